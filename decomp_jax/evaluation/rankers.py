"""The ways of ranking references for a query: the codes, and what they are compared with. `METHODS` lists all."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float, Integer, UInt8

from decomp_jax.config import LayoutTerm, StructureTerm
from decomp_jax.data.schema import Settings
from decomp_jax.evaluation.overlap import LabelOverlap, Relevances
from decomp_jax.evaluation.scratch import map_blocks
from decomp_jax.evaluation.slices import THUMBNAIL, SliceSet
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.sketch import sketch_latents
from decomp_jax.losses.cells import cell_means, class_fractions, local_contrast
from decomp_jax.losses.latent import layout_target
from decomp_jax.retrieval import Queries, codes, latents, relative, relevance

PCA_COMPONENTS = 64
PCA_SAMPLE = 2048
SHIFT = 0.1  # of the image's side, by which a badly placed drawing is off
DEPTH = 2048  # hits ranked for each query; average precision sees no further
# The rankings by true labels: target and kind of relevance.
ORACLES = {
    "oracle_normal": ("normal", "dice"),
    "oracle_abnormal": ("abnormal", "dice"),
    "oracle_whole": ("abnormal", "whole_dice"),
    "oracle_both": ("both", "dice"),
}


@dataclasses.dataclass(frozen=True)
class Search:
    """Queries and the references they are looked up in; with the network lesions can be drawn as well."""

    query: SliceSet
    reference: SliceSet
    settings: Settings
    seed: int = 0
    decomposer: Decomposer | None = None

    @property
    def depth(self) -> int:
        """Hits ranked for each query."""
        return min(DEPTH, len(self.reference))

    @property
    def methods(self) -> dict[str, "Method"]:
        """`METHODS`, and one for each kind of features that the slices came with."""
        return METHODS | {
            name: Method(name, GIVEN, "Squared L2 of the vectors given by this name.", by_features(_given(name)))
            for name in self.query.features
        }

    @functools.cached_property
    def overlap(self) -> LabelOverlap:
        """Relevances by the true labels."""
        return LabelOverlap(self.query, self.reference, self.settings)

    @functools.cached_property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @functools.cached_property
    def components(self) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "p k"]]:
        """Mean and principal components of the references' thumbnails."""
        return principal_components(self.reference.thumbnail, self.random)

    def noise(self, queries: Integer[np.ndarray, "q"]) -> Float[np.ndarray, "q r"]:
        """Uniform in [0, 1), for order by chance; other numbers at each call."""
        return self.random.random((len(queries), len(self.reference)))

    def excluded(self, queries: Integer[np.ndarray, "q"]) -> Bool[np.ndarray, "q r"]:
        """References that may be no hit: those of the query's own patient."""
        return self.query.rows["patient_id"][queries, None] == self.reference.rows["patient_id"]


@dataclasses.dataclass(frozen=True)
class Block:
    """Some queries of a search, and what is computed once for all methods.

    Attributes:
        queries: their positions.
        excluded: references that may be no hit.
        relevances: of all references.
        ideal: hits of each oracle whose labels are there.
    """

    queries: Integer[np.ndarray, "q"]
    excluded: Bool[np.ndarray, "q r"]
    relevances: Relevances
    ideal: dict[str, Integer[np.ndarray, "q k"]]

    @classmethod
    def prepare(cls, search: Search, queries: Integer[np.ndarray, "q"]) -> "Block":
        excluded, relevances = search.excluded(queries), search.overlap(queries)
        ideal = {
            oracle: relevance.nearest(-relevances[target][kind], excluded=excluded, k=search.depth)
            for oracle, (target, kind) in ORACLES.items() if target in relevances
        }
        return cls(queries, excluded, relevances, ideal)


# Rows of the references for a block of queries, nearest first, -1 where there are no more.
Ranker = Callable[[Block], Integer[np.ndarray, "q k"]]
# Makes the ranker of a search; None where the data lack what it needs.
Builder = Callable[[Search], Ranker | None]
Features = Float[np.ndarray, "n f"]


class Method(NamedTuple):
    """A way of ranking.

    Attributes:
        title: its name in tables and figures.
        group: the part of the page's main table that it stands in.
        sentence: what it ranks by.
    """

    title: str
    group: str
    sentence: str
    builder: Builder


def rankers(search: Search, names: Iterable[str] | None = None) -> dict[str, Ranker]:
    """Rankers of the methods that the data allow, or of those named alone."""
    built = {name: search.methods[name].builder(search) for name in (search.methods if names is None else names)}
    return {name: ranker for name, ranker in built.items() if ranker is not None}


# ---------------------------------------------------------------- builders


def by_queries(ask: Callable[[SliceSet, np.ndarray], Queries]) -> Builder:
    """By the exact search of the bank, asked with queries made of slices and positions among them."""

    def build(search: Search) -> Ranker:
        def rank(block: Block) -> Integer[np.ndarray, "q k"]:
            queries, exclude = ask(search.query, block.queries), search.query.rows["patient_id"][block.queries]
            return search.reference.bank.search(queries, k=search.depth, exclude=exclude).rows

        return rank

    return build


def relative_queries(*paths: str) -> Callable[[SliceSet, np.ndarray], Queries]:
    """`latent_queries` for relative distances, as `evaluate.py query` asks."""
    return lambda slices, chosen: relative(latent_queries(*paths)(slices, chosen))


def code_queries(*paths: str) -> Callable[[SliceSet, np.ndarray], Queries]:
    """The slices' codes of some paths."""
    return lambda slices, chosen: codes(**{path: getattr(slices.bank, f"{path}_indices")[chosen] for path in paths})


def latent_queries(*paths: str) -> Callable[[SliceSet, np.ndarray], Queries]:
    """The vectors that the slices' codes stand for: the query is not quantised, the bank is."""
    return lambda slices, chosen: latents(**{
        path: getattr(slices, f"z_e_{path}")[chosen].astype(np.float32) for path in paths
    })


def by_sketch(draw: Callable[[UInt8[np.ndarray, "s s"]], UInt8[np.ndarray, "s s"]]) -> Builder:
    """By a drawn lesion, made of the true labels of the query; where nothing is drawn, by a code that holds nothing."""

    def build(search: Search) -> Ranker | None:
        if search.decomposer is None or not search.decomposer.config.objective.layout.weight:
            return None
        if "abnormal" not in search.overlap.targets:
            return None
        shape = (*search.query.bank.grid, search.query.bank.abnormal_codebook.shape[1])

        def sketch(label: UInt8[np.ndarray, "s s"]) -> Float[np.ndarray, "h w d"]:
            drawn = draw(label)
            return sketch_latents(search.decomposer, drawn) if drawn.any() else np.zeros(shape, np.float32)

        def ask(slices: SliceSet, chosen: np.ndarray) -> Queries:
            return relative(latents(abnormal=np.stack([sketch(slices.label[i]) for i in chosen])))

        return by_queries(ask)(search)

    return build


def circle(label: UInt8[np.ndarray, "s s"]) -> UInt8[np.ndarray, "s s"]:
    """A disc of the lesion's area at its centroid, all of its most frequent class."""
    area = np.count_nonzero(label)
    if not area:
        return label
    (y, x), places = np.argwhere(label).mean(0), np.indices(label.shape)
    nearest_pixels = np.argsort(np.hypot(places[0] - y, places[1] - x).ravel(), kind="stable")[:area]
    drawn = np.zeros_like(label)
    drawn.ravel()[nearest_pixels] = np.bincount(label[label > 0]).argmax()
    return drawn


def shifted(label: UInt8[np.ndarray, "s s"]) -> UInt8[np.ndarray, "s s"]:
    """The labels moved towards the right by a tenth of the image; what leaves it is lost."""
    by = round(label.shape[1] * SHIFT)
    return np.pad(label, ((0, 0), (by, 0)))[:, : label.shape[1]]


def by_distance(distance: Callable[[Search, np.ndarray], np.ndarray | Array]) -> Builder:
    """By a function of the search and the queries' positions that gives distances [q,r]."""
    return lambda search: lambda block: relevance.nearest(
        distance(search, block.queries), excluded=block.excluded, k=search.depth
    )


def by_features(features: Callable[[Search, SliceSet], np.ndarray]) -> Builder:
    """By the squared L2 distance of a vector for each slice."""

    def build(search: Search) -> Ranker:
        query, reference = (
            vectors.reshape(len(vectors), -1)
            for vectors in (features(search, slices) for slices in (search.query, search.reference))
        )
        return by_distance(lambda _, queries: squared_distances(query[queries], reference))(search)

    return build


def by_height(search: Search) -> Ranker | None:
    """By the difference of heights; heights repeat from patient to patient, so ties fall by chance."""
    query, reference = (slices.rows["position_mm"] for slices in (search.query, search.reference))
    if not (np.isfinite(query).any() and np.isfinite(reference).any()):
        return None
    return by_distance(
        lambda _, queries: np.abs(query[queries, None] - reference) + 1e-3 * search.noise(queries)
    )(search)


def by_predicted_labels(search: Search, queries: Integer[np.ndarray, "q"]) -> Float[Array, "q r"]:
    """Minus the mean Dice of predicted labels, 1 where neither slice has any; ties fall by chance."""
    query, reference = search.query.segmentation[queries], search.reference.segmentation
    dice = relevance.class_dice(query, reference, classes=len(search.settings.lesion_classes))
    return 1e-5 * search.noise(queries) - jnp.nan_to_num(relevance.mean_over_classes(dice), nan=1.0)


def by_labels(oracle: str) -> Builder:
    """By the true labels: an entry of `ORACLES`."""

    def build(search: Search) -> Ranker | None:
        return (lambda block: block.ideal[oracle]) if ORACLES[oracle][0] in search.overlap.targets else None

    return build


# ---------------------------------------------------------------- features


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
) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "p k"]]:
    """Mean and first components of images (of a sample, where there are many)."""
    sample = rng.permutation(len(images))[:PCA_SAMPLE]
    pixels = images[np.sort(sample)].reshape(len(sample), -1).astype(np.float32)
    mean = pixels.mean(0)
    # The few images span all components: eigenvectors of their products instead of the pixels' covariance.
    largest = (max(len(pixels) - PCA_COMPONENTS, 0), len(pixels) - 1)
    _, vectors = scipy.linalg.eigh((pixels - mean) @ (pixels - mean).T, subset_by_index=largest)
    return mean, np.linalg.qr((pixels - mean).T @ vectors)[0]


def projections(search: Search, slices: SliceSet) -> Features:
    """The slices' thumbnails on the references' principal components."""
    mean, components = search.components

    def project(images: Float[np.ndarray, "b t t c"]) -> Features:
        return (images.reshape(len(images), -1).astype(np.float32) - mean) @ components

    return map_blocks(project, slices.thumbnail)


def contrasts(_: Search, slices: SliceSet) -> Features:
    """What the structure term draws the normal code to, at every pixel and with the lesions."""
    return map_blocks(
        lambda images: local_contrast(
            jnp.asarray(images, jnp.float32), window=StructureTerm.window, flat=StructureTerm.flat
        ),
        slices.thumbnail,
    )


def contrast_bytes(search: Search, slices: SliceSet) -> Features:
    """Local contrast of each code cell, one byte a cell: as many as the cells of a code, without a network."""
    grid = search.query.bank.grid[0]
    means = map_blocks(lambda images: cell_means(jnp.asarray(images), grid), contrasts(search, slices))
    return np.clip(np.round(32 * means), -128, 127).astype(np.int8)


def predicted_layout(search: Search, slices: SliceSet) -> Features:
    """What the layout term draws the abnormal code to, of the predicted labels: a segmentation without codes."""
    grid, classes = search.query.bank.grid[0], len(search.settings.lesion_classes)

    def layout(label: UInt8[np.ndarray, "b s s"]) -> Features:
        shares = class_fractions(jax.nn.one_hot(label, 1 + classes), grid)
        return layout_target(shares, 1 + classes, scale=LayoutTerm.scale, whole=LayoutTerm.whole)

    return map_blocks(layout, slices.segmentation)


def lesion_shares(search: Search, slices: SliceSet) -> Features:
    """Share of each code cell's pixels that the true lesion covers."""
    grid = search.query.bank.grid[0]
    return map_blocks(lambda label: cell_means(jnp.asarray(label[..., None] > 0, jnp.float32), grid), slices.label)


def _given(name: str) -> Callable[[Search, SliceSet], Features]:
    return lambda _, slices: slices.features[name]


# ---------------------------------------------------------------- the table

CODES, PLAIN, NETWORK, TRUTH = "The codes", "Without the network", "The network otherwise", "By the true labels"
SKETCH = "A drawn lesion, looked up by abnormal codes, relative distance"
GIVEN = "Features given to the report"

# All methods, in the order of tables and figures. Oracles are ceilings, and for the other target floors.
METHODS = {
    "normal": Method("normal code", CODES, "The code of the anatomy.", by_queries(code_queries("normal"))),
    "abnormal": Method("abnormal code", CODES, "The code of the lesion.", by_queries(code_queries("abnormal"))),
    "both": Method(
        "both codes", CODES, "The sum of both codes' squared distances.",
        by_queries(code_queries("normal", "abnormal")),
    ),
    "normal_asymmetric": Method(
        "normal code, query not quantised", CODES, "The query keeps its vectors, the references are codes.",
        by_queries(latent_queries("normal")),
    ),
    "abnormal_asymmetric": Method(
        "abnormal code, query not quantised", CODES, "The same for the lesion.",
        by_queries(latent_queries("abnormal")),
    ),
    "both_asymmetric": Method(
        "both codes, query not quantised", CODES, "The same for both.",
        by_queries(latent_queries("normal", "abnormal")),
    ),
    "normal_relative": Method(
        "normal code, relative distance", CODES,
        "The same relative to the lengths of both, as queries of this program are ranked: 0 is the same, 1 nothing "
        "alike.",
        by_queries(relative_queries("normal")),
    ),
    "abnormal_relative": Method(
        "abnormal code, relative distance", CODES, "The same for the lesion: 1 less a Dice of the codes.",
        by_queries(relative_queries("abnormal")),
    ),
    "both_relative": Method(
        "both codes, relative distance", CODES, "The same for both.",
        by_queries(relative_queries("normal", "abnormal")),
    ),
    "sketch": Method(
        "the true lesion, drawn", SKETCH,
        "What the network would draw the query's true lesion to; no image is asked with.",
        by_sketch(lambda label: label),
    ),
    "sketch_circle": Method(
        "one circle of one class", SKETCH,
        "The same of a disc of the true lesion's area at its centroid, all of its most frequent class.",
        by_sketch(circle),
    ),
    "sketch_shifted": Method(
        f"the true lesion, {SHIFT:.0%} of the image off", SKETCH, "The same of the true lesion moved to one side.",
        by_sketch(shifted),
    ),
    "random": Method("random order", PLAIN, "Chance.", by_distance(lambda search, queries: search.noise(queries))),
    "slice_level": Method(
        "nearest slice height", PLAIN, "The difference of slice heights in mm, ties by chance.", by_height,
    ),
    "pixel_l2": Method(
        "pixels, L2", PLAIN,
        f"Squared differences of pixels; larger images are averaged down to about {THUMBNAIL} pixels a side.",
        by_features(lambda _, slices: slices.thumbnail),
    ),
    "pca": Method(
        f"pixels, {PCA_COMPONENTS} principal components", PLAIN,
        "The same on the first principal components of the references' pixels.", by_features(projections),
    ),
    "local_contrast": Method(
        "local contrast of pixels, L2", PLAIN,
        "The same pixels after brightness and contrast around each were taken out.", by_features(contrasts),
    ),
    "contrast_bytes": Method(
        "local contrast, one byte a code cell, L2", PLAIN,
        "Local contrast averaged over each code cell and rounded to a byte: the size of a code without a network.",
        by_features(contrast_bytes),
    ),
    "z_e_normal": Method(
        "normal path before quantisation", NETWORK, "The vectors that the normal codes stand for.",
        by_features(lambda _, slices: slices.z_e_normal),
    ),
    "z_e_abnormal": Method(
        "abnormal path before quantisation", NETWORK, "The vectors that the abnormal codes stand for.",
        by_features(lambda _, slices: slices.z_e_abnormal),
    ),
    "segmentation": Method(
        "overlap of predicted labels", NETWORK, "Mean Dice of the lesion classes that the network predicts.",
        by_distance(by_predicted_labels),
    ),
    "segmentation_layout": Method(
        "predicted lesion shares of each code cell, L2", NETWORK,
        "The vectors that the layout term asks of the abnormal code, from the predicted labels: a segmentation without "
        "codes.",
        by_features(predicted_layout),
    ),
    "lesion_grid": Method(
        "true lesion share of each code cell, L2", TRUTH, "How much of each code cell the true lesion covers.",
        by_features(lesion_shares),
    ),
    "oracle_normal": Method(
        "oracle: true regions", TRUTH, "Mean Dice of the true regions.", by_labels("oracle_normal"),
    ),
    "oracle_abnormal": Method(
        "oracle: true lesion classes", TRUTH, "Mean Dice of the true lesion classes.", by_labels("oracle_abnormal"),
    ),
    "oracle_whole": Method(
        "oracle: true whole lesion", TRUTH, "Dice of the true lesion, classes taken together.",
        by_labels("oracle_whole"),
    ),
    "oracle_both": Method(
        "oracle: regions and lesion classes", TRUTH, "The mean of the first two oracles' Dice.",
        by_labels("oracle_both"),
    ),
}
