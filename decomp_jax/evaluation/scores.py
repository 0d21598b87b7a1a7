"""Scores of every query under every ranking, in one pass over blocks of queries: no array holds all pairs of slices.

A score is named by (method, target, measure). The targets are what a search may be after: the `normal` anatomy, the
`abnormal` findings, `both`; further ones are `slice` (agreement of whole slices) and `column NAME` (a text column of
the rows). A query that a target does not ask for, such as a slice without lesion for `abnormal`, scores NaN.
"""

import dataclasses
from collections.abc import Iterator
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Integer
from tqdm import tqdm

from decomp_jax.evaluation.rankers import Block, Ranker, Search
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.retrieval import relevance

# Queries scored at a time: at most so many, and fewer where their pairs with the references would be more than PAIRS.
QUERY_BLOCK = 256
PAIRS = 2**22
TOP = (1, 5, 10)
# Dice from which a reference counts as relevant, for precision and average precision.
THRESHOLDS = {"normal": (0.6, 0.8), "abnormal": (0.25, 0.5), "both": (0.4, 0.6)}
MOST_KINDS = 50  # a text column with more different values than this names slices, not kinds
SLICE_COLUMNS = ("patient_id", "slice_index", "position_mm", "has_abnormality", "labelled")

Scores = dict[tuple[str, str, str], Float[np.ndarray, "n"]]
NamedScores = Iterator[tuple[tuple[str, str, str], Float[np.ndarray, "q"]]]


def score(search: Search, methods: dict[str, Ranker]) -> Scores:
    """Scores of the given methods over all queries."""
    columns = [name for name, reason in kind_columns(search.query.rows, search.reference.rows).items() if not reason]
    blocks = query_blocks(np.arange(len(search.query)), len(search.reference))
    parts = [
        dict(_block_scores(search, Block.prepare(search, queries), methods, columns))
        for queries in tqdm(blocks, desc="rank and score", unit="block")
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def query_blocks(queries: Integer[np.ndarray, "n *rest"], references: int) -> list[Integer[np.ndarray, "q *rest"]]:
    """The queries in blocks of equal size, so that a block's pairs with the references fit in memory."""
    size = max(min(QUERY_BLOCK, PAIRS // references), 1)
    return np.array_split(queries, -(-len(queries) // size))


def kind_columns(query: np.ndarray, reference: np.ndarray) -> dict[str, str]:
    """The columns of the source, each with the reason why hits are not scored by it; "" where they are.

    A column says what kind of slice it is if it holds text of few values, more than one, some of them in both splits.
    """
    return {
        name: _reason(query[name], reference[name] if name in reference.dtype.names else query[name][:0])
        for name in query.dtype.names if name not in SLICE_COLUMNS
    }


def _reason(query: np.ndarray, reference: np.ndarray) -> str:
    if query.dtype.kind != "U" or reference.dtype.kind != "U":
        return "holds numbers; write them as text, such as 'grade 2', if they name kinds"
    kinds = np.unique(reference)
    if len(kinds) < 2:
        return "has one value in all references"
    if len(kinds) > MOST_KINDS:
        return f"has {len(kinds)} values, more than the {MOST_KINDS} that are taken for kinds"
    return "" if np.isin(query, kinds).any() else "has no value of a query among the references"


def _block_scores(search: Search, block: Block, methods: dict[str, Ranker], columns: list[str]) -> NamedScores:
    query, reference = search.query, search.reference
    patient = np.unique(reference.rows["patient_id"], return_inverse=True)[1]
    judges = {
        target: _Judge.prepare(kinds, block.ideal[f"oracle_{target}"], block.excluded, THRESHOLDS[target])
        for target, kinds in block.relevances.items()
    }
    agreements = agreement(query, reference, block.queries)
    same = {column: query.rows[column][block.queries, None] == reference.rows[column] for column in columns}
    for method, rank in methods.items():
        rows = rank(block)
        one_each = relevance.first_of_each(rows, patient, k=max(TOP))
        for target, judge in judges.items():
            yield from (((method, target, measure), dice) for measure, dice in judge.scores(rows, one_each))
        for measure, agree in agreements.items():
            for k in TOP:
                gains = relevance.gains_of(agree, rows[:, :k])
                yield (method, "slice", f"{measure}@{k}"), relevance.mean_gain(gains, k)
        for column in columns:
            precisions = column_scores(same[column], rows, block.excluded)
            yield from (((method, f"column {column}", measure), precision) for measure, precision in precisions)


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
    def prepare(
        cls, kinds: dict[str, Float[np.ndarray, "q r"]], ideal_rows: Integer[np.ndarray, "q k"],
        excluded: Bool[np.ndarray, "q r"], thresholds: tuple[float, ...],
    ) -> Self:
        relevant = {threshold: ((kinds["dice"] >= threshold) & ~excluded).sum(1) for threshold in thresholds}
        return cls(kinds, relevance.gains_of(kinds["dice"], ideal_rows), relevant)

    def scores(
        self, rows: Integer[np.ndarray, "q k"], one_each: Integer[np.ndarray, "q n"]
    ) -> Iterator[tuple[str, Float[np.ndarray, "q"]]]:
        """All measures of one ranking, and of its first hit of each patient."""
        for kind, overlap in self.kinds.items():
            gains, diverse = (relevance.gains_of(overlap, hits[:, : max(TOP)]) for hits in (rows, one_each))
            for k in TOP:
                yield f"{kind}@{k}", relevance.mean_gain(gains, k)
                yield f"{kind}@{k} one per patient", relevance.mean_gain(diverse, k)
        gains = relevance.gains_of(self.kinds["dice"], rows)
        yield "ndcg@10", relevance.ndcg(gains, self.ideal, 10)
        yield "recall of ideal@10", relevance.recall_of_ideal(gains, self.ideal, 10)
        asked = ~np.isnan(self.ideal[:, 0])
        for threshold, total in self.relevant.items():
            hits = np.where(np.isnan(gains), np.nan, gains >= threshold)
            for k in TOP:
                yield f"precision@{k} (dice >= {threshold})", relevance.mean_gain(hits[:, :k], k)
            precision = relevance.average_precision(hits == 1, total)
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
    measures = {}
    if query.lesion.any() and reference.rows["labelled"].any():
        side = query.lesion_side[queries, None]
        measures["presence"] = (query.lesion[queries, None] == reference.lesion).astype(np.float32)
        measures["side"] = np.where(side == 0, np.nan, side == reference.lesion_side)
    heights = query.rows["position_mm"][queries, None] - reference.rows["position_mm"]
    if np.isfinite(heights).any():
        measures["height error in mm"] = np.abs(heights)
    return measures
