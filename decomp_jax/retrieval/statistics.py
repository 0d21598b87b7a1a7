"""How sure the numbers are: averages over patients, and bootstrap intervals from resampling patients.

Slices of one patient are alike, so the patient is the unit: a measure is averaged within each patient first. All
measures are resampled with the same draws of patients, so that differences and ratios between methods are paired.
Fewer than `LEAST_PATIENTS` patients give no interval: resamples of so few are nearly all alike, and would claim a
certainty that is not there.
"""

import dataclasses
from typing import NamedTuple, Self

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

CONFIDENCE = 0.95
SAMPLES = 2000
LEAST_PATIENTS = 5


class Interval(NamedTuple):
    """A number with its 95 % percentile interval; the bounds are NaN where there is none."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Resamples of the patients that a set of slices belongs to.

    Attributes:
        patient: patient of each slice, 0..P-1.
        counts: how often each resample draws each patient.
    """

    patient: Int[np.ndarray, "n"]
    counts: Int[np.ndarray, "samples patients"]

    @classmethod
    def draw(cls, patient_ids: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> Self:
        """`patient_ids` [n] of the slices."""
        names, patient = np.unique(patient_ids, return_inverse=True)
        return cls(patient, _draw_counts(len(names), samples, seed))

    def patient_means(self, values: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "patients m"]:
        """Mean of each patient's slices; NaN slices are left out, a patient with none other is NaN."""
        defined = ~np.isnan(values)
        sums, sizes = (np.zeros((self.counts.shape[1], values.shape[1])) for _ in range(2))
        np.add.at(sums, self.patient, np.where(defined, values, 0))
        np.add.at(sizes, self.patient, defined)
        return ratio(sums, sizes)

    def macro(
        self, values: Float[np.ndarray, "n m"]
    ) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "samples m"]]:
        """Mean over patients of each measure, and the same for every resample (NaN if it drew none with a value).

        A measure that fewer than `LEAST_PATIENTS` patients have is NaN in all resamples.
        """
        means = self.patient_means(values)
        defined = ~np.isnan(means)
        filled = np.where(defined, means, 0)
        resampled = ratio(self.counts @ filled, self.counts @ defined)
        enough = defined.sum(0) >= LEAST_PATIENTS
        return ratio(filled.sum(0), defined.sum(0)), np.where(enough, resampled, np.nan)

    def auroc(self, scores: Float[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]) -> Interval:
        """Area under the ROC curve over all slices, patients resampled; ties count one half.

        The wins of patient a's positive over patient b's negative slices are counted once, as `wins[a, b]`; a resample
        c then has c wins c of them. No interval where fewer than `LEAST_PATIENTS` patients have slices of either kind.
        """
        patients = self.counts.shape[1]
        wins = np.zeros((patients, patients))
        for b in range(patients):
            negative = np.sort(scores[~positive & (self.patient == b)])
            beaten = np.searchsorted(negative, scores[positive], "left")
            drawn = np.searchsorted(negative, scores[positive], "right") - beaten
            wins[:, b] = np.bincount(self.patient[positive], beaten + drawn / 2, patients)
        positives, negatives = (np.bincount(self.patient[kind], minlength=patients) for kind in (positive, ~positive))
        pairs = (self.counts @ positives) * (self.counts @ negatives)
        won = np.einsum("sa,ab,sb->s", self.counts, wins, self.counts, optimize=True)
        few = min(np.count_nonzero(positives), np.count_nonzero(negatives)) < LEAST_PATIENTS
        resampled = np.full(len(pairs), np.nan) if few else ratio(won, pairs)
        return interval(float(ratio(wins.sum(), positives.sum() * negatives.sum())), resampled)


@dataclasses.dataclass(frozen=True)
class PairBootstrap:
    """Resamples of the patients of pairs of slices (A, B), as mixed queries are: a two-way bootstrap.

    A and B come from the same patients, so one draw of patients serves both. In a resample the mean of a patient of A
    takes each of its pairs as often as the patient of B was drawn, and the mean over patients takes it as often as the
    patient of A was drawn (the vertex bootstrap of Snijders and Borgatti 1999, on a mean of means). Resampling the
    patients of A alone would leave out what the choice of B's patients adds.

    Attributes:
        patients: patients of A and of B, 0..P-1, of each pair.
        counts: how often each resample draws each patient.
    """

    patients: Int[np.ndarray, "n 2"]
    counts: Int[np.ndarray, "samples patients"]

    @classmethod
    def draw(cls, patient_ids: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> Self:
        """`patient_ids` [n,2] of A and of B."""
        names, patients = np.unique(patient_ids, return_inverse=True)
        return cls(patients.reshape(-1, 2), _draw_counts(len(names), samples, seed))

    def macro(
        self, values: Float[np.ndarray, "n m"]
    ) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "samples m"]]:
        """As `Bootstrap.macro`: mean over the pairs of each patient of A, then over patients of A.

        `LEAST_PATIENTS` holds for the patients of A and for those of B.
        """
        once = np.ones((1, self.counts.shape[1]), int)
        defined = ~np.isnan(values)
        patients = (min(len(np.unique(side[chosen])) for side in self.patients.T) for chosen in defined.T)
        enough = np.array(list(patients)) >= LEAST_PATIENTS
        means, resampled = (
            np.stack([self._mean(counts, column) for column in values.T], axis=1) for counts in (once, self.counts)
        )
        return means[0], np.where(enough, resampled, np.nan)

    def _mean(
        self, counts: Int[np.ndarray, "samples patients"], values: Float[np.ndarray, "n"]
    ) -> Float[np.ndarray, "samples"]:
        a, b = self.patients.T
        defined = ~np.isnan(values)
        sums, sizes = (
            counts @ scipy.sparse.coo_array((of_pair, (b, a)), shape=2 * counts.shape[1:]).tocsr()
            for of_pair in (np.where(defined, values, 0), defined.astype(float))
        )
        drawn = counts * (sizes > 0)
        return ratio((drawn * np.nan_to_num(ratio(sums, sizes))).sum(1), drawn.sum(1))


def interval(point: float, resampled: Float[np.ndarray, "samples"]) -> Interval:
    """The percentile interval around `point`; resamples in which the number is undefined are left out."""
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return Interval(point, np.nan, np.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Interval(point, float(low), float(high))


def ratio(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    """part / whole; NaN where `whole` is 0."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole != 0)


def _draw_counts(patients: int, samples: int, seed: int) -> Int[np.ndarray, "samples patients"]:
    return np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), size=samples)
