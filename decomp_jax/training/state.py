"""All that changes in a run."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from decomp_jax.config import Config, TrainConfig
from decomp_jax.mesh import replicated
from decomp_jax.models.network import DecompositionNet
from decomp_jax.types import CodebookStats


@flax.struct.dataclass
class State:
    """A run is its state: data order, augmentation and noise are functions of `step` and the seed."""

    step: jax.Array
    params: Any
    batch_stats: Any
    codebook_stats: dict[str, CodebookStats]
    opt_state: optax.OptState


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam (Appendix D) with a linear ramp and a cosine."""
    ramp = min(config.ramp_steps, config.steps // 2)
    last = config.final_rate * config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, ramp, config.steps, last)
    return optax.adam(schedule)


def create_state(config: Config, model: DecompositionNet, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state of step 0, made on the devices where it will live."""

    def init() -> State:
        image = jnp.zeros((1, model.size, model.size, model.channels))
        variables = model.init(jax.random.key(config.train.seed), image, quantised=0.0, train=False)
        empty = CodebookStats.zeros(config.model.codebook_size, config.model.code_dim)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            codebook_stats={"normal": empty, "abnormal": empty},
            opt_state=tx.init(variables["params"]),
        )

    return jax.jit(init, out_shardings=replicated(mesh))()
