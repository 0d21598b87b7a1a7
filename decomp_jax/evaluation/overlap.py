"""How alike query and reference slices are by their label maps: what hits are scored by."""

import functools

import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

from decomp_jax.data.schema import Settings
from decomp_jax.evaluation.scratch import map_blocks
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.retrieval import relevance

# Relevance of each reference for each query, by target and kind ("dice", "whole_dice", ...).
Relevances = dict[str, dict[str, Float[np.ndarray, "q r"]]]


class LabelOverlap:
    """Called with positions of queries, gives the relevances of all references for them.

    A target without labels is absent; a query that a target does not ask for has NaN.

    Attributes:
        targets: "normal" (anatomical regions), "abnormal" (lesion classes), and "both" where both are there.
    """

    def __init__(self, query: SliceSet, reference: SliceSet, settings: Settings) -> None:
        self._classes = {"lesion": len(settings.lesion_classes), "anatomy": len(settings.anatomy_classes)}
        self._classes["aligned"] = self._classes["lesion"]
        self._asks = {}
        self._maps: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if query.anatomy is not None:
            self._asks["normal"] = query.has_regions
            self._maps["anatomy"] = crop(query.anatomy, reference.anatomy)
        if query.lesion.any() and reference.rows["labelled"].any():
            self._asks["abnormal"] = query.lesion
            aligned = (map_blocks(relevance.centre_lesions, slices.label) for slices in (query, reference))
            self._maps |= {"lesion": crop(query.label, reference.label), "aligned": crop(*aligned)}
            count = functools.partial(relevance.class_areas, classes=self._classes["lesion"])
            self._areas = [map_blocks(count, maps) for maps in self._maps["lesion"]]
        self.targets = (*self._asks, "both") if len(self._asks) == 2 else tuple(self._asks)

    def __call__(self, queries: Integer[np.ndarray, "q"]) -> Relevances:
        measures = {"normal": self._anatomy, "abnormal": self._lesion}
        relevances = {
            target: {
                kind: np.where(asks[queries, None], np.asarray(overlap), np.nan)
                for kind, overlap in measures[target](queries).items()
            }
            for target, asks in self._asks.items()
        }
        if "both" in self.targets:
            normal, abnormal = relevances["normal"], relevances["abnormal"]
            relevances["both"] = {kind: (normal[kind] + abnormal[kind]) / 2 for kind in ("dice", "zero_dice")}
        return relevances

    def _anatomy(self, queries: np.ndarray) -> dict[str, Float[Array, "q r"]]:
        return _means(self._dice("anatomy", queries))

    def _lesion(self, queries: np.ndarray) -> dict[str, Float[Array, "q r"]]:
        query, reference = self._maps["lesion"]
        area = relevance.area_similarity(self._areas[0][queries], self._areas[1])
        return _means(self._dice("lesion", queries)) | {
            "whole_dice": relevance.whole_dice(query[queries], reference),
            "aligned_dice": relevance.mean_over_classes(self._dice("aligned", queries)),
            "aligned_whole_dice": relevance.whole_dice(self._maps["aligned"][0][queries], self._maps["aligned"][1]),
            "area_similarity": relevance.mean_over_classes(area),
        }

    def _dice(self, name: str, queries: np.ndarray) -> Float[Array, "q r c"]:
        query, reference = self._maps[name]
        return relevance.class_dice(query[queries], reference, classes=self._classes[name])


def crop(
    query: UInt8[np.ndarray, "q s s"], reference: UInt8[np.ndarray, "r s s"]
) -> tuple[UInt8[np.ndarray, "q p"], UInt8[np.ndarray, "r p"]]:
    """The pixels that carry a label in any of the maps."""
    used = query.any(0) | reference.any(0)
    return map_blocks(lambda maps: maps[:, used], query), map_blocks(lambda maps: maps[:, used], reference)


def _means(dice: Float[Array, "q r c"]) -> dict[str, Float[Array, "q r"]]:
    return {"dice": relevance.mean_over_classes(dice), "zero_dice": relevance.mean_over_classes(dice, "zero")}
