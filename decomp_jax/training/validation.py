"""A pass over the validation patients during training: the objective, segmentation and retrieval, without augmentation."""

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from decomp_jax.config import Config
from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.losses.objective import objective
from decomp_jax.models.network import DecompositionNet
from decomp_jax.retrieval import CodeBank, relevance
from decomp_jax.training.state import State
from decomp_jax.types import Targets

PANELS = 4
HITS = 5


class Validation:
    """Called with a state, returns metrics by name and image panels.

    Retrieval is leave-one-patient-out among the validation slices: the mean Dice (over classes, then queries) of the
    `HITS` nearest slices of other patients, for lesions by the abnormal code and for anatomy by the normal code.
    """

    def __init__(self, config: Config, model: DecompositionNet, dataset: SliceDataset) -> None:
        self._dataset, self._model = dataset, model
        self._labelled = np.flatnonzero(dataset.rows["labelled"])
        self._batch_size = min(config.train.batch_size, len(self._labelled))
        self._fields = ("image", "label") + (("anatomy",) if dataset.settings.anatomy_classes else ())
        self._forward = jax.jit(functools.partial(_forward, model=model, config=config))

    @classmethod
    def of(cls, config: Config, model: DecompositionNet) -> Self | None:
        """None if the configuration asks for none or the data set has no labelled validation slice."""
        if not config.train.eval_every or "validation" not in read_manifest(config.data.dir)["splits"]:
            return None
        dataset = SliceDataset(config.data.dir, "validation")
        return cls(config, model, dataset) if dataset.rows["labelled"].any() else None

    def __call__(self, state: State) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        passes = []
        for batch, valid in split_batches(self._dataset, self._fields, self._batch_size, self._labelled):
            terms, arrays = jax.device_get(self._forward(state.params, state.batch_stats, batch["image"], batch["label"]))
            arrays |= {name: batch[name] for name in self._fields}
            passes.append((valid, terms, {name: value[:valid] for name, value in arrays.items()}))
        total = sum(valid for valid, _, _ in passes)
        values = {
            f"val/{name}": float(sum(valid * terms[name] for valid, terms, _ in passes) / total)
            for name in passes[0][1]
        }
        arrays = {name: np.concatenate([part[name] for _, _, part in passes]) for name in passes[0][2]}
        return values | self._dice(arrays) | self._retrieval(arrays, state.params), _panels(arrays)

    def _dice(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """Dice of each lesion class, over all validation pixels."""
        label, predicted = arrays["label"], arrays["predicted"]
        return {
            f"val/segmentation_dice/{name}": float(
                2 * np.sum((label == c) & (predicted == c)) / max(np.sum(label == c) + np.sum(predicted == c), 1)
            )
            for c, name in enumerate(self._dataset.settings.lesion_classes, 1)
        }

    def _retrieval(self, arrays: dict[str, np.ndarray], params: Any) -> dict[str, float]:
        rows, settings = self._dataset.rows[self._labelled], self._dataset.settings
        normal_codebook, abnormal_codebook = self._model.apply({"params": params}, method="codebooks")
        bank = CodeBank.from_arrays(
            normal_indices=arrays["normal_indices"].astype(np.uint16),
            abnormal_indices=arrays["abnormal_indices"].astype(np.uint16),
            normal_codebook=np.asarray(normal_codebook),
            abnormal_codebook=np.asarray(abnormal_codebook),
            rows=rows,
        )
        targets = {"abnormal": (arrays["label"], len(settings.lesion_classes), np.flatnonzero(rows["has_abnormality"]))}
        if settings.anatomy_classes:
            targets["normal"] = (arrays["anatomy"], len(settings.anatomy_classes), np.arange(len(rows)))
        values = {}
        for path, (labels, classes, queries) in targets.items():
            indices = getattr(bank, f"{path}_indices")[queries]
            hits = bank.search(**{path: indices}, k=HITS, exclude=rows["patient_id"][queries])
            dice = relevance.mean_over_classes(relevance.class_dice(labels[queries], labels, classes=classes))
            gains = relevance.mean_gain(relevance.gains_of(np.asarray(dice), np.asarray(hits.rows)), HITS)
            if not np.isnan(gains).all():  # a single validation patient has nobody to be compared with
                values[f"val/retrieval/{path}_dice@{HITS}"] = float(np.nanmean(gains))
        return values


def _forward(
    params: Any, batch_stats: Any, image: jax.Array, label: jax.Array, *, model: DecompositionNet, config: Config
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    image, label = image.astype(jnp.float32), label.astype(jnp.int32)
    outputs = model.apply({"params": params, "batch_stats": batch_stats}, image, quantised=1.0, train=False)
    total, terms = objective(
        outputs,
        Targets(image, label, image, label),
        config.weights,
        margin=config.train.margin,
        nothing=bool(model.nothing_threshold),
    )
    arrays = {
        "normal_indices": outputs.codes.normal_indices,
        "abnormal_indices": outputs.codes.abnormal_indices,
        "predicted": outputs.seg_logits.argmax(-1).astype(jnp.uint8),
        "x_plus": outputs.x_plus[..., :1],
        "x_minus": outputs.x_minus[..., :1],
    }
    return {"loss/total": total, **{f"term/{name}": value for name, value in terms.items()}}, arrays


def _panels(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Input, x_plus and x_minus side by side, of slices spread over those with a lesion."""
    rows = np.flatnonzero(arrays["label"].any((1, 2)))
    rows = rows[np.linspace(0, len(rows) - 1, PANELS).astype(int)] if len(rows) else np.arange(min(PANELS, len(arrays["label"])))
    panel = [arrays[name][rows].astype(np.float32)[..., :1] for name in ("image", "x_plus", "x_minus")]
    return {"val/image_plus_minus": np.concatenate(panel, axis=2)}
