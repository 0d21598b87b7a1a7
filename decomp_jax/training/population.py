"""Statistics of batch normalisation for images as they are."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from decomp_jax.data.augment import drop_channels
from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import State


def with_population_statistics(
    state: State, dataset: SliceDataset, *, model: DecompositionNet, mesh: Mesh, batch_size: int, images: int,
    drop_channel: float, check: Callable[[], None] = lambda: None,
) -> State:
    """`state` with the statistics of the training slices, as the mean over batches of up to `images` of them.

    With 0 images the moving averages of training stay.

    The moving averages of training are those of augmented images, which resampling has smoothed and lesions are pasted
    into; with them the network finds lesions that are not there. ("Precise" statistics: Wu and Johnson 2021.) `check`
    is called before each batch and may raise.
    """
    if not images:
        return state
    rows = full_batches(np.flatnonzero(dataset.rows["labelled"]), images, batch_size)

    def batches() -> Iterator[jax.Array]:
        for batch, _ in split_batches(dataset, ("image",), mesh, batch_size=batch_size, rows=rows):
            check()
            yield batch["image"]

    statistics = population_statistics(
        state.params, state.batch_stats, batches(), model=model, drop_channel=drop_channel
    )
    return state.replace(batch_stats=statistics)


def full_batches(rows: Int[np.ndarray, "n"], images: int, batch_size: int) -> Int[np.ndarray, "_"]:
    """Up to `images` of the rows at random, in full batches; all of them where they fill none."""
    return np.random.default_rng(0).permutation(rows)[: max(min(images, len(rows)) // batch_size, 1) * batch_size]


def population_statistics(
    params: Any, batch_stats: Any, batches: Iterable[Float[jax.Array, "b s s c"]], *, model: DecompositionNet,
    drop_channel: float,
) -> Any:
    """The statistics of batches of images, as the mean over batches; of the structure of `batch_stats`.

    Channels are dropped as in training: the network normalises any subset of them by the same statistics.
    """
    statistics = [
        _batch_statistics(params, batch_stats, image, i, model=model, drop_channel=drop_channel)
        for i, image in enumerate(batches)
    ]
    return jax.tree.map(lambda *values: sum(values) / len(values), *statistics)


@functools.partial(jax.jit, static_argnames=("model", "drop_channel"))
def _batch_statistics(
    params: Any, batch_stats: Any, image: jax.Array, number: int, *, model: DecompositionNet, drop_channel: float
) -> Any:
    """Those of one batch. The layers that serve both paintings move twice, and get the mean of the two."""

    def move(moving: Any) -> Any:
        variables = {"params": params, "batch_stats": moving}
        return model.apply(variables, image, quantised=1.0, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    image = image.astype(jnp.float32)
    if drop_channel:
        image = drop_channels(jax.random.key(number), image, drop_channel)
    zeros, ones = (jax.tree.map(like, batch_stats) for like in (jnp.zeros_like, jnp.ones_like))
    moved, kept = jax.jvp(move, (zeros,), (ones,))
    return jax.tree.map(lambda moved, kept: moved / (1 - kept), moved, kept)
