"""The values that pass between modules: pytrees, with shapes as documentation.

They are not checked at run time: transformations fill pytrees with other things than arrays.
B batch, S image side, C channels, L lesion classes, h and w code grid, D code size, K codebook size.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """Encoder outputs z_e of both paths."""

    normal: Float[Array, "B h w D"]
    abnormal: Float[Array, "B h w D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Quantised latents of both paths: codebook rows z_q, their indices, and the straight-through values z_st.

    `lesion_indices` and `z_q_lesion` are the codes that the abnormal path would take in a cell with a finding: where
    there is a "nothing" code, the nearest of all others; without one the same as `abnormal_indices`, `z_q_abnormal`.
    """

    normal_indices: Int[Array, "B h w"]
    abnormal_indices: Int[Array, "B h w"]
    lesion_indices: Int[Array, "B h w"]
    z_q_normal: Float[Array, "B h w D"]
    z_q_abnormal: Float[Array, "B h w D"]
    z_q_lesion: Float[Array, "B h w D"]
    z_st_normal: Float[Array, "B h w D"]
    z_st_abnormal: Float[Array, "B h w D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """All that the objective looks at."""

    latents: Latents
    codes: Codes
    seg_logits: Float[Array, "B S S 1+L"]
    x_plus: Float[Array, "B S S C"]
    x_minus: Float[Array, "B S S C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the outputs are held to.

    Attributes:
        image: the whole image, for x_plus.
        label: its lesions, 0 background.
        background: for x_minus: the image before a lesion was pasted into it, else the image itself.
        background_label: the lesions of `background`.
    """

    image: Float[Array, "B S S C"]
    label: Int[Array, "B S S"]
    background: Float[Array, "B S S C"]
    background_label: Int[Array, "B S S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodebookStats:
    """Moving averages behind a codebook: how many vectors each code takes in a batch, and their sum."""

    count: Float[Array, "K"]
    total: Float[Array, "K D"]

    @classmethod
    def zeros(cls, size: int, dim: int) -> Self:
        """Of K = `size` codes of D = `dim` channels, none used yet."""
        return cls(jnp.zeros(size), jnp.zeros((size, dim)))
