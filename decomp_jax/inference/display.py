"""How images are shown: grey, labels over them in colours that stay apart for the colour-blind.

Warm for lesions, lighter to darker by class; cool for anatomy, one hue a structure, dark on the left side and light on
the right.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from decomp_jax.data.schema import Settings

INK, SOFT, ACCENT, BOUND = "#1c2733", "#8b97a3", "#0b5fa5", "#b3541e"
LESION_COLOURS = ("#f7e04a", "#f0932b", "#c8321e", "#8a1c5c", "#ffb3a7")
ANATOMY_COLOURS = ("#1b7f79", "#79c7bf", "#2a5caa", "#8fb4e3", "#7a4fa3", "#c3a4de")
FARTHER, NEARER = "#2f7de1", "#1e9e5a"  # of cells that add to a distance, or take from it
NAME_WIDTH = 22  # characters below an image
COLUMNS, NOTE_WIDTH = 6, 150  # of a contact sheet: tiles a line, characters a line of the note
CELL, GAP, CAPTION, TITLE = 1.32, 0.08, 0.42, 0.36  # inches: an image, between images, below one, above a block
HEAD, FOOT, LINE = 0.36, 0.36, 0.14  # inches: the heading, the key of colours, a line of the note
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.8, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8, "figure.dpi": 150, "savefig.dpi": 150,
}


class Display(NamedTuple):
    """How all images of a figure are shown.

    Attributes:
        margin: share of the side that is cut off all round.
        white: value.
        channel: the first of those that most images have.
    """

    margin: float
    white: float
    channel: int = 0

    @classmethod
    def fit(cls, images: Float[np.ndarray, "n s s c"]) -> "Display":
        """Fitted to images, or to thumbnails of them."""
        channel = int((images > 0).any((1, 2)).sum(0).argmax())
        foreground = images[..., channel] > 0
        size = images.shape[1]
        used = np.flatnonzero((foreground.any(0) | foreground.any(0).T).any(0))
        margin = min(used.min(initial=size), size - 1 - used.max(initial=-1)) if len(used) else 0
        values = images[..., channel][foreground]
        return cls(max(margin - 1, 0) / size, float(np.quantile(values, 0.999)) if len(values) else 1.0, channel)

    def overlay(
        self, image: Float[np.ndarray, "s s c"], *, lesion: UInt8[np.ndarray, "s s"] | None = None,
        anatomy: UInt8[np.ndarray, "s s"] | None = None,
    ) -> Float[np.ndarray, "t t 3"]:
        """Colours [0,1] of an image (one channel) under its labels."""
        rgb = np.repeat(np.clip(image[..., [self.channel]].astype(np.float32) / self.white, 0, 1), 3, axis=-1)
        for labels, colours, alpha in ((anatomy, ANATOMY_COLOURS, 0.38), (lesion, LESION_COLOURS, 0.55)):
            if labels is not None:
                shades = (to_rgb(colours[i % len(colours)]) for i in range(labels.max(initial=0)))
                table = np.array([(0, 0, 0), *shades])
                weight = alpha * (labels > 0)[..., None]
                rgb = (1 - weight) * rgb + weight * table[labels]
        return self.crop(rgb)

    def crop(self, array: Shaped[np.ndarray, "s s ..."]) -> Shaped[np.ndarray, "t t ..."]:
        """Without the margin."""
        cut = round(self.margin * len(array))
        return array[cut : len(array) - cut, cut : len(array) - cut]


class Tile(NamedTuple):
    """An image of a contact sheet.

    Attributes:
        name: what is written below it.
        frame: colour of its frame.
        outlines: masks of its size, by the colour in which they are drawn around.
    """

    rgb: Float[np.ndarray, "t t 3"]
    name: str = ""
    frame: str | None = None
    outlines: Mapping[str, Bool[np.ndarray, "t t"]] = {}


class Section(NamedTuple):
    """Lines of at most `COLUMNS` tiles below a title."""

    title: str
    lines: Sequence[Sequence[Tile]]


def show(axes: Axes, rgb: Float[np.ndarray, "s s 3"], caption: str = "", *, frame: str | None = None) -> None:
    """Draws one image with a caption under it, framed if it is a query."""
    axes.imshow(rgb, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=7.5, labelpad=3)
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=2)


def label_key(figure: Figure, settings: Settings, *, anatomy: bool) -> None:
    """Legend of the label colours."""
    named = list(zip(settings.lesion_classes, LESION_COLOURS))
    if anatomy:
        named = list(zip(settings.anatomy_classes, ANATOMY_COLOURS)) + named
    handles = [Patch(color=colour, label=name) for name, colour in named]
    figure.legend(handles=handles, ncols=min(len(handles), 5), loc="lower center", handlelength=1)


def caption(row: np.void) -> str:
    """Patient and slice of a bank's row, in two lines."""
    return f"{fitting(row['patient_id'])}\nslice {row['slice_index']}"


def fitting(name: str, width: int = NAME_WIDTH) -> str:
    """A name that fits below an image: without its middle, where it is long."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-width // 2 :]}"


def contact_sheet(sections: Sequence[Section], *, heading: str, note: str, settings: Settings) -> Figure:
    """The sections one below the other, and a key of the lesion classes."""
    notes = textwrap.wrap(note, NOTE_WIDTH)
    width = COLUMNS * (CELL + GAP) + 3 * GAP
    heights = sum(_height(line) for section in sections for line in section.lines)
    height = HEAD + LINE * len(notes) + TITLE * len(sections) + heights + FOOT
    figure = Figure(figsize=(width, height))
    y = height - HEAD * 0.7  # from the bottom
    figure.text(GAP / width, y / height, heading, fontsize=11, fontweight="bold")
    for text in notes:
        y -= LINE * 1.2 if text is notes[0] else LINE
        figure.text(GAP / width, y / height, text, fontsize=7.5, color=SOFT)
    for section in sections:
        y -= TITLE * 0.8
        figure.text(GAP / width, y / height, section.title, fontsize=9, fontweight="bold")
        y -= TITLE * 0.2
        for line in section.lines:
            for column, tile in enumerate(line):
                place = GAP + column * (CELL + GAP), y - CELL, CELL, CELL
                axes = figure.add_axes(tuple(np.divide(place, (width, height, width, height))))
                _draw(axes, tile)
            y -= _height(line)
    label_key(figure, settings, anatomy=False)
    return figure


def _height(line: Sequence[Tile]) -> float:
    """Of a line of tiles and what is written below them, in inches."""
    return CELL + GAP + LINE * max(tile.name.count("\n") + 1 for tile in line)


def in_lines(tiles: Sequence[Tile]) -> list[Sequence[Tile]]:
    """Lines of at most `COLUMNS` tiles."""
    return [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]


def cell_map(
    display: Display, image: Float[np.ndarray, "s s c"], cells: Float[np.ndarray, "h w"], most: float
) -> Float[np.ndarray, "t t 3"]:
    """An image under the cells of its code, the stronger in colour the more they add to a distance (`most`: fully)."""
    side = len(image) // len(cells)
    share = display.crop(np.kron(cells / (most or 1), np.ones((side, side))))[..., None].clip(-1, 1)
    colour = np.where(share > 0, to_rgb(FARTHER), to_rgb(NEARER))
    weight = 0.9 * np.abs(share)
    return (1 - weight) * (0.6 * display.overlay(image)) + weight * colour


def resized(drawn: Shaped[np.ndarray, "n n"], size: int) -> Shaped[np.ndarray, "s s"]:
    """A label map at another size: the value at each pixel's centre."""
    at = ((np.arange(size) + 0.5) * len(drawn) / size).astype(int)
    return drawn[np.ix_(at, at)]


def spread(weights: Float[np.ndarray, "n"], count: int = COLUMNS) -> Integer[np.ndarray, "m"]:
    """At most `count` positions that part the sum of the weights evenly."""
    shares = np.cumsum(weights) / np.sum(weights)
    return np.unique(np.searchsorted(shares, (np.arange(count) + 0.5) / count))


def _draw(axes: Axes, tile: Tile) -> None:
    show(axes, tile.rgb, tile.name, frame=tile.frame)
    axes.xaxis.label.set_size(6.8)
    for colour, mask in tile.outlines.items():
        if mask.any() and not mask.all():
            axes.contour(mask, levels=[0.5], colors=colour, linewidths=0.9)
