"""`python -m data_prep phantom|brats|volumes|images|join`: makes a data set, the input of training and search."""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from data_prep import brats, images, layouts, phantom, series, splits, volumes
from data_prep.anatomy import SCHEMES, AnatomySource, maps_of_nobody
from data_prep.cases import Case, prepare_case, split_cases
from data_prep.join import join_parts
from data_prep.slices import write_dataset
from decomp_jax.data.schema import ANATOMY_CLASSES, FIELD_MM, GLIOMA_CLASSES, INTENSITY_CLIP, MODALITIES, Settings
from decomp_jax.errors import UserError, run_program
from decomp_jax.preparation.field import PLANES
from decomp_jax.preparation.picture import FOREGROUND
from decomp_jax.preparation.releases import survey


def make_phantom(flags: argparse.Namespace) -> None:
    write_dataset(
        flags.out,
        settings=phantom.settings(flags.size, flags.modalities),
        splits=splits.split_by_hash(
            phantom.patient_ids(flags.patients),
            splits.PHANTOM_SHARES,
            seed=flags.seed,
            growing=flags.shard is not None,
        ),
        prepare=functools.partial(
            phantom.prepare, seed=flags.seed, size=flags.size, domain=phantom.DOMAINS[flags.domain],
            modalities=flags.modalities,
        ),
        workers=flags.workers,
        on_error="stop",
        source={"seed": flags.seed, "domain": flags.domain},
        shard=flags.shard,
    )


def make_brats(flags: argparse.Namespace) -> None:
    found = survey(flags.src)
    tell_progress(found.describe(flags.src))
    brats.require_needed(flags.label_map, found.patients)
    if flags.on_error == "stop" and not flags.unlabelled:
        brats.require_segmentations(found.patients)
    cases = brats.brats_cases(found.patients, flags.label_map)
    settings = Settings(source="brats", size=flags.size, modalities=flags.modalities)
    _write_cases(
        flags, cases, settings, label_maps=brats.count_label_maps(cases),
        left_out=[str(path.relative_to(flags.src)) for path in found.left_out],
        renamed_segmentations=[str(path.relative_to(flags.src)) for path in found.renamed],
    )


def make_volumes(flags: argparse.Namespace) -> None:
    if flags.list:
        series.print_series(flags.src)
        return
    if flags.out is None:
        raise UserError("--out: name the data set to make")
    if flags.table and (flags.channels or flags.labels):
        raise UserError("--table: names the channels, and segments their labels; leave out --channels and --labels")
    if flags.table:
        layout = series.read_series_table(flags.src, flags.table)
    else:
        layout = layouts.read_layout(flags.src, flags.channels, flags.labels)
    found = volumes.name_volumes(
        layout,
        modalities=flags.modalities,
        lesion_classes=flags.lesion_classes,
        anatomy_labels=flags.anatomy_labels,
        unlabelled=flags.unlabelled,
    )
    print(volumes.describe(layout, found), file=sys.stderr)
    settings = Settings(
        source="volumes",
        size=flags.size,
        modalities=found.modalities,
        foreground="nonzero" if flags.window is None else "window",
        intensity_clip=flags.window or INTENSITY_CLIP,
        lesion_classes=found.lesion_classes,
        anatomy_classes=found.anatomy_classes,
        field_mm=flags.field_mm,
        plane=flags.plane,
    )
    _write_cases(
        flags, found.cases, settings, layout=layout.title, called=found.called, query_fold=flags.query_fold,
        left_out=[str(path.relative_to(layout.names.parent)) for path in layout.left_out],
    )


def _write_cases(flags: argparse.Namespace, cases: Mapping[str, Case], settings: Settings, **source: object) -> None:
    """Prepares cases of any layout, with the six regions of a brain where there are label maps of them."""
    if (flags.anatomy is None) != (flags.anatomy_scheme is None):
        raise UserError("--anatomy and --anatomy_scheme go together: ids of label maps overlap; give both or none")
    if flags.splits and flags.query_fold is not None:
        raise UserError("--splits and --query_fold both say which patients are queries; give one of them")
    for flag, path in (("--anatomy", flags.anatomy), ("--mask", flags.mask)):
        if path and not path.exists():
            raise UserError(f"{flag} {path}: does not exist; name a folder with ID.nii.gz")
    if flags.anatomy and settings.anatomy_classes:
        raise UserError("--anatomy: --anatomy_labels makes anatomy of the labels; give one of the two")
    anatomy = flags.anatomy and AnatomySource(flags.anatomy, flags.anatomy_scheme)
    if anatomy:
        settings = dataclasses.replace(settings, anatomy_classes=ANATOMY_CLASSES)
    for flag, path in (("--anatomy", flags.anatomy), ("--mask", flags.mask)):
        if path and path.is_dir() and (others := maps_of_nobody(path, cases)):
            tell_progress(f"{flag} {path}: {len(others)} files are of no patient, first {others[0].name}")
            source[f"left_out_{flag[2:]}"] = [str(other.relative_to(path)) for other in others]
    write_dataset(
        flags.out,
        settings=settings,
        splits=split_cases(
            cases,
            csv=flags.splits,
            query_fold=flags.query_fold,
            seed=flags.seed,
            growing=flags.shard is not None,
        ),
        prepare=functools.partial(
            prepare_case,
            cases=cases,
            settings=settings,
            unlabelled=flags.unlabelled,
            anatomy=anatomy,
            masks=flags.mask,
        ),
        workers=flags.workers,
        on_error=flags.on_error,
        source={
            **split_source(flags),
            "anatomy": anatomy and {"path": anatomy.path.name, "scheme": anatomy.scheme},
            **({"mask": flags.mask.name} if flags.mask else {}),
            **source,
        },
        shard=flags.shard,
    )


def make_images(flags: argparse.Namespace) -> None:
    if flags.splits and flags.query_fold is not None:
        raise UserError("--splits and --query_fold both say which patients are queries; give one of them")
    pictures = images.read_pictures(flags.table)
    split = images.split_pictures(
        pictures,
        flags.table,
        csv=flags.splits,
        query_fold=flags.query_fold,
        seed=flags.seed,
        growing=flags.shard is not None,
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
        shard=flags.shard,
    )


def make_joined(flags: argparse.Namespace) -> None:
    join_parts(flags.out, flags.parts)


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


def shard(text: str) -> tuple[int, int]:
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return i, n


def names(text: str) -> tuple[str, ...]:
    listed = tuple(text.split(","))
    if wrong := [name for name in listed if not name or listed.count(name) > 1]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is there twice or empty; name each once, as in liver,spleen")
    return listed


def regions(text: str) -> dict[str, tuple[int, ...]]:
    try:
        pairs = [pair.split("=") for pair in text.split(",")]
        found = {name: tuple(map(int, numbers.split("+"))) for name, numbers in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER,..., such as liver=1+2,cancer=2") from None
    if len(found) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} has a name twice; name each once")
    return found


def channels(text: str) -> dict[int, str]:
    found = regions(text)
    numbers = [number for values in found.values() for number in values]
    if len({*numbers}) < len(numbers) or len(numbers) > len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not one number a name, such as t1ce=1,flair=0")
    return {values[0]: name for name, values in found.items()}


def window(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(","))
    if not low < high:
        raise ValueError
    return low, high


def millimetres(text: str) -> float:
    if not 0 < (value := float(text)) < 5000:
        raise ValueError
    return value


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
    common.add_argument("--seed", type=int, default=0, help="of the splits, and of phantoms (default: %(default)s)")
    common.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N",
                        help="processes; the bytes written do not depend on it (default: all cores, %(default)s here)")
    common.add_argument("--shard", type=shard, metavar="I/N",
                        help="prepare only the I-th of N parts, of a set that grows: each patient's split follows from "
                             "the patient's own hash; `join` makes one data set of parts")
    real = argparse.ArgumentParser(add_help=False)
    real.add_argument("--size", type=positive, default=256, metavar="PIXELS", help="side of the images (default: 256)")
    real.add_argument("--splits", type=Path, metavar="FILE.csv",
                      help="columns patient_id,split (train, validation, query, reference); default: by a seeded hash")
    real.add_argument("--on_error", "--on-error", choices=("stop", "skip"), default="stop",
                      help="skip: finish without the patients that can't be used; manifest.json lists them")
    scans = argparse.ArgumentParser(add_help=False)
    scans.add_argument("--anatomy", type=Path, metavar="DIR|FILE",
                       help="label maps of anatomy: a folder with ID.nii.gz, or one atlas in the images' space")
    scans.add_argument("--anatomy_scheme", choices=tuple(SCHEMES),
                       help="ids of the label maps: six (1/2 left/right cerebrum, 3/4 cerebellum, 5/6 ventricle, "
                            "7/8 other) or FreeSurfer's and SynthSeg's")
    scans.add_argument("--mask", type=Path, metavar="DIR",
                       help="masks of the brain, for heads that are not skull-stripped: a folder with ID.nii.gz, "
                            "ID_mask.nii.gz or ID/*mask*.nii.gz")
    scans.add_argument("--unlabelled", action="store_true", help="take patients without a segmentation, too")

    channel = argparse.ArgumentParser(add_help=False)
    channel.add_argument("--modalities", type=modalities, default=MODALITIES[:1], metavar="NAME,...",
                         help=f"channels, of {', '.join(MODALITIES)} (default: {MODALITIES[0]})")

    top = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="phantom | brats | volumes | images | join")

    command = commands.add_parser("phantom", parents=[common, channel], help="synthetic patients; no download")
    command.set_defaults(make=make_phantom)
    command.add_argument("--patients", type=positive, default=200, metavar="N", help="default: %(default)s")
    command.add_argument("--size", type=int, default=64, choices=(64, 128, 256),
                         help="side of the images in pixels (default: %(default)s)")
    command.add_argument("--domain", choices=tuple(phantom.DOMAINS), default="plain",
                         help="plain: clean scans of one kind; wide: of any scanner and preparation, to train networks "
                              "that are to meet real scans")

    command = commands.add_parser("brats", parents=[common, real, scans, channel],
                                  help="BraTS releases since 2017, as they come")
    command.set_defaults(make=make_brats, query_fold=None)
    command.add_argument("--src", type=Path, required=True, metavar="DIR", help="folder of patients; releases may mix")
    command.add_argument("--label_map", type=label_map, default={}, metavar="LABEL:CLASS,...",
                         help="meaning of labels that a release does not name: 0 none, 1 NCR, 2 ED, 3 ET "
                              "(4:0 leaves out the resection cavities of 2024)")

    command = commands.add_parser("volumes", parents=[common, real, scans],
                                  help="nnU-Net, Medical Segmentation Decathlon, MONAI datalists")
    command.set_defaults(make=make_volumes)
    command.add_argument("--src", type=Path, required=True, metavar="DIR|FILE.json",
                         help="folder with dataset.json, a datalist, or a folder of DICOM series")
    command.add_argument("--table", type=Path, metavar="FILE.csv",
                         help="DICOM: columns case, channel, series, as --list prints it, with channels filled in")
    command.add_argument("--list", action="store_true", help="DICOM: print the series below --src, and end")
    command.add_argument("--modalities", type=names, metavar="NAME,...", help="channels to take (default: all)")
    command.add_argument("--channels", type=channels, default={}, metavar="NAME=NUMBER,...",
                         help="names of the channels, in place of the source's")
    command.add_argument("--labels", type=regions, default={}, metavar="NAME=NUMBER[+NUMBER],...",
                         help="names of the labels, in place of the source's; background and ignore have their meaning")
    command.add_argument("--lesion_classes", type=names, default=(), metavar="NAME,...",
                         help="all lesion classes, for a part that may lack some (default: those of the source)")
    command.add_argument("--anatomy_labels", type=names, default=(), metavar="NAME,...",
                         help="labels that are organs; the others are lesion classes")
    command.add_argument("--window", type=window, metavar="LOW,HIGH",
                         help="values that map to 0 and 1, such as -100,250 HU (default: z-scores over voxels other "
                              "than 0, as of skull-stripped MRI)")
    command.add_argument("--field_mm", type=millimetres, default=FIELD_MM, metavar="MM",
                         help="side of the field that a slice is cut or padded to (default: %(default)g)")
    command.add_argument("--plane", choices=tuple(PLANES), default="axial", help="of the slices (default: %(default)s)")
    command.add_argument("--query_fold", metavar="F",
                         help="make this fold the queries (of splits_final.json, a datalist's key fold, or validation, "
                              "test); the rest is split for training")

    command = commands.add_parser("images", parents=[common, real], help="any 2-D images with lesion masks")
    command.set_defaults(make=make_images)
    command.add_argument("--table", type=Path, required=True, metavar="FILE.csv",
                         help="columns image,mask and optionally patient,fold,split; others travel to the bank's rows")
    command.add_argument("--query_fold", metavar="F", help="make this fold the queries; the rest is split for training")

    command = commands.add_parser("join", help="one data set of several, whose records stay where they are")
    command.set_defaults(make=make_joined)
    command.add_argument("parts", type=Path, nargs="+", metavar="PART", help="a data set, or several joined before")

    for name, command in commands.choices.items():
        command.add_argument("--out", type=Path, required=name != "volumes", metavar="DIR",
                             help="data set to make; must not exist yet")
    return top


def main() -> None:
    flags = parser().parse_args()
    flags.make(flags)


if __name__ == "__main__":
    run_program(main)
