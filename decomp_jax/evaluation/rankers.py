"""The ways of ranking references for a query: the codes, and what they have to be compared with."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float, Integer

from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.config import StructureTerm
from decomp_jax.losses.cells import local_contrast
from decomp_jax.retrieval import relevance

PCA_COMPONENTS = 64
PCA_SAMPLE = 2048

# What each method ranks by. Oracles rank by the true labels: they are ceilings, and for the other target floors.
METHODS = {
    "normal": "normal code",
    "abnormal": "abnormal code",
    "both": "both codes",
    "random": "random order",
    "slice_level": "nearest slice height",
    "pixel_l2": "pixels, L2",
    "pca": f"pixels, {PCA_COMPONENTS} principal components",
    "local_contrast": "local contrast of pixels, L2",
    "z_e_normal": "normal path before quantisation",
    "z_e_abnormal": "abnormal path before quantisation",
    "segmentation": "overlap of predicted labels",
    "lesion_grid": "true lesion share of each code cell, L2",
    "oracle_normal": "oracle: true regions",
    "oracle_abnormal": "oracle: true lesion classes",
    "oracle_whole": "oracle: true whole lesion",
    "oracle_both": "oracle: regions and lesion classes",
}

# Rows of the references for some queries, nearest first, -1 where there are no more; given the queries' positions and
# which references may not be found (those of the query's own patient).
Ranker = Callable[[Integer[np.ndarray, "q"], Bool[np.ndarray, "q r"]], Integer[np.ndarray, "q k"]]


def rankers(
    query: SliceSet, reference: SliceSet, *, depth: int, lesion_classes: int, seed: int = 0
) -> dict[str, Ranker]:
    """The methods that know nothing of the labels (but for `lesion_grid`), as functions that give `depth` hits."""
    rng = np.random.default_rng(seed)
    grid = query.bank.grid

    def by_code(*paths: str) -> Ranker:
        def rank(queries: np.ndarray, excluded: np.ndarray) -> np.ndarray:
            codes = {path: getattr(query.bank, f"{path}_indices")[queries] for path in paths}
            hits = reference.bank.search(**codes, k=depth, exclude=query.rows["patient_id"][queries])
            return np.asarray(hits.rows)

        return rank

    def by_distance(distances: Callable[[np.ndarray], np.ndarray | Array]) -> Ranker:
        return lambda queries, excluded: relevance.nearest(distances(queries), excluded=excluded, k=depth)

    def by_features(features: Callable[[SliceSet], np.ndarray]) -> Ranker:
        ours, theirs = (features(slices).reshape(len(slices), -1) for slices in (query, reference))
        return by_distance(lambda queries: squared_distances(ours[queries], theirs))

    def noise(queries: np.ndarray) -> np.ndarray:
        return rng.random((len(queries), len(reference)))

    def height_gap(queries: np.ndarray) -> np.ndarray:
        gap = query.rows["position_mm"][queries, None] - reference.rows["position_mm"]
        return np.abs(gap) + 1e-3 * noise(queries)  # heights repeat from patient to patient: ties by chance

    def predicted_overlap(queries: np.ndarray) -> np.ndarray:
        dice = relevance.class_dice(query.segmentation[queries], reference.segmentation, classes=lesion_classes)
        return 1e-5 * noise(queries) - jnp.nan_to_num(relevance.mean_over_classes(dice), nan=1.0)

    methods = {
        "normal": by_code("normal"),
        "abnormal": by_code("abnormal"),
        "both": by_code("normal", "abnormal"),
        "random": by_distance(noise),
        "slice_level": by_distance(height_gap),
        "pixel_l2": by_features(lambda slices: slices.image),
        "pca": by_features(principal_components(reference.image, rng)),
        "local_contrast": by_features(lambda slices: contrasts(slices.image)),
        "z_e_normal": by_features(lambda slices: slices.z_e_normal),
        "z_e_abnormal": by_features(lambda slices: slices.z_e_abnormal),
        "segmentation": by_distance(predicted_overlap),
        "lesion_grid": by_features(lambda slices: cell_share(slices.label > 0, grid)),
    }
    if not (np.isfinite(query.rows["position_mm"]).any() and np.isfinite(reference.rows["position_mm"]).any()):
        del methods["slice_level"]
    return methods


def squared_distances(query: Float[np.ndarray, "q f"], reference: Float[np.ndarray, "r f"]) -> Float[Array, "q r"]:
    """Squared L2 of all pairs, a block of references at a time."""
    step = relevance.REFERENCE_BLOCK
    return jnp.concatenate(
        [_squared_distances(query, reference[i : i + step]) for i in range(0, len(reference), step)], axis=1
    )


@jax.jit
def _squared_distances(query: Float[Array, "q f"], reference: Float[Array, "r f"]) -> Float[Array, "q r"]:
    query, reference = query.astype(jnp.float32), reference.astype(jnp.float32)
    product = jnp.matmul(query, reference.T, precision=jax.lax.Precision.HIGHEST)
    return (query**2).sum(1)[:, None] - 2 * product + (reference**2).sum(1)


def principal_components(
    images: Float[np.ndarray, "n s s c"], rng: np.random.Generator
) -> Callable[[SliceSet], Float[np.ndarray, "m k"]]:
    """Projection of a set's images on the first components of `images` (of a sample, where there are many)."""
    sample = rng.permutation(len(images))[:PCA_SAMPLE]
    pixels = images[np.sort(sample)].reshape(len(sample), -1).astype(np.float32)
    mean = pixels.mean(0)
    # The few images span all components: eigenvectors of their products instead of the pixels' covariance.
    largest = (max(len(pixels) - PCA_COMPONENTS, 0), len(pixels) - 1)
    _, vectors = scipy.linalg.eigh((pixels - mean) @ (pixels - mean).T, subset_by_index=largest)
    components = np.linalg.qr((pixels - mean).T @ vectors)[0]

    def project(slices: SliceSet) -> Float[np.ndarray, "m k"]:
        blocks = range(0, len(slices), relevance.REFERENCE_BLOCK)
        flat = (slices.image[i : i + relevance.REFERENCE_BLOCK].reshape(-1, len(mean)) for i in blocks)
        return np.concatenate([(block.astype(np.float32) - mean) @ components for block in flat])

    return project


def cell_share(mask: Bool[np.ndarray, "n s s"], grid: tuple[int, int]) -> Float[np.ndarray, "n h w"]:
    """Share of each code cell's pixels that the mask covers."""
    n, height, width = mask.shape
    h, w = grid
    return mask.reshape(n, h, height // h, w, width // w).mean((2, 4), dtype=np.float32)


def contrasts(images: Float[np.ndarray, "n s s c"]) -> Float[np.ndarray, "n s s c"]:
    """What the structure term draws the normal code to, at every pixel and with the lesions."""
    step = relevance.REFERENCE_BLOCK
    blocks = [jnp.asarray(images[i : i + step], jnp.float32) for i in range(0, len(images), step)]
    return np.concatenate([np.asarray(local_contrast(block, window=StructureTerm.window, flat=StructureTerm.flat)) for block in blocks])
