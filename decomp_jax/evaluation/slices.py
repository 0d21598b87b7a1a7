"""The slices of one split as the evaluation needs them: images, labels, and what the network makes of each."""

import dataclasses
from collections.abc import Iterator
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from tqdm import tqdm

from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.inference.decomposer import Decomposer, Decomposition
from decomp_jax.mesh import data_mesh, to_host
from decomp_jax.retrieval import CodeBank

BATCH = 64


def decomposed(
    decomposer: Decomposer, images: Float[np.ndarray, "n s s c"], progress: str
) -> Iterator[Decomposition]:
    """The network's view of `images`, a batch of at most `BATCH` at a time."""
    for start in tqdm(range(0, len(images), BATCH), desc=progress, unit="batch"):
        batch = images[start : start + BATCH]
        # One shape for all, so that nothing is compiled for the last.
        output = decomposer.decompose(np.pad(batch, [(0, BATCH - len(batch))] + [(0, 0)] * 3))
        fields = dataclasses.fields(Decomposition)
        yield Decomposition(**{field.name: getattr(output, field.name)[: len(batch)] for field in fields})


@dataclasses.dataclass(frozen=True)
class SliceSet:
    """The labelled slices of a split (all slices, where none is labelled), with labels and codes.

    Attributes:
        positions: row of each slice in the split.
        anatomy: None where the data set has no regions.
        bank: the codes.
        segmentation: the label that the network finds most probable in each pixel.
        lesion_probability: that of a lesion of any class, mean over the pixels.
        abnormality: the network's score of each slice, higher where it sees a lesion.
    """

    rows: Shaped[np.ndarray, "n"]
    positions: Integer[np.ndarray, "n"]
    image: Float[np.ndarray, "n s s c"]
    label: UInt8[np.ndarray, "n s s"]
    anatomy: UInt8[np.ndarray, "n s s"] | None
    bank: CodeBank
    z_e_normal: Float[np.ndarray, "n h w d"]
    z_e_abnormal: Float[np.ndarray, "n h w d"]
    segmentation: UInt8[np.ndarray, "n s s"]
    lesion_probability: Float[np.ndarray, "n"]
    abnormality: Float[np.ndarray, "n"]

    @classmethod
    def encode(cls, decomposer: Decomposer, dataset: SliceDataset, split: str) -> Self:
        labelled = dataset.rows["labelled"]
        positions = np.flatnonzero(labelled) if labelled.any() else np.arange(len(dataset))
        fields = ("image", "label", "anatomy") if dataset.settings.anatomy_classes else ("image", "label")
        batches = split_batches(dataset, fields, data_mesh(), rows=positions)
        with tqdm(total=len(positions), desc=f"encode {split}", unit="slice") as bar:
            parts = []
            for batch, count in batches:
                parts.append({name: value[:count] for name, value in to_host(_encoded(decomposer, batch)).items()})
                bar.update(count)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        normal, abnormal = arrays.pop("normal_indices"), arrays.pop("abnormal_indices")
        bank = CodeBank.from_arrays(
            normal_indices=normal, abnormal_indices=abnormal, rows=dataset.rows[positions],
            normal_codebook=decomposer.normal_codebook, abnormal_codebook=decomposer.abnormal_codebook,
        )
        return cls(rows=bank.rows, positions=positions, bank=bank, **{"anatomy": None, **arrays})

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lesion(self) -> Bool[np.ndarray, "n"]:
        """Whether each slice shows a lesion."""
        return self.label.any((1, 2))


def _encoded(decomposer: Decomposer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The fields of a batch, and of the network's view what the evaluation keeps."""
    output = decomposer.decompose(batch["image"])
    kept = ("normal_indices", "abnormal_indices", "z_e_normal", "z_e_abnormal", "abnormality")
    fields = {name: value for name, value in batch.items() if name != "valid"}
    return fields | {name: getattr(output, name) for name in kept} | _summary(output.segmentation)


@jax.jit
def _summary(segmentation: Float[jax.Array, "b s s k"]) -> dict[str, jax.Array]:
    return {
        "segmentation": segmentation.argmax(-1).astype(jnp.uint8),
        "lesion_probability": segmentation[..., 1:].sum(-1).mean((1, 2)),
    }
