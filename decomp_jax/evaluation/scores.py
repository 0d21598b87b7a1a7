"""Scores of every query under every ranking, in one pass over blocks of queries: no array holds all pairs of slices.

A score is named by (method, target, measure). The targets are what a search may be after: the `normal` anatomy, the
`abnormal` findings, `both`; further ones are `slice` (agreement of whole slices) and `column NAME` (a text column of
the rows). A query that a target does not ask for, such as a slice without lesion for `abnormal`, scores NaN.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer
from tqdm import tqdm

from decomp_jax.data.schema import Settings
from decomp_jax.evaluation.rankers import Ranker
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.retrieval import relevance

DEPTH = 2048  # hits ranked for each query; average precision sees no further
QUERY_BLOCK = 256
TOP = (1, 5, 10)
# Dice from which a reference counts as relevant, for precision and average precision.
THRESHOLDS = {"normal": (0.6, 0.8), "abnormal": (0.25, 0.5), "both": (0.4, 0.6)}
MOST_VALUES = 50  # a text column with more different values than this names slices, not kinds
ORACLES = {
    "oracle_normal": ("normal", "dice"),
    "oracle_abnormal": ("abnormal", "dice"),
    "oracle_whole": ("abnormal", "whole_dice"),
    "oracle_both": ("both", "dice"),
}

Scores = dict[tuple[str, str, str], Float[np.ndarray, "n"]]
# Relevance of each reference for each query, by target and kind ("dice", "whole_dice", ...).
Relevances = dict[str, dict[str, Float[np.ndarray, "q r"]]]
Overlap = Callable[[Integer[np.ndarray, "q"]], Relevances]


def score(query: SliceSet, reference: SliceSet, methods: dict[str, Ranker], relevances: Overlap) -> Scores:
    """Scores of the given methods and of the oracles, over all queries."""
    columns = text_columns(query.rows, reference.rows)
    blocks = np.array_split(np.arange(len(query)), -(-len(query) // QUERY_BLOCK))
    parts = [
        dict(_block_scores(query, reference, queries, methods, relevances(queries), columns))
        for queries in tqdm(blocks, desc="rank and score", unit="block")
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same_patient(
    query: SliceSet, reference: SliceSet, queries: Integer[np.ndarray, "q"]
) -> Bool[np.ndarray, "q r"]:
    return query.rows["patient_id"][queries, None] == reference.rows["patient_id"]


def label_overlap(query: SliceSet, reference: SliceSet, settings: Settings) -> Overlap:
    """The relevances of all references for some queries; a target without labels is absent."""
    lesions, regions = len(settings.lesion_classes), len(settings.anatomy_classes)
    asked = {"normal": None if query.anatomy is None else query.anatomy.any((1, 2)), "abnormal": query.lesion}
    ours, theirs = _views(query, reference)

    def dice(view: str, classes: int, queries: np.ndarray) -> Float[Array, "q r c"]:
        return relevance.class_dice(ours[view][queries], theirs[view], classes=classes)

    def whole(view: str, queries: np.ndarray) -> Float[Array, "q r"]:
        return relevance.whole_dice(ours[view][queries], theirs[view])

    def of(queries: np.ndarray) -> Relevances:
        found: Relevances = {}
        if query.anatomy is not None:
            found["normal"] = _conventions(dice("anatomy", regions, queries))
        if query.lesion.any() and reference.rows["labelled"].any():
            area = relevance.area_similarity(ours["lesion"][queries], theirs["lesion"], classes=lesions)
            found["abnormal"] = _conventions(dice("lesion", lesions, queries)) | {
                "whole_dice": whole("lesion", queries),
                "aligned_dice": relevance.mean_over_classes(dice("aligned", lesions, queries)),
                "aligned_whole_dice": whole("aligned", queries),
                "area_similarity": relevance.mean_over_classes(area),
            }
        found = {
            target: {
                kind: np.where(asked[target][queries, None], np.asarray(values), np.nan)
                for kind, values in kinds.items()
            }
            for target, kinds in found.items()
        }
        if len(found) == 2:
            kinds = ("dice", "zero_dice")
            found["both"] = {kind: (found["normal"][kind] + found["abnormal"][kind]) / 2 for kind in kinds}
        return found

    return of


def _views(query: SliceSet, reference: SliceSet) -> tuple[dict[str, np.ndarray], dict[str, Array]]:
    """The label maps that slices are compared by, those of the references on the device; only the pixels in use."""
    ours, theirs = {}, {}
    for name, view in _VIEWS.items():
        if query.anatomy is not None or name != "anatomy":
            maps = [view(slices).reshape(len(slices), -1) for slices in (query, reference)]
            used = maps[0].any(0) | maps[1].any(0)
            ours[name], theirs[name] = maps[0][:, used], jnp.asarray(maps[1][:, used])
    return ours, theirs


_VIEWS = {
    "lesion": lambda slices: slices.label, "aligned": lambda slices: relevance.centre_lesions(slices.label),
    "anatomy": lambda slices: slices.anatomy,
}


def _conventions(dice: Float[Array, "q r c"]) -> dict[str, Float[Array, "q r"]]:
    return {"dice": relevance.mean_over_classes(dice), "zero_dice": relevance.mean_over_classes(dice, "zero")}


def text_columns(query: np.ndarray, reference: np.ndarray) -> list[str]:
    """Text columns that say what kind of slice it is: few values, some of them in both splits, more than one."""
    names = [name for name in query.dtype.names if query.dtype[name].kind == "U" and name != "patient_id"]
    values = {name: (np.unique(query[name]), np.unique(reference[name])) for name in names}
    return [
        name for name, (ours, theirs) in values.items()
        if 2 <= len(theirs) <= MOST_VALUES and np.isin(ours, theirs).any()
    ]


def _block_scores(
    query: SliceSet, reference: SliceSet, queries: Integer[np.ndarray, "q"], methods: dict[str, Ranker],
    relevances: Relevances, columns: list[str],
) -> Iterator[tuple[tuple[str, str, str], Float[np.ndarray, "q"]]]:
    excluded = same_patient(query, reference, queries)
    patient = np.unique(reference.rows["patient_id"], return_inverse=True)[1]
    depth = min(DEPTH, len(reference))
    ideal = {
        method: relevance.nearest(-relevances[target][kind], excluded=excluded, k=depth)
        for method, (target, kind) in ORACLES.items() if target in relevances
    }
    judges = {
        target: _Judge.of(kinds, ideal[f"oracle_{target}"], excluded, THRESHOLDS[target])
        for target, kinds in relevances.items()
    }
    agreements = agreement(query, reference, queries)
    same = {column: query.rows[column][queries, None] == reference.rows[column] for column in columns}
    for method in (*methods, *ideal):
        rows = ideal[method] if method in ideal else methods[method](queries, excluded)
        one_each = relevance.first_of_each(rows, patient, k=max(TOP))
        for target, judge in judges.items():
            yield from (((method, target, measure), values) for measure, values in judge.scores(rows, one_each))
        for measure, values in agreements.items():
            for k in TOP:
                gains = relevance.gains_of(values, rows[:, :k])
                yield (method, "slice", f"{measure}@{k}"), relevance.mean_gain(gains, k)
        for column in columns:
            scores = column_scores(same[column], rows, excluded)
            yield from (((method, f"column {column}", measure), values) for measure, values in scores)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """What rankings are held to for one target.

    Attributes:
        kinds: relevances by kind; measures without another name take the primary Dice as gain.
        ideal: gains of the ideal ranking.
        relevant: number of references that may be found, by the Dice from which one counts as relevant.
    """

    kinds: dict[str, Float[np.ndarray, "q r"]]
    ideal: Float[np.ndarray, "q k"]
    relevant: dict[float, Integer[np.ndarray, "q"]]

    @classmethod
    def of(
        cls, kinds: dict[str, Float[np.ndarray, "q r"]], ideal_rows: Integer[np.ndarray, "q k"],
        excluded: Bool[np.ndarray, "q r"], thresholds: tuple[float, ...],
    ) -> Self:
        relevant = {threshold: ((kinds["dice"] >= threshold) & ~excluded).sum(1) for threshold in thresholds}
        return cls(kinds, relevance.gains_of(kinds["dice"], ideal_rows), relevant)

    def scores(
        self, rows: Integer[np.ndarray, "q k"], one_each: Integer[np.ndarray, "q n"]
    ) -> Iterator[tuple[str, Float[np.ndarray, "q"]]]:
        """All measures of one ranking, and of its first hit of each patient."""
        for kind, values in self.kinds.items():
            gains, diverse = (relevance.gains_of(values, hits[:, : max(TOP)]) for hits in (rows, one_each))
            for k in TOP:
                yield f"{kind}@{k}", relevance.mean_gain(gains, k)
                yield f"{kind}@{k} one per patient", relevance.mean_gain(diverse, k)
        gains = relevance.gains_of(self.kinds["dice"], rows)
        yield "ndcg@10", relevance.ndcg(gains, self.ideal, 10)
        yield "recall of ideal@10", relevance.recall_of_ideal(gains, self.ideal, 10)
        asked = ~np.isnan(self.ideal[:, 0])
        for threshold, total in self.relevant.items():
            found = np.where(np.isnan(gains), np.nan, gains >= threshold)
            for k in TOP:
                yield f"precision@{k} (dice >= {threshold})", relevance.mean_gain(found[:, :k], k)
            precision = relevance.average_precision(found == 1, total)
            yield f"map (dice >= {threshold})", np.where(asked, precision, np.nan)


def column_scores(
    same: Bool[np.ndarray, "q r"], rows: Integer[np.ndarray, "q k"], excluded: Bool[np.ndarray, "q r"]
) -> Iterator[tuple[str, Float[np.ndarray, "q"]]]:
    """Precision at k and average precision, a reference being relevant if the column's text is the query's."""
    gains = relevance.gains_of(same.astype(float), rows)
    for k in TOP:
        yield f"precision@{k}", relevance.mean_gain(gains, k)
    precision = relevance.average_precision(gains == 1, (same & ~excluded).sum(1))
    yield "map", np.where(rows[:, 0] < 0, np.nan, precision)  # no ranking was asked for, as of an oracle without label


def agreement(
    query: SliceSet, reference: SliceSet, queries: Integer[np.ndarray, "q"]
) -> dict[str, Float[np.ndarray, "q r"]]:
    """Whether slices agree in having a lesion and (asked by slices with one) in its side; distance of heights in mm."""
    found = {}
    if query.lesion.any() and reference.rows["labelled"].any():
        found["presence"] = (query.lesion[queries, None] == reference.lesion).astype(np.float32)
        ours = lesion_side(query.label[queries])[:, None]
        found["side"] = np.where(ours == 0, np.nan, ours == lesion_side(reference.label))
    heights = query.rows["position_mm"][queries, None] - reference.rows["position_mm"]
    if np.isfinite(heights).any():
        found["height error in mm"] = np.abs(heights)
    return found


def lesion_side(label: np.ndarray) -> Integer[np.ndarray, "n"]:
    """-1 or 1 for the half of the image, left or right, that holds more of the lesion; 0 without a lesion or a side."""
    half = label.shape[2] // 2
    left, right = ((side > 0).sum((1, 2), dtype=np.int64) for side in (label[:, :, :half], label[:, :, half:]))
    return np.sign(right - left)
