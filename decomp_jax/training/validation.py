"""A pass over the validation patients during training: the objective, segmentation and retrieval, without augmentation."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from decomp_jax.config import Config
from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.losses.objective import objective
from decomp_jax.mesh import split_over, to_host
from decomp_jax.models.network import DecompositionNet
from decomp_jax.retrieval import CodeBank, relevance
from decomp_jax.retrieval.queries import PATHS
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

    def __init__(self, config: Config, model: DecompositionNet, mesh: Mesh, dataset: SliceDataset) -> None:
        self._dataset, self._model, self._mesh = dataset, model, mesh
        self._labelled = np.flatnonzero(dataset.rows["labelled"])
        self._batch_size = min(config.train.batch_size, -(-len(self._labelled) // mesh.size) * mesh.size)
        self._targets = {"abnormal": ("label", len(dataset.settings.lesion_classes))}
        if dataset.settings.anatomy_classes:
            self._targets["normal"] = ("anatomy", len(dataset.settings.anatomy_classes))
        self._measure = jax.jit(functools.partial(_measure, model=model, config=config))
        self._paint = jax.jit(functools.partial(_paint, model=model))

    @classmethod
    def of(cls, config: Config, model: DecompositionNet, mesh: Mesh) -> Self | None:
        """None if the configuration asks for none or the data set has no labelled validation slice."""
        if not config.train.eval_every or "validation" not in read_manifest(config.data.dir)["splits"]:
            return None
        dataset = SliceDataset(config.data.dir, "validation")
        return cls(config, model, mesh, dataset) if dataset.rows["labelled"].any() else None

    def __call__(self, state: State) -> dict[str, float]:
        passes, kept, counts = [], [], 0
        for batch, valid, (terms, arrays) in self._passes(self._measure, state, self._labelled):
            arrays = {name: value[:valid] for name, value in arrays.items()}
            passes.append((valid, terms))
            counts = counts + self._pixel_counts(batch["label"][:valid], arrays["predicted"])
            kept.append({name: batch[name][:valid] for name, _ in self._targets.values()}
                        | {f"{path}_indices": arrays[f"{path}_indices"].astype(np.uint16) for path in PARTS})
        values = {
            f"val/{name}": float(sum(valid * terms[name] for valid, terms in passes) / len(self._labelled))
            for name in passes[0][1]
        }
        for name, (shared, either) in zip(self._dataset.settings.lesion_classes, counts):
            values[f"val/segmentation_dice/{name}"] = float(2 * shared / max(either, 1))
        arrays = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
        return values | self._retrieval(arrays, state.params)

    def panels(self, state: State) -> dict[str, np.ndarray]:
        """Input, x_plus and x_minus side by side [PANELS,S,3S,1], of slices spread over those with a lesion."""
        rows = self._labelled[self._dataset.rows["has_abnormality"][self._labelled]]
        rows = rows if len(rows) else self._labelled
        rows = rows[np.linspace(0, len(rows) - 1, PANELS).astype(int)]
        panels = [panel[:valid] for _, valid, panel in self._passes(self._paint, state, rows)]
        return {"val/image_plus_minus": np.concatenate(panels)}

    def _passes(
        self, function: Callable[..., Any], state: State, rows: np.ndarray
    ) -> Iterator[tuple[dict[str, np.ndarray], int, Any]]:
        """Padded batches {image, label, anatomy} of the rows, how many rows of each are valid, what `function` gives."""
        fields = ("image", *(name for name, _ in self._targets.values()))
        for batch, valid in split_batches(self._dataset, fields, self._batch_size, rows):
            placed = {name: split_over(self._mesh, batch[name]) for name in ("image", "label")}
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            yield batch, valid, to_host(function(variables, placed))

    def _pixel_counts(self, label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Pixels [classes,2] of each lesion class in both maps, and in the one plus those in the other."""
        return np.array([
            (np.sum((label == c) & (predicted == c)), np.sum(label == c) + np.sum(predicted == c))
            for c in range(1, len(self._dataset.settings.lesion_classes) + 1)
        ])

    def _retrieval(self, arrays: dict[str, np.ndarray], params: Any) -> dict[str, float]:
        rows = self._dataset.rows[self._labelled]
        normal_codebook, abnormal_codebook = self._model.apply({"params": params}, method="codebooks")
        bank = CodeBank.from_arrays(
            normal_indices=arrays["normal_indices"],
            abnormal_indices=arrays["abnormal_indices"],
            normal_codebook=np.asarray(normal_codebook),
            abnormal_codebook=np.asarray(abnormal_codebook),
            rows=rows,
        )
        values: dict[str, float] = {}
        for path, (name, classes) in self._targets.items():
            queries = np.flatnonzero(rows["has_abnormality"]) if path == "abnormal" else np.arange(len(rows))
            indices = getattr(bank, f"{path}_indices")[queries]
            hits = bank.search(**{path: indices}, k=HITS, exclude=rows["patient_id"][queries])
            gains = relevance.mean_gain(_dice_of_hits(arrays[name], queries, np.asarray(hits.rows), classes), HITS)
            if not np.isnan(gains).all():  # a single validation patient has nobody to be compared with
                values[f"val/retrieval/{path}_dice@{HITS}"] = float(np.nanmean(gains))
        return values


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


def _measure(
    variables: dict[str, Any], batch: dict[str, Array], *, model: DecompositionNet, config: Config
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Terms of the objective; codes and predicted labels."""
    image, label = batch["image"].astype(jnp.float32), batch["label"].astype(jnp.int32)
    outputs = model.apply(variables, image, quantised=1.0, train=False)
    total, terms = objective(
        outputs,
        Targets(image, label, image, label),
        config.weights,
        margin=config.train.margin,
        nothing=bool(config.model.nothing_threshold),
    )
    arrays = {
        "normal_indices": outputs.codes.normal_indices,
        "abnormal_indices": outputs.codes.abnormal_indices,
        "predicted": outputs.seg_logits.argmax(-1).astype(jnp.uint8),
    }
    return {"loss/total": total, **{f"term/{name}": value for name, value in terms.items()}}, arrays


def _paint(variables: dict[str, Any], batch: dict[str, Array], *, model: DecompositionNet) -> Array:
    """Input, x_plus and x_minus [B,S,3S,1] side by side, of the first modality."""
    image = batch["image"].astype(jnp.float32)
    outputs = model.apply(variables, image, quantised=1.0, train=False)
    return jnp.concatenate([image[..., :1], outputs.x_plus[..., :1], outputs.x_minus[..., :1]], axis=2)
