"""One training step: augment, forward, objective, optimiser, codebooks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from decomp_jax.config import Config, TrainConfig
from decomp_jax.data.augment import augment
from decomp_jax.losses.cells import cell_means, lesion_cells
from decomp_jax.losses.objective import objective
from decomp_jax.mesh import replicated, sharded
from decomp_jax.models import vq
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import State
from decomp_jax.types import CodebookStats, Outputs, Targets

Metrics = dict[str, Float[Array, ""]]


def quantisation(step: Array, config: TrainConfig) -> Float[Array, ""]:
    """Share of quantisation in what the decoders see: 0 in the warm-up, then linearly to 1 in as many steps again.

    The warm-up is clamped so that even a short run ends quantised. Without one all steps are quantised.
    """
    warmup = min(config.warmup_steps, config.steps // 4)
    return jnp.clip((step - warmup) / warmup, 0.0, 1.0) if warmup else jnp.ones(())


def train_step(
    state: State, batch: dict[str, Array], *, model: DecompositionNet, tx: optax.GradientTransformation, config: Config
) -> tuple[State, Metrics]:
    """State and a global batch {image [B,S,S,C], label [B,S,S]} -> next state, and metrics of this step."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    augment_key, revive_key = jax.random.split(key)
    batch = {"image": batch["image"].astype(jnp.float32), "label": batch["label"].astype(jnp.int32)}
    image, targets = augment(augment_key, batch, config.augment)
    quantised = quantisation(state.step, config.train)

    def loss(params: dict) -> tuple[Array, tuple]:
        outputs, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            image,
            quantised=quantised,
            train=True,
            mutable=["batch_stats"],
        )
        total, terms = objective(
            outputs, targets, config.objective, nothing=bool(config.model.nothing_threshold)
        )
        return total, (terms, outputs, updates["batch_stats"])

    (total, (terms, outputs, batch_stats)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    stats = state.codebook_stats
    if config.model.codebook_decay:
        params, stats = update_codebooks(revive_key, params, stats, outputs, targets, state.step, config)
    metrics = {
        "loss/total": total,
        **{f"term/{name}": value for name, value in terms.items()},
        "gradient_norm": optax.tree.norm(gradients),
        **codebook_metrics(outputs, config.model.codebook_size),
    }
    return State(state.step + 1, params, batch_stats, stats, opt_state), metrics


def update_codebooks(
    key: PRNGKeyArray,
    params: dict,
    stats: dict[str, CodebookStats],
    outputs: Outputs,
    targets: Targets,
    step: Array,
    config: Config,
) -> tuple[dict, dict[str, CodebookStats]]:
    """Moves both codebooks to the average of their vectors and revives dead codes: in the warm-up, too.

    The abnormal codebook learns from the cells that `lesion_cells` names: others are drawn to nothing, or pushed away.
    """
    reviving = step < config.train.revive_until * config.train.steps
    nothing = bool(config.model.nothing_threshold)
    lesion = (targets.label > 0).astype(jnp.float32)[..., None]
    fraction = cell_means(lesion, outputs.latents.abnormal.shape[1])[..., 0]
    cells = lesion_cells(fraction, config.objective.lesion_cell, nothing=nothing)
    latents = {
        "normal": (outputs.latents.normal, outputs.codes.normal_indices, jnp.ones_like(cells)),
        "abnormal": (outputs.latents.abnormal, outputs.codes.lesion_indices, cells),
    }
    params, new_stats = dict(params), {}
    for i, (path, (z_e, indices, weight)) in enumerate(latents.items()):
        flat = z_e.reshape(-1, z_e.shape[-1])
        weight = weight.reshape(-1).astype(jnp.float32)
        new_stats[path] = vq.update_by_average(
            stats[path], flat, indices.reshape(-1), weight, decay=config.model.codebook_decay
        )
        if config.model.revive_below:
            new_stats[path] = vq.revive(
                jax.random.fold_in(key, i), new_stats[path], flat, weight * reviving, below=config.model.revive_below
            )
        name = f"{path}_codebook"
        params[name] = vq.mean_codes(new_stats[path], params[name], nothing=nothing and path == "abnormal")
    return params, new_stats


def codebook_metrics(outputs: Outputs, size: int) -> Metrics:
    """Share of both codebooks' `size` codes that the batch uses, and the perplexity of their use."""
    metrics = {}
    for path in ("normal", "abnormal"):
        used, perplexity = vq.usage(getattr(outputs.codes, f"{path}_indices"), size)
        metrics |= {f"codebook/{path}_usage": used, f"codebook/{path}_perplexity": perplexity}
    return metrics


def compile_train_step(
    model: DecompositionNet, tx: optax.GradientTransformation, config: Config, mesh: Mesh
) -> Callable[[State, dict[str, Array]], tuple[State, Metrics]]:
    """The jitted step: state replicated and donated, batch split over the mesh."""
    return jax.jit(
        functools.partial(train_step, model=model, tx=tx, config=config),
        in_shardings=(replicated(mesh), sharded(mesh)),
        out_shardings=(replicated(mesh), replicated(mesh)),
        donate_argnums=0,
    )
