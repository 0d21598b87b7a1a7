"""Damages inputs of every kind at random, and checks that none is silently wrong, ends in a traceback or hangs.

    python benchmarks/fuzz.py [--n=1000] [--seed=0] [--kinds=nifti,...] [--write=docs/robustness.md]

Each kind of input is made whole, copied, damaged (bits flipped, cut, keys and types of JSON changed, shapes, types and
headers changed, files exchanged with those of a sibling) and read as the programs read it. A case must end in a
`UserError` of one line, or in the values that the file holds: those of the whole input where checksums guard it, else
those that another reader (nibabel, Pillow, NumPy, csv) finds in the damaged file. What fails is kept in --keep.
"""

import argparse
import collections
import csv
import dataclasses
import functools
import gzip
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from damage import damage
from PIL import Image

from decomp_jax.errors import UserError

SECONDS = 60  # a case that takes longer hangs; on a busy machine some take 30
OUTCOMES = ("refused", "read", "silently wrong", "traceback", "hang")


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
        make: (folder, number) -> whole input; siblings, of another number, have other values of the same shapes.
        files: of an input, those that may be damaged.
        use: folder -> values, read as the programs do.
        right: (values, folder of the whole input, folder of the damaged one) -> whether they are what is there.
    """

    make: Callable[[Path, int], None]
    files: str
    use: Callable[[Path], Any]
    right: Callable[[Any, Path, Path], bool]


class Hang(BaseException):
    """No Exception, so that nothing on the way takes it for one of its own."""


# ---------------------------------------------------------------- kinds


def scan_data(number: int, dtype: type = np.int16) -> np.ndarray:
    data = np.zeros((24, 24, 4), dtype)
    data[6:18, 6:18, 1:] = np.random.default_rng(number).integers(50, 1000, (12, 12, 3))
    return data


LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 23], [0, 0, 1, 0], [0, 0, 0, 1]])


def make_scan(folder: Path, number: int) -> None:
    label = np.zeros((24, 24, 4), np.uint8)
    label[8:12, 8:12, 2:] = 1 + number % 2
    for kind, data in (("t1ce", scan_data(number)), ("seg", label)):
        image = nib.Nifti1Image(data, LPS)
        image.set_qform(LPS, 1)
        image.set_sform(LPS, 1)
        nib.save(image, folder / f"P_{kind}.nii{'.gz' if number % 2 else ''}")


def use_scan(folder: Path) -> dict[str, Any]:
    from data_prep.brats import brats_cases, require_segmentations
    from data_prep.cases import prepare_case
    from decomp_jax.data.schema import Settings
    from decomp_jax.preparation.releases import find_patients
    from decomp_jax.preparation.volume import Source, load_labels, load_volume

    patients = find_patients(folder)
    require_segmentations(patients)
    ((case_id, case),) = (cases := brats_cases(patients, {})).items()
    prepared = prepare_case(
        case_id, cases=cases, settings=Settings("brats", 16), unlabelled=False, anatomy=None, masks=None
    )
    volume = load_volume(case.channels["t1ce"].path)
    labels = load_labels(case.label, Source(case.channels["t1ce"].path), volume)
    return {"t1ce": (case.channels["t1ce"].path, volume), "seg": (case.label.path, nib.Nifti1Image(labels, volume.affine)),
            "image": prepared.image, "label": prepared.label}


def right_scan(values: dict[str, Any], whole: Path, damaged: Path) -> bool:
    """As nibabel reads it, on the same axes as the whole one; slices finite and in [0,1]."""
    image = values["image"]
    if not (np.isfinite(image).all() and 0 <= image.min() and image.max() <= 1):
        return False
    for kind in ("t1ce", "seg"):
        path, found = values[kind]
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        two = nib.Nifti2Header.may_contain_header(data)
        oracle = nib.as_closest_canonical((nib.Nifti2Image if two else nib.Nifti1Image).from_bytes(data))
        expected = oracle.get_fdata(dtype=np.float32).reshape(found.shape)
        if kind == "seg":
            expected = np.round(expected)
            if not {*np.unique(values["label"])} <= {*np.unique(np.where(expected == 4, 3, expected))} | {0}:
                return False
        if not np.array_equal(expected, np.asarray(found.dataobj)) or np.abs(oracle.affine - found.affine).max() > 0.5:
            return False
        (original,) = (one for one in whole.iterdir() if f"_{kind}." in one.name)
        if nib.aff2axcodes(nib.Nifti1Image.from_bytes(data).affine if not two else oracle.affine) != nib.aff2axcodes(
                nib.load(original).affine):
            return False
    return True


def make_pictures(folder: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    picture, mask = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    picture[6:-6, 8:-8] = rng.integers(60, 255, (28, 24))
    mask[10:20, 12:24] = 255
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(picture).save(folder / "b.jpg", quality=90)
    np.save(folder / "c.npy", picture.astype(np.float32))
    Image.fromarray(np.stack([picture] * 3 + [np.where(picture, 255, 0).astype(np.uint8)], -1)).save(folder / "d.png")
    Image.fromarray(mask).save(folder / "m.png")
    Image.fromarray(mask).save(folder / "n.jpg", quality=90)
    palette = Image.fromarray(mask // 255)
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(folder / "p.png")
    np.save(folder / "q.npy", mask)


PICTURES, MASKS = ("a.png", "b.jpg", "c.npy", "d.png"), ("m.png", "n.jpg", "p.png", "q.npy")


def use_pictures(folder: Path) -> dict[str, np.ndarray]:
    from decomp_jax.data.schema import Settings
    from decomp_jax.preparation.picture import FOREGROUND, load_mask, load_picture, prepare_mask, prepare_picture

    settings = Settings("images", 16, modalities=("image",), foreground=FOREGROUND)
    values = {name: load_picture(folder / name) for name in PICTURES}
    values |= {name: load_mask(folder / name) for name in MASKS}
    for name in PICTURES:
        values[f"prepared {name}"] = prepare_picture(folder / name, settings)
    for name in MASKS:
        prepare_mask(folder / name, folder / "a.png", {1: 1, 255: 1}, 16)
    return values


def right_pictures(values: dict[str, np.ndarray], whole: Path, damaged: Path) -> bool:
    """Files with checksums are as they were, or whole files of another kind; the rest as another reader reads them."""
    for name in (*PICTURES, *MASKS):
        found, path = values[name], damaged / name
        if path.read_bytes() == (whole / name).read_bytes():
            continue
        if path.suffix == ".npy":
            if not np.array_equal(np.load(path).reshape(found.shape), found):
                return False
            continue
        if not _png_checksums_hold(path):
            return False
        with Image.open(path) as image:
            alpha = np.asarray(image.convert("RGBA"))[..., 3:].astype(float) / 255
            grey = np.asarray(image.convert("RGB"), float)
        grey = grey if alpha.min() == alpha.max() else grey * alpha
        if name in PICTURES:
            deep = np.asarray(image) if image.mode in ("I", "I;16", "F") else None
            luminance = grey @ (0.299, 0.587, 0.114) if deep is None else deep
            if found.shape != luminance.shape or np.abs(luminance - found).max() > 1.5 and image.mode != "1":
                return False
        elif found.shape != grey.shape[:2] or ((found > 0) != (grey.max(-1) >= (128 if image.format == "JPEG" else 1))).any():
            return False
    return all(np.isfinite(value).all() for value in values.values())


def _png_checksums_hold(path: Path) -> bool:
    """Of the chunks that are there whole, but the last one, which says nothing."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG"):
        return True
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] == b"IEND":
            return True
        if zlib.crc32(data[at + 4 : at + 8 + size]) != int.from_bytes(data[at + 8 + size : at + 12 + size]):
            return False
        at += 12 + size
    return True


def make_table(folder: Path, number: int) -> None:
    lines = ["image,mask,patient,fold,kind"]
    for i in range(12):
        for name in (f"i{i}.png", f"m{i}.png"):
            (folder / name).touch()
        lines.append(f"i{i}.png,{f'm{i}.png' if i % 4 else ''},p{i // 2},{i // 2 % 3},kind {i + number}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    splits = ("train", "query", "reference", "validation")
    (folder / "splits.csv").write_text("patient_id,split\n" + "".join(f"p{i},{splits[(i + number) % 4]}\n" for i in range(6)))


def use_table(folder: Path) -> dict[str, Any]:
    from data_prep import images

    table = folder / "table.csv"
    pictures = images.read_pictures(table)
    images.column_types(pictures)
    folds = images.split_pictures(pictures, table, csv=None, query_fold="1", seed=0)
    splits = images.split_pictures(pictures, table, csv=folder / "splits.csv", query_fold=None, seed=0)
    return {"pictures": pictures, "folds": folds, "splits": splits}


def right_table(values: dict[str, Any], whole: Path, damaged: Path) -> bool:
    """As Python's csv reads the lines."""
    def lines(name: str) -> list[dict[str, str]]:
        text = (damaged / name).read_bytes().decode("utf-8-sig")
        head, *rows = ([cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), skipinitialspace=True) if row)
        return [dict(zip(head, row, strict=True)) for row in rows]

    found = sorted(tuple(p.row.items()) for group in values["pictures"].values() for p in group)
    if found != sorted(tuple(row.items()) for row in lines("table.csv")):
        return False
    for row in lines("table.csv"):
        patient = row.get("patient", row["image"])
        if (values["folds"][patient] == "query") != (row["fold"] == "1"):
            return False
    return values["splits"] == {row["patient_id"]: row["split"] for row in lines("splits.csv")}


def tiny_patient(patient_id: str, number: int) -> Any:
    from data_prep.slices import PatientSlices

    rng = np.random.default_rng([number, int(patient_id[1:])])
    return PatientSlices(
        patient_id, rng.random((3, 8, 8, 1)).astype(np.float16), (rng.random((3, 8, 8)) > 0.7).astype(np.uint8),
        np.arange(3, dtype=np.int32), np.arange(3, dtype=np.float32),
    )


def make_records(folder: Path, number: int) -> None:
    """Written in this process: workers would take longer to start than all the rest."""
    from data_prep import slices
    from decomp_jax.data.schema import SPLITS, Settings

    in_order, slices.map_in_order = slices.map_in_order, lambda function, items, **_: ((item, function(item)) for item in items)
    try:
        slices.write_dataset(
            folder / "data", settings=Settings("phantom", 8), splits={f"p{i}": SPLITS[i % 4] for i in range(12)},
            prepare=lambda patient_id: tiny_patient(patient_id, number), workers=1, on_error="stop",
        )
    finally:
        slices.map_in_order = in_order


def use_records(folder: Path) -> dict[str, Any]:
    from decomp_jax.data.records import SliceDataset, read_manifest

    values = {"digest": read_manifest(folder / "data")["digest"]}
    for split in ("train", "validation", "query", "reference"):
        dataset = SliceDataset(folder / "data", split)
        values[split] = {**dataset.stack(("image", "label")), "rows": np.array(dataset.rows), "settings": dataset.settings}
    return values


def make_bank_files(folder: Path, number: int) -> None:
    from decomp_jax.retrieval import CodeBank

    rng, books = np.random.default_rng(number), np.random.default_rng(7)
    rows = np.zeros(60, [("patient_id", "U8"), ("slice_index", "i4"), ("position_mm", "f4")])
    rows["patient_id"], rows["slice_index"] = [f"p{i // 5}" for i in range(60)], np.arange(60) % 5
    CodeBank.from_arrays(
        normal_indices=rng.integers(16, size=(60, 4, 4)), abnormal_indices=rng.integers(16, size=(60, 4, 4)),
        normal_codebook=books.normal(size=(16, 4)), abnormal_codebook=books.normal(size=(16, 4)), rows=rows,
        meta={"model_digest": "m", "data_digest": f"d{number}", "preprocessing": {"size": 8}, "data": "x", "split": "train"},
    ).save(folder / "bank")


def use_bank(folder: Path) -> dict[str, Any]:
    from decomp_jax.retrieval import CodeBank

    bank = CodeBank.load(folder / "bank")
    names = ("normal_indices", "abnormal_indices", "normal_codebook", "abnormal_codebook", "rows")
    return {name: np.array(getattr(bank, name)) for name in names} | {"meta": bank.meta}


@functools.cache
def tiny_state() -> tuple[Any, dict[str, Any]]:

    from decomp_jax.config import Config, ModelConfig, TrainConfig
    from decomp_jax.data.schema import Settings
    from decomp_jax.mesh import data_mesh
    from decomp_jax.models.network import DecompositionNet
    from decomp_jax.training.state import create_state, make_optimizer

    model = ModelConfig(widths=(4, 4), code_dim=4, codebook_size=8, own_blocks=0, spade_width=4, dtype="float32")
    config = Config(model=model, train=TrainConfig(steps=8, batch_size=4))
    net, settings = DecompositionNet(model, size=16, channels=1, lesion_classes=3), Settings("phantom", 16)
    state = create_state(config, net, make_optimizer(config.train), data_mesh())
    meta = {"config": config.to_dict(), "settings": settings.to_json(), "data_digest": "d" * 64, "commit": "c"}
    return state, meta


def numbered_state(number: int) -> tuple[Any, dict[str, Any]]:
    import jax

    state, meta = tiny_state()
    return jax.tree.map(lambda leaf: leaf + leaf.dtype.type(number), state), {**meta, "data_digest": f"{number}" * 64}


def make_checkpoint(folder: Path, number: int) -> None:
    """Two steps of one run."""
    from decomp_jax.training.checkpoint import Checkpoints

    state, meta = numbered_state(number)
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state.replace(step=state.step * 0 + step), meta)


def use_model(folder: Path) -> dict[str, Any]:
    from decomp_jax.config import Config
    from decomp_jax.data.schema import Settings
    from decomp_jax.training.checkpoint import EXPORTED, digest, restore_for_inference

    state, meta = restore_for_inference(folder)
    return {"state": digest({name: state[name] for name in EXPORTED}), "config": Config.from_dict(meta["config"]),
            "settings": Settings.from_json(meta["settings"]), "data_digest": meta["data_digest"]}


def make_exported(folder: Path, number: int) -> None:
    from decomp_jax.training import checkpoint

    state, meta = numbered_state(number)
    state = vars(state)
    digests = {name: checkpoint.digest(state[name]) for name in checkpoint.EXPORTED}
    tree = {name: _as_dict(state[name]) for name in checkpoint.EXPORTED}
    checkpoint.write_exported(folder, tree, {**meta, "digests": digests, "step": 2})


def _as_dict(tree: Any) -> Any:
    if dataclasses.is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return {name: _as_dict(value) for name, value in tree.items()} if isinstance(tree, dict) else np.asarray(tree)


def make_config(folder: Path, number: int) -> None:
    from decomp_jax.config import Config

    (folder / "config.json").write_text(json.dumps(Config().to_dict()))


def use_config(folder: Path) -> Any:
    from decomp_jax.config import Config
    from decomp_jax.files import read_json

    return Config.from_dict(read_json(folder / "config.json", "write it again"))


def right_config(config: Any, whole: Path, damaged: Path) -> bool:
    """What is there, and defaults for what is not; finite."""
    given, known = json.loads((damaged / "config.json").read_text()), json.loads(json.dumps(config.to_dict()))

    def within(part: Any, all_of: Any) -> bool:
        if isinstance(part, dict):
            return all(name in all_of and within(value, all_of[name]) for name, value in part.items())
        return part == all_of and type(part) in (type(all_of), int)

    json.dumps(known, allow_nan=False)
    return within(given, known)


def same(values: Any, whole: Any) -> bool:
    if isinstance(values, dict):
        return values.keys() == whole.keys() and all(same(values[name], whole[name]) for name in values)
    if isinstance(values, np.ndarray):
        return values.dtype == whole.dtype and values.shape == whole.shape and values.tobytes() == whole.tobytes()
    return values == whole


def as_whole(use: Callable[[Path], Any]) -> Callable[[Any, Path, Path], bool]:
    """The values of the whole input, read once."""
    known: dict[Path, Any] = {}

    def right(values: Any, whole: Path, _: Path) -> bool:
        if whole not in known:
            known[whole] = use(whole)
        return same(values, known[whole])

    return right


KINDS = {
    "nifti": Kind(make_scan, "*", use_scan, right_scan),
    "pictures": Kind(make_pictures, "*", use_pictures, right_pictures),
    "tables": Kind(make_table, "*.csv", use_table, right_table),
    "records": Kind(make_records, "*", use_records, as_whole(use_records)),
    "banks": Kind(make_bank_files, "*", use_bank, as_whole(use_bank)),
    "checkpoints": Kind(make_checkpoint, "*", use_model, as_whole(use_model)),
    "exported": Kind(make_exported, "*", use_model, as_whole(use_model)),
    "configs": Kind(make_config, "*", use_config, right_config),
}


# ---------------------------------------------------------------- running


def _hang(*_: Any) -> None:
    raise Hang


def outcome(kind: Kind, whole: Path, damaged: Path) -> tuple[str, str]:
    """One of `OUTCOMES`, and what it shows."""
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    try:
        values = kind.use(damaged)
        signal.alarm(0)
        return ("read", "") if kind.right(values, whole, damaged) else ("silently wrong", repr(values)[:300])
    except UserError as error:
        return ("refused", str(error)) if "\n" not in str(error).strip() else ("traceback", f"of several lines: {error}")
    except Hang:
        return "hang", traceback.format_exc()
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)


def run(name: str, n: int, seed: int, work: Path, keep: Path | None = None) -> tuple[collections.Counter, list[str]]:
    """Counts of the outcomes of n damaged inputs of a kind, and what went wrong, each case once."""
    kind, rng, tally, faults = KINDS[name], np.random.default_rng([seed, len(name)]), collections.Counter(), {}
    wholes = [work / f"{name}-{number}" for number in range(3)]
    for number, whole in enumerate(wholes):
        whole.mkdir()
        kind.make(whole, number)
    for case in range(n):
        number = int(rng.integers(2))
        damaged = work / f"{name}-damaged"
        shutil.copytree(wholes[number], damaged)
        what = damage(rng, damaged, wholes[number + 1], kind.files)
        result, shown = outcome(kind, wholes[number], damaged)
        tally[result] += 1
        if result not in ("refused", "read"):
            faults.setdefault(shown[-200:], f"{name} case {case}: {result} after {what}\n{shown}")
            if keep:
                shutil.copytree(damaged, keep / f"{name}-{case}", dirs_exist_ok=True)
        shutil.rmtree(damaged)
    return tally, list(faults.values())


def main() -> None:
    from common import write_measured

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="damaged inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--keep", type=Path, help="folder for the inputs that failed")
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    args = parser.parse_args()
    quiet()
    lines = ["| input | cases | refused in a line | read, values right | silently wrong | tracebacks | hangs |",
             "|---|---|---|---|---|---|---|"]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in args.kinds:
            begin = time.perf_counter()
            tally, faults = run(name, args.n, args.seed, Path(folder), args.keep)
            print(f"{name}: {dict(tally)}, {time.perf_counter() - begin:.0f} s", *faults, sep="\n", flush=True)
            failed |= bool(faults)
            lines.append(f"| {name} | {args.n} | {' | '.join(str(tally[result]) for result in OUTCOMES)} |")
    print("\n".join(lines))
    if args.write:
        write_measured(args.write, "fuzz", [*lines, "", f"Seed {args.seed}."])
    sys.exit(failed)


def quiet() -> None:
    """What readers say of damaged files besides."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    nib.imageglobals.logger.setLevel(logging.CRITICAL)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
