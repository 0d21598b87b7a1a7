"""`python -m data_prep phantom|brats|images`: makes a data set of TFRecords, the input of training and search."""

import argparse
import functools
import os
import sys
from pathlib import Path

from data_prep import brats, images, phantom, splits
from data_prep.anatomy import SCHEMES, AnatomySource
from data_prep.slices import write_dataset
from decomp_jax.data.schema import ANATOMY_CLASSES, GLIOMA_CLASSES, MODALITIES, Settings
from decomp_jax.errors import UserError, run_program
from decomp_jax.preparation.picture import FOREGROUND
from decomp_jax.preparation.releases import survey


def make_phantom(flags: argparse.Namespace) -> None:
    write_dataset(
        flags.out,
        settings=phantom.settings(flags.size),
        splits=splits.split_by_hash(phantom.patient_ids(flags.patients), splits.PHANTOM_SHARES, seed=flags.seed),
        prepare=functools.partial(phantom.prepare, seed=flags.seed, size=flags.size),
        workers=flags.workers,
        on_error="stop",
        source={"seed": flags.seed},
    )


def make_brats(flags: argparse.Namespace) -> None:
    if (flags.anatomy is None) != (flags.anatomy_scheme is None):
        raise UserError("--anatomy and --anatomy_scheme go together: ids of label maps overlap; give both or none")
    if flags.anatomy and not flags.anatomy.exists():
        raise UserError(f"--anatomy {flags.anatomy}: does not exist; name a folder of label maps or an atlas file")
    anatomy = flags.anatomy and AnatomySource(flags.anatomy, flags.anatomy_scheme)
    settings = Settings(
        source="brats",
        size=flags.size,
        modalities=flags.modalities,
        anatomy_classes=ANATOMY_CLASSES if anatomy else (),
    )
    found = survey(flags.src)
    tell_progress(found.describe(flags.src))
    patients = found.patients
    if flags.on_error == "stop":
        brats.require_usable(patients, flags.label_map, unlabelled=flags.unlabelled)
    write_dataset(
        flags.out,
        settings=settings,
        splits=brats.split_patients(patients, flags.splits, seed=flags.seed),
        prepare=functools.partial(
            brats.prepare_patient,
            patients=patients,
            settings=settings,
            label_map=flags.label_map,
            unlabelled=flags.unlabelled,
            anatomy=anatomy,
        ),
        workers=flags.workers,
        on_error=flags.on_error,
        source={
            **split_source(flags),
            "anatomy": anatomy and {"path": anatomy.path.name, "scheme": anatomy.scheme},
            "label_maps": brats.count_label_maps(patients, flags.label_map),
            "left_out": [str(path.relative_to(flags.src)) for path in found.left_out],
            "renamed_segmentations": [str(path.relative_to(flags.src)) for path in found.renamed],
        },
    )


def make_images(flags: argparse.Namespace) -> None:
    if flags.splits and flags.query_fold is not None:
        raise UserError("--splits and --query_fold both say which patients are queries; give one of them")
    pictures = images.read_pictures(flags.table)
    split = images.split_pictures(
        pictures, flags.table, csv=flags.splits, query_fold=flags.query_fold, seed=flags.seed
    )
    tell_progress(images.describe(pictures, flags.table, split_given=bool(flags.splits or flags.query_fold is not None)))
    classes = images.find_classes(pictures, workers=flags.workers, on_error=flags.on_error)
    settings = Settings(
        source="images",
        size=flags.size,
        modalities=("image",),
        foreground=FOREGROUND,
        lesion_classes=tuple(dict.fromkeys(classes.values())),
    )
    known_patients = "patient" in next(iter(pictures.values()))[0].row
    write_dataset(
        flags.out,
        settings=settings,
        splits=split,
        prepare=functools.partial(
            images.prepare_pictures,
            pictures=pictures,
            classes={value: 1 + settings.lesion_classes.index(name) for value, name in classes.items()},
            settings=settings,
        ),
        workers=flags.workers,
        on_error=flags.on_error,
        columns=images.column_types(pictures),
        source={
            **split_source(flags),
            "table": flags.table.name,
            "patients": "column patient" if known_patients else "unknown: each image is its own patient",
            "query_fold": flags.query_fold,
            "mask_values": classes,
        },
    )


def split_source(flags: argparse.Namespace) -> dict[str, object]:
    return {"splits": flags.splits and flags.splits.name, "seed": flags.seed}


def tell_progress(line: str) -> None:
    print(line, file=sys.stderr)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def modalities(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in MODALITIES or names.count(name) > 1]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown or there twice; use of {','.join(MODALITIES)}")
    return names


def label_map(text: str) -> dict[int, int]:
    try:
        pairs = {int(key): int(value) for key, value in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL:CLASS pairs, such as 4:0,5:2") from None
    if not all(0 <= value <= len(GLIOMA_CLASSES) for value in pairs.values()):
        raise argparse.ArgumentTypeError(f"{text!r} maps to a class other than 0, 1 NCR, 2 ED, 3 ET")
    return pairs


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, metavar="DIR", help="data set to make; must not exist yet")
    common.add_argument("--seed", type=int, default=0, help="of the splits, and of phantoms (default: %(default)s)")
    common.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N",
                        help="processes; the bytes written do not depend on it (default: all cores, %(default)s here)")
    real = argparse.ArgumentParser(add_help=False)
    real.add_argument("--size", type=positive, default=256, metavar="PIXELS", help="side of the images (default: 256)")
    real.add_argument("--splits", type=Path, metavar="FILE.csv",
                      help="columns patient_id,split (train, validation, query, reference); default: by a seeded hash")
    real.add_argument("--on_error", "--on-error", choices=("stop", "skip"), default="stop",
                      help="skip: finish without the patients that can't be used; manifest.json lists them")

    top = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="phantom | brats | images")

    command = commands.add_parser("phantom", parents=[common], help="synthetic patients; no download")
    command.set_defaults(make=make_phantom)
    command.add_argument("--patients", type=positive, default=200, metavar="N", help="default: %(default)s")
    command.add_argument("--size", type=int, default=64, choices=(64, 128, 256),
                         help="side of the images in pixels (default: %(default)s)")

    command = commands.add_parser("brats", parents=[common, real], help="BraTS releases since 2017, as they come")
    command.set_defaults(make=make_brats)
    command.add_argument("--src", type=Path, required=True, metavar="DIR", help="folder of patients; releases may mix")
    command.add_argument("--modalities", type=modalities, default=MODALITIES[:1], metavar="NAME,...",
                         help=f"channels, of {', '.join(MODALITIES)} (default: {MODALITIES[0]})")
    command.add_argument("--anatomy", type=Path, metavar="DIR|FILE",
                         help="label maps of anatomy: a folder with ID.nii.gz, or one atlas in the images' space")
    command.add_argument("--anatomy_scheme", choices=tuple(SCHEMES),
                         help="ids of the label maps: six (1/2 left/right cerebrum, 3/4 cerebellum, 5/6 ventricle, "
                              "7/8 other) or FreeSurfer's and SynthSeg's")
    command.add_argument("--unlabelled", action="store_true", help="take patients without a segmentation, too")
    command.add_argument("--label_map", type=label_map, default={}, metavar="LABEL:CLASS,...",
                         help="meaning of labels that a release does not name: 0 none, 1 NCR, 2 ED, 3 ET "
                              "(4:0 leaves out the resection cavities of 2024)")

    command = commands.add_parser("images", parents=[common, real], help="any 2-D images with lesion masks")
    command.set_defaults(make=make_images)
    command.add_argument("--table", type=Path, required=True, metavar="FILE.csv",
                         help="columns image,mask and optionally patient,fold,split; others travel to the bank's rows")
    command.add_argument("--query_fold", metavar="F", help="make this fold the queries; the rest is split for training")
    return top


def main() -> None:
    flags = parser().parse_args()
    flags.make(flags)


if __name__ == "__main__":
    run_program(main)
