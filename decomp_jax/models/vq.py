"""Vector quantisation: nearest codes, the straight-through value, and the care of codebooks, as plain functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from decomp_jax.types import CodebookStats


def init_codebook(key: PRNGKeyArray, shape: tuple[int, int], *, nothing: bool = False) -> Float[Array, "k d"]:
    """Uniform in +-1/K (van den Oord et al. 2017); with `nothing`, code 0 is the zero vector that says "nothing"."""
    codebook = jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0])
    return codebook.at[0].set(0.0) if nothing else codebook


def nearest_code(z_e: Float[Array, "*n d"], codebook: Float[Array, "k d"]) -> Int[Array, "*n"]:
    """Index of the code with the least ||z_e - code||^2, short of rounding; the lower one of two equally near.

    ||z_e||^2, the same for all codes, is left out of the expanded square, so that one product of matrices remains:
    (z_e, 1) . (-2 code, ||code||^2). Two plain reductions take a fifth of the time of an argmin on a CPU.
    """
    columns = jnp.concatenate([-2 * codebook, jnp.sum(codebook**2, -1, keepdims=True)], -1).T
    # Without the barrier XLA folds the transposition into the product, which its CPU kernel runs 8 times slower.
    columns = jax.lax.optimization_barrier(columns)
    ones = jnp.ones_like(z_e[..., :1])
    distance = jnp.matmul(jnp.concatenate([z_e, ones], -1), columns, precision=jax.lax.Precision.HIGHEST)
    last = len(codebook) - 1
    return jnp.where(distance == distance.min(-1, keepdims=True), jnp.arange(last + 1), last).min(-1)


def is_finding(z_e: Float[Array, "*n d"], threshold: float) -> Bool[Array, "*n"]:
    """Whether a cell of the abnormal path shows a lesion: ||z_e||^2 > threshold. The others take the "nothing" code."""
    return jnp.sum(z_e**2, -1) > threshold


def lookup(indices: Int[Array, "*n"], codebook: Float[Array, "k d"]) -> Float[Array, "*n d"]:
    """z_q: the codebook's rows of these indices."""
    return codebook[indices]


def straight_through(z_e: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Value of z_q, gradient of the identity in z_e (van den Oord et al. 2017)."""
    return z_e + jax.lax.stop_gradient(z_q - z_e)


def rotate_through(z_e: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Value of z_q, gradient of the rotation and scaling that take z_e to z_q (Fifty et al. 2024, "rotation trick").

    Where either is zero, as the "nothing" code is, no rotation is defined: the gradient is that of `straight_through`.
    """
    norm_e, norm_q = (jnp.linalg.norm(jax.lax.stop_gradient(z), axis=-1, keepdims=True) for z in (z_e, z_q))
    defined = (norm_e > 1e-6) & (norm_q > 1e-6)
    e, q = (jax.lax.stop_gradient(z) / jnp.where(defined, norm, 1) for z, norm in ((z_e, norm_e), (z_q, norm_q)))
    half = (e + q) / jnp.maximum(jnp.linalg.norm(e + q, axis=-1, keepdims=True), 1e-6)
    # R z = z - 2 half (half . z) + 2 q (e . z): a product of two reflections.
    along_half, along_e = (jnp.sum(unit * z_e, -1, keepdims=True) for unit in (half, e))
    rotated = norm_q / jnp.where(defined, norm_e, 1) * (z_e - 2 * half * along_half + 2 * q * along_e)
    return jnp.where(defined, rotated, straight_through(z_e, z_q))


def usage(indices: Int[Array, "*n"], size: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Share of codes in use, and perplexity exp(entropy) of their use."""
    counts = jnp.zeros(size).at[indices.reshape(-1)].add(1.0)
    p = counts / counts.sum()
    return (counts > 0).mean(), jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))


def update_by_average(
    stats: CodebookStats,
    z_e: Float[Array, "n d"],
    indices: Int[Array, "n"],
    weight: Float[Array, "n"],
    *,
    decay: float,
) -> CodebookStats:
    """Moving average of the vectors that chose each code (Razavi et al. 2019). `weight` 0 leaves a vector out."""
    codes = jnp.arange(len(stats.count))[:, None]
    chosen = jnp.where(codes == indices, weight, 0.0)
    total = jnp.matmul(chosen, z_e, precision=jax.lax.Precision.HIGHEST)
    return CodebookStats(
        count=decay * stats.count + (1 - decay) * chosen.sum(1),
        total=decay * stats.total + (1 - decay) * total,
    )


def revive(
    key: PRNGKeyArray, stats: CodebookStats, z_e: Float[Array, "n d"], weight: Float[Array, "n"], *, below: float
) -> CodebookStats:
    """Restarts codes used less than `below` at vectors drawn from `z_e` by `weight`.

    Codes that were never used are dead, so the first call is the data-dependent initialisation.
    A revived code counts as used once, which gives it time to find vectors of its own before it is dead again.
    Without any vector to draw from nothing changes.
    """
    size = stats.count.shape[0]
    dead = (stats.count < below) & (weight.sum() > 0)
    bounds = jnp.cumsum(weight)
    drawn = z_e[jnp.searchsorted(bounds, jax.random.uniform(key, (size,)) * bounds[-1], side="right")]
    return CodebookStats(
        count=jnp.where(dead, 1.0, stats.count),
        total=jnp.where(dead[:, None], drawn, stats.total),
    )


def mean_codes(stats: CodebookStats, codebook: Float[Array, "k d"], *, nothing: bool) -> Float[Array, "k d"]:
    """Mean vector of each code; codes that were hardly ever used keep the one they have, as code 0, "nothing", does."""
    moves = (stats.count > 1e-3) & ~(nothing & (jnp.arange(len(codebook)) == 0))
    return jnp.where(moves[:, None], stats.total / jnp.maximum(stats.count, 1e-3)[:, None], codebook)
