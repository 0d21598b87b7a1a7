"""`evaluate.py compare`: the same measures of several runs, and their differences to the first, on validation patients.

Models are chosen with this, so query patients stay unseen. Each validation slice is searched among those of other
patients, as validation does in training.
"""

import csv
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.evaluation.counterfactual import counterfactual_table
from decomp_jax.evaluation.rankers import METHODS, Search, rankers
from decomp_jax.evaluation.scores import score
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.evaluation.tables import Summary, abnormality_table, segmentation_summary
from decomp_jax.files import replacing
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.display import ACCENT, SOFT, STYLE
from decomp_jax.retrieval.statistics import Bootstrap, Interval

SPLIT = "validation"

# title -> name in the summaries; Dice is that of the five nearest slices.
PAIRED = {
    "lesion by abnormal code": ("abnormal", "abnormal", "dice@5"),
    "whole lesion by abnormal code": ("abnormal", "abnormal", "whole_dice@5"),
    "anatomy by normal code": ("normal", "normal", "dice@5"),
    "lesion by normal code": ("normal", "abnormal", "dice@5"),
    "anatomy by abnormal code": ("abnormal", "normal", "dice@5"),
    "whole lesion by predicted shares": ("segmentation_layout", "abnormal", "whole_dice@5"),
    "anatomy by bytes of contrast": ("contrast_bytes", "normal", "dice@5"),
    "segmentation Dice": ("dice", "whole lesion"),
    "false positives": ("lesion-free slices with a finding",),
}
AUROC, GAIN = "AUROC of abnormality", "gain of x_minus, dB"
MEASURES = (*PAIRED, AUROC, GAIN)


@dataclasses.dataclass(frozen=True)
class Result:
    """Measures of a run: those of `summary` can be compared between runs, patient by patient."""

    name: str
    step: int
    summary: Summary
    others: dict[str, Interval]

    def value(self, measure: str) -> Interval | None:
        """None where the data have no such labels."""
        name = PAIRED.get(measure)
        return self.others.get(measure) if name is None else self.summary[name] if name in self.summary else None

    def difference(self, first: "Result", measure: str) -> Interval | None:
        """To another run, over resamples of the patients of both; None for what is not paired."""
        name = PAIRED.get(measure)
        if name is None or self is first or name not in self.summary or name not in first.summary:
            return None
        pair = Summary({("a",): self.summary.means[name], ("b",): first.summary.means[name]},
                       {("a",): self.summary.resampled[name], ("b",): first.summary.resampled[name]})
        return pair.compare(("a",), ("b",))["difference"]


def compare_runs(runs: Sequence[str | Path], data: str | Path, out: str | Path) -> None:
    """Writes OUT/{comparison.md, comparison.csv, comparison.png}.

    Args:
        runs: training runs, named by their folders; the first is what the others are compared with.
        data: a prepared data set, whose split `validation` is used.
        out: directory to write into.

    Raises:
        UserError: the data have no validation slices, were prepared otherwise than a run's or have other classes,
            or two runs have one name.
    """
    names = [Path(run).name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"--runs: {', '.join(names)}: two folders of one name; name them apart")
    dataset = SliceDataset(data, SPLIT)
    if not dataset.rows["labelled"].any():
        raise UserError(f"{data}: no labelled slice in the split {SPLIT!r}; prepare the data with patients in it")
    results = [_measure(Decomposer.restore(run), dataset, name, data) for run, name in zip(runs, names)]
    if jax.process_index() == 0:
        write_comparison(results, Path(out))


def _measure(decomposer: Decomposer, dataset: SliceDataset, name: str, data: str | Path) -> Result:
    dataset = decomposer.take_images(dataset, str(data))
    settings = dataset.settings
    decomposer.check_classes(settings, str(data))
    slices = SliceSet.encode(decomposer, dataset, name, slab_mm=0)  # networks are compared, not slabs
    search = Search(slices, slices, settings)
    slice_scores = score(search, rankers(search, {name[0] for name in PAIRED.values() if name[0] in METHODS}))
    paired = {key: values for key, values in slice_scores.items() if key in PAIRED.values()}
    summary = Summary.average(paired, Bootstrap.draw(slices.rows["patient_id"]))
    summary |= segmentation_summary(slices, settings.lesion_classes)
    others = {AUROC: abnormality_table(slices).get("auroc")}
    images = counterfactual_table(decomposer, dataset, slices).get("images")
    others[GAIN] = images and images["x_minus"]["psnr gain inside"]
    return Result(name, decomposer.step, summary, {key: value for key, value in others.items() if value})


def write_comparison(results: Sequence[Result], out: Path) -> None:
    """The tables (Markdown and CSV) and the figure of differences."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "comparison.csv") as file, file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("run", "step", "measure", "mean", "low", "high", "difference", "low", "high"))
        table.writerows(_lines(results))
    with replacing(out / "comparison.md") as file:
        file.write_text(markdown(results))
    with mpl.rc_context(STYLE), replacing(out / "comparison.png") as file:
        difference_figure(results).savefig(file)


def _lines(results: Sequence[Result]) -> Iterator[tuple]:
    for result in results:
        for measure in MEASURES:
            if value := result.value(measure):
                yield result.name, result.step, measure, *value, *(result.difference(results[0], measure) or ())


def markdown(results: Sequence[Result]) -> str:
    """Tables of each run's measures and of the differences to the first run, with intervals of 95 %.

    Where runs are named VARIANT-SEED, a table of means over the seeds comes first.
    """
    shown = [measure for measure in MEASURES if results[0].value(measure)]
    paired = [measure for measure in shown if measure in PAIRED]
    tables = (
        (shown, results, lambda result, measure: _number(result.value(measure))),
        (paired, results[1:], lambda result, measure: _number(result.difference(results[0], measure), "+")),
    )
    text = "\n".join(
        _table(heading, columns, {row.name: [cell(row, column) for column in columns] for row in rows})
        for heading, (columns, rows, cell) in zip(("run", f"minus {results[0].name}"), tables)
    )
    seeds = group_seeds(results)
    if max(map(len, seeds.values())) == 1:
        return text
    means = {name: [_over_seeds(runs, measure) for measure in shown] for name, runs in seeds.items()}
    return _table("mean of the seeds (least to most)", shown, means) + "\n" + text


def group_seeds(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each variant: names that differ in a number behind the last hyphen are seeds of one."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        variant, _, seed = result.name.rpartition("-")
        groups.setdefault(variant if seed.isdecimal() else result.name, []).append(result)
    return groups


def _over_seeds(runs: Sequence[Result], measure: str) -> str:
    means = [value.mean for run in runs if (value := run.value(measure))]
    return f"{np.mean(means):.3f} ({min(means):.3f} to {max(means):.3f})" if means else ""


def _table(heading: str, columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {heading} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]) + "\n"


def _number(value: Interval | None, sign: str = "") -> str:
    if value is None:
        return ""
    mean, low, high = (f"{part:{sign}.3f}" for part in value)
    return f"{mean} ({'too few patients' if math.isnan(value.low) else f'{low} to {high}'})"


def difference_figure(results: Sequence[Result]) -> Figure:
    """Each run's difference to the first in each paired measure, with its interval."""
    first, *others = results
    shown = [measure for measure in PAIRED if first.value(measure)]
    figure = Figure(figsize=(1.9 * len(shown) + 1.6, 0.24 * len(others) + 1.1), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    heights = np.arange(len(others))[::-1]
    for axes, measure in zip(panels, shown):
        axes.axvline(0, color=SOFT, linewidth=1)
        for y, result in zip(heights, others):
            if (value := result.difference(first, measure)) is None:
                continue
            clear = value.low > 0 or value.high < 0
            colour = ACCENT if clear else SOFT
            axes.plot(value[1:], (y, y), color=colour, linewidth=2.2, alpha=0.6, solid_capstyle="butt")
            axes.plot(value.mean, y, "o", color=colour, markersize=5)
        axes.set_title(measure.replace(" by ", "\nby "), fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(heights, [result.name for result in others])
    figure.supxlabel(f"difference to {first.name}, 95 % interval over patients; blue where it excludes 0", fontsize=8)
    return figure
