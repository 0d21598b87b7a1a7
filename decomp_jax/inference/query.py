"""`evaluate.py query`: a new scan that no one has segmented, looked up in a bank."""

import sys
import textwrap
from pathlib import Path
from typing import Literal

import jax
import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from decomp_jax.errors import UserError
from decomp_jax.files import replacing
from decomp_jax.inference.decomposer import Decomposer, Decomposition
from decomp_jax.inference.display import STYLE, Display, Tile, caption, contact_sheet
from decomp_jax.inference.encode import encoded_by
from decomp_jax.inference.search import write_hits
from decomp_jax.preparation.picture import prepare_picture
from decomp_jax.preparation.scan import prepare_scan
from decomp_jax.retrieval import CodeBank, Hits

NAME_WIDTH = 24  # characters below a tile
BY = {
    "normal": "normal code: similar anatomy", "abnormal": "abnormal code: similar lesion",
    "both": "both codes: similar anatomy and lesion",
    "mix": "both codes: anatomy of the first image, lesion of the second",
}


def run_query(
    workdir: str | Path, bank: str | Path, image: str | Path, *, slice_index: int | None, mask: str | Path | None,
    lesion_from: str | Path | None, lesion_slice: int | None, lesion_mask: str | Path | None,
    by: Literal["normal", "abnormal", "both"], k: int, out: str | Path,
) -> None:
    """Writes OUT/hits.csv and OUT/sheet.png, the query beside its hits.

    Args:
        workdir: a training run; the image is prepared as its training images were.
        bank: a bank encoded by that run's network.
        image: a volume, with `slice_index` and, where the skull is not stripped, a `mask` of the brain; or a picture.
        lesion_from: another image, whose lesion is looked for in place of the first one's; needs by="both".
        k: number of hits.

    Raises:
        UserError: an image can't be used, or the bank is another network's.
    """
    if lesion_from is not None and by != "both":
        raise UserError(f"--lesion_from: searches for the anatomy of one image with the lesion of another; "
                        f"use --by=both, not --by={by}")
    if (lesion_slice is not None or lesion_mask is not None) and lesion_from is None:
        raise UserError("--lesion_slice, --lesion_mask: are of --lesion_from; give that, too (it may be the same scan)")
    decomposer, searched = Decomposer.restore(workdir), CodeBank.load(bank)
    if searched.meta.get("model_digest") != decomposer.model_digest:
        raise UserError(f"{bank}: encoded by another network than {workdir}; encode it again with --workdir={workdir}")
    sources = [(image, slice_index, mask)]
    sources += [] if lesion_from is None else [(lesion_from, lesion_slice, lesion_mask)]
    images = np.stack([_prepare(*source, decomposer) for source in sources])
    output = decomposer.decompose(images)
    hits = searched.search(
        normal=None if by == "abnormal" else output.normal_indices[:1],
        abnormal=None if by == "normal" else output.abnormal_indices[-1:], k=k,
    )
    out = Path(out)
    names = [_name(path, index) for path, index, _ in sources]
    with mpl.rc_context(STYLE):
        sheet = _sheet(decomposer, searched, hits, images, output, names, by)
        if jax.process_index() == 0:
            write_hits(out / "hits.csv", hits, searched.rows)
            with replacing(out / "sheet.png") as file:
                sheet.savefig(file)


def _prepare(
    path: str | Path, slice_index: int | None, mask: str | Path | None, decomposer: Decomposer
) -> Float[np.ndarray, "s s c"]:
    if slice_index is not None:
        return prepare_scan(Path(path), decomposer.settings, slice_index, mask and Path(mask))
    if mask is not None:
        raise UserError(f"{mask}: is of a volume; name the slice of {path}, too")
    return prepare_picture(Path(path), decomposer.settings)


def _name(path: str | Path, slice_index: int | None) -> str:
    """Name of an image below its tile, in lines that fit."""
    name = Path(path).name
    lines = textwrap.wrap(name.removesuffix(".gz").rpartition(".")[0] or name, NAME_WIDTH)[:1] + ([] if slice_index is None else [f"slice {slice_index}"])
    return "\n".join(lines)


def _sheet(
    decomposer: Decomposer, bank: CodeBank, hits: Hits, images: Float[np.ndarray, "n s s c"], output: Decomposition,
    names: list[str], by: str,
) -> Figure:
    """The contact sheet: the query with the lesion that the network sees, then its hits by rank."""
    rows = hits.rows[0][hits.rows[0] >= 0]
    pixels, labels, note = _pixels_of(decomposer, bank, rows)
    display = Display.fit(np.concatenate([images, pixels]))
    predicted = output.segmentation.argmax(-1).astype(np.uint8)
    asked = [
        Tile(display.overlay(image, lesion=label), name) for image, label, name in zip(images, predicted, names)
    ]
    answer = [
        Tile(display.overlay(image, lesion=label), f"{caption(bank.rows[row])}, rank {rank}")
        for rank, (image, label, row) in enumerate(zip(pixels, labels, rows), start=1)
    ]
    return contact_sheet(
        asked, answer, heading=f"Nearest by {BY['mix' if len(images) > 1 else by]}", settings=decomposer.settings,
        note=f"Blue frame: the query with the lesion that the network sees. {note} Not for diagnosis.",
    )


def _pixels_of(
    decomposer: Decomposer, bank: CodeBank, rows: np.ndarray
) -> tuple[Float[np.ndarray, "n s s c"], list[UInt8[np.ndarray, "s s"] | None], str]:
    """Images and labels of hits from the data set that was encoded; where it is gone, what the codes alone show."""
    try:
        dataset = encoded_by(bank)
        stacked = dataset.stack(("image", "label"), rows)
        labelled = dataset.rows["labelled"][rows]
        labels = [label if has_label else None for label, has_label in zip(stacked["label"], labelled)]
        return stacked["image"], labels, "Hits: with their labels, where they have any."
    except (UserError, OSError) as error:
        print(f"{error}; the sheet shows what the network paints from the codes", file=sys.stderr)
    painted = decomposer.paint(bank.normal_indices[rows], bank.abnormal_indices[rows])
    return painted, [None] * len(rows), "Hits: painted from their codes, since the images are not at hand."
