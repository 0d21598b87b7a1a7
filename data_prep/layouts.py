"""Layouts in which sets of volumes are kept: nnU-Net v2 and v1, Medical Segmentation Decathlon, MONAI datalists."""

import collections
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.names import Regions
from decomp_jax.errors import UserError
from decomp_jax.preparation.releases import NIFTI, match_name
from decomp_jax.preparation.volume import Source

_NUMBERED = re.compile(r"(.+)_(\d{4})")  # CASE_0000: nnU-Net's name of a channel's file
_SECTIONS = {"training": None, "validation": "validation", "testing": "test", "test": "test"}  # of a list -> fold
_NIFTI = (".nii.gz", ".nii")


class Found(NamedTuple):
    """A case as its layout has it.

    Attributes:
        images: channel number -> where it lies.
        folds: of a cross-validation in which it is held out, or the list that the case stands in.
        regions: what its labels are called, where each case has names of its own.
        subject: the person, where the layout tells.
    """

    case_id: str
    images: Mapping[int, Source]
    label: Source | None
    folds: frozenset[str] = frozenset()
    regions: Regions | None = None
    subject: str | None = None


class Layout(NamedTuple):
    """A set of volumes.

    Attributes:
        title: what it is kept as.
        names: file that names channels and labels.
        channels: number -> name.
        regions: name of a label -> its values.
        left_out: files beside the cases' that are none of theirs, by their names.
    """

    title: str
    names: Path
    channels: Mapping[int, str]
    regions: Regions
    cases: list[Found]
    left_out: Sequence[Path] = ()


def read_layout(src: Path, channels: Mapping[int, str], regions: Regions) -> Layout:
    """What `src`, a folder with dataset.json or a datalist, holds; `channels` and `regions` replace its own names.

    Raises:
        UserError: it is of no known layout, has not the form of one, or names no channels or labels.
    """
    path = src / "dataset.json" if src.is_dir() else src
    if not path.is_file():
        raise UserError(
            f"--src {src}: holds no dataset.json (nnU-Net, Medical Segmentation Decathlon) and is no datalist (.json); "
            "name another, or take `brats` for a BraTS release and --table for DICOM"
        )
    with _as_said(path):
        meta = json.loads(path.read_bytes())
        channels = channels or _channel_names(meta)
        regions = regions or _regions(meta.get("labels", {}))
        left_out: Sequence[Path] = ()
        if "channel_names" in meta:
            title, (cases, left_out) = "nnU-Net v2", _numbered_cases(path.parent, meta)
        elif _SECTIONS.keys() & meta.keys():
            title = "Medical Segmentation Decathlon or nnU-Net v1" if "modality" in meta else "MONAI datalist"
            cases = _listed_cases(path.parent, meta, channels)
        else:
            raise UserError(f"{path}: has neither channel_names (nnU-Net v2) nor a list training; name another --src")
    for flag, names, example in (("channels", channels, "t1ce=0"), ("labels", regions, "lesion=1")):
        if not names:
            raise UserError(f"{path}: names no {flag}; say what the numbers mean, as in --{flag}={example}")
    if not cases:
        raise UserError(f"{path}: names no cases, and none lie beside it; name another --src")
    case_id, count = collections.Counter(case.case_id for case in cases).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: case {case_id} is there twice; remove one, or give them names that differ")
    sources = collections.Counter(source for case in cases for source in [*case.images.values(), case.label] if source)
    (source, count), = sources.most_common(1) or [(None, 0)]
    if count > 1:
        raise UserError(f"{path}: names {source.path} twice; a channel or a case each has a file of its own")
    return Layout(title, path, channels, regions, cases, left_out)


@contextlib.contextmanager
def _as_said(path: Path) -> Iterator[None]:
    """Mistakes in the form of a JSON file are the user's."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: not of the form that its layout has ({what}); mend it") from error


def _channel_names(meta: Mapping[str, Any]) -> dict[int, str]:
    names = {**meta.get("modality", {}), **meta.get("channel_names", {})}
    return {int(number): str(name) for number, name in names.items()}


def _regions(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """From {name: number or numbers}, as nnU-Net v2 has it, or {number: name}, as the others do."""
    regions: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():
        name, values = (str(value), [key]) if key.isdigit() else (key, value if isinstance(value, list) else [value])
        regions[name] = (*regions.get(name, ()), *map(int, values))
    return regions


# ---------------------------------------------------------------- nnU-Net v2


def _numbered_cases(folder: Path, meta: Mapping[str, Any]) -> tuple[list[Found], list[Path]]:
    """Cases, and NIfTI files beside theirs that are none of theirs."""
    folds = _read_folds(folder)
    if "dataset" in meta:
        return [
            Found(
                case_id,
                {number: Source(folder / image) for number, image in enumerate(entry["images"])},
                Source(folder / entry["label"]) if entry.get("label") else None,
                folds.get(case_id, frozenset()),
            )
            for case_id, entry in meta["dataset"].items()
        ], []
    if (ending := meta["file_ending"]) not in _NIFTI:
        raise UserError(f"{folder}/dataset.json: its files are {ending}; convert them to .nii.gz")
    cases: dict[str, Found] = {}
    left_out = []
    for part, fold in (("Tr", frozenset()), ("Ts", frozenset({"test"}))):
        for path in _files(folder / f"images{part}"):
            match = _NUMBERED.fullmatch(path.name.removesuffix(ending))
            if not match or not path.name.endswith(ending):
                left_out.append(path)
                continue
            case = cases.setdefault(match[1], Found(match[1], {}, None, folds.get(match[1], fold)))
            case.images[int(match[2])] = Source(path)
        for path in _files(folder / f"labels{part}"):
            name = path.name.removesuffix(ending)
            if not path.name.endswith(ending):
                left_out.append(path)
                continue
            case = cases.get(name, Found(name, {}, None, folds.get(name, fold)))
            cases[name] = case._replace(label=Source(path))
    return [cases[name] for name in sorted(cases)], left_out


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if NIFTI.search(path.name) and not path.name.startswith("."))


def _read_folds(folder: Path) -> dict[str, frozenset[str]]:
    """case -> folds that validate with it, where splits_final.json lies beside dataset.json."""
    path = folder / "splits_final.json"
    found: dict[str, frozenset[str]] = {}
    if path.is_file():
        with _as_said(path):
            for number, fold in enumerate(json.loads(path.read_bytes())):
                found |= {case_id: found.get(case_id, frozenset()) | {str(number)} for case_id in fold["val"]}
    return found


# ---------------------------------------------------------------- lists of images and labels


def _listed_cases(folder: Path, meta: Mapping[str, Any], channels: Mapping[int, str]) -> list[Found]:
    cases, folders = [], []
    named = len(channels) if channels == _channel_names(meta) else None
    for section, fold in _SECTIONS.items():
        for item in meta.get(section, []):
            item = {"image": item} if isinstance(item, str) else item
            images, label = item["image"], item.get("label")
            if label is not None and not isinstance(label, str):
                raise UserError(f"label {label} is a number; volumes need a segmentation as label")
            names = images if isinstance(images, list) else [images]
            if any(Path(name).name.startswith("._") for name in names):
                continue
            folders.append(Path(names[0]).parent.name)
            cases.append(Found(
                _case_id([Path(name) for name in names]),
                _listed_images(folder, images, channels, named),
                Source(folder / label) if label else None,
                frozenset(str(name) for name in [item.get("fold", fold)] if name is not None),
            ))
    if len({case.case_id for case in cases}) < len(cases) == len({*folders}):  # case1/image.nii.gz, case2/image.nii.gz
        cases = [case._replace(case_id=name) for case, name in zip(cases, folders)]
    return cases


def _listed_images(folder: Path, images: str | Sequence[str], channels: Mapping[int, str], named: int | None
                   ) -> dict[int, Source]:
    """A file a channel, all channels in one file, or nnU-Net v1's CASE_0000.nii.gz in place of CASE.nii.gz.

    `named` is how many channels a file of all has, None where that isn't known.
    """
    if isinstance(images, list):
        return {number: Source(folder / image) for number, image in enumerate(images)}
    path = folder / images
    ending = next((ending for ending in _NIFTI if images.endswith(ending)), path.suffix)
    numbered = {n: path.with_name(f"{path.name.removesuffix(ending)}_{n:04d}{ending}") for n in channels}
    if not path.exists() and any(part.exists() for part in numbered.values()):
        return {number: Source(part) for number, part in numbered.items() if part.exists()}
    return {number: Source(path, number, named=named) for number in channels}


def _case_id(paths: Sequence[Path]) -> str:
    """What the names of a case's files have in common."""
    if match := match_name(paths[0]):
        return match[1]
    stems = [re.sub(r"\.nii(\.gz)?$", "", path.name) for path in paths]
    if len(stems) == 1:
        return stems[0]
    common = os.path.commonprefix(stems)
    return re.sub(r"[-_.][^-_.]*$", "", common) if re.search("[-_.]", common) else paths[0].parent.name
