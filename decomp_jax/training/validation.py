"""A pass over the validation patients during training: objective, segmentation and retrieval, not augmented."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from decomp_jax.config import Config, ObjectiveConfig
from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.losses.objective import objective
from decomp_jax.mesh import to_host
from decomp_jax.models.network import DecompositionNet
from decomp_jax.retrieval import CodeBank, relevance
from decomp_jax.training.state import State
from decomp_jax.types import Targets

PANELS = 4
HITS = 5
QUERY_BLOCK = 256


class Validation:
    """Called with a state, returns metrics by name.

    Retrieval is leave-one-patient-out among the validation slices: the mean Dice (over classes, then queries) of the
    `HITS` nearest slices of other patients, for lesions by the abnormal code and for anatomy by the normal code.
    """

    def __init__(
        self, config: Config, model: DecompositionNet, mesh: Mesh, dataset: SliceDataset, check: Callable[[], None]
    ) -> None:
        self._config, self._dataset, self._model, self._mesh, self._check = config, dataset, model, mesh, check
        self._positions = _spread(np.flatnonzero(dataset.rows["labelled"]), config.train.eval_slices)
        self._rows = dataset.rows[self._positions]
        self._targets = {"abnormal": ("label", len(dataset.settings.lesion_classes))}
        if dataset.settings.anatomy_classes:
            self._targets["normal"] = ("anatomy", len(dataset.settings.anatomy_classes))
        self._measure = functools.partial(_measure, model=model, config=config.objective)
        self._paint = functools.partial(_paint, model=model)

    @classmethod
    def create(
        cls, config: Config, model: DecompositionNet, mesh: Mesh, check: Callable[[], None] = lambda: None
    ) -> Self | None:
        """None if the configuration asks for none or the data set has no labelled validation slice."""
        if not config.train.eval_every or "validation" not in read_manifest(config.data.dir)["splits"]:
            return None
        dataset = SliceDataset(config.data.dir, "validation")
        return cls(config, model, mesh, dataset, check) if dataset.rows["labelled"].any() else None

    def __call__(self, state: State) -> dict[str, float]:
        sums, pixels, kept = [], 0, []
        for batch, count, (terms, counts, codes) in self._passes(self._measure, state, self._positions):
            sums.append(terms)
            pixels = pixels + counts.astype(np.int64)
            labels = to_host({name: batch[name] for name, _ in self._targets.values()})
            kept.append({name: value[:count] for name, value in (labels | codes).items()})
        values = {f"val/{name}": float(sum(terms[name] for terms in sums) / len(self._positions)) for name in sums[0]}
        for name, (shared, either) in zip(self._dataset.settings.lesion_classes, pixels):
            values[f"val/segmentation_dice/{name}"] = float(2 * shared / max(either, 1))
        arrays = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
        return values | self._retrieval(arrays, state.params)

    def panels(self, state: State) -> dict[str, np.ndarray]:
        """Input, x_plus and x_minus side by side [PANELS,S,3S,1], of slices spread over those with a lesion."""
        abnormal = self._positions[self._rows["has_abnormality"]]
        positions = _spread(abnormal if len(abnormal) else self._positions, PANELS)
        panels = [panel[:count] for _, count, panel in self._passes(self._paint, state, positions)]
        return {"val/image_plus_minus": np.concatenate(panels)}

    def _passes(
        self, function: Callable[..., Any], state: State, positions: np.ndarray
    ) -> Iterator[tuple[dict[str, Array], int, Any]]:
        """Global batches {image, label, anatomy, valid}, how many rows of each count, what `function` gives."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        fields = ("image", *(name for name, _ in self._targets.values()))
        for batch, count in split_batches(
            self._dataset, fields, self._mesh,
            batch_size=self._config.train.batch_size, rows=positions, config=self._config.data,
        ):
            self._check()
            yield batch, count, to_host(function(variables, batch))

    def _retrieval(self, arrays: dict[str, np.ndarray], params: Any) -> dict[str, float]:
        normal_codebook, abnormal_codebook = self._model.apply({"params": params}, method="codebooks")
        bank = CodeBank.from_arrays(
            normal_indices=arrays["normal_indices"],
            abnormal_indices=arrays["abnormal_indices"],
            normal_codebook=np.asarray(normal_codebook),
            abnormal_codebook=np.asarray(abnormal_codebook),
            rows=self._rows,
        )
        values: dict[str, float] = {}
        for path, (name, classes) in self._targets.items():
            asks = self._rows["has_abnormality"] if path == "abnormal" else np.ones(len(self._rows), bool)
            queries = np.flatnonzero(asks)
            indices = getattr(bank, f"{path}_indices")[queries]
            hits = bank.search(**{path: indices}, k=HITS, exclude=self._rows["patient_id"][queries])
            gains = relevance.mean_gain(_dice_of_hits(arrays[name], queries, np.asarray(hits.rows), classes), HITS)
            if not np.isnan(gains).all():  # a single validation patient has nobody to be compared with
                values[f"val/retrieval/{path}_dice@{HITS}"] = float(np.nanmean(gains))
        return values


def _spread(positions: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the positions, at even distances."""
    return positions[np.linspace(0, len(positions) - 1, min(most, len(positions))).astype(int)]


def _dice_of_hits(
    labels: UInt8[np.ndarray, "n s s"], queries: Int[np.ndarray, "q"], rows: Int[np.ndarray, "q k"], classes: int
) -> Float[np.ndarray, "q k"]:
    """Dice of each query with each of its hits, mean over classes; NaN where there is no hit."""
    blocks = np.array_split(np.arange(len(queries)), -(-len(queries) // QUERY_BLOCK) or 1)
    dice = [_pair_dice(labels[queries[block]], labels[rows[block]], classes=classes) for block in blocks]
    return np.where(rows < 0, np.nan, np.concatenate(dice))


@functools.partial(jax.jit, static_argnames="classes")
def _pair_dice(query: UInt8[Array, "q s s"], hits: UInt8[Array, "q k s s"], *, classes: int) -> Float[Array, "q k"]:
    of_one = jax.vmap(functools.partial(relevance.class_dice, classes=classes))(query[:, None], hits)
    return relevance.mean_over_classes(of_one[:, 0])


@functools.partial(jax.jit, static_argnames=("model", "config"))
def _measure(
    variables: dict[str, Any], batch: dict[str, Array], *, model: DecompositionNet, config: ObjectiveConfig
) -> tuple[dict[str, Array], Int[Array, "classes 2"], dict[str, Array]]:
    """Of the valid rows the sums of all terms, and pixels of each class in both maps and in either; all rows' codes."""
    image, label, valid = batch["image"].astype(jnp.float32), batch["label"].astype(jnp.int32), batch["valid"]
    outputs = model.apply(variables, image, quantised=1.0, train=False)
    total, terms = objective(
        outputs,
        Targets(image, label, image, label),
        config,
        nothing=bool(model.config.nothing_threshold),
        valid=valid,
    )
    means = {"loss/total": total} | {f"term/{name}": mean for name, mean in terms.items()}
    predicted = jnp.where(valid[:, None, None], outputs.seg_logits.argmax(-1), 0)
    true = jnp.where(valid[:, None, None], label, 0)
    pixels = jnp.array([
        [jnp.sum((true == c) & (predicted == c)), jnp.sum(true == c) + jnp.sum(predicted == c)]
        for c in range(1, model.lesion_classes + 1)
    ])
    codes = {
        "normal_indices": outputs.codes.normal_indices.astype(jnp.uint16),
        "abnormal_indices": outputs.codes.abnormal_indices.astype(jnp.uint16),
    }
    return {name: valid.sum() * mean for name, mean in means.items()}, pixels, codes


@functools.partial(jax.jit, static_argnames="model")
def _paint(variables: dict[str, Any], batch: dict[str, Array], *, model: DecompositionNet) -> Array:
    """Input, x_plus and x_minus [B,S,3S,1] side by side, of the first modality."""
    image = batch["image"].astype(jnp.float32)
    outputs = model.apply(variables, image, quantised=1.0, train=False)
    return jnp.concatenate([image[..., :1], outputs.x_plus[..., :1], outputs.x_minus[..., :1]], axis=2)
