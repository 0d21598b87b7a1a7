"""The sheet of a query: what was asked, above what was found."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from matplotlib.figure import Figure

from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.errors import UserError
from decomp_jax.inference.asking import Asked, Question
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.display import (
    ACCENT, BOUND, Display, Section, Tile, caption, cell_map, contact_sheet, in_lines, resized, spread,
)
from decomp_jax.retrieval import CodeBank, Hits, PatientHits

ALIKE = {"normal": "anatomy", "abnormal": "lesion"}
DRAWN, REGION = "#ffffff", "#36d6e7"  # outlines of what was drawn


class Pixels(NamedTuple):
    """Images of some rows of a bank, their labels where they have any, and a note on where they come from."""

    images: Float[np.ndarray, "n s s c"]
    labels: list[UInt8[np.ndarray, "s s"] | None]
    note: str


def slice_sheet(decomposer: Decomposer, bank: CodeBank, question: Question, asked: Asked, hits: Hits) -> Figure:
    """What was asked, and the hits by rank, each above the cells that make its distance."""
    rows = hits.rows[0][hits.rows[0] >= 0]
    examples = [*question.like, *question.unlike]
    pixels = pixels_of(decomposer, bank, np.array([*rows, *examples], int))
    images = pixels.images if asked.images is None else np.concatenate([asked.images, pixels.images])
    display, size = Display.fit(images), decomposer.settings.size
    outlines = _outlines(display, asked, size)
    found = [
        Tile(display.overlay(image, lesion=label), f"rank {rank}\n{caption(bank.rows[row])}", outlines=outlines)
        for rank, (image, label, row) in enumerate(zip(pixels.images, pixels.labels, rows), start=1)
    ]
    cells = sum(bank.contributions(asked.queries, rows[None]).values())[0]
    maps = [
        Tile(cell_map(display, image, of_hit, np.abs(cells).max()), f"distance {of_hit.sum():.4g}")
        for image, of_hit in zip(pixels.images, cells)
    ]
    lines = [line for pair in zip(in_lines(found), in_lines(maps)) for line in pair]
    ground = pixels.images[: len(rows)].astype(np.float32).mean(0) if asked.images is None else asked.images[0]
    asked_tiles = _asked_tiles(display, asked, ground, outlines)
    for flag, start, colour in (("like", 0, ACCENT), ("unlike", len(question.like), BOUND)):
        for place, row in enumerate(getattr(question, flag), start=len(rows) + start):
            rgb = display.overlay(pixels.images[place], lesion=pixels.labels[place])
            asked_tiles.append(Tile(rgb, f"{flag}\n{caption(bank.rows[row])}", colour))
    note = f"{_note(asked, pixels)} Below each hit: the bluer a cell, the more it adds to the distance"
    note += " (green: it takes from it, being far from what hits should not be like)." if question.unlike else "."
    note += " A distance of 0 is the same; from 1 on nothing is alike." if asked.queries.relative else ""
    return contact_sheet(
        [Section("Asked", in_lines(asked_tiles)), Section("Found", lines)], heading=heading(question), note=note,
        settings=decomposer.settings,
    )


def patient_sheet(
    decomposer: Decomposer, bank: CodeBank, question: Question, asked: Asked, hits: PatientHits
) -> Figure:
    """Some slices of the scan, and below each the slice of each patient that it was matched with."""
    area = np.count_nonzero(asked.lesions, (1, 2))
    columns = spread(area if question.by != "normal" and area.any() else np.ones(len(area)))
    matched = {path: matches[:, columns] for path, matches in hits.matches.items()}
    rows = np.unique(np.concatenate([matches.ravel() for matches in matched.values()]))
    rows = rows[rows >= 0]
    pixels = pixels_of(decomposer, bank, rows)
    display = Display.fit(np.concatenate([asked.images[columns], pixels.images]))
    outlines = _outlines(display, asked, decomposer.settings.size)

    def tile(row: int) -> Tile:
        if row < 0:
            return Tile(np.ones((1, 1, 3)), "no slice within reach")
        place = np.searchsorted(rows, row)
        rgb = display.overlay(pixels.images[place], lesion=pixels.labels[place])
        return Tile(rgb, f"slice {bank.rows['slice_index'][row]}", outlines=outlines)

    shown = [Tile(display.overlay(asked.images[i], lesion=asked.lesions[i]), asked.names[i], ACCENT, outlines)
             for i in columns]
    sections = [Section(f"Asked: all {len(area)} slices of {Path(question.image).name}, these among them", [shown])]
    sections += [
        Section(f"Rank {rank}: {patient}, distance {distance:.4g}; the slices nearest by {ALIKE[path]}",
                [[tile(row) for row in matched[path][rank - 1]]])
        for rank, (patient, distance) in enumerate(zip(hits.patients, hits.distances), start=1) for path in matched
    ]
    note = f"{_note(asked, pixels)} A distance of 0 is the same; from {len(matched)} on nothing is alike."
    return contact_sheet(sections, heading=heading(question), note=note, settings=decomposer.settings)


def heading(question: Question) -> str:
    """What was asked, in words."""
    what = "patients" if question.level == "patient" else "slices"
    by = " and ".join(ALIKE[path] for path in question.paths)
    if question.image is not None and question.by == "both" and (question.lesion_from or question.sketch):
        by = f"anatomy of the image, lesion of the {'drawing' if question.sketch else 'other'}"
    elif question.sketch is not None:
        by = "lesion, as drawn"
    if question.like:
        by += ", as in the examples" if question.image is None else ", of the image and the examples"
    if question.weight is not None:
        by += f" (lesion weighs {question.weight:g})"
    return f"Nearest {what} by {by}" + (", in the region alone" if question.region else "")


def _note(asked: Asked, pixels: Pixels) -> str:
    seen = "" if asked.images is None else "Asked: with the lesion that the network sees. "
    drawn = "" if asked.sketch is None else " White line: the drawing."
    region = "" if asked.region is None else " Line in cyan: the region that counts."
    return f"Not for diagnosis. {seen}{pixels.note}{drawn}{region}"


def pixels_of(decomposer: Decomposer, bank: CodeBank, rows: Integer[np.ndarray, "n"]) -> Pixels:
    """From the data set that was encoded, whatever its splits; where it is gone, what the codes alone show."""
    if not len(rows):
        size, channels = decomposer.settings.size, len(decomposer.settings.modalities)
        return Pixels(np.zeros((0, size, size, channels), np.float16), [], "")
    data = bank.meta.get("data", "")
    try:
        manifest = read_manifest(data)
        if manifest["digest"] == bank.meta.get("data_digest"):
            own = bank.meta.get("split")
            splits = sorted(manifest["splits"], key=lambda split: split != own)
            return _stored(decomposer, data, splits, bank.rows[rows])
        reason = "has changed since the bank was encoded, or is not the only one in it"
    except (UserError, OSError):
        reason = "is not there, or not the only one in the bank"
    print(f"{data}: the data set {reason}; the sheet shows what the network paints from the codes", file=sys.stderr)
    painted = decomposer.paint(bank.normal_indices[rows], bank.abnormal_indices[rows])
    return Pixels(painted, [None] * len(rows), "Found: painted from their codes, since the images are not at hand.")


def _stored(decomposer: Decomposer, data: str, splits: Iterable[str], rows: np.ndarray) -> Pixels:
    """Raises UserError if the data set can't be read, or lacks one of the rows."""
    found: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    for split in splits:
        missing = [i for i in range(len(rows)) if i not in found]
        if not missing:
            break
        dataset = decomposer.take_images(SliceDataset(data, split), data)
        for i in missing:
            same = (dataset.rows[name] == rows[name][i] for name in ("patient_id", "slice_index"))
            for place in np.flatnonzero(np.logical_and(*same)):
                image, label = (values[0] for values in dataset.stack(("image", "label"), [place]).values())
                found[i] = image, label if dataset.rows["labelled"][place] else None
    if len(found) < len(rows):
        raise UserError(f"{data}: lacks slices of the bank")
    images, labels = zip(*(found[i] for i in range(len(rows))))
    return Pixels(np.stack(images), list(labels), "Found: with their labels, where they have any.")


def _asked_tiles(
    display: Display, asked: Asked, ground: Float[np.ndarray, "s s c"], outlines: dict[str, Bool[np.ndarray, "t t"]]
) -> list[Tile]:
    """The images with the lesion that the network sees, the drawing on its ground, and what the network paints."""
    tiles = []
    if asked.images is not None:
        region = {colour: mask for colour, mask in outlines.items() if colour == REGION}
        tiles += [Tile(display.overlay(image, lesion=lesion), name, ACCENT, region)
                  for image, lesion, name in zip(asked.images, asked.lesions, asked.names)]
    if asked.sketch is not None:
        sketch = resized(asked.sketch, len(ground)).astype(np.uint8)
        name = "the drawing" if asked.images is not None else "the drawing, on\nthe mean of the hits"
        tiles.append(Tile(display.overlay(ground, lesion=sketch), name, ACCENT, outlines))
    if asked.painted is not None:
        tiles.append(Tile(display.overlay(asked.painted), "what the network\npaints of the two", ACCENT, outlines))
    return tiles


def _outlines(display: Display, asked: Asked, size: int) -> dict[str, Bool[np.ndarray, "t t"]]:
    drawn = {DRAWN: asked.sketch, REGION: asked.region}
    return {colour: display.crop(resized(mask, size) > 0) for colour, mask in drawn.items() if mask is not None}
