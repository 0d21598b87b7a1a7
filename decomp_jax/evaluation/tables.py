"""The numbers of a report: scores averaged over patients, with bootstrap intervals, as nested dictionaries."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from decomp_jax.evaluation.rankers import Search
from decomp_jax.evaluation.scores import NamedScores, Scores, query_blocks
from decomp_jax.evaluation.scratch import blocks
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.models import vq
from decomp_jax.retrieval import relevance
from decomp_jax.retrieval.statistics import Bootstrap, Interval, PairBootstrap, interval, ratio

Table = dict[str, Any]

# Each target's own code; and beside what a code finds of another target, what the oracle of the code's own target finds
# of it: the labels alone force that much.
OWN = {"normal": "normal", "abnormal": "abnormal", "both": "both"}
FLOOR = {(row, column): f"oracle_{row}" for row in OWN for column in OWN if row != column}
HEADLINE = ("dice@5", "whole_dice@5")
MIXED_PAIRS = 4096  # mixed queries scored, at most


@dataclasses.dataclass(frozen=True)
class Summary:
    """Averages of scores over patients, and of each resample, by name; NaN where a score was never asked for."""

    means: dict[tuple[str, ...], float]
    resampled: dict[tuple[str, ...], Float[np.ndarray, "samples"]]

    @classmethod
    def average(
        cls, scores: dict[tuple[str, ...], Float[np.ndarray, "n"]], bootstrap: Bootstrap | PairBootstrap
    ) -> Self:
        """Of scores of the bootstrap's slices (or pairs of slices)."""
        if not scores:
            return cls({}, {})
        means, resampled = bootstrap.macro(np.stack(list(scores.values()), axis=1))
        asked = [(name, i) for i, name in enumerate(scores) if np.isfinite(means[i])]
        return cls({name: float(means[i]) for name, i in asked}, {name: resampled[:, i] for name, i in asked})

    def __contains__(self, name: tuple[str, ...]) -> bool:
        return name in self.means

    def __or__(self, other: Self) -> Self:
        """Both, of which the resamples must be those of the same patients."""
        return Summary(self.means | other.means, self.resampled | other.resampled)

    def __getitem__(self, name: tuple[str, ...]) -> Interval:
        return interval(self.means[name], self.resampled[name])

    def compare(self, a: tuple[str, ...], b: tuple[str, ...]) -> dict[str, Interval]:
        """Paired difference a - b and ratio a / b."""
        return {
            "difference": interval(self.means[a] - self.means[b], self.resampled[a] - self.resampled[b]),
            "ratio": interval(float(ratio(self.means[a], self.means[b])), ratio(self.resampled[a], self.resampled[b])),
        }

    def nested(self, names: Iterator[tuple[str, ...]] | None = None) -> Table:
        """Intervals by the parts of their names: (a, b, c) becomes table[a][b][c]."""
        table: Table = {}
        for name in self.means if names is None else names:
            *outer, last = name
            place = table
            for part in outer:
                place = place.setdefault(part, {})
            place[last] = self[name]
        return table


def retrieval_tables(summary: Summary) -> Table:
    """`retrieval[method][target][measure]`, `agreement[method][measure]` and `columns[column][method][measure]`."""
    plain = [name for name in summary.means if name[1] in OWN]
    slices = [name for name in summary.means if name[1] == "slice"]
    columns = Summary(
        {_by_column(name): summary.means[name] for name in summary.means if name[1].startswith("column ")},
        {_by_column(name): summary.resampled[name] for name in summary.means if name[1].startswith("column ")},
    )
    agreement = {method: table["slice"] for method, table in summary.nested(slices).items()}
    return {"retrieval": summary.nested(plain), "agreement": agreement, "columns": columns.nested()}


def _by_column(name: tuple[str, str, str]) -> tuple[str, str, str]:
    method, column, measure = name
    return column.removeprefix("column "), method, measure


def comparisons(summary: Summary) -> Table:
    """`comparisons[target][measure]["a vs b"]`: each target's own code with every other method, and the codes of the
    other targets with their floors."""
    table: Table = {}
    methods = dict.fromkeys(method for method, *_ in summary.means)
    for target, own in OWN.items():
        pairs = [(own, other) for other in methods if other != own]
        pairs += [(row, floor) for (row, column), floor in FLOOR.items() if column == target]
        for measure in HEADLINE:
            for a, b in pairs:
                if (a, target, measure) in summary and (b, target, measure) in summary:
                    comparison = summary.compare((a, target, measure), (b, target, measure))
                    table.setdefault(target, {}).setdefault(measure, {})[f"{a} vs {b}"] = comparison
    return table


def strata(scores: Scores, query: SliceSet, bootstrap: Bootstrap) -> Table:
    """Dice@5 of the main methods by thirds of lesion area and of slice height: `strata[by][third][method][target]`."""
    area = np.where(query.lesion, query.lesion_area, np.nan)
    heights = query.rows["position_mm"].astype(float)
    names = [
        (method, target, measure) for method, target, measure in scores
        if measure in HEADLINE and target in ("normal", "abnormal") and method in ("normal", "abnormal", "pixel_l2")
    ]
    table: Table = {}
    for by, size, parts in (
        ("lesion area", area, ("small", "middle", "large")), ("slice height", heights, ("low", "middle", "high")),
    ):
        if np.isfinite(size).sum() < len(parts):
            continue
        edges = np.nanquantile(size, (1 / 3, 2 / 3))
        third = np.where(np.isnan(size), -1, np.searchsorted(edges, size))
        for i, part in enumerate(parts):
            if i not in third:  # many slices of one value
                continue
            chosen = {name: np.where(third == i, scores[name], np.nan) for name in names}
            bounds = [float(np.nanmin(size[third == i])), float(np.nanmax(size[third == i]))]
            table.setdefault(by, {})[part] = {"from_to": bounds, **Summary.average(chosen, bootstrap).nested()}
    return table


class Mixed(NamedTuple):
    """Pairs of query slices (A, B), and the scores of their searches by (method, target, measure)."""

    pairs: Integer[np.ndarray, "m 2"]
    scores: Scores


def mixed_queries(search: Search) -> Mixed | None:
    """Searches with the anatomy of one slice, A, and the lesion of another patient's, B, scored against both.

    Each query slice with a lesion (of more than `MIXED_PAIRS`, a draw of so many) is A once; B is drawn among those of
    other patients. `oracle of both` ranks by the mean of both true overlaps: what the references hold. None without
    anatomy, without labels among the references, or with lesions of a single patient.
    """
    patients, lesion = search.query.rows["patient_id"], np.flatnonzero(search.query.lesion)
    if search.overlap.targets != ("normal", "abnormal", "both") or len(np.unique(patients[lesion])) < 2:
        return None
    pairs = _draw_pairs(patients, lesion, np.random.default_rng(search.seed))
    parts = [dict(_mixed_scores(search, block)) for block in query_blocks(pairs, len(search.reference))]
    return Mixed(pairs, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def mixed_table(mixed: Mixed | None, query: SliceSet) -> Table:
    """`mixed[method][target]["dice@5"]`, and what a mix keeps of either half alone.

    Means are over the patients of A; intervals are resampled over the patients of A and of B.
    """
    if mixed is None:
        return {}
    summary = Summary.average(mixed.scores, PairBootstrap.draw(query.rows["patient_id"][mixed.pairs]))

    def kept(mix: str, half_a: str, half_b: str) -> Table:
        return {
            target: summary.compare((mix, target, "dice@5"), (half, target, "dice@5"))
            for target, half in (("anatomy of A", half_a), ("lesion of B", half_b))
        }

    return {
        **summary.nested(),
        "mixed vs pure": kept("mixed", "normal code of A", "abnormal code of B"),
        "oracle vs pure": kept("oracle of both", "oracle of A", "oracle of B"),
    }


def _draw_pairs(patients: np.ndarray, slices: np.ndarray, rng: np.random.Generator) -> Integer[np.ndarray, "m 2"]:
    a = np.sort(rng.permutation(slices)[:MIXED_PAIRS])
    b = rng.choice(slices, len(a))
    while (same := patients[a] == patients[b]).any():
        b[same] = rng.choice(slices, same.sum())
    return np.stack([a, b], axis=1)


def _mixed_scores(search: Search, pairs: Integer[np.ndarray, "m 2"]) -> NamedScores:
    query, reference = search.query, search.reference
    a, b = pairs.T
    of_a, of_b = search.overlap(a), search.overlap(b)
    excluded = search.excluded(a) | search.excluded(b)
    normal, abnormal = query.bank.normal_indices[a], query.bank.abnormal_indices[b]
    nearest = functools.partial(reference.bank.search, k=5, exclude=query.rows["patient_id"][pairs])
    best = functools.partial(relevance.nearest, excluded=excluded, k=5)
    anatomy, lesion = of_a["normal"]["dice"], of_b["abnormal"]["dice"]
    rows = {
        "mixed": nearest(normal=normal, abnormal=abnormal).rows,
        "normal code of A": nearest(normal=normal).rows,
        "abnormal code of B": nearest(abnormal=abnormal).rows,
        "oracle of both": best(-anatomy - lesion),
        "oracle of A": best(-anatomy),
        "oracle of B": best(-lesion),
        "random": best(np.random.default_rng(0).random(excluded.shape)),
    }
    targets = {
        "anatomy of A": of_a["normal"], "lesion of B": of_b["abnormal"],
        "anatomy of B": of_b["normal"], "lesion of A": of_a["abnormal"],
    }
    for method, hits in rows.items():
        for target, kinds in targets.items():
            gains = relevance.gains_of(kinds["dice"], np.asarray(hits))
            yield (method, target, "dice@5"), relevance.mean_gain(gains, 5)


def segmentation_summary(query: SliceSet, classes: tuple[str, ...]) -> Summary:
    """Dice of the predicted labels per class and of the whole lesion, over all slices of a patient together; shares of
    lesion-free slices with a finding and of lesion slices without one."""
    names, patient = np.unique(query.rows["patient_id"], return_inverse=True)
    predicted_area = query.predicted_area
    dice = {}
    for label, name in enumerate((*classes, "whole lesion"), start=1):
        counts = np.zeros((len(names), 3))
        np.add.at(counts, patient, _pixel_counts(query, label if label <= len(classes) else 0))
        overlap, true, predicted = counts.T
        dice["dice", name] = np.where(true > 0, ratio(2 * overlap, true + predicted), np.nan)
    slices = {
        ("lesion-free slices with a finding",): np.where(query.lesion, np.nan, predicted_area > 0),
        ("lesion slices without a finding",): np.where(query.lesion, predicted_area == 0, np.nan),
    }
    by_patient, by_slice = Bootstrap.draw(names), Bootstrap.draw(query.rows["patient_id"])
    return Summary.average(dice, by_patient) | Summary.average(slices, by_slice)


def _pixel_counts(query: SliceSet, label: int) -> Integer[np.ndarray, "n 3"]:
    """Pixels of each slice with a label (any, if it is 0) in both maps, in the true one, and in the predicted one."""

    def count(block: slice) -> Integer[np.ndarray, "b 3"]:
        true, predicted = (
            maps[block] == label if label else maps[block] > 0 for maps in (query.label, query.segmentation)
        )
        return np.stack([mask.sum((1, 2), dtype=np.int64) for mask in (true & predicted, true, predicted)], axis=1)

    return np.concatenate([count(block) for block in blocks(len(query))])


def abnormality_table(query: SliceSet) -> Table:
    """How well the abnormality score, the predicted lesion area, and the summed lesion probability tell lesion slices
    from the others; empty without one or the other."""
    if query.lesion.all() or not query.lesion.any():
        return {}
    bootstrap = Bootstrap.draw(query.rows["patient_id"])
    findings = {
        "auroc": query.abnormality, "auroc of predicted area": query.predicted_area,
        "auroc of lesion probability": query.lesion_probability,
    }
    return {name: bootstrap.auroc(score.astype(float), query.lesion) for name, score in findings.items()}


def codebook_table(slices: SliceSet) -> Table:
    """Codes in use and perplexity (exp of the entropy of use) of each codebook, over lesion and lesion-free slices."""
    table: Table = {}
    for path in ("normal", "abnormal"):
        size = len(getattr(slices.bank, f"{path}_codebook"))
        indices = getattr(slices.bank, f"{path}_indices")
        table[path] = {"size": size}
        for kind, chosen in (("lesion slices", slices.lesion), ("lesion-free slices", ~slices.lesion)):
            if chosen.any():
                table[path][kind] = code_use(indices[chosen], size)
    return table


def code_use(indices: Integer[np.ndarray, "*n"], size: int) -> dict[str, float]:
    """Codes in use, perplexity of their use, and the share of cells that the most common one takes."""
    share, perplexity = vq.usage(jnp.asarray(indices, jnp.int32), size)
    return {
        "used": round(float(share) * size), "perplexity": float(perplexity),
        "most common": float(np.bincount(indices.ravel(), minlength=size).max() / indices.size),
    }
