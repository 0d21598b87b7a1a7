"""How sure the numbers are: averages over patients, and bootstrap intervals from resampling patients.

Slices of one patient are alike, so the patient is the unit: a measure is averaged within each patient first. All
measures are resampled with the same draws of patients, so that differences and ratios between methods are paired.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A number with its 95 % percentile interval."""

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
    def of(cls, patient_ids: np.ndarray, *, samples: int = 2000, seed: int = 0) -> "Bootstrap":
        names, patient = np.unique(patient_ids, return_inverse=True)
        shares = np.full(len(names), 1 / len(names))
        return cls(patient, np.random.default_rng(seed).multinomial(len(names), shares, size=samples))

    def patient_means(self, values: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "patients m"]:
        """Mean of each patient's slices; NaN slices are left out, a patient with none other is NaN."""
        known = ~np.isnan(values)
        sums, counts = (np.zeros((self.counts.shape[1], values.shape[1])) for _ in range(2))
        np.add.at(sums, self.patient, np.where(known, values, 0))
        np.add.at(counts, self.patient, known)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def macro(
        self, values: Float[np.ndarray, "n m"]
    ) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "samples m"]]:
        """Mean over patients of each measure, and the same for every resample (NaN if it drew none with a value)."""
        means = self.patient_means(values)
        known = ~np.isnan(means)
        filled = np.where(known, means, 0)
        return _ratio(filled.sum(0), known.sum(0)), _ratio(self.counts @ filled, self.counts @ known)

    def auroc(self, scores: Float[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]) -> Interval:
        """Area under the ROC curve over all slices, patients resampled; ties count one half.

        The wins of patient a's positive over patient b's negative slices are counted once, as `wins[a, b]`; a resample
        c then has c wins c of them.
        """
        patients = self.counts.shape[1]
        wins = np.zeros((patients, patients))
        for b in range(patients):
            negative = np.sort(scores[~positive & (self.patient == b)])
            beaten = np.searchsorted(negative, scores[positive], "left")
            drawn = np.searchsorted(negative, scores[positive], "right") - beaten
            wins[:, b] = np.bincount(self.patient[positive], beaten + drawn / 2, patients)
        positives, negatives = (np.bincount(self.patient[s], minlength=patients) for s in (positive, ~positive))
        pairs = (self.counts @ positives) * (self.counts @ negatives)
        won = np.einsum("sa,ab,sb->s", self.counts, wins, self.counts, optimize=True)
        return interval(float(_ratio(wins.sum(), positives.sum() * negatives.sum())), _ratio(won, pairs))


def interval(point: float, resampled: Float[np.ndarray, "samples"]) -> Interval:
    """The percentile interval around `point`; resamples in which the number is undefined are left out."""
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return Interval(point, np.nan, np.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Interval(point, float(low), float(high))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
