"""The slices of one split as the evaluation needs them: labels, thumbnails, and what the network makes of each."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from tqdm import tqdm

from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.evaluation.scratch import map_blocks, scratch
from decomp_jax.inference.decomposer import Decomposer, Decomposition
from decomp_jax.inference.slab import default_slab_mm, with_slab_latents
from decomp_jax.losses.cells import cell_means
from decomp_jax.mesh import data_mesh, to_host
from decomp_jax.retrieval import CodeBank
from decomp_jax.types import Latents

BATCH = 64
THUMBNAIL = 64  # pixels: larger images are averaged down to about this side

CODES = ("normal_indices", "abnormal_indices")
KEPT = ("z_e_normal", "z_e_abnormal", "abnormality", *CODES)


def decompose(decomposer: Decomposer, images: Float[np.ndarray, "n s s c"]) -> Decomposition:
    """The network's view of at most `BATCH` images, in batches of one shape, so that the network is compiled once."""
    return _first(decomposer.decompose(np.pad(images, [(0, BATCH - len(images))] + [(0, 0)] * 3)), len(images))


def _first(output: Decomposition, count: int) -> Decomposition:
    return Decomposition(**{name: values[:count] for name, values in vars(output).items()})


def read_batches(
    dataset: SliceDataset, fields: Sequence[str], positions: Integer[np.ndarray, "n"], progress: str
) -> Iterator[tuple[slice, dict[str, jax.Array]]]:
    """The fields of the given slices, a global batch at a time, with the place of its valid rows among them."""
    start = 0
    with tqdm(desc=progress, unit="slice", total=len(positions)) as bar:
        for batch, count in split_batches(dataset, fields, data_mesh(), rows=positions):
            yield slice(start, start + count), batch
            start += count
            bar.update(count)


def valid_rows(batch: dict[str, jax.Array], place: slice) -> dict[str, np.ndarray]:
    """The rows of a global batch that stand at `place`, on every process."""
    return {name: rows[: place.stop - place.start] for name, rows in to_host(batch).items()}


@dataclasses.dataclass(frozen=True)
class SliceSet:
    """The labelled slices of a split (all slices, where none is labelled), with labels and codes.

    What grows with the slices is in scratch files; whole images stay in the data set.

    Attributes:
        dataset: where the slices come from.
        positions: row of each slice in the split.
        thumbnail: the images, averaged down to a side of about `THUMBNAIL` where they are larger.
        anatomy: None where the data set has no regions.
        bank: the codes.
        segmentation: the label that the network finds most probable in each pixel.
        lesion_probability: that of a lesion of any class, mean over the pixels.
        abnormality: the network's score of each slice, higher where it sees a lesion.
        features: vectors of others that came with the data set, by name.
    """

    dataset: SliceDataset
    rows: Shaped[np.ndarray, "n"]
    positions: Integer[np.ndarray, "n"]
    thumbnail: Float[np.ndarray, "n t t c"]
    label: UInt8[np.ndarray, "n s s"]
    anatomy: UInt8[np.ndarray, "n s s"] | None
    bank: CodeBank
    z_e_normal: Float[np.ndarray, "n h w d"]
    z_e_abnormal: Float[np.ndarray, "n h w d"]
    segmentation: UInt8[np.ndarray, "n s s"]
    lesion_probability: Float[np.ndarray, "n"]
    abnormality: Float[np.ndarray, "n"]
    features: dict[str, Float[np.ndarray, "n f"]] = dataclasses.field(default_factory=dict)

    @classmethod
    def encode(
        cls, decomposer: Decomposer, dataset: SliceDataset, split: str,
        features: Mapping[str, Float[np.ndarray, "slices f"]] | None = None, slab_mm: float | None = None,
    ) -> Self:
        """`features` are those of all slices of `dataset`, by name; `slab_mm` as of `inference.encode`."""
        slab_mm = default_slab_mm(dataset.settings, decomposer.grid) if slab_mm is None else slab_mm
        labelled = dataset.rows["labelled"]
        kept = labelled if labelled.any() else ~labelled
        positions, patients = np.flatnonzero(kept), dataset.rows["patient_id"]
        near = np.flatnonzero(np.isin(patients, np.unique(patients[kept])))  # slabs are of all slices of a scan
        fields = ("image", "label", "anatomy") if dataset.settings.anatomy_classes else ("image", "label")
        arrays: dict[str, np.ndarray] = {}
        written = 0
        batches = read_batches(dataset, fields, near, f"encode {split}")
        for place, batch, latents in with_slab_latents(decomposer, batches, dataset.rows[near], slab_mm):
            some = kept[near[place]]
            to = slice(written, written := written + np.count_nonzero(some))
            for name, part in valid_rows(_encode_batch(decomposer, batch, latents), place).items():
                if name not in arrays:
                    arrays[name] = scratch((len(positions), *part.shape[1:]), part.dtype)
                arrays[name][to] = part[some]
        bank = CodeBank.from_arrays(
            **{name: arrays.pop(name) for name in CODES}, rows=dataset.rows[positions],
            normal_codebook=decomposer.normal_codebook, abnormal_codebook=decomposer.abnormal_codebook,
            meta={"slab_mm": slab_mm},
        )
        given = {name: map_blocks(vectors.__getitem__, positions) for name, vectors in (features or {}).items()}
        return cls(
            dataset=dataset, rows=bank.rows, positions=positions, bank=bank, features=given,
            **{"anatomy": None} | arrays,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, chosen: Integer[np.ndarray, "k"]) -> Float[np.ndarray, "k s s c"]:
        """Whole images of a few slices, read again."""
        return self.dataset.stack(("image",), self.positions[chosen])["image"]

    def decompositions(self, decomposer: Decomposer, chosen: Integer[np.ndarray, "k"]) -> Decomposition:
        """What the network says of at most `BATCH` slices."""
        padded = np.resize(chosen, BATCH)
        output = decomposer.explain(Latents(self.z_e_normal[padded], self.z_e_abnormal[padded]))
        return _first(output, len(chosen))

    @functools.cached_property
    def lesion_area(self) -> Float[np.ndarray, "n"]:
        """Share of each slice's pixels that carry a lesion label."""
        return np.array(map_blocks(lambda label: (label > 0).mean((1, 2)), self.label))

    @functools.cached_property
    def predicted_area(self) -> Float[np.ndarray, "n"]:
        """Share of each slice's pixels in which the network sees a lesion."""
        return np.array(map_blocks(lambda label: (label > 0).mean((1, 2)), self.segmentation))

    @functools.cached_property
    def lesion_side(self) -> Integer[np.ndarray, "n"]:
        """-1 or 1 for the half of the image that has more of the lesion, left or right; 0 for neither."""
        return np.array(map_blocks(lesion_side, self.label))

    @functools.cached_property
    def has_regions(self) -> Bool[np.ndarray, "n"]:
        """Whether each slice shows an anatomical region."""
        return np.zeros(len(self), bool) if self.anatomy is None else self.anatomy.any((1, 2))

    @property
    def lesion(self) -> Bool[np.ndarray, "n"]:
        """Whether each slice shows a lesion."""
        return self.lesion_area > 0


def _encode_batch(decomposer: Decomposer, batch: dict[str, jax.Array], latents: Latents) -> dict[str, jax.Array]:
    """Of a global batch, what a `SliceSet` keeps."""
    output = decomposer.explain(latents)
    labels = {name: batch[name] for name in ("label", "anatomy") if name in batch}
    kept = {name: getattr(output, name) for name in KEPT}
    return labels | kept | {"thumbnail": shrink(batch["image"])} | _summary(output.segmentation)


@jax.jit
def shrink(images: Float[jax.Array, "n s s c"]) -> Float[jax.Array, "n t t c"]:
    """Means of square groups of pixels, so that the side is about `THUMBNAIL`; smaller images as they are."""
    size = images.shape[1]
    factor = next(factor for factor in range(max(size // THUMBNAIL, 1), 0, -1) if size % factor == 0)
    return cell_means(images.astype(jnp.float32), size // factor).astype(images.dtype) if factor > 1 else images


@jax.jit
def _summary(segmentation: Float[jax.Array, "n s s k"]) -> dict[str, jax.Array]:
    return {
        "segmentation": segmentation.argmax(-1).astype(jnp.uint8),
        "lesion_probability": segmentation[..., 1:].sum(-1).mean((1, 2)),
    }


def lesion_side(label: UInt8[np.ndarray, "n s s"]) -> Integer[np.ndarray, "n"]:
    """-1 or 1 for the half of each label map that has more of the lesion, left or right; 0 for neither."""
    half = label.shape[2] // 2
    left, right = ((side > 0).sum((1, 2), dtype=np.int64) for side in (label[:, :, :half], label[:, :, half:]))
    return np.sign(right - left)
