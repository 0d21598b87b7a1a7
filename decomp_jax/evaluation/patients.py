"""Patients in place of slices: which reference patients are most like a query patient, in three dimensions.

As for slices there is one table of methods, `METHODS`. A method gives distances of all query patients to all reference
patients for a target, searched by the target's own codes: the normal ones for the anatomy, the abnormal ones for the
lesion. A score is named by (method, target, measure); a patient that a target does not ask for scores NaN.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from decomp_jax.evaluation.rankers import Search, latent_queries, relative_queries, squared_distances
from decomp_jax.evaluation.scores import NamedScores, Scores
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.evaluation.tables import Summary, Table
from decomp_jax.retrieval import relevance
from decomp_jax.retrieval.bank import WITHIN_MM
from decomp_jax.retrieval.statistics import Bootstrap

TOP = (1, 5, 10)
VOTES = 50  # hits of each query slice that vote for their patients
PATHS = {"normal": ("normal",), "abnormal": ("abnormal",), "both": ("normal", "abnormal")}
# A plane of the common space takes the nearest slice, no further than this part of the slices' spacing: half, and what
# spacings differ by.
NEAR = 0.6
MEASURES = ("dice@5", "whole_dice@5", "ndcg@10")

Distances = Float[np.ndarray, "q r"]


class Stack:
    """Slices as patients: who they are, and their volumes in the space that all share.

    Attributes:
        ids: of the patients, sorted.
        heights: of the slices, mm.
        pixel: side of a pixel of the label maps, mm.
        rows: of each patient, its slices from the feet up.
    """

    def __init__(self, slices: SliceSet) -> None:
        self.slices = slices
        self.ids, patient = np.unique(slices.rows["patient_id"], return_inverse=True)
        self.heights = slices.rows["position_mm"].astype(float)
        self.pixel = slices.dataset.settings.field_mm / slices.label.shape[1]
        order = np.lexsort((self.heights, patient))
        self.rows = np.split(order, np.flatnonzero(np.diff(patient[order])) + 1)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def spacing(self) -> float:
        """Median distance of neighbouring slices, mm; infinite where no patient has two."""
        gaps = np.concatenate([np.diff(self.heights[rows]) for rows in self.rows])
        return float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else np.inf

    def gather(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A function of the positions of each patient's slices."""
        return np.stack([function(rows) for rows in self.rows])

    def volume_and_centroid(self, labels: UInt8[np.ndarray, "n s s"]) -> Float[np.ndarray, "p 4"]:
        """Radius of the ball of the lesion's volume, and the lesion's centroid, all in mm; NaN without a lesion."""
        def measure(rows: np.ndarray) -> np.ndarray:
            mask = labels[rows] > 0
            areas = mask.sum((1, 2))
            if not areas.any():
                return np.full(4, np.nan)
            gap = np.median(np.diff(self.heights[rows])) if len(rows) > 1 else self.pixel
            radius = (3 / (4 * np.pi) * areas.sum() * self.pixel**2 * gap) ** (1 / 3)
            inside = self.pixel * np.argwhere(mask)[:, 1:].mean(0)
            return np.array([radius, np.average(self.heights[rows], weights=areas), *inside])

        return self.gather(measure)

    def planes(self, labels: np.ndarray, spacing: float, moved: Integer[np.ndarray, "p 3"] | None = None
               ) -> "Planes":
        """`labels` of the patients plane by plane, of planes `spacing` mm apart."""
        plane_of = {}
        for patient, rows in enumerate(self.rows):
            lift = 0 if moved is None else moved[patient, 0]
            first, last = np.floor(self.heights[rows[0]] / spacing), np.ceil(self.heights[rows[-1]] / spacing)
            for plane in range(int(first), int(last) + 1):
                distance = np.abs(self.heights[rows] - plane * spacing)
                if distance.min() <= NEAR * spacing:
                    plane_of.setdefault(plane + lift, {})[patient] = rows[distance.argmin()]
        return Planes(labels, len(self), plane_of, moved)


class Planes(NamedTuple):
    """Label maps of patients in planes that all patients share.

    Attributes:
        labels: uint8 [n,s,s], of all slices.
        patients: how many.
        slices: the slice of each patient in each plane, where it has one.
        moved: planes, rows and columns by which each patient is moved; None: not at all.
    """

    labels: np.ndarray
    patients: int
    slices: dict[int, dict[int, int]]
    moved: np.ndarray | None

    def __getitem__(self, plane: int) -> UInt8[np.ndarray, "p s s"]:
        maps = np.zeros((self.patients, *self.labels.shape[1:]), np.uint8)
        for patient, row in self.slices.get(plane, {}).items():
            label = self.labels[row]
            maps[patient] = label if self.moved is None else np.roll(label, self.moved[patient, 1:], (0, 1))
        return maps


def volume_dice(query: Planes, reference: Planes, classes: int) -> Float[np.ndarray, "q r {classes}+1"]:
    """Dice of the volumes of all pairs of patients, for each class and for all together; NaN where neither has any.

    One plane at a time is in memory.
    """
    common = np.zeros((query.patients, reference.patients, classes + 1))
    sizes = [np.zeros((planes.patients, classes + 1)) for planes in (query, reference)]
    for plane in sorted({*query.slices, *reference.slices}):
        maps = [planes[plane].reshape(planes.patients, -1) for planes in (query, reference)]
        for label in range(classes + 1):
            # Counts are exact in float32, and such matrices are multiplied fast.
            a, b = ((values == label + 1 if label < classes else values > 0).astype(np.float32) for values in maps)
            used = a.any(0) & b.any(0)
            common[..., label] += a[:, used] @ b[:, used].T
            sizes[0][:, label] += a.sum(1)
            sizes[1][:, label] += b.sum(1)
    total = sizes[0][:, None] + sizes[1]
    return np.where(total > 0, 2 * common / np.maximum(total, 1), np.nan)


class PatientSearch:
    """Query patients, reference patients, and how alike they are."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.query, self.reference = (Stack(slices) for slices in (search.query, search.reference))
        self.excluded: Bool[np.ndarray, "q r"] = self.query.ids[:, None] == self.reference.ids
        self.cache: dict[tuple, np.ndarray] = {}

    @functools.cached_property
    def relevances(self) -> dict[str, dict[str, Distances]]:
        """Overlap of all pairs of patients, by target and kind; NaN where the target does not ask."""
        search, stacks = self.search, (self.query, self.reference)
        spacing = min(stack.spacing for stack in stacks)
        found, targets = {}, search.overlap.targets
        if "normal" in targets:
            planes = (stack.planes(stack.slices.anatomy, spacing) for stack in stacks)
            dice = volume_dice(*planes, len(search.settings.anatomy_classes))
            found["normal"] = {"dice": np.asarray(relevance.mean_over_classes(dice[..., :-1]))}
        if "abnormal" in targets:
            classes = len(search.settings.lesion_classes)
            moves = (_to_the_middle(stack, spacing) for stack in stacks)
            for prefix, moved in (("", (None, None)), ("aligned_", tuple(moves))):
                planes = (stack.planes(stack.slices.label, spacing, move) for stack, move in zip(stacks, moved))
                dice = volume_dice(*planes, classes)
                found.setdefault("abnormal", {})[f"{prefix}dice"] = np.asarray(
                    relevance.mean_over_classes(dice[..., :-1])
                )
                found["abnormal"][f"{prefix}whole_dice"] = dice[..., -1]
            asks = np.array([search.query.lesion[rows].any() for rows in self.query.rows])
            found["abnormal"] = {
                kind: np.where(asks[:, None], dice, np.nan) for kind, dice in found["abnormal"].items()
            }
        if "both" in targets:
            found["both"] = {"dice": (found["normal"]["dice"] + found["abnormal"]["dice"]) / 2}
        return found

    def asking(self, target: str) -> list[np.ndarray]:
        """The slices of each query patient that ask: for the lesion those in which the network sees one."""
        if target != "abnormal":
            return self.query.rows
        seen = self.search.query.predicted_area > 0
        return [rows[seen[rows]] if seen[rows].any() else rows for rows in self.query.rows]

    def nearest_patients(
        self, target: str, within_mm: float = WITHIN_MM["abnormal"]
    ) -> tuple[Distances, Distances]:
        """Exact distances of the nearest patients, infinite of all others; and how far apart matched slices are, mm."""
        if (target, within_mm) not in self.cache:
            bank, ids = self.search.reference.bank, self.reference.ids
            ask, within = latent_queries(*PATHS[target]), {"abnormal": within_mm}
            distances, apart = np.full((2, *self.excluded.shape), np.inf)
            for i, rows in enumerate(self.query.rows):
                heights = self.query.heights[rows]
                hits = bank.search_patients(
                    ask(self.search.query, rows), heights=heights, k=max(TOP), within_mm=within,
                    exclude=self.query.ids[i : i + 1],
                )
                places = np.searchsorted(ids, hits.patients)
                distances[i, places] = hits.distances
                matches = hits.matches[PATHS[target][-1]]
                gaps = np.abs(self.reference.heights[matches] - heights)
                counted = (matches >= 0) & np.isin(rows, self.asking(target)[i])
                apart[i, places] = np.where(
                    counted.any(1), (gaps * counted).sum(1) / np.maximum(counted.sum(1), 1), np.nan
                )
            self.cache[target, within_mm] = distances, apart
        return self.cache[target, within_mm]

    def slice_hits(self, target: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each query patient the hits of its asking slices: their patients [s,v] and distances."""
        if ("hits", target) not in self.cache:
            number = np.searchsorted(self.reference.ids, self.search.reference.rows["patient_id"])
            query, rows = self.search.query, np.concatenate(self.asking(target))
            queries, exclude = relative_queries(*PATHS[target])(query, rows), query.rows["patient_id"][rows]
            hits = self.search.reference.bank.search(queries, exclude=exclude, k=min(VOTES, len(number)))
            self.cache["hits", target] = np.where(hits.rows < 0, -1, number[hits.rows]), hits.distances
        ends = np.cumsum([len(rows) for rows in self.asking(target)])[:-1]
        return zip(*(np.split(values, ends) for values in self.cache["hits", target]))


def _to_the_middle(stack: Stack, spacing: float) -> Integer[np.ndarray, "p 3"]:
    """Planes, rows and columns that bring the centroids of the lesions to one place."""
    size = stack.slices.label.shape[1]
    _, height, *inside = stack.volume_and_centroid(stack.slices.label).T
    planes = np.stack([-height / spacing, *(size // 2 - place / stack.pixel for place in inside)], axis=1)
    return np.floor(np.nan_to_num(planes) + 0.5).astype(int)


# ---------------------------------------------------------------- methods

# Distances for a target; None where the method knows nothing of it.
Builder = Callable[[PatientSearch, str], Distances | None]


class Method(NamedTuple):
    """A way of ranking patients: see `rankers.Method`."""

    title: str
    group: str
    sentence: str
    builder: Builder


def by_tally(tally: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Builder:
    """By the sum over slice hits of a function of their distances [s,v]; patients without a hit come last."""

    def build(patients: PatientSearch, target: str) -> Distances:
        sums = np.zeros(patients.excluded.shape)
        for line, (hit, distance) in zip(sums, patients.slice_hits(target)):
            found = hit >= 0
            np.add.at(line, hit[found], tally(distance)[found])
        return -sums

    return build


def _farthest(distance: Float[np.ndarray, "s v"]) -> Float[np.ndarray, "s 1"]:
    """The largest distance of each line that is of a hit, not 0."""
    return np.where(np.isinf(distance), 0, distance).max(1, keepdims=True).clip(1e-9)


def by_nearest_slice(patients: PatientSearch, target: str) -> Distances:
    """By the least distance of two slices; patients without a hit come last."""
    least = np.full(patients.excluded.shape, np.finfo(np.float32).max)
    for line, (hit, distance) in zip(least, patients.slice_hits(target)):
        np.minimum.at(line, hit[hit >= 0], distance[hit >= 0])
    return least


def by_mean(vectors: Callable[[SliceSet, str], np.ndarray]) -> Builder:
    """By the squared L2 of the mean vectors of all slices, summed over paths."""

    def pool(stack: Stack, path: str) -> np.ndarray:
        values = vectors(stack.slices, path)
        return stack.gather(lambda rows: values[rows].astype(np.float32).mean(0).ravel())

    return lambda patients, target: sum(
        np.asarray(squared_distances(pool(patients.query, path), pool(patients.reference, path)))
        for path in PATHS[target]
    )


def by_histogram(patients: PatientSearch, target: str) -> Distances:
    """By L1 of the shares of cells that take each code, summed over paths."""

    def histogram(stack: Stack, path: str) -> np.ndarray:
        bank = stack.slices.bank
        indices, size = getattr(bank, f"{path}_indices"), len(getattr(bank, f"{path}_codebook"))
        return stack.gather(lambda rows: np.bincount(indices[rows].ravel(), minlength=size) / indices[rows].size)

    def distances(path: str) -> Distances:
        reference = histogram(patients.reference, path)
        return np.stack([np.abs(line - reference).sum(1) for line in histogram(patients.query, path)])

    return sum(map(distances, PATHS[target]))


def by_volume(labels: str) -> Builder:
    """By the lesion's place and size alone; a patient without a lesion is taken for one of no size in the middle."""

    def build(patients: PatientSearch, target: str) -> Distances | None:
        if target != "abnormal":
            return None
        query, reference = (
            stack.volume_and_centroid(getattr(stack.slices, labels)) for stack in (patients.query, patients.reference)
        )
        places = reference[~np.isnan(reference[:, 0]), 1:]
        middle = [0, *(places.mean(0) if len(places) else np.zeros(3))]
        query, reference = (np.where(np.isnan(values), middle, values) for values in (query, reference))
        return ((query[:, None] - reference) ** 2).sum(2)

    return build


def by_truth(kind: str) -> Builder:
    """By the true overlap; NaN, where a patient asks for nothing, is no hit."""

    def build(patients: PatientSearch, target: str) -> Distances | None:
        overlap = patients.relevances[target].get(kind)
        return None if overlap is None else -overlap

    return build


def by_chance(patients: PatientSearch, _: str) -> Distances:
    """In random order, the same in every run of a seed."""
    return patients.search.random.random(patients.excluded.shape)


WHOLE, POOLED, TRUTH = "All slices matched", "Pooled, counted, or without codes", "By the true labels"
METHODS = {
    "patient": Method(
        "patient distance", WHOLE,
        f"Each slice matched with the nearest of the other patient's, anatomy within {WITHIN_MM['normal']:g} mm of "
        f"height, lesions within {WITHIN_MM['abnormal']:g} mm, both ways, relative to what the lesions are from none; "
        "the query's slices are not quantised.",
        lambda patients, target: patients.nearest_patients(target)[0],
    ),
    "patient_anywhere": Method(
        "patient distance, lesion at any height", WHOLE, "The same, lesions matched whatever their heights.",
        lambda patients, target: None if target == "normal" else patients.nearest_patients(target, np.inf)[0],
    ),
    "votes": Method(
        "votes of slices", POOLED,
        f"How many of the {VOTES} slices nearest to each of the query's, by relative distance, are the patient's.",
        by_tally(np.ones_like),
    ),
    "sum": Method(
        "sum of slice scores", POOLED,
        "The same, a vote counting 1 for distance 0, down to 0 for the last of these slices.",
        by_tally(lambda distance: 1 - distance / _farthest(distance)),
    ),
    "maximum": Method("best slice score", POOLED, "The least distance of two slices.", by_nearest_slice),
    "pooled": Method(
        "mean vectors, L2", POOLED, "Vectors before quantisation, mean over the slices, cell by cell.",
        by_mean(lambda slices, path: getattr(slices, f"z_e_{path}")),
    ),
    "histogram": Method("histogram of codes", POOLED, "L1 of how often each code is used.", by_histogram),
    "volume": Method(
        "volume and centroid alone", POOLED,
        "L2 of the predicted lesion's centroid and of the radius of a ball of its volume, in mm.",
        by_volume("segmentation"),
    ),
    "random": Method("random order", POOLED, "Chance.", by_chance),
    "true_volume": Method(
        "true volume and centroid alone", TRUTH, "The same of the true lesion.", by_volume("label"),
    ),
    "oracle": Method(
        "oracle: true overlap by class", TRUTH, "Mean Dice of regions or lesion classes.", by_truth("dice"),
    ),
    "oracle_whole": Method(
        "oracle: true whole lesion", TRUTH, "Dice of the lesion, classes taken together.", by_truth("whole_dice"),
    ),
}


def methods(search: Search) -> dict[str, Method]:
    """`METHODS`, and one for each kind of features that the slices came with: their mean over a patient's slices."""
    return METHODS | {
        name: Method(
            f"{name}, mean over slices", POOLED, "Squared L2 of the mean of the vectors given by this name.",
            by_features(name),
        )
        for name in search.query.features
    }


def by_features(name: str) -> Builder:
    """By the squared L2 of given vectors, mean over a patient's slices."""
    mean = by_mean(lambda slices, _: slices.features[name])
    return lambda patients, _: mean(patients, "normal")


# ---------------------------------------------------------------- scores


def patient_table(search: Search) -> Table:
    """`retrieval[method][target][measure]` and `comparisons[target][measure]["patient vs METHOD"]`, with intervals over
    query patients; empty without labels, heights, or patients of several slices."""
    heights = [slices.rows["position_mm"] for slices in (search.query, search.reference)]
    if not search.overlap.targets or not all(np.isfinite(values).all() for values in heights):
        return {}
    patients = PatientSearch(search)
    if not np.isfinite(patients.query.spacing) or not np.isfinite(patients.reference.spacing):
        return {}
    scores: Scores = dict(patient_scores(patients, methods(search)))
    summary = Summary.average(scores, Bootstrap.draw(patients.query.ids, seed=search.seed))
    comparisons: Table = {}
    for method, target, measure in summary.means:
        if measure in MEASURES and method != "patient":
            compared = summary.compare(("patient", target, measure), (method, target, measure))
            comparisons.setdefault(target, {}).setdefault(measure, {})[f"patient vs {method}"] = compared
    return {"retrieval": summary.nested(), "comparisons": comparisons}


def patient_scores(patients: PatientSearch, methods: dict[str, Method]) -> NamedScores:
    """Scores of all methods. The share of the ideal ten is left out where there are no more than ten to choose from."""
    choice = (~patients.excluded).sum(1)
    for target, kinds in patients.relevances.items():
        best = relevance.nearest(-kinds["dice"], excluded=patients.excluded, k=max(TOP))
        ideal = relevance.gains_of(kinds["dice"], best)
        for name, method in methods.items():
            distances = method.builder(patients, target)
            if distances is None:
                continue
            rows = relevance.nearest(distances, excluded=patients.excluded, k=max(TOP))
            for kind, overlap in kinds.items():
                gains = relevance.gains_of(overlap, rows)
                yield from (((name, target, f"{kind}@{k}"), relevance.mean_gain(gains, k)) for k in TOP)
            gains = relevance.gains_of(kinds["dice"], rows)
            yield (name, target, "ndcg@10"), relevance.ndcg(gains, ideal, 10)
            share = relevance.recall_of_ideal(gains, ideal, 10)
            yield (name, target, "recall of ideal@10"), np.where(choice > 10, share, np.nan)
            if name == "patient":
                apart = relevance.gains_of(patients.nearest_patients(target)[1], rows)
                yield (name, target, "height error in mm@5"), relevance.mean_gain(apart, 5)
