"""How images are shown: grey, labels over them in colours that stay apart for the colour-blind.

Warm for lesions, lighter to darker by class; cool for anatomy, one hue a structure, dark on the left side and light on
the right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from decomp_jax.data.schema import Settings

INK, SOFT, ACCENT, BOUND = "#1c2733", "#8b97a3", "#0b5fa5", "#b3541e"
LESION_COLOURS = ("#f7e04a", "#f0932b", "#c8321e", "#8a1c5c", "#ffb3a7")
ANATOMY_COLOURS = ("#1b7f79", "#79c7bf", "#2a5caa", "#8fb4e3", "#7a4fa3", "#c3a4de")
HITS_A_LINE = 5  # of a contact sheet
CELL, GAP, CAPTION, TITLE = 1.32, 0.08, 0.42, 0.36  # inches: an image, between images, below one, above a block
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.8, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8, "figure.dpi": 150, "savefig.dpi": 150,
}


class Display(NamedTuple):
    """How all images of a figure are shown: the share of the side that is cut off all round, and the value of white."""

    margin: float
    white: float

    @classmethod
    def fit(cls, images: Float[np.ndarray, "n s s c"]) -> "Display":
        """Fitted to images, or to thumbnails of them."""
        foreground = images[..., 0] > 0
        size = images.shape[1]
        used = np.flatnonzero((foreground.any(0) | foreground.any(0).T).any(0))
        margin = min(used.min(initial=size), size - 1 - used.max(initial=-1)) if len(used) else 0
        values = images[..., 0][foreground]
        return cls(max(margin - 1, 0) / size, float(np.quantile(values, 0.999)) if len(values) else 1.0)

    def overlay(
        self, image: Float[np.ndarray, "s s c"], *, lesion: UInt8[np.ndarray, "s s"] | None = None,
        anatomy: UInt8[np.ndarray, "s s"] | None = None,
    ) -> Float[np.ndarray, "t t 3"]:
        """Colours [0,1] of an image (its first channel) under its labels."""
        rgb = np.repeat(np.clip(image[..., :1].astype(np.float32) / self.white, 0, 1), 3, axis=-1)
        for labels, colours, alpha in ((anatomy, ANATOMY_COLOURS, 0.38), (lesion, LESION_COLOURS, 0.55)):
            if labels is not None:
                shades = (to_rgb(colours[i % len(colours)]) for i in range(labels.max(initial=0)))
                table = np.array([(0, 0, 0), *shades])
                weight = alpha * (labels > 0)[..., None]
                rgb = (1 - weight) * rgb + weight * table[labels]
        cut = round(self.margin * len(rgb))
        return rgb[cut : len(rgb) - cut, cut : len(rgb) - cut]


class Tile(NamedTuple):
    """An image of a contact sheet and what is written below it."""

    rgb: Float[np.ndarray, "t t 3"]
    name: str


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
    return f"{row['patient_id']}\nslice {row['slice_index']}"


def contact_sheet(
    queries: Sequence[Tile], hits: Sequence[Tile], *, heading: str, note: str, settings: Settings
) -> Figure:
    """Query images in a column, framed, beside their hits in lines."""
    lines = max(-(-len(hits) // HITS_A_LINE), len(queries))
    width = (1 + HITS_A_LINE) * (CELL + GAP) + 3 * GAP
    height = lines * (CELL + CAPTION) + 1.15
    figure = Figure(figsize=(width, height))
    figure.text(GAP / width, 1 - 0.25 / height, heading, fontsize=11, fontweight="bold")
    figure.text(GAP / width, 1 - 0.43 / height, note, fontsize=7.5, color=SOFT)
    places = [(0, i, tile, ACCENT) for i, tile in enumerate(queries)]
    places += [(1 + i % HITS_A_LINE, i // HITS_A_LINE, tile, None) for i, tile in enumerate(hits)]
    for column, line, (rgb, name), frame in places:
        x = column * (CELL + GAP) + GAP * (1 if column == 0 else 3)
        y = height - 0.55 - CELL - line * (CELL + CAPTION)
        axes = figure.add_axes((x / width, y / height, CELL / width, CELL / height))
        show(axes, rgb, name, frame=frame)
    label_key(figure, settings, anatomy=False)
    return figure
