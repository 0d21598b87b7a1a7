"""Figures of the report: the paper's Figure 3 and Figure E.1 from our banks, and the measures behind them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decomp_jax.data.schema import Settings
from decomp_jax.evaluation.rankers import Method, Search
from decomp_jax.evaluation.scores import Scores
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.evaluation.tables import Mixed, Table
from decomp_jax.inference.decomposer import Decomposition
from decomp_jax.inference.display import (
    ACCENT, BOUND, CAPTION, CELL, GAP, INK, SOFT, TITLE, Display, caption, label_key, show
)

HITS = 5  # shown beside a query
EXAMPLES = 7  # slices with a lesion, of the decompositions
FAILURES = 4  # slices of either kind
QUANTILES = (0.8, 0.5, 0.2)  # of Dice@5: the queries shown do well, middling and badly


# ---------------------------------------------------------------- Figure 3


class _Row(NamedTuple):
    """A line of Figure 3: what is asked of which query slice, one entry a code."""

    asked: tuple[tuple[int, str], ...]
    title: str


_TITLES = {
    ("normal",): "a   Nearest by normal code: similar anatomy, whatever the lesion",
    ("abnormal",): "b   Nearest by abnormal code: similar lesion, whatever the anatomy around it",
    ("normal", "abnormal"): "c   Nearest to a mix: anatomy of the first image with the lesion of the second",
}


def retrieval_figure(search: Search, scores: Scores, mixed: Mixed | None) -> Figure:
    """Figure 3 of the paper: queries and their nearest references by either code, and by a mix of two images.

    The queries are those at fixed quantiles of Dice@5 (not the best), among slices whose lesion is larger than most.
    """
    rows = _figure_rows(search.query, scores, mixed)
    display = Display.fit(search.query.thumbnail)
    titles = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1].title != row.title]
    width = (2 + HITS) * (CELL + GAP) + 3 * GAP
    height = len(rows) * (CELL + CAPTION) + len(titles) * TITLE + 0.7
    figure, top = Figure(figsize=(width, height)), height
    for i, row in enumerate(rows):
        if i in titles:
            top -= TITLE
            figure.text(GAP / width, (top + 0.1) / height, row.title, fontsize=11, fontweight="bold")
        top -= CELL + CAPTION
        places = [(c * (CELL + GAP) + GAP * (1 if c < 2 else 3), top + CAPTION) for c in range(2 + HITS)]
        axes = [figure.add_axes((x / width, y / height, CELL / width, CELL / height)) for x, y in places]
        _draw_row(axes, row, search, display)
    label_key(figure, search.settings, anatomy=search.query.anatomy is not None)
    return figure


def _figure_rows(query: SliceSet, scores: Scores, mixed: Mixed | None) -> list[_Row]:
    area = query.lesion_area
    shown = area >= np.median(area[query.lesion]) if query.lesion.any() else np.ones(len(query), bool)
    asked = [
        [((i, target),) for i in _typical(scores.get((target, target, "dice@5"), area), shown)]
        for target in ("normal", "abnormal")
    ]
    if mixed is not None:
        pairs = mixed.pairs
        dice = (mixed.scores["mixed", "anatomy of A", "dice@5"] + mixed.scores["mixed", "lesion of B", "dice@5"]) / 2
        chosen = _typical(dice, shown[pairs].all(1))
        asked.append([((pairs[i, 0], "normal"), (pairs[i, 1], "abnormal")) for i in chosen])
    return [_Row(row, _TITLES[tuple(target for _, target in row)]) for block in asked for row in block]


def _typical(dice: Float[np.ndarray, "n"], shown: Bool[np.ndarray, "n"]) -> list[int]:
    """Positions that stand at `QUANTILES` of the scores, among those that may be shown."""
    candidates = np.flatnonzero(shown & ~np.isnan(dice))
    order = candidates[np.argsort(dice[candidates], kind="stable")]
    return [int(order[round(q * (len(order) - 1))]) for q in QUANTILES] if len(order) else []


def _overlaid(display: Display, slices: SliceSet, i: int, targets: Sequence[str]) -> Float[np.ndarray, "t t 3"]:
    """A slice under the labels that the given targets are about."""
    anatomy = slices.anatomy[i] if "normal" in targets and slices.anatomy is not None else None
    lesion = slices.label[i] if "abnormal" in targets else None
    return display.overlay(slices.images(np.array([i]))[0], lesion=lesion, anatomy=anatomy)


def _draw_row(axes: list[Axes], row: _Row, search: Search, display: Display) -> None:
    query, reference = search.query, search.reference
    targets = [target for _, target in row.asked]
    for c, (i, target) in enumerate(row.asked, start=2 - len(row.asked)):
        show(axes[c], _overlaid(display, query, i, [target]), caption(query.rows[i]), frame=ACCENT)
    if len(row.asked) == 1:
        axes[0].set_axis_off()
    codes = {target: getattr(query.bank, f"{target}_indices")[i][None] for i, target in row.asked}
    exclude = query.rows["patient_id"][[[i for i, _ in row.asked]]]
    hits = np.asarray(reference.bank.search(**codes, k=HITS, exclude=exclude).rows)[0]
    relevances = {target: search.overlap(np.array([i])).get(target) for i, target in row.asked}
    for place, hit in zip(axes[2:], hits):
        if hit < 0:
            place.set_axis_off()
            continue
        dice = [f"{kinds['dice'][0, hit]:.2f}" for kinds in relevances.values() if kinds]
        below = f", Dice {' | '.join(dice)}" if dice else ""
        show(place, _overlaid(display, reference, hit, targets), caption(reference.rows[hit]) + below)


# ---------------------------------------------------------------- Figure E.1


def choose_examples(query: SliceSet) -> Integer[np.ndarray, "n"]:
    """Slices from the largest lesion to small ones, by equal steps of rank, and one without a lesion."""
    area = query.lesion_area
    order = np.flatnonzero(query.lesion)[np.argsort(-area[query.lesion], kind="stable")]
    steps = np.unique(np.linspace(0.03 * len(order), 0.8 * len(order) - 1, EXAMPLES).astype(int).clip(0))
    return np.concatenate([order[steps] if len(order) else order, np.flatnonzero(~query.lesion)[:1]]).astype(int)


def choose_failures(query: SliceSet) -> Integer[np.ndarray, "n"]:
    """The largest lesions drawn where there is none, and the largest of which none is drawn; one a patient of each."""
    drawn = np.where(query.lesion, 0, query.predicted_area)
    missed = np.where(query.predicted_area > 0, 0, query.lesion_area)
    return np.concatenate([_largest(values, query.rows["patient_id"]) for values in (drawn, missed)])


def _largest(values: Float[np.ndarray, "n"], patients: Shaped[np.ndarray, "n"]) -> Integer[np.ndarray, "k"]:
    order = np.argsort(-values, kind="stable")[: np.count_nonzero(values)]
    firsts = np.sort(np.unique(patients[order], return_index=True)[1])
    return order[firsts[:FAILURES]]


def decomposition_figure(
    query: SliceSet, chosen: Integer[np.ndarray, "n"], images: dict[str, Float[np.ndarray, "n s s c"]],
    output: Decomposition, settings: Settings,
) -> Figure:
    """Figure E.1 of the paper: images, both reconstructions, labels and predicted labels, and the truth if known.

    `images` holds `image`, and `healthy` where the true lesion-free image is known, of the chosen slices.
    """
    display = Display.fit(query.thumbnail)
    labels = {"label": query.label[chosen], "predicted\nlabel": output.segmentation.argmax(-1).astype(np.uint8)}
    plain = {
        "input\nx": images["image"], "reconstruction\nx\u0302\u207a": output.x_plus,
        "lesion-free\nx\u0302\u207b": output.x_minus,
    }
    if "healthy" in images:
        plain["true\nlesion-free"] = images["healthy"]
    lines = {name: [display.overlay(image) for image in row] for name, row in plain.items()} | {
        name: [display.overlay(image, lesion=label) for image, label in zip(images["image"], row)]
        for name, row in labels.items()
    }
    height = CELL * len(lines) + 0.8
    figure = Figure(figsize=(CELL * len(chosen) + 1, height))
    axes = figure.subplots(
        len(lines), len(chosen), squeeze=False, gridspec_kw={
            "left": 1 / figure.get_figwidth(), "right": 0.995, "top": 0.995, "bottom": 0.75 / height,
            "hspace": 0.04, "wspace": 0.04,
        },
    )
    for line, (name, images) in zip(axes, lines.items()):
        for place, image in zip(line, images):
            show(place, image)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for place, i in zip(axes[-1], chosen):
        place.set_xlabel(caption(query.rows[i]), fontsize=7.5)
    label_key(figure, settings, anatomy=False)
    return figure


# ---------------------------------------------------------------- measures


def selectivity_figure(retrieval: Table, methods: dict[str, Method]) -> Figure:
    """Each method's score for either target with its interval, between the other oracle's floor and the ceiling."""
    targets = [target for target in ("normal", "abnormal") if target in retrieval["random"]]
    shown = [name for name in methods if name in retrieval and name not in ("oracle_both", "lesion_grid")]
    figure = Figure(figsize=(3.9 * len(targets) + 2.2, 0.27 * len(shown) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    heights = np.arange(len(shown))[::-1]
    for axes, target in zip(panels, targets):
        dice = [retrieval[name][target]["dice@5"] for name in shown]
        colours = [ACCENT if name == target else SOFT if name.startswith("oracle") else INK for name in shown]
        for y, value, colour in zip(heights, dice, colours):
            axes.plot(value[1:], (y, y), color=colour, linewidth=2.2, alpha=0.6, solid_capstyle="butt")
            axes.plot(value.mean, y, "o", color=colour, markersize=6)
        other = f"oracle_{'abnormal' if target == 'normal' else 'normal'}"
        if other in retrieval and len(targets) == 2:
            floor = retrieval[other][target]["dice@5"].mean
            axes.axvline(floor, color=BOUND, linewidth=1, linestyle=(0, (4, 3)))
            axes.text(floor, len(shown) - 0.35, " floor", color=BOUND, fontsize=8, va="bottom")
        axes.set(title=_TARGET_TITLES[target], xlabel="Dice@5, mean over patients, 95 % interval")
        axes.grid(axis="x", color="#e4e8ec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(heights, [methods[name].title for name in shown])
    return figure


_TARGET_TITLES = {
    "normal": "Like anatomy (mean over regions)\n", "abnormal": "Like lesion (mean over lesion classes)\n",
}


def codebook_figure(slices: SliceSet) -> Figure:
    """Share of cells that each code takes, most used first, over lesion and lesion-free slices."""
    figure = Figure(figsize=(9.8, 2.8), layout="constrained")
    for axes, path in zip(figure.subplots(1, 2, sharey=True), ("normal", "abnormal")):
        size = len(getattr(slices.bank, f"{path}_codebook"))
        indices = getattr(slices.bank, f"{path}_indices")
        for name, chosen, colour in (("lesion", slices.lesion, BOUND), ("lesion-free", ~slices.lesion, ACCENT)):
            if chosen.any():
                share = np.sort(np.bincount(indices[chosen].ravel(), minlength=size))[::-1] / indices[chosen].size
                used = share[share > 0]
                axes.plot(np.arange(1, len(used) + 1), used, color=colour, label=f"{name} slices")
        axes.set(title=f"{path.capitalize()} codebook ({size} codes)", xlabel="code, by rank of use", yscale="log",
                 xscale="log")
        axes.grid(color="#e4e8ec", linewidth=0.8)
    figure.axes[0].set_ylabel("share of cells")
    figure.axes[0].legend()
    return figure


def training_figure(lines: Sequence[dict[str, float]]) -> Figure | None:
    """Losses, codebook perplexity and validation measures by step; None if nothing was logged.

    A curve's first tenth may leave the frame, so that the rest can be read.
    """
    curves = _curves(lines)
    if not curves:
        return None
    columns = 4
    figure = Figure(figsize=(9.8, 1.6 * -(-len(curves) // columns) + 0.3), layout="constrained")
    panels = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).ravel()
    for axes, (title, parts) in zip(panels, curves.items()):
        for part, colour in (("train", ACCENT), ("val", BOUND)):
            if part in parts:
                axes.plot(*zip(*parts[part]), color=colour, linewidth=1.2, label=_PARTS[part])
        last = max(step for points in parts.values() for step, _ in points)
        settled = [value for points in parts.values() for step, value in points if step >= last / 10]
        axes.set_ylim(min(0, *settled), 1.05 * max(*settled, 1e-6))
        name = title.replace("segmentation_dice/", "Dice of predicted ").rpartition("/")[2].replace("_", " ")
        axes.set_title(name, fontsize=8.5, fontweight="normal")
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower right", ncols=2)
    return figure


_PARTS = {"train": "training", "val": "validation patients"}
_SHOWN = (
    "loss/", "term/", "retrieval/", "segmentation_dice/", "codebook/abnormal_perplexity", "codebook/normal_perplexity",
)


def _curves(lines: Sequence[dict[str, float]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points (step, value) by name and part ("train" or "val"), in the order of `_SHOWN`."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            part, _, title = name.partition("/")
            if part in _PARTS and title.startswith(_SHOWN):
                curves.setdefault(title, {}).setdefault(part, []).append((line["step"], value))
    return {title: curves[title] for prefix in _SHOWN for title in curves if title.startswith(prefix)}
