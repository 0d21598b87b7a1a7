"""A network for images of twice the size, from a trained one: a level more at full resolution, the same code grid."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from decomp_jax.config import ModelConfig

DECODERS = {
    "segmentation_decoder": ("UpBlock_{}", "ResBlock_{}"),
    "image_decoder": ("up_blocks_{}", "res_blocks_{}"),
}


def grows(small: ModelConfig, large: ModelConfig) -> bool:
    """Whether the second is the first with one level more, as wide as its outermost."""
    if not small.full_resolution_block or len(small.widths) < 2:
        return False
    return large == dataclasses.replace(small, widths=(small.widths[0], *small.widths))


def grown(small: Mapping[str, Any], fresh: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """Parameters, or statistics of batch normalisation, of the larger network.

    Its levels take what the same level of the smaller network learnt, counted from the codes; the outermost blocks,
    which see single pixels, stay outermost. Those of the level in between leave their input as it is: residuals of 0, a
    convolution that copies. So the larger network begins as the smaller one with finer eyes, and not with new ones.
    (The idea is Karras et al. 2018's; nothing is faded in.)

    Args:
        fresh: the larger network's own, at the start.
        levels: of the smaller network.

    Raises:
        KeyError: what `fresh` needs is not in `small`.
    """
    last, between = levels - 1, None  # for blocks that no level of the smaller network has
    moved = {("encoder", "block_0"): ("encoder", "full_block"), ("encoder", "full_block"): between}
    moved |= {("encoder", f"block_{i + 1}"): ("encoder", f"block_{i}") for i in range(levels)}
    for decoder, (up, block) in DECODERS.items():
        # Ups follow the stem's own, so that there is one fewer of them than of blocks.
        for kind, outermost in ((up, last - 1), (block, last)):
            moved[decoder, kind.format(outermost + 1)] = (decoder, kind.format(outermost))
            moved[decoder, kind.format(outermost)] = between
    learnt = flatten_dict(small)
    result = {}
    for name, values in flatten_dict(fresh).items():
        source = moved.get(name[:2], name[:2])
        result[name] = _copying(name, np.asarray(values)) if source is between else learnt[source + name[2:]]
    return unflatten_dict(result)


def _copying(name: tuple[str, ...], values: np.ndarray) -> np.ndarray:
    """A leaf of a block that leaves its input as it is."""
    _, block, layer, *_, leaf = name
    if leaf != "kernel" or layer != ("Conv_0" if "up" in block.lower() else "Conv_1"):
        return values
    copying = np.zeros_like(values)
    if "up" in block.lower():
        copying[1, 1] = np.eye(*values.shape[2:])
    return copying
