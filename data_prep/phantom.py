"""Synthetic glioma patients on real anatomy, with the lesion-free counterfactual that no real data set has.

A patient is the MNI152 head seen through its own smooth deformation, tissue contrast, vessels, bias field and noise, as
in a T1 scan with gadolinium, and if asked for in scans of other contrasts: the same head, each with a bias field and
noise of its own. It gets a glioma: an uneven core with an enhancing ring around necrosis, oedema that creeps through
white matter, and mass effect.

`healthy` is the same slice without lesion tissue. The deformation (mass effect included), contrast, bias field, noise
and intensity constants are the image's own, so that the two are equal wherever `label` is 0.

Axes are those of `data_prep.template`, points are mm from the window's centre. All randomness but the noise of single
voxels is drawn on lattices in mm, so that a patient has the same anatomy and the same lesion at every size.
"""

import dataclasses
import functools
import hashlib

import numpy as np
from scipy import ndimage

from data_prep.slices import PatientSlices
from data_prep.template import PULL_MM, load_template
from decomp_jax.data.schema import ANATOMY_CLASSES, GLIOMA_CLASSES, INTENSITY_CLIP, Settings
from decomp_jax.preparation.field import field_mean, field_nearest

WINDOW_MM = (152, 208, 160)  # a brain fits into it; the middle of the 256 mm field
SLICE_MM = 4

NCR, ED, ET = (1 + GLIOMA_CLASSES.index(name) for name in ("NCR", "ED", "ET"))
CEREBRUM, CEREBELLUM, VENTRICLES = (
    [1 + ANATOMY_CLASSES.index(f"{side} {name}") for side in ("left", "right")]
    for name in ("cerebrum", "cerebellum", "ventricle")
)
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """What the signals of one modality are drawn from, grey matter's being 1. The defaults are those of T1ce.

    Attributes:
        white, fluid: signals.
        vessel: above white matter; of what takes up contrast agent in a healthy head, too.
        ring: of enhancing tumour, in white matters.
        necrosis, filled: of a core that enhances and of one that doesn't, from 0 as fluid to 1 as white matter.
        oedema: relative loss; negative where it is bright.
    """

    white: Range = (1.08, 1.35)
    fluid: Range = (0.3, 0.6)
    vessel: Range = (0.5, 1.6)
    ring: Range = (1.25, 1.9)
    necrosis: Range = (0.2, 0.6)
    filled: Range = (0.55, 0.8)
    oedema: Range = (0.18, 0.35)


@dataclasses.dataclass(frozen=True)
class Domain:
    """What scans are drawn from: scanners, contrast agents and preparations.

    Attributes:
        sequences: by modality.
        lesion_share: of the stored slices.
        least_brain: mm^2; slices with less brain are not stored.
        bias: deviation of the bias field's log.
        blur: deviation, mm in plane.
        noise: deviation, of a mean over 1 mm^2, grey matter's signal being 1.
        sinus: thickness of enhancing patches at the brain's surface, mm.
        imperfect: whether skull-stripping may leave some of the skull and take some of the brain, fields of view be
            cut, slices be thick and noise be correlated, and whether lesions blur beyond their labels.
    """

    sequences: dict[str, Sequence]
    lesion_share: float = 0.7
    least_brain: float = 1000
    bias: Range = (0.03, 0.1)
    blur: Range = (0.3, 0.9)
    noise: Range = (0.01, 0.03)
    sinus: Range = (1, 1)
    imperfect: bool = False


# Without contrast agent vessels are dark, and the ring is as the core around it. In FLAIR fluid is suppressed and
# oedema is the brightest of all.
PLAIN = {
    "t1ce": Sequence(),
    "t1": Sequence(vessel=(-0.5, -0.2), ring=(0.65, 0.85)),
    "t2": Sequence(
        white=(0.6, 0.75), fluid=(1.8, 2.5), vessel=(-0.3, -0.1), ring=(1.5, 2.1), necrosis=(0.1, 0.4),
        filled=(0.35, 0.6), oedema=(-1.4, -0.9),
    ),
    "flair": Sequence(
        white=(0.75, 0.92), fluid=(0.15, 0.35), vessel=(-0.4, -0.1), ring=(1.2, 1.6), necrosis=(0.3, 1),
        filled=(1.3, 1.7), oedema=(-1.5, -0.9),
    ),
}
WIDE_T1CE = Sequence(
    white=(1.02, 1.6), fluid=(0.15, 0.75), vessel=(0.2, 3.5), ring=(1.1, 2.4), necrosis=(0.05, 0.9), filled=(0.3, 0.95),
    oedema=(0.07, 0.45),
)
# `plain` are clean scans of one kind. `wide` is to hold scans of any scanner: wider than the field's, so that a network
# trained on it has to go by shape.
DOMAINS = {
    "plain": Domain(PLAIN),
    "wide": Domain(
        {
            "t1ce": WIDE_T1CE,
            "t1": dataclasses.replace(WIDE_T1CE, vessel=(-0.7, 0), ring=(0.5, 0.95)),
            "t2": Sequence(
                white=(0.5, 0.95), fluid=(1.5, 3.2), vessel=(-0.5, 0.1), ring=(1.1, 2.4), necrosis=(0, 0.7),
                filled=(0.2, 0.8), oedema=(-1.8, -0.4),
            ),
            "flair": Sequence(
                white=(0.65, 1), fluid=(0.05, 0.6), vessel=(-0.6, 0.2), ring=(1, 2), necrosis=(0, 1.4), filled=(1.1, 2),
                oedema=(-2, -0.5),
            ),
        },
        lesion_share=0.5, least_brain=60, bias=(0.03, 0.3), blur=(0.3, 1.8), noise=(0.005, 0.06), sinus=(1, 4),
        imperfect=True,
    ),
}


def settings(size: int, modalities: tuple[str, ...] = ("t1ce",)) -> Settings:
    """How phantom slices are prepared: as BraTS slices, with anatomy and `healthy` beside them."""
    return Settings(source="phantom", size=size, modalities=modalities, anatomy_classes=ANATOMY_CLASSES, healthy=True)


def patient_ids(n: int) -> list[str]:
    """The first n phantom patients."""
    return [f"phantom-{i:04d}" for i in range(1, n + 1)]


def prepare(
    patient_id: str, *, seed: int, size: int, domain: Domain = DOMAINS["plain"], modalities: tuple[str, ...] = ("t1ce",)
) -> PatientSlices:
    """A patient's slices, 4 mm apart, a pure function of the arguments.

    All but the signals is the same whatever the modalities, and so are those of each of them.

    All slices with lesion are stored, and as many others, of every height, as make the domain's share. `position_mm` is the
    mean height in MNI152 space of the brain that a slice shows, so that it compares between patients.
    """
    words = [seed, *hashlib.sha256(patient_id.encode()).digest()]
    rng = np.random.default_rng(words)
    grid = Grid(1 if size > 64 else 2)  # fine enough to be averaged
    pixel = (grid.spacing, grid.spacing)
    shown, foci = _shape(rng)
    head = _head(rng, grid, shown)
    contrast = _contrast(rng, domain.sequences["t1ce"])
    lesion = _lesion(rng, grid, foci, head, contrast.enhancing)
    tissue = _tissue(rng, grid, head, domain)
    texture = grid.noise(rng, 5) + grid.noise(rng, 2.5)
    foreground, skull = _stripped(rng, grid, head, foci[0], domain)

    label = field_nearest(lesion.label * foreground, pixel, size)
    brain = head.brain & foreground
    shown_mm2 = np.count_nonzero(brain, axis=(1, 2)) * grid.spacing**2
    height = np.sum(head.height, axis=(1, 2), where=brain) * grid.spacing**2 / np.maximum(shown_mm2, 1)
    planes = _planes(rng, height, label.any(axis=(1, 2)), shown_mm2 >= domain.least_brain, domain.lesion_share)
    scans = []
    for modality in modalities:
        # T1ce goes on with the patient's own random numbers, the others each have theirs.
        own, signals = rng, contrast
        if modality != "t1ce":
            own = np.random.default_rng([*words, *modality.encode()])
            signals = _contrast(own, domain.sequences[modality], contrast.enhancing)
        healthy = _healthy_signal(tissue, signals)
        image = _lesion_signal(healthy, lesion, texture, signals)
        image, healthy = (np.where(skull > 0, skull, signal) for signal in (image, healthy))
        scan = _scaled(*_acquired(own, grid, domain, image, healthy), foreground)
        scans.append([field_mean(part[planes], pixel, size).astype(np.float16) for part in scan])
    image, healthy = (np.stack(channels, axis=-1) for channels in zip(*scans))
    label = label[planes]
    # Pixels at the label's edge mix both: beside a lesion one of the two has to take the other's.
    lesion = label[..., None] > 0
    if domain.imperfect:
        healthy = np.where(lesion, healthy, image)
    else:
        image = np.where(lesion, image, healthy)
    return PatientSlices(
        patient_id=patient_id,
        image=image,
        label=label,
        slice_index=planes.astype(np.int32),
        position_mm=height[planes].astype(np.float32),
        anatomy=field_nearest((head.regions * brain)[planes], pixel, size),
        healthy=healthy,
    )


def _planes(
    rng: np.random.Generator, height: np.ndarray, has_lesion: np.ndarray, has_brain: np.ndarray, lesion_share: float
) -> np.ndarray:
    """The planes to store: see `prepare`."""
    with_lesion, without = np.flatnonzero(has_brain & has_lesion), np.flatnonzero(has_brain & ~has_lesion)
    n = min(len(without), round(len(with_lesion) * (1 / lesion_share - 1)))
    # Drawn without replacement, by Gumbel's trick; more from mid height, which most lesions reach.
    keys = rng.gumbel(size=len(without)) - np.abs(height[without] - 15) / 30
    return np.sort(np.concatenate([with_lesion, without[np.argsort(-keys)[:n]]]))


# ---------------------------------------------------------------- grids and smooth noise


@dataclasses.dataclass(frozen=True)
class Grid:
    """Voxels of the window: planes `SLICE_MM` apart, `spacing` mm in plane."""

    spacing: int

    @functools.cached_property
    def axes(self) -> list[np.ndarray]:
        """z, y, x of the voxel centres, mm, shaped to broadcast to the grid."""
        steps = (SLICE_MM, self.spacing, self.spacing)
        centres = [(np.arange(mm // step) + 0.5) * step - mm / 2 for mm, step in zip(WINDOW_MM, steps)]
        return np.meshgrid(*(axis.astype(np.float32) for axis in centres), indexing="ij", sparse=True)

    @property
    def points(self) -> np.ndarray:
        return np.stack(np.broadcast_arrays(*self.axes))

    def coarse(self, volume: np.ndarray) -> np.ndarray:
        """Means of the voxels in each cell of ISOTROPIC."""
        n = SLICE_MM // self.spacing
        slices, rows, columns = volume.shape
        return volume.reshape(slices, rows // n, n, columns // n, n).mean((2, 4))

    def fine(self, volume: np.ndarray) -> np.ndarray:
        """A smooth volume [...,z,y,x] on ISOTROPIC, brought to this grid."""
        n = SLICE_MM // self.spacing
        within = ((np.arange(n) + 0.5) / n - 0.5).astype(np.float32)
        for axis in (-2, -1):
            size = volume.shape[axis]
            pad = [(0, 0)] * volume.ndim
            pad[axis] = (2, 2)
            padded = np.pad(volume, pad, "reflect", reflect_type="odd")
            positions = np.arange(size, dtype=np.float32)[:, None] + within + 1
            volume = _spline(padded, positions.ravel(), axis)
        return volume

    def noise(self, rng: np.random.Generator, scale: float, *components: int) -> np.ndarray:
        """Smooth noise of mean 0 and variance 1 that varies over `scale` mm, [*components,z,y,x]."""
        lattice = rng.standard_normal((*components, *(int(mm / scale) + 4 for mm in WINDOW_MM)), dtype=np.float32)
        for axis, (mm, centres) in enumerate(zip(WINDOW_MM, self.axes), -3):
            lattice = _spline(lattice, (centres.ravel() + mm / 2) / np.float32(scale), axis)
        return lattice / np.float32(NOISE_STD)


ISOTROPIC = Grid(SLICE_MM)
NOISE_STD = (151 / 315) ** 1.5  # of a cubic B-spline with normal coefficients, in three dimensions


def _spline(coefficients: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Uniform cubic B-spline along an axis; coefficient k lies at position k - 1."""
    cell = np.floor(positions).astype(int)
    t = positions - cell
    weights = [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (3 * (1 - t) ** 3 - 6 * (1 - t) ** 2 + 4) / 6, t**3 / 6]
    column = (-1,) + (1,) * (-1 - axis)
    return sum(coefficients.take(cell + k, axis) * weight.reshape(column) for k, weight in enumerate(weights))


# ---------------------------------------------------------------- head


@dataclasses.dataclass(frozen=True)
class Head:
    """A patient's lesion-free anatomy on a grid: the volumes of `Template`, 0 outside the brain."""

    brain: np.ndarray
    depth: np.ndarray
    t1: np.ndarray
    white: np.ndarray
    dura: np.ndarray
    regions: np.ndarray
    height: np.ndarray  # mm above MNI152's origin
    side: np.ndarray  # mm left of the template's midline


@dataclasses.dataclass(frozen=True)
class Focus:
    """An ellipsoid; `axes` [3,3] turns and stretches offsets from its centre, keeping volumes."""

    centre: np.ndarray
    radius: float
    axes: np.ndarray

    def offset(self, grid: Grid) -> np.ndarray:
        return grid.points - self.centre.astype(np.float32)[:, None, None, None]

    def distance(self, grid: Grid) -> np.ndarray:
        """From the centre, in radii."""
        stretched = np.einsum("ij,j...->i...", (self.axes / self.radius).astype(np.float32), self.offset(grid))
        return np.sqrt(np.square(stretched).sum(0))


def _shape(rng: np.random.Generator) -> tuple[np.ndarray, list[Focus]]:
    """The template point that each voxel of ISOTROPIC shows, and the tumour's foci."""
    template, grid = load_template(), ISOTROPIC
    # MNI152's brain is larger than SRI24's, which BraTS is registered to, and lies off its origin.
    scale = 1.085 * rng.normal(1, 0.02) * rng.normal(1, 0.025, 3)
    matrix = _rotation(np.radians(rng.normal(0, (2, 2, 3)))) * scale
    centre = np.array([4, 17, 0]) + rng.normal(0, 2, 3)
    shown = np.einsum("ij,j...->i...", matrix, grid.points) + centre[:, None, None, None]
    shown += 2.5 * grid.noise(rng, 45, 3) + 1.1 * grid.noise(rng, 18, 3)
    shown += rng.uniform(-1, 7) * _sampled(template.ventricle_pull, template.index(shown, PULL_MM))
    index = template.index(shown)
    depth = _sampled(template.depth, index)
    white = (_sampled(template.white, index) > 0.5) & (depth > 7)
    side = CEREBELLUM if rng.random() < 0.03 else CEREBRUM
    foci = _foci(rng, grid.points[:, white & np.isin(_sampled(template.anatomy, index, order=0), side)].T)
    return shown - np.clip(depth / 12, 0, 1) * _mass_effect(foci, rng.uniform(0.05, 0.4), grid), foci


def _rotation(angles: np.ndarray) -> np.ndarray:
    """[3,3], by one angle in each plane of two axes."""
    matrix = np.eye(3)
    for angle, plane in zip(angles, ((0, 1), (0, 2), (1, 2))):
        turn = np.eye(3)
        turn[np.ix_(plane, plane)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        matrix = turn @ matrix
    return matrix


def _sampled(volume: np.ndarray, index: np.ndarray, order: int = 1) -> np.ndarray:
    """`volume` [...,z,y,x] at array indices [3,...]."""
    if volume.ndim > 3:
        return np.stack([_sampled(part, index, order) for part in volume])
    return ndimage.map_coordinates(volume, index, order=order, mode="nearest")


def _foci(rng: np.random.Generator, centres: np.ndarray) -> list[Focus]:
    """One focus at any of the centres [n,3], in some patients with satellites."""

    def focus(centre: np.ndarray, radius: float) -> Focus:
        stretch = np.exp(rng.normal(0, 0.2, 3))
        turn = _rotation(rng.uniform(0, np.pi, 3))
        return Focus(centre, radius, turn * (stretch / stretch.prod() ** (1 / 3))[:, None])

    radius = float(np.clip(rng.lognormal(np.log(19), 0.35), 6, 30))
    first = focus(rng.choice(centres), radius)
    near = np.linalg.norm(centres - first.centre, axis=1)
    near = centres[(near > 1.2 * radius) & (near < radius + 28)]
    satellites = rng.integers(1, 4) if rng.random() < 0.15 and len(near) else 0
    return [first, *(focus(rng.choice(near), radius * rng.uniform(0.25, 0.6)) for _ in range(satellites))]


def _mass_effect(foci: list[Focus], strength: float, grid: Grid) -> np.ndarray:
    """How far the tissue that each voxel shows has been pushed away from the tumour, [3,...] mm."""
    return strength * sum(focus.offset(grid) * np.exp((1 - focus.distance(grid) ** 2) / 2) for focus in foci)


def _head(rng: np.random.Generator, grid: Grid, shown: np.ndarray) -> Head:
    template = load_template()
    points = grid.fine(shown.astype(np.float32))
    index = template.index(points)
    depth = _sampled(template.depth, index) + 0.8 * grid.noise(rng, 10)
    brain = depth > 0

    def within(volume: np.ndarray, order: int = 1) -> np.ndarray:
        values = np.zeros(brain.shape, volume.dtype)
        values[brain] = _sampled(volume, index[:, brain], order)
        return values

    t1, white, dura = map(within, (template.t1, template.white, template.dura))
    return Head(brain, depth, t1, white, dura, within(template.anatomy, order=0), height=points[0], side=points[2])


# ---------------------------------------------------------------- glioma


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Signals of one scan, grey matter being 1."""

    white: float
    fluid: float
    vessel: float
    enhancing: bool  # whether the tumour takes up contrast agent all around
    ring: float
    necrosis: float
    oedema: float  # relative loss


def _contrast(rng: np.random.Generator, sequence: Sequence, enhancing: bool | None = None) -> Contrast:
    """Drawn from a sequence; whether the tumour enhances, too, unless it is known."""
    white, fluid = rng.uniform(*sequence.white), rng.uniform(*sequence.fluid)
    enhancing = rng.random() > 0.12 if enhancing is None else enhancing
    return Contrast(
        white=white,
        fluid=fluid,
        vessel=white + rng.uniform(*sequence.vessel),
        enhancing=enhancing,
        ring=white * rng.uniform(*sequence.ring),
        necrosis=fluid + (white - fluid) * rng.uniform(*(sequence.necrosis if enhancing else sequence.filled)),
        oedema=rng.uniform(*sequence.oedema),
    )


@dataclasses.dataclass(frozen=True)
class Lesion:
    """`label`, and how much of a voxel is core, enhancing and oedema, 0..1."""

    label: np.ndarray
    core: np.ndarray
    ring: np.ndarray
    oedema: np.ndarray


def _lesion(rng: np.random.Generator, grid: Grid, foci: list[Focus], head: Head, enhancing: bool) -> Lesion:
    uneven = 1 + rng.uniform(0.12, 0.3) * grid.noise(rng, 14) + rng.uniform(0.04, 0.1) * grid.noise(rng, 6)
    inside = np.max([(uneven - focus.distance(grid)) * focus.radius for focus in foci], axis=0)  # mm below the surface
    across = np.maximum(-np.sign(foci[0].centre[2]) * head.side, 0)
    inside = np.minimum(inside - across * (1.2 - head.white), head.depth)  # held by falx and skull, not by white matter

    thickness = rng.uniform(3, 8) * np.exp(0.5 * grid.noise(rng, 9)) + 1.2 * grid.noise(rng, 3.5)
    septa = rng.choice([0, 0.1, 0.2]) - np.abs(grid.noise(rng, 9) + 0.3 * grid.noise(rng, 3.5))
    gaps = grid.noise(rng, 16) > (1.6 if enhancing else -1.1)
    ring = np.where(gaps, 0, np.clip(np.maximum((thickness - inside) / 1.2, septa / 0.15) + 0.5, 0, 1))
    core = np.clip(inside / 2, 0, 1)
    level = _oedema_level(rng, grid, inside, head, enhancing)
    label = np.select([core > 0, level > 0], [np.where(ring > 0.5, ET, NCR), ED]) * head.brain
    return Lesion(label.astype(np.uint8), core, ring * core, np.clip(2 * level, 0, 1))


def _oedema_level(
    rng: np.random.Generator, grid: Grid, inside: np.ndarray, head: Head, enhancing: bool
) -> np.ndarray:
    """Positive in the oedema: what spreads from the core, fast through white matter, until a volume is filled."""
    white = grid.coarse(head.white)
    core = grid.coarse((inside > 0).astype(np.float32))
    below = grid.coarse(np.isin(head.regions, CEREBELLUM).astype(np.float32))
    speed = (0.35 + 0.64 * white) * (grid.coarse(head.depth) > 0)
    speed *= below if np.average(below, weights=core) > 0.5 else 1 - below  # it does not cross the tentorium
    reached = core
    for _ in range(30):
        reached = np.maximum(core, speed * ndimage.uniform_filter(reached, 3, mode="constant"))
    order = np.argsort(-reached, axis=None, kind="stable")
    filled = np.cumsum((white * (1 - core) * (reached > 1e-12)).ravel()[order]) * SLICE_MM**3 / 1000
    reached = np.log(reached + 1e-15)
    ml = min(rng.lognormal(np.log(45 if enhancing else 15), 0.8), 170, 0.7 * filled[-1])
    edge = reached.ravel()[order[np.searchsorted(filled, ml)]]
    level = (grid.fine(reached) - edge) / 1.5 + 0.25 * grid.noise(rng, 9)
    tissue = 0.5 * (head.white + grid.fine(white)) + 0.15 * grid.noise(rng, 8) - 0.45
    spared = np.isin(head.regions, VENTRICLES) & (head.t1 < 0.6) | (head.depth < 1.5)
    return np.where(spared, -1, np.minimum(level, tissue))


# ---------------------------------------------------------------- signal


@dataclasses.dataclass(frozen=True)
class Tissue:
    """What the lesion-free head is made of: the template's T1, texture of mean 1, and how much of a voxel is vessel."""

    t1: np.ndarray
    texture: np.ndarray
    vessel: np.ndarray


def _tissue(rng: np.random.Generator, grid: Grid, head: Head, domain: Domain) -> Tissue:
    near_surface = np.clip((18 - head.depth) / 6, 0, 1)
    t1 = head.t1 + near_surface * (rng.normal(0, 0.03) + 0.05 * grid.noise(rng, 10))  # wider and narrower sulci
    texture = 1 + 0.02 * grid.noise(rng, 4)
    # Two smooth fields are both near 0 along curves: vessels, where these run through sulci.
    course = grid.noise(rng, 13) ** 2 + grid.noise(rng, 13) ** 2
    sulci = np.clip((0.66 - t1) / 0.08, 0, 1) * ~np.isin(head.regions, VENTRICLES)
    vessels = np.exp(-course / 0.04) * sulci
    dura = head.dura * rng.uniform(0.4, 1) * np.clip(1 + 0.3 * grid.noise(rng, 12), 0, 1.4)
    sinus = domain.sinus[0] if domain.sinus[0] == domain.sinus[1] else rng.uniform(*domain.sinus)
    surface = np.clip(sinus + 0.5 - np.abs(head.depth - sinus), 0, 1) * np.clip(grid.noise(rng, 11) - 1, 0, 1)
    return Tissue(t1, texture, np.clip(np.max([vessels, dura, surface], axis=0), 0, 1))


def _healthy_signal(tissue: Tissue, contrast: Contrast) -> np.ndarray:
    side = np.sign(1 - contrast.fluid)  # on which fluid lies of grey matter
    levels = [contrast.fluid, contrast.fluid + 0.1 * side, 1 - 0.05 * side, 1, contrast.white]
    signal = np.interp(tissue.t1, [0.3, 0.45, 0.6, 0.68, 0.9], levels).astype(np.float32)
    signal *= tissue.texture
    return signal + (contrast.vessel - signal) * tissue.vessel


def _lesion_signal(healthy: np.ndarray, lesion: Lesion, texture: np.ndarray, contrast: Contrast) -> np.ndarray:
    signal = healthy * (1 - contrast.oedema * lesion.oedema)
    signal += (contrast.necrosis + 0.04 * texture - signal) * lesion.core
    return signal + (contrast.ring * (1 + 0.16 * texture) - signal) * lesion.ring


def _stripped(
    rng: np.random.Generator, grid: Grid, head: Head, focus: Focus, domain: Domain
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of the head, and the signal of what is left of the skull, 0 elsewhere."""
    if not domain.imperfect:
        return head.brain, np.zeros(head.brain.shape, np.float32)
    reach = rng.uniform(0, 7) * np.clip(grid.noise(rng, 25) + rng.uniform(-1.5, 0.5), 0, 1)
    remains = (head.depth <= 0) & (head.depth > -reach)
    marrow = np.exp(rng.normal(0, 0.6) + rng.uniform(0.2, 0.7) * grid.noise(rng, 8))
    taken = rng.uniform(0, 6) * np.clip(grid.noise(rng, 25) + rng.uniform(-2, 0), 0, 1)
    kept = head.brain & (head.depth > taken) | remains
    if rng.random() < 0.2:  # cut by a plane, mostly from above or below, on the side where the tumour isn't
        normal = rng.normal(0, (1, 0.25, 0.15)).astype(np.float32)
        along = np.einsum("i,i...->...", normal, grid.points)
        towards = np.sign(normal @ focus.centre - np.median(along[head.brain]))
        kept &= towards * along > np.quantile(towards * along[head.brain], rng.uniform(0, 0.25))
    return kept, np.where(remains, marrow, 0)


def _acquired(
    rng: np.random.Generator, grid: Grid, domain: Domain, image: np.ndarray, healthy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both signals as magnitude images, under the same bias field, resolution and noise."""
    bias = np.exp(rng.uniform(*domain.bias) * grid.noise(rng, 80))
    blur = np.array([0, 1, 1]) * rng.uniform(*domain.blur) / grid.spacing
    sigma = rng.uniform(*domain.noise) / grid.spacing  # of a mean over spacing^2 mm^2
    real, imaginary = sigma * rng.standard_normal((2, *image.shape), dtype=np.float32)
    if domain.imperfect:
        thick = rng.choice([0, 0, 0.3, 0.7]) * rng.random()  # slices
        blur = blur * np.exp(rng.normal(0, 0.25, 3)) + [thick, 0, 0]
        real += rng.uniform(0, 0.04) * grid.noise(rng, 4)
    seen = (ndimage.gaussian_filter(signal * bias, blur) for signal in (image, healthy))
    return tuple(np.hypot(signal + real, imaginary) for signal in seen)


def _scaled(image: np.ndarray, healthy: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in [0,1] as `preparation.intensity.scale_intensity` maps the image; 0 outside the foreground."""
    low, high = INTENSITY_CLIP
    mean, std = image[foreground].mean(dtype=np.float64), image[foreground].std(dtype=np.float64)
    scores = ((scan - mean) / std for scan in (image, healthy))
    return tuple(np.where(foreground, (np.clip(z, low, high) - low) / (high - low), 0).astype(np.float32) for z in scores)
