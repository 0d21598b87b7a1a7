"""A trained network, ready to encode and decompose images."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from decomp_jax.config import Config
from decomp_jax.data.records import SliceDataset
from decomp_jax.data.schema import PREPROCESSING, Settings
from decomp_jax.errors import UserError
from decomp_jax.mesh import data_mesh, replicated, split_over, to_host
from decomp_jax.models.network import DecompositionNet
from decomp_jax.models.vq import lookup
from decomp_jax.preparation.scan import Scan
from decomp_jax.training.checkpoint import digest, restore_for_inference
from decomp_jax.types import Latents

Images = TypeVar("Images", SliceDataset, Scan)


@dataclasses.dataclass(frozen=True)
class CodeIndices:
    """Indices of the codes of both paths."""

    normal_indices: Integer[np.ndarray | jax.Array, "b h w"]
    abnormal_indices: Integer[np.ndarray | jax.Array, "b h w"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What codes show: the image painted with their lesion and without, and that lesion."""

    x_plus: Float[np.ndarray, "b s s c"]
    x_minus: Float[np.ndarray, "b s s c"]
    segmentation: Float[np.ndarray, "b s s k"]


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """All that the network says of a batch of images.

    Attributes:
        x_plus, x_minus: the image painted with its lesion and without.
        segmentation: probabilities of background and the lesion classes.
        z_e_abnormal: 0 of images whose code says "nothing" in all cells, so that they ask for such images: what is left
            of their vectors is noise, which relative distances would take for a lesion.
        abnormality: score of the image, the largest ||z_e_abnormal||^2 of a cell where the network has a "nothing"
            code, else minus the mean distance to the nearest lesion code (equation 3's d); larger is more abnormal.
    """

    x_plus: Float[np.ndarray | jax.Array, "b s s c"]
    x_minus: Float[np.ndarray | jax.Array, "b s s c"]
    segmentation: Float[np.ndarray | jax.Array, "b s s k"]
    normal_indices: Integer[np.ndarray | jax.Array, "b h w"]
    abnormal_indices: Integer[np.ndarray | jax.Array, "b h w"]
    z_e_normal: Float[np.ndarray | jax.Array, "b h w d"]
    z_e_abnormal: Float[np.ndarray | jax.Array, "b h w d"]
    abnormality: Float[np.ndarray | jax.Array, "b"]


@functools.cache
def _tell(line: str) -> None:
    """Prints a line, once."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


class Decomposer:
    """The newest whole checkpoint of a run.

    Attributes:
        config: the run's settings.
        settings: how its training images were prepared; others' can't be read.
        model_digest: sha256 of the parameters and running statistics.
        data_digest: the training data's.
        step: training step of the checkpoint.
        model: the network.
        normal_codebook, abnormal_codebook: float32 [K,D].
    """

    def __init__(self, variables: dict, config: Config, settings: Settings, *, data_digest: str, step: int) -> None:
        self.config, self.settings, self.data_digest, self.step = config, settings, data_digest, step
        self.model_digest = digest(variables)
        self._mesh = data_mesh()
        self._variables = jax.device_put(variables, replicated(self._mesh))
        self.model = DecompositionNet(
            config.model,
            size=settings.size,
            channels=len(settings.modalities),
            lesion_classes=len(settings.lesion_classes),
        )
        codebooks = self.model.apply(self._variables, method="codebooks")
        self.normal_codebook, self.abnormal_codebook = (np.asarray(codebook) for codebook in codebooks)
        self._latents = jax.jit(self._latents_of)
        self._explain = jax.jit(self._explain_latents)
        self._decode = jax.jit(self._decode_codes)
        self._paint = jax.jit(lambda *codes: self._decode_codes(*codes)[0])  # XLA leaves out the rest
        self._quantize = jax.jit(self._quantize_latents)

    @classmethod
    def restore(cls, workdir: str | Path) -> Self:
        """Raises UserError if the run has no whole checkpoint."""
        state, meta = restore_for_inference(workdir)
        variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
        return cls(
            variables,
            Config.from_dict(meta["config"]),
            Settings.from_json(meta["settings"]),
            data_digest=meta["data_digest"],
            step=meta["step"],
        )

    def take_images(self, images: Images, where: str) -> Images:
        """A data set or scan as the network reads it: modalities that it lacks are 0, if training dropped some.

        Raises UserError naming the first setting in which images differ from those the network was trained on.
        """
        names, given = self.settings.modalities, images.settings.modalities
        some = {*given} < {*names}
        if some and self.config.augment.drop_channel:
            images = images.with_modalities(names)
        for name in PREPROCESSING:
            value, other = getattr(self.settings, name), getattr(images.settings, name)
            if other != value:
                cure = "prepare alike"
                if name == "modalities" and some:
                    cure = "prepare all of them, or train with --config.augment.drop_channel=0.4 to do without some"
                raise UserError(f"{where}: prepared with {name}={other}, the network was trained on {value}; {cure}")
        if some:
            missing = ", ".join(name for name in names if name not in given)
            _tell(f"{where}: has {', '.join(given)} alone; {missing} of the network's modalities read as 0")
        return images

    def check_classes(self, settings: Settings, where: str) -> None:
        """Raises UserError if the lesion classes of data are not those that the network was trained on."""
        if settings.lesion_classes != self.settings.lesion_classes:
            raise UserError(f"{where}: its lesion classes are {', '.join(settings.lesion_classes)}, the network's "
                            f"{', '.join(self.settings.lesion_classes)}; train on data of the same classes")

    @property
    def grid(self) -> int:
        """Side of the code grid."""
        return self.model.grid

    def encode(self, images: Float[np.ndarray | jax.Array, "b s s c"]) -> CodeIndices:
        """Codes by the encoder alone; global arrays of a global batch, NumPy arrays of one that every process holds."""
        latents = self.latents(images)
        return self.quantize(latents.normal, latents.abnormal)

    def decompose(self, images: Float[np.ndarray | jax.Array, "b s s c"]) -> Decomposition:
        """Codes, latents, segmentation and both paintings; global arrays of a global batch, as `encode`."""
        return self.explain(self.latents(images))

    def latents(self, images: Float[np.ndarray | jax.Array, "b s s c"]) -> Latents:
        """z_e of both paths, each image by itself; global arrays of a global batch, as `encode`."""
        return Latents(*self._on_devices(self._latents, images))

    def explain(self, latents: Latents) -> Decomposition:
        """`decompose` of latents, which may be of slabs (`decomp_jax.inference.slab`)."""
        return Decomposition(**self._on_devices(self._explain, latents.normal, latents.abnormal))

    def quantize(
        self, z_e_normal: Float[np.ndarray | jax.Array, "b h w d"],
        z_e_abnormal: Float[np.ndarray | jax.Array, "b h w d"],
    ) -> CodeIndices:
        """Codes of latents, of an image, of a slab or of a sketch; global arrays of a global batch, as `encode`."""
        return CodeIndices(*self._on_devices(self._quantize, z_e_normal, z_e_abnormal))

    def paint(
        self, normal_indices: Integer[np.ndarray, "b h w"], abnormal_indices: Integer[np.ndarray, "b h w"]
    ) -> Float[np.ndarray, "b s s c"]:
        """x_plus of codes, which may come from two images: anatomy of the one, lesion of the other."""
        return self._on_devices(self._paint, normal_indices, abnormal_indices)

    def decode(
        self, normal_indices: Integer[np.ndarray, "b h w"], abnormal_indices: Integer[np.ndarray, "b h w"]
    ) -> Decoding:
        """All that can be said of codes, which may come from two images."""
        return Decoding(*self._on_devices(self._decode, normal_indices, abnormal_indices))

    def _on_devices(self, function: Callable[..., Any], *batches: np.ndarray | jax.Array) -> Any:
        """Splits batches, the same on every process, over all devices (padded to a multiple) and gathers the result.

        What is on the devices already stays there, and so does its result.
        """
        if isinstance(batches[0], jax.Array):
            return function(self._variables, *batches)
        valid, devices = len(batches[0]), self._mesh.size
        padded = [np.concatenate([batch, np.repeat(batch[-1:], -valid % devices, 0)]) for batch in batches]
        placed = [split_over(self._mesh, batch) for batch in padded]
        return jax.tree.map(lambda x: x[:valid], to_host(function(self._variables, *placed)))

    def _latents_of(self, variables: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = self.model.apply(variables, images.astype(jnp.float32), train=False, method="encode")
        return latents.normal, latents.abnormal

    def _quantize_latents(self, variables: dict, normal: jax.Array, abnormal: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = self.model.apply(variables, Latents(normal, abnormal), method="quantize")
        return codes.normal_indices, codes.abnormal_indices

    def _explain_latents(self, variables: dict, normal: jax.Array, abnormal: jax.Array) -> dict[str, jax.Array]:
        codes = self.model.apply(variables, Latents(normal, abnormal), method="quantize")
        x_plus, x_minus, segmentation = self._decode_codes(variables, codes.normal_indices, codes.abnormal_indices)
        if self.config.model.nothing_threshold:
            abnormality = jnp.sum(abnormal**2, -1).max((1, 2))
            abnormal = jnp.where((codes.abnormal_indices == 0).all((1, 2))[:, None, None, None], 0, abnormal)
        else:
            abnormality = -jnp.sum((abnormal - codes.z_q_lesion) ** 2, -1).mean((1, 2))
        return {
            "x_plus": x_plus,
            "x_minus": x_minus,
            "segmentation": segmentation,
            "normal_indices": codes.normal_indices,
            "abnormal_indices": codes.abnormal_indices,
            "z_e_normal": normal,
            "z_e_abnormal": abnormal,
            "abnormality": abnormality,
        }

    def _decode_codes(
        self, variables: dict, normal_indices: jax.Array, abnormal_indices: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        normal = lookup(normal_indices, jnp.asarray(self.normal_codebook))
        abnormal = lookup(abnormal_indices, jnp.asarray(self.abnormal_codebook))
        seg_logits = self.model.apply(variables, abnormal, train=False, method="segment")
        x_plus, x_minus = self.model.apply(variables, normal, seg_logits, train=False, method="render_both")
        return x_plus, x_minus, jax.nn.softmax(seg_logits)
