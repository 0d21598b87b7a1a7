"""A small data set of drawn heads with drawn lesions, and a network that reads both off the labels."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from decomp_jax.config import Config, LayoutTerm
from decomp_jax.data.schema import ANATOMY_CLASSES, Settings
from decomp_jax.inference.decomposer import CodeIndices, Decoding, Decomposer, Decomposition
from decomp_jax.losses.cells import cell_means
from decomp_jax.types import Latents

SIZE, GRID, LEVELS = 32, (4, 4), 16


def settings(**changes: object) -> Settings:
    values = {"source": "phantom", "size": SIZE, "lesion_classes": ("NCR", "ED"), "anatomy_classes": ANATOMY_CLASSES}
    return Settings(**{**values, "healthy": True, **changes})


class Heads:
    """Stands in for `SliceDataset`: `patients` heads of `slices` slices, lesions of two classes in most of them."""

    digest = "d" * 64

    def __init__(self, patients: int, slices: int, *, seed: int, prefix: str = "p", **changes: object) -> None:
        self.settings = settings(**changes)
        rng = np.random.default_rng(seed)
        drawn = [_head(rng, z) for _ in range(patients) for z in np.linspace(-0.7, 0.7, slices)]
        self.fields = {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}
        self.rows = np.zeros(len(drawn), [
            ("patient_id", "U8"), ("slice_index", "i4"), ("position_mm", "f4"), ("has_abnormality", "?"),
            ("labelled", "?"), ("tumour", "U12"),
        ])
        patient, index = np.divmod(np.arange(len(drawn)), slices)
        self.rows["patient_id"] = [f"{prefix}{i}" for i in patient]
        self.rows["slice_index"], self.rows["position_mm"] = index, 4.0 * index
        self.rows["has_abnormality"] = self.fields["label"].any((1, 2))
        self.rows["labelled"] = True
        self.rows["tumour"] = np.where(patient % 2, "glioma", "meningioma")

    def __len__(self) -> int:
        return len(self.rows)

    def stack(self, names: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        return {name: self.fields[name][slice(None) if rows is None else np.asarray(rows)] for name in names}


def _head(rng: np.random.Generator, z: float) -> dict[str, np.ndarray]:
    y, x = np.mgrid[-1:1:SIZE * 1j, -1:1:SIZE * 1j]
    width, height = 0.85 * np.sqrt(1 - z * z) * rng.uniform(0.9, 1.1, 2)
    brain = (x / width) ** 2 + (y / height) ** 2 < 1
    anatomy = np.where(brain, np.where(x > 0, 1, 2), 0)
    ventricle = brain & (np.abs(np.abs(x) - 0.15) < 0.08) & (np.abs(y) < 0.35 * (1 - z))
    anatomy[ventricle] = np.where(x > 0, 5, 6)[ventricle]
    healthy = np.where(brain, 0.6, 0.0) - 0.4 * ventricle + 0.03 * rng.normal(size=x.shape) * brain
    radius = np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5)) / rng.uniform(0.15, 0.4)
    label = np.where(brain & (radius < 1) & (rng.random() < 0.7), np.where(radius < 0.6, 1, 2), 0)
    image = np.where(label == 1, 0.3, np.where(label == 2, 0.8, healthy))
    return {
        "image": image[..., None].clip(0, 1).astype(np.float16), "label": label.astype(np.uint8),
        "anatomy": anatomy.astype(np.uint8), "healthy": healthy[..., None].clip(0, 1).astype(np.float16),
    }


def _cell_shares(mask: np.ndarray) -> np.ndarray:
    return np.asarray(cell_means(jnp.asarray(mask[..., None], jnp.float32), GRID[0]))[..., 0]


def _pixels(cells: np.ndarray) -> np.ndarray:
    return cells.repeat(SIZE // GRID[0], 1).repeat(SIZE // GRID[1], 2)


def _keys(normal: np.ndarray, abnormal: np.ndarray) -> list[bytes]:
    return [one.tobytes() + other.tobytes() for one, other in zip(np.asarray(normal), np.asarray(abnormal))]


@dataclasses.dataclass
class FakeDecomposer:
    """Stands in for `Decomposer`: finds lesions by their grey values, and paints 0.6 over them."""

    settings: Settings
    model_digest: str = "m" * 64
    data_digest: str = "d" * 64
    config: Config = Config(
        model=dataclasses.replace(Config().model, code_dim=3),
        objective=dataclasses.replace(Config().objective, layout=LayoutTerm(1.0, scale=1.0, whole=1.0)),
    )
    grid: int = GRID[0]
    said: dict[bytes, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def normal_codebook(self) -> np.ndarray:
        return np.linspace(0, 1, LEVELS, dtype=np.float32)[:, None]

    @property
    def abnormal_codebook(self) -> np.ndarray:
        """Roots of the share of a cell that is lesion, as the layout term has it; other channels hold nothing."""
        return np.pad(np.sqrt(self.normal_codebook), ((0, 0), (0, 2)))

    take_images, check_classes = Decomposer.take_images, Decomposer.check_classes

    def paint(self, normal_indices: np.ndarray, abnormal_indices: np.ndarray) -> np.ndarray:
        cells = (normal_indices / (LEVELS - 1) * (1 - abnormal_indices / (LEVELS - 1)))[..., None]
        return _pixels(cells).astype(np.float32)

    def decode(self, normal_indices: np.ndarray, abnormal_indices: np.ndarray) -> Decoding:
        lesion = _pixels(abnormal_indices[..., None] > 0)
        segmentation = np.concatenate([~lesion, lesion, np.zeros_like(lesion)], -1).astype(np.float32)
        x_plus = self.paint(normal_indices, abnormal_indices)
        return Decoding(x_plus, self.paint(normal_indices, 0 * abnormal_indices), segmentation)

    def quantize(self, z_e_normal: np.ndarray, z_e_abnormal: np.ndarray) -> CodeIndices:
        shares = np.asarray(z_e_normal)[..., 0], np.asarray(z_e_abnormal)[..., 0] ** 2
        return CodeIndices(*(np.rint(share * (LEVELS - 1)).astype(int) for share in shares))

    def latents(self, images: np.ndarray) -> Latents:
        """Remembers what it says of each image, for `explain`."""
        output = self.decompose(images)
        for i, key in enumerate(_keys(output.z_e_normal, output.z_e_abnormal)):
            self.said[key] = {name: values[i] for name, values in vars(output).items()}
        return Latents(output.z_e_normal, output.z_e_abnormal)

    def explain(self, latents: Latents) -> Decomposition:
        """Of an image's latents what it says of the image, of others what their codes show."""
        explained = [
            self.said.get(key) or self._of_codes(normal[None], abnormal[None])
            for key, normal, abnormal in zip(_keys(latents.normal, latents.abnormal), latents.normal, latents.abnormal)
        ]
        return Decomposition(**{name: np.stack([one[name] for one in explained]) for name in explained[0]})

    def _of_codes(self, normal: np.ndarray, abnormal: np.ndarray) -> dict[str, np.ndarray]:
        indices = vars(self.quantize(normal, abnormal))
        values = vars(self.decode(*indices.values())) | indices
        values |= {"z_e_normal": normal, "z_e_abnormal": abnormal, "abnormality": abnormal.max((1, 2, 3))}
        return {name: np.asarray(value)[0] for name, value in values.items()}

    def decompose(self, images: np.ndarray) -> Decomposition:
        images = np.asarray(images)
        grey = images.astype(np.float32)[..., 0]
        segmentation = np.stack([np.ones_like(grey), *(abs(grey - level) < 0.01 for level in (0.3, 0.8))], -1)
        segmentation[..., 0] -= 0.5
        segmentation[..., 0] -= segmentation[..., 1:].sum(-1)
        lesion = segmentation[..., 1:].any(-1)
        x_minus = np.where(lesion, 0.6, grey)[..., None]
        anatomy, shares = (_cell_shares(mask)[..., None] for mask in (x_minus[..., 0] > 0.4, lesion))
        z_e_abnormal = np.pad(np.sqrt(shares), 3 * [(0, 0)] + [(0, 2)])
        return Decomposition(
            x_plus=images.astype(np.float32), x_minus=x_minus, segmentation=segmentation, z_e_normal=anatomy,
            z_e_abnormal=z_e_abnormal, abnormality=shares.max((1, 2, 3)), **vars(self.quantize(anatomy, z_e_abnormal)),
        )

    encode = decompose
