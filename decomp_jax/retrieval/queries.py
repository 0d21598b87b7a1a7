"""Queries: what a bank is asked for.

A query is a table a path: L[k, p] is what code k in cell p adds to the distance. Every table has the form

    L[k, p] = sum over examples of  weight[p] * ||point[p] - codebook[k]||^2

in which a point is a row of the codebook (`codes`) or a vector (`latents`). Queries are added, and multiplied by
weights of the cells, a number or [h,w] or [Q,h,w]:

    codes(normal=a) + codes(abnormal=b)            anatomy of one image, lesion of another
    latents(normal=z_n, abnormal=z_a)              an image that is not quantised (asymmetric search)
    latents(abnormal=t)                            a drawn lesion, t being what the network draws such a lesion to
    (1 - s) * latents(normal=z_n) + s * latents(abnormal=z_a)
    region * latents(abnormal=z_a)                 cells in which the region is 0 don't count
    one + two - 0.5 * other                        like one and two, unlike the other
    by_examples([one, two], [other], weight=s)     the same as a mean, and a share for the lesion
    relative(queries)                              any of these, relative to the lengths of what is compared
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Real

from decomp_jax.errors import UserError

PATHS = ("normal", "abnormal")
# Of squared lengths: what distances of equal vectors come to by rounding alone stays below.
ROUNDING = 1e-12
# Weight of what hits had better not be like; below 1, so that what they should be like decides.
AWAY = 0.5

Indices = Int[np.ndarray | jax.Array, "q h w"]
Latents = Float[np.ndarray | jax.Array, "q h w d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """What one path is compared with.

    Attributes:
        path: "normal" or "abnormal".
        points: integers [Q,h,w], rows of the codebook, or float [Q,h,w,D], vectors.
        weights: float64 [Q,h,w]; negative where a code had better be far from the point.

    The first axis of each may be 1, which stands for any Q.
    """

    path: str
    points: np.ndarray
    weights: np.ndarray

    @property
    def quantised(self) -> bool:
        """Whether the points are rows of the codebook, not vectors."""
        return self.points.ndim == 3

    def __len__(self) -> int:
        return np.broadcast_shapes(self.points.shape[:1], self.weights.shape[:1])[0]

    def __getitem__(self, rows: slice | np.ndarray) -> Self:
        points, weights = (array if len(array) == 1 else array[rows] for array in (self.points, self.weights))
        return dataclasses.replace(self, points=points, weights=weights)


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """Q queries, the sum of their examples; built by `codes` and `latents`, added and weighted.

    Attributes:
        relative: whether they ask for `relative` distances.
        share: float64 [Q], how much of the lengths is taken off the distance; None for nothing.
    """

    examples: tuple[Example, ...]
    relative: bool = False
    share: np.ndarray | None = None

    __array_ufunc__ = None  # an array times queries is left to __rmul__

    def __post_init__(self) -> None:
        sizes = [len(example) for example in self.examples]
        if len({*sizes} - {1}) > 1:
            counts = ", ".join(f"{size} ({example.path})" for size, example in zip(sizes, self.examples))
            raise UserError(f"queries: {counts} are put together; give as many of each, or one")

    def __len__(self) -> int:
        return np.broadcast_shapes(*((len(example),) for example in self.examples))[0]

    def __getitem__(self, rows: slice | np.ndarray) -> Self:
        examples = tuple(example if len(example) == 1 else example[rows] for example in self.examples)
        share = None if self.share is None else self.share[rows]
        return dataclasses.replace(self, examples=examples, share=share)

    def __add__(self, other: Self) -> Self:
        return Queries(self.examples + other.examples, self.relative or other.relative)

    def __sub__(self, other: Self) -> Self:
        return self + -1 * other

    def __mul__(self, weights: float | Real[np.ndarray | jax.Array, "..."]) -> Self:
        weights = np.asarray(weights, np.float64)
        return dataclasses.replace(self, examples=tuple(_weighted(example, weights) for example in self.examples))

    __rmul__ = __mul__

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that the queries are about."""
        return tuple(path for path in PATHS if any(example.path == path for example in self.examples))

    def less(self, share: Float[np.ndarray, "q"]) -> Self:
        """Queries for the distance less a share of the lengths (see `decomp_jax.retrieval.relative`)."""
        return Queries(self.examples, share=share)

    def check(self, grid: tuple[int, int], codebooks: Mapping[str, np.ndarray]) -> None:
        """Raises UserError if the queries don't fit codes of this grid and these codebooks."""
        for example in self.examples:
            points, codebook = example.points, codebooks[example.path]
            shape = (*grid,) if example.quantised else (*grid, codebook.shape[1])
            if points.shape[1:] != shape:
                kind = "integer indices" if example.quantised else "latents"
                raise UserError(f"{example.path}: needs {kind} [Q,{','.join(map(str, shape))}], as the bank's, not "
                                f"{list(points.shape)}")
            if example.quantised and points.size and not 0 <= points.min() <= points.max() < len(codebook):
                raise UserError(f"{example.path}: holds {points.min()}..{points.max()}, but the bank's {example.path}_"
                                f"codebook has {len(codebook)} codes; encode queries and bank with one model")


def codes(*, normal: Indices | None = None, abnormal: Indices | None = None) -> Queries:
    """Queries that are quantised as the bank is: indices [Q,h,w] of one path or of both.

    Raises:
        UserError: naming the argument that is no such array.
    """
    return _queries(normal, abnormal, "integer indices [Q,h,w]", np.integer, 3)


def latents(*, normal: Latents | None = None, abnormal: Latents | None = None) -> Queries:
    """Queries that are vectors [Q,h,w,D] of one path or of both: the encoder's outputs, or targets of a drawn lesion.

    Raises:
        UserError: naming the argument that is no such array, or isn't finite.
    """
    return _queries(normal, abnormal, "finite latents [Q,h,w,D]", np.floating, 4)


def by_examples(like: Sequence[Queries], unlike: Sequence[Queries] = (), *, weight: float = 0.5) -> Queries:
    """The mean distance to what hits should be like, less half the mean distance to the others, path by path.

    Args:
        weight: share of the lesion in queries about both paths; 0.5 is the plain sum.
    """
    liked, unliked = ([example for query in queries for example in query.examples] for queries in (like, unlike))
    paths = {example.path for example in liked + unliked}
    shares = {"normal": 2 * (1 - weight), "abnormal": 2 * weight} if len(paths) > 1 else dict.fromkeys(paths, 1)
    parts = []
    for path in PATHS:
        for factor, examples in ((1, liked), (-AWAY, unliked)):
            own = tuple(example for example in examples if example.path == path)
            parts += (factor * shares[path] / len(own) * Queries(own)).examples if own else ()
    return Queries(tuple(parts))


def relative(queries: Queries) -> Queries:
    """The queries, for their distance relative to what it would be between vectors at right angles.

    0 is the same; from 1 on nothing is alike. Of lesion codes it is 1 less a Dice of the two lesions, where the plain
    distance has small lesions near to all others. See `decomp_jax.retrieval.relative`.
    """
    return dataclasses.replace(queries, relative=True)


def contributions(
    queries: Queries, indices: Mapping[str, Int[np.ndarray, "q k h w"]],
    codebooks: Mapping[str, Float[np.ndarray, "n d"]],
) -> dict[str, Float[np.ndarray, "q k h w"]]:
    """What each cell of some codes adds to their distance from the queries, by path; all together is the distance.

    Args:
        indices: for each path of the queries, k codes a query.
    """
    found = {path: np.empty(np.shape(indices[path])) for path in queries.paths}
    for query in range(len(queries)):
        flat = {path: np.reshape(indices[path][query], (len(indices[path][query]), -1)) for path in queries.paths}
        distances, lengths = _by_cell(queries[query:query + 1], flat, codebooks)
        for path, cells in distances.items():
            cells = _divided(cells, lengths[:, None]) if queries.relative else cells
            found[path][query] = cells.reshape(found[path][query].shape)
    return found


def ratios(
    query: Queries, indices: Mapping[str, Int[np.ndarray, "k p"]], codebooks: Mapping[str, Float[np.ndarray, "n d"]],
) -> Float[np.ndarray, "k"]:
    """Relative distances of k codes from one query."""
    distances, lengths = _by_cell(query, indices, codebooks)
    return _divided(sum(cells.sum(1) for cells in distances.values()), lengths)


def _by_cell(
    query: Queries, indices: Mapping[str, Int[np.ndarray, "k p"]], codebooks: Mapping[str, Float[np.ndarray, "n d"]],
) -> tuple[dict[str, Float[np.ndarray, "k p"]], Float[np.ndarray, "k"]]:
    """Of k codes what each cell adds to the distance from one query, and what relative distances are divided by."""
    distances, lengths = {}, np.zeros(len(indices[query.paths[0]]))
    for path in query.paths:
        own, codebook = indices[path], codebooks[path]
        squares, points, offsets = (part[0] for part in merged(query, path, codebook))
        whole = merged(query, path, codebook, lengths=True)
        norms = (codebook**2).sum(1)[own]
        over = whole.squares[0] * norms + whole.offsets[0]
        cells = squares * norms - 2 * np.einsum("kpd,pd->kp", codebook[own], points) + offsets
        cells[np.abs(cells) < ROUNDING * over] = 0.0
        distances[path] = cells
        lengths += over.sum(1)
    return distances, lengths


def _divided(values: Float[np.ndarray, "..."], lengths: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """0 where nothing was to be compared."""
    return np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)


def is_sparse(path: str, codebook: Float[np.ndarray, "k d"]) -> bool:
    """Whether code 0 stands for "nothing here": a lesion codebook's zero vector, which most cells hold."""
    return path == "abnormal" and not codebook[0].any()


class Merged(NamedTuple):
    """All examples of a path as one, with [Q] in front or not.

    In cell p code c adds  squares[p] ||c||^2 - 2 points[p] c + offsets[p]  to the distance.
    """

    squares: Float[Array, "*q p"]
    points: Float[Array, "*q p d"]
    offsets: Float[Array, "*q p"]


def merged(queries: Queries, path: str, codebook: Float[np.ndarray, "k d"], *, lengths: bool = False) -> Merged:
    """The examples of `path`; with `lengths`, for what relative distances are divided by in place of the distance."""
    squares, points, offsets = 0.0, 0.0, 0.0
    for example in queries.examples:
        if example.path == path:
            vectors = codebook[example.points] if example.quantised else example.points.astype(codebook.dtype)
            weights, of_squares = example.weights, example.weights
            if lengths:
                weights, of_squares = 0 * weights, np.abs(weights)
            elif queries.share is not None:
                of_squares = weights - queries.share[:, None, None] * np.abs(weights)
            squares = squares + of_squares
            points = points + weights[..., None] * vectors
            offsets = offsets + of_squares * (vectors**2).sum(-1)
    cells = points.shape[1] * points.shape[2]
    return Merged(*(np.broadcast_to(part, (len(queries), *part.shape[1:])).reshape(len(queries), cells, *part.shape[3:])
                    for part in (squares, points, offsets)))


def padded(examples: Merged, size: int) -> Merged:
    """`examples` of so many queries: the last is repeated."""
    return jax.tree.map(lambda part: part[np.minimum(np.arange(size), len(part) - 1)], examples)


def table(example: Merged, codebook: Float[Array, "k d"]) -> Float[Array, "p k"]:
    """What each code in each cell adds to the distance from one query."""
    squares, points, offsets = example
    return squares[:, None] * (codebook**2).sum(1) - 2 * (points @ codebook.T) + offsets[:, None]


def _queries(normal: object, abnormal: object, what: str, kind: type, ndim: int) -> Queries:
    points = {path: np.asarray(given) for path, given in zip(PATHS, (normal, abnormal)) if given is not None}
    if not points:
        raise UserError("normal, abnormal: give one of them, or both")
    for path, array in points.items():
        if not np.issubdtype(array.dtype, kind) or array.ndim != ndim or not np.isfinite(array).all():
            raise UserError(f"{path}: needs {what}, not {array.dtype} {list(array.shape)}")
    if len({len(array) for array in points.values()}) > 1:
        raise UserError(f"normal, abnormal: {len(points['normal'])} and {len(points['abnormal'])} queries; give as "
                        "many of each")
    return Queries(tuple(Example(path, array, np.ones((1, *array.shape[1:3]))) for path, array in points.items()))


def _weighted(example: Example, weights: np.ndarray) -> Example:
    cells = example.weights.shape[1:]
    fits = weights.ndim in (0, 2, 3) and weights.shape[-2:] in ((), cells)
    if not fits or not np.isfinite(weights).all():
        raise UserError(f"weights: need a finite number, or one a cell, [{cells[0]},{cells[1]}] or "
                        f"[Q,{cells[0]},{cells[1]}], not {list(weights.shape)}")
    if weights.ndim == 3 and len(weights) != 1 and len(example) not in (1, len(weights)):
        raise UserError(f"weights: {len(weights)} for {len(example)} queries; give as many, or one")
    return dataclasses.replace(example, weights=example.weights * weights)
