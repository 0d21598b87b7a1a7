"""Synthetic glioma patients on real anatomy, with the lesion-free counterfactual that no real data set has.

A patient is the MNI152 template (T1 and white matter map, as they come inside nilearn) seen through its own smooth
deformation, tissue contrast, enhancing vessels, bias field and noise, with a synthetic glioma: an irregular core
with an enhancing ring around necrosis, oedema that creeps through white matter, and mass effect.

`healthy` is the same slice without lesion tissue: deformation (mass effect included), contrast, bias field, noise and
intensity constants are the image's own, so that the two are equal outside the lesion label.

Arrays are [slice, row, column]: slices from inferior to superior, rows from anterior to posterior, columns from the
patient's right to left, and points are (z, y, x) in mm along these axes. Randomness is drawn on lattices in mm, so
that a patient is the same at every size but for the noise of single pixels.
"""

import dataclasses
import functools
import hashlib

import numpy as np
from scipy import ndimage

from data_prep.slices import PatientSlices
from decomp_jax.data.schema import ANATOMY_CLASSES, GLIOMA_CLASSES, Settings

FIELD_MM = 256  # side of the square field of view: SRI24's 240 mm, padded as BraTS images are
WINDOW_MM = (152, 208, 160)  # the part of the field, around its centre, that a brain fills
SLICE_MM = 4
LESION_SHARE = 0.7  # share of stored slices that show lesion
MIN_BRAIN_MM2 = 1000  # slices with less brain are not stored

NCR, ED, ET = (1 + GLIOMA_CLASSES.index(name) for name in ("NCR", "ED", "ET"))


def settings(size: int) -> Settings:
    """How phantom slices of side `size` are prepared: as BraTS t1ce slices, with anatomy and `healthy` beside them."""
    return Settings(source="phantom", size=size, anatomy_classes=ANATOMY_CLASSES, healthy=True)


def patient_ids(n: int) -> list[str]:
    """The first `n` phantom patients."""
    return [f"phantom-{i:04d}" for i in range(1, n + 1)]


def prepare(patient_id: str, *, seed: int, size: int) -> PatientSlices:
    """One patient's slices, a pure function of the arguments.

    `position_mm` is the mean height, in MNI152 space, of the brain that a slice shows; `slice_index` counts planes
    4 mm apart.
    """
    rng = np.random.default_rng([seed, *hashlib.sha256(patient_id.encode()).digest()])
    grid = Grid(spacing=1 if size >= 128 else 2)
    return _stored(_scan(rng, grid), patient_id, rng, size)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Voxel centres of the window that patients are built in, in mm from its centre; `spacing` is in-plane."""

    spacing: int

    @functools.cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        steps = (SLICE_MM, self.spacing, self.spacing)
        return tuple((np.arange(mm // step, dtype=np.float32) + 0.5) * step - mm / 2 for mm, step in zip(WINDOW_MM, steps))

    @property
    def points(self) -> list[np.ndarray]:
        """z, y, x of the voxels, as three arrays that broadcast to the grid's shape."""
        return np.meshgrid(*self.axes, indexing="ij", sparse=True)

    def coarse(self, volume: np.ndarray) -> np.ndarray:
        """Means over SLICE_MM x SLICE_MM of each plane: an isotropic grid."""
        n = SLICE_MM // self.spacing
        slices, rows, columns = volume.shape
        return volume.reshape(slices, rows // n, n, columns // n, n).mean((2, 4))

    def fine(self, volume: np.ndarray) -> np.ndarray:
        """Linear interpolation of an isotropic grid back to this one."""
        n = SLICE_MM // self.spacing
        return ndimage.zoom(volume, (1, n, n), order=1, mode="nearest", grid_mode=True)

    def noise(self, rng: np.random.Generator, scale: float, *components: int) -> np.ndarray:
        """Smooth noise of unit variance that varies over about `scale` mm: a cubic B-spline of normal numbers."""
        values = rng.standard_normal((*components, *(int(mm // scale) + 4 for mm in WINDOW_MM)), dtype=np.float32)
        for axis, (mm, positions) in enumerate(zip(WINDOW_MM, self.axes), len(components)):
            cell, t = np.divmod((positions + mm / 2) / np.float32(scale), 1)
            weights = np.stack([(1 - t) ** 3, _hat(t), _hat(1 - t), t**3])
            weights /= np.sqrt((weights**2).sum(0))  # unit variance
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            values = sum(np.take(values, cell.astype(int) + k, axis) * w.reshape(shape) for k, w in enumerate(weights))
        return values


def _hat(t: np.ndarray) -> np.ndarray:
    """The middle piece of the cubic B-spline."""
    return 3 * t**3 - 6 * t**2 + 4


@dataclasses.dataclass(frozen=True)
class Template:
    """MNI152 at 1 mm, cropped to the brain and a margin; index 0 of each axis lies at `origin` (mm)."""

    origin: np.ndarray  # [3]
    t1: np.ndarray  # sharpened T1; cerebrospinal fluid outside the brain
    white: np.ndarray  # white matter fraction
    depth: np.ndarray  # mm below the brain's surface, negative outside
    dura: np.ndarray  # 0..1: falx, tentorium and venous sinuses, which enhance
    ventricle_pull: np.ndarray  # [3, ...] at SLICE_MM: direction away from the lateral ventricles, fading with distance
    anatomy: np.ndarray  # uint8, ANATOMY_CLASSES

    def sample(self, volume: np.ndarray, points: np.ndarray, *, step: int = 1, order: int = 1) -> np.ndarray:
        """`volume` (of voxels `step` mm wide) at `points` [3, ...] in mm."""
        index = (points - self.origin.reshape(3, *[1] * (points.ndim - 1))) / step
        return ndimage.map_coordinates(volume, index, order=order, mode="nearest")


def _axial(image) -> np.ndarray:
    """A canonical NIfTI volume [x, y, z] as [slice, row, column]."""
    return np.ascontiguousarray(np.asarray(image.dataobj, np.float32)[::-1, ::-1].transpose(2, 1, 0))


@functools.cache
def template() -> Template:
    from nilearn import datasets  # seconds to import

    image = datasets.load_mni152_template(resolution=1)
    t1, white, grey = map(_axial, (image, datasets.load_mni152_wm_template(1), datasets.load_mni152_gm_template(1)))
    brain = t1 > 0
    corner = image.affine[:3, 3]
    far = corner + np.array(image.shape) - 1
    origin = np.array([corner[2], -far[1], -far[0]])  # z up, y to the back, x to the left
    crop = tuple(slice(at.start - 8, at.stop + 8) for at in ndimage.find_objects(brain.astype(int))[0])
    crop = tuple(slice(max(s.start, 0), s.stop) for s in crop)
    t1, white, grey, brain = (a[crop] for a in (t1, white, grey, brain))
    origin = origin + [s.start for s in crop]
    points = np.meshgrid(*(at + np.arange(n) for at, n in zip(origin, t1.shape)), indexing="ij", sparse=True)

    depth = ndimage.distance_transform_edt(brain) - ndimage.distance_transform_edt(~brain)
    anatomy = _regions(t1, white + grey, points)
    fluid = np.where(brain, t1, CSF_T1)
    ventricles = np.isin(anatomy, (5, 6))[::2, ::2, ::2]
    reach = np.exp(-ndimage.distance_transform_edt(~ventricles) / 6)
    pull = np.stack(np.gradient(-ndimage.gaussian_filter(reach, 2)))[:, ::2, ::2, ::2]
    return Template(
        origin=origin.astype(np.float32),
        t1=(fluid + SHARPEN * (fluid - ndimage.gaussian_filter(fluid, 1.5))).astype(np.float32),
        white=white,
        depth=depth.astype(np.float32),
        dura=_dura(t1, depth, points),
        ventricle_pull=(pull / np.sqrt((pull**2).sum(0)).max()).astype(np.float32),
        anatomy=anatomy,
    )


CSF_T1 = 0.3
SHARPEN = 0.8


def _tentorium(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Height in mm of the surface between cerebrum and cerebellum."""
    side = np.abs(x)
    return -27 + y - 1.2 * side - 0.01 * y**2 + 0.004 * side**2 + 0.0095 * side * y


def _regions(t1: np.ndarray, tissue: np.ndarray, points: list[np.ndarray]) -> np.ndarray:
    """ANATOMY_CLASSES by rule; brain stem, third and fourth ventricle and the cisterns below stay 0."""
    z, y, x = points

    def ellipsoid(centre: tuple[int, int, int], radii: tuple[int, int, int]) -> np.ndarray:
        return sum(((axis - c) / r) ** 2 for axis, c, r in zip(points, centre, radii)) < 1

    brain, dark = t1 > 0, (t1 < 0.55) & (tissue < 0.6)
    stem = ellipsoid((-26, 27, 0), (22, 14, 13)) | ellipsoid((-52, 40, 0), (24, 9, 10))
    third = dark & (abs(x) < 6) & (y > -4) & (y < 38) & (z > -14) & (z < 12)
    below = z < _tentorium(y, x)
    ventricle = _lateral_ventricles(dark & (abs(x) < 36) & (y > -30) & (y < 52) & (z > -8) & (z < 33))
    region = np.zeros(t1.shape, np.uint8)
    region[brain & ~below] = 1
    region[brain & below & (t1 > 0.45)] = 3
    region[brain & (stem | third)] = 0
    region[ventricle] = 5
    return np.where((x < 0) & (region > 0), region + 1, region).astype(np.uint8)  # left has x > 0, right is next


def _lateral_ventricles(dark: np.ndarray) -> np.ndarray:
    """The two large dark regions that keep to one side, grown by the voxels that they share with tissue."""
    parts, _ = ndimage.label(ndimage.binary_opening(dark))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    middle = np.unique(parts[:, :, dark.shape[2] // 2])
    sizes[middle] = 0
    return ndimage.binary_dilation(np.isin(parts, np.argsort(sizes)[-2:]), np.ones((3, 3, 3)))


def _dura(t1: np.ndarray, depth: np.ndarray, points: list[np.ndarray]) -> np.ndarray:
    """Falx and sagittal sinus in the midline fissure, tentorium and transverse sinus above the cerebellum."""
    z, y, x = points
    fissure = np.clip((0.72 - t1) / 0.1, 0, 1) * (t1 > 0)
    falx = np.exp(-((x / 1.2) ** 2)) * np.clip((30 - depth) / 12, 0, 1) * (z > _tentorium(y, x))
    sinus = np.exp(-((x / 3) ** 2)) * np.clip((4 - depth) / 3, 0, 1) * ((z > 20) | (y > 60))
    tentorium = np.exp(-(((z - _tentorium(y, x)) / 1.5) ** 2)) * (y > 30) * np.clip((30 - depth) / 20, 0, 1)
    return np.clip(fissure * np.maximum(falx, 0.8 * tentorium) + sinus * (t1 > 0), 0, 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A patient's own lesion-free head on the grid."""

    t1: np.ndarray
    white: np.ndarray
    depth: np.ndarray
    dura: np.ndarray
    regions: np.ndarray
    height: np.ndarray  # mm in MNI152 space
    side: np.ndarray  # mm left of the template's midline


def _warp(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """Template point [3, ...] that each voxel shows, before mass effect."""
    points = np.stack(np.broadcast_arrays(*grid.points))
    turn = np.deg2rad(rng.normal(0, (2, 2, 3)))  # about the left-right, front-back and vertical axes
    scale = np.array([1.08, 1.045, 1.05]) * rng.normal(1, 0.02) * rng.normal(1, 0.025, 3)  # MNI152 is larger than SRI24
    matrix = _rotation(turn) * scale
    centre = np.array([4, 17, 0]) + rng.normal(0, 2, 3)  # MNI152's brain is centred there
    warped = np.tensordot(matrix.astype(np.float32), points, 1) + centre.astype(np.float32)[:, None, None, None]
    warped += 2.5 * grid.noise(rng, 45, 3) + 1.1 * grid.noise(rng, 18, 3)
    return warped


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation by `angles` about the axes x, y, z, in that order, for points (z, y, x)."""
    matrix = np.eye(3)
    for angle, (a, b) in zip(angles, ((0, 1), (0, 2), (1, 2))):
        turn = np.eye(3)
        turn[[a, b], [a, b]] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _anatomy(at: np.ndarray) -> Anatomy:
    head = template()
    t1, white, depth, dura = (head.sample(v, at) for v in (head.t1, head.white, head.depth, head.dura))
    regions = head.sample(head.anatomy, at, order=0)
    return Anatomy(t1, white, depth, dura, regions, height=at[0], side=at[2])


@dataclasses.dataclass(frozen=True)
class Focus:
    """One tumour focus: an ellipsoid with an uneven surface."""

    centre: np.ndarray  # [3], mm
    radius: float  # mm
    shape: np.ndarray  # [3, 3], stretches the distance from the centre

    def distance(self, points: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """Offset from the centre, and its length in radii."""
        offset = np.stack(np.broadcast_arrays(*(axis - np.float32(c) for axis, c in zip(points, self.centre))))
        return offset, np.sqrt((np.tensordot(self.shape.astype(np.float32), offset, 1) ** 2).sum(0)) / self.radius


def _foci(rng: np.random.Generator, grid: Grid, warped: np.ndarray) -> list[Focus]:
    """One focus in the white matter of a cerebral hemisphere (rarely of the cerebellum), at times with satellites."""
    head = template()
    coarse = np.stack([grid.coarse(axis) for axis in warped])
    regions = head.sample(head.anatomy, coarse, order=0)
    wanted = (3, 4) if rng.random() < 0.03 else (1, 2)
    home = np.isin(regions, wanted) & (head.sample(head.white, coarse) > 0.5) & (head.sample(head.depth, coarse) > 7)
    axes = dataclasses.replace(grid, spacing=SLICE_MM).axes
    centres = np.argwhere(home)
    centres = np.stack([axis[i] for axis, i in zip(axes, centres.T)], 1)
    radius = float(np.clip(np.exp(rng.normal(np.log(15), 0.38)), 6, 28))
    foci = [_focus(rng, centres[rng.integers(len(centres))], radius)]
    if rng.random() < 0.15:
        near = np.linalg.norm(centres - foci[0].centre, axis=1)
        centres = centres[(near > 1.2 * radius) & (near < radius + 28)]
        for _ in range(rng.integers(1, 4)):
            foci.append(_focus(rng, centres[rng.integers(len(centres))], radius * rng.uniform(0.25, 0.6)))
    return foci


def _focus(rng: np.random.Generator, centre: np.ndarray, radius: float) -> Focus:
    stretch = np.exp(rng.normal(0, 0.2, 3))
    return Focus(centre, radius, _rotation(rng.uniform(0, np.pi, 3)) * (stretch / stretch.prod() ** (1 / 3))[:, None])


def _push(foci: list[Focus], strength: float, grid: Grid) -> np.ndarray:
    """Mass effect [3, ...]: how far, in mm, each voxel's tissue has been pushed away from the tumour."""
    push = 0
    for focus in foci:
        offset, distance = focus.distance(grid.points)
        push = push + strength * offset * np.exp((1 - distance**2) / 2)
    return push


@dataclasses.dataclass(frozen=True)
class Lesion:
    label: np.ndarray
    core: np.ndarray  # 0..1, softly, as the next two
    ring: np.ndarray
    oedema: np.ndarray


def _lesion(rng: np.random.Generator, grid: Grid, foci: list[Focus], head: Anatomy, enhancing: bool) -> Lesion:
    brain = head.depth > 0
    uneven = rng.uniform(0.12, 0.3) * grid.noise(rng, 14) + rng.uniform(0.04, 0.1) * grid.noise(rng, 6)
    inside = np.max([(1 - focus.distance(grid.points)[1] + uneven) * focus.radius for focus in foci], axis=0)
    across = np.maximum(-np.sign(foci[0].centre[2]) * head.side, 0)
    inside = inside - across * (1.2 - head.white)  # the falx holds, the corpus callosum does not
    inside = np.minimum(inside, head.depth + 1)
    thickness = rng.uniform(2.2, 6) * np.exp(0.35 * grid.noise(rng, 10))
    septa = np.abs(grid.noise(rng, 9)) < rng.choice([0.05, 0.15, 0.4])
    gaps = grid.noise(rng, 16) > (1.6 if enhancing else -1.1)
    ring = np.clip(inside / 1.2, 0, 1) * np.clip((thickness - inside) / 1.2 + 0.5, 0, 1)
    ring = ndimage.gaussian_filter(np.where(gaps, 0, np.maximum(ring, septa * (inside > 1))), (0, 0.6 / grid.spacing, 0.6 / grid.spacing))
    core = np.clip(inside / 1.2, 0, 1) * brain
    spread = _oedema(rng, grid, inside, head, enhancing)
    label = np.where((core > 0) & brain, np.where(ring > 0.45, ET, NCR), np.where(spread > 0, ED, 0)).astype(np.uint8)
    return Lesion(label, core, ring * core, np.clip(spread * 2.5, 0, 1) * brain)


def _oedema(rng: np.random.Generator, grid: Grid, inside: np.ndarray, head: Anatomy, enhancing: bool) -> np.ndarray:
    """Level that is positive in the oedema: diffusion from the core, fast in white matter, cut at a given volume."""
    white = grid.coarse(head.white)
    speed = (0.35 + 0.64 * white) * (grid.coarse(head.depth) > 0)
    core = grid.coarse((inside > -1).astype(np.float32))
    reach = core
    for _ in range(30):
        reach = np.maximum(core, speed * ndimage.uniform_filter(reach, 3, mode="constant"))
    log_reach = np.log(reach + 1e-6)
    volume = np.exp(rng.normal(np.log(40 if enhancing else 10), 0.8)) * 1000 / SLICE_MM**3  # voxels of white matter
    free = (core < 0.5) * white
    order = np.argsort(-log_reach, axis=None)
    last = np.searchsorted(np.cumsum(free.ravel()[order]), min(volume, 170_000 / SLICE_MM**3))
    threshold = log_reach.ravel()[order[min(last, order.size - 1)]]
    level = (grid.fine(log_reach) - threshold) / 1.5 + 0.25 * grid.noise(rng, 9)
    tissue = head.white + 0.15 * grid.noise(rng, 8) - 0.45
    ventricle = np.isin(head.regions, (5, 6)) & (head.t1 < 0.6)
    return np.where(ventricle | (head.depth < 1.5), -1, np.minimum(level, tissue))


def _scan(rng: np.random.Generator, grid: Grid) -> dict[str, np.ndarray]:
    """image, healthy (raw intensities, background 0), label and anatomy on the grid, and template height."""
    warped = _warp(rng, grid)
    pull = template().ventricle_pull
    dilation = rng.uniform(-1.0, 5.0)
    warped = warped + dilation * np.stack([template().sample(p, warped, step=2) for p in pull])
    foci = _foci(rng, grid, warped)
    deep = np.clip(template().sample(template().depth, warped) / 12, 0, 1)
    head = _anatomy(warped - _push(foci, rng.uniform(0.05, 0.4), grid) * deep)
    rim = head.depth + 0.8 * grid.noise(rng, 10)
    head = dataclasses.replace(head, depth=rim)
    brain = rim > 0
    enhancing = bool(rng.random() > 0.12)
    lesion = _lesion(rng, grid, foci, head, enhancing)
    healthy, white_signal, csf_signal = _tissue(rng, grid, head)
    image = _with_lesion(rng, grid, healthy, lesion, white_signal, csf_signal, enhancing)
    bias = np.exp(rng.uniform(0.03, 0.1) * grid.noise(rng, 80))
    sigma = rng.uniform(0.015, 0.045) * white_signal / grid.spacing
    noise = sigma * rng.standard_normal((2, *brain.shape), dtype=np.float32)
    scan = {name: np.hypot(signal * bias + noise[0], noise[1]) * brain for name, signal in (("image", image), ("healthy", healthy))}
    label = lesion.label * brain
    scan["image"] = np.where(label > 0, scan["image"], scan["healthy"])
    return scan | {"label": label, "anatomy": head.regions * brain, "height": head.height}


def _tissue(rng: np.random.Generator, grid: Grid, head: Anatomy) -> tuple[np.ndarray, float, float]:
    grey, white, csf = 1.0, rng.uniform(1.08, 1.3), rng.uniform(0.25, 0.55)
    sulci = head.t1 + (rng.normal(0, 0.03) + 0.05 * grid.noise(rng, 10)) * np.clip((18 - head.depth) / 6, 0, 1)
    signal = np.interp(sulci, [0.3, 0.45, 0.6, 0.68, 0.9], [csf, csf + 0.1, 0.95 * grey, grey, white]).astype(np.float32)
    tube = np.exp(-(grid.noise(rng, 13) ** 2 + grid.noise(rng, 13) ** 2) / (2 * 0.14**2)) * np.clip((0.66 - sulci) / 0.08, 0, 1)
    bright = rng.uniform(0.5, 1.6)
    vessel = np.maximum(head.dura * rng.uniform(0.4, 1) * np.clip(1 + 0.3 * grid.noise(rng, 12), 0, 1.5), tube)
    rim = np.clip(1.5 - np.abs(head.depth - 1), 0, 1) * np.clip(grid.noise(rng, 11) - 1, 0, 1)
    vessel = np.maximum(vessel, rim)
    return signal * (1 - vessel) + (white + bright) * vessel, white, csf


def _with_lesion(rng, grid, healthy, lesion, white, csf, enhancing):
    texture = grid.noise(rng, 5)
    swollen = healthy * (1 - rng.uniform(0.12, 0.3) * lesion.oedema)
    dead = csf + (white - csf) * (rng.uniform(0.2, 0.6) if enhancing else rng.uniform(0.55, 0.8)) + 0.04 * texture
    image = swollen * (1 - lesion.core) + dead * lesion.core
    bright = white * rng.uniform(1.35, 2.1) + 0.15 * texture
    return image * (1 - lesion.ring) + bright * lesion.ring


def _stored(scan: dict[str, np.ndarray], patient_id: str, rng: np.random.Generator, size: int) -> PatientSlices:
    brain = scan["image"] > 0
    area = np.count_nonzero(brain, (1, 2)) * (FIELD_MM / 256) ** 2
    mean, std = scan["image"][brain].mean(), scan["image"][brain].std()
    out = {}
    for name in ("image", "healthy"):
        out[name] = np.where(brain, np.clip(((scan[name] - mean) / std + 3) / 8, 0, 1), 0)
    spacing = WINDOW_MM[1] // brain.shape[1]
    area = np.count_nonzero(brain, (1, 2)) * spacing**2
    label = scan["label"]
    has = label.any((1, 2))
    usable = area >= MIN_BRAIN_MM2
    sick, sound = np.flatnonzero(usable & has), np.flatnonzero(usable & ~has)
    n = min(len(sound), round(len(sick) * (1 / LESION_SHARE - 1)))
    kept = np.sort(np.concatenate([sick, rng.choice(sound, n, replace=False)]))
    pad = [(0, 0)] + [((FIELD_MM - mm) // 2 // spacing,) * 2 for mm in WINDOW_MM[1:]]
    f = size * spacing / FIELD_MM
    k = round(1 / f)
    def shrink(v):
        v = np.pad(v[kept], pad); return v.reshape(len(v), size, k, size, k).mean((2, 4)).astype(np.float16)[..., None]
    def near(v):
        v = np.pad(v[kept], pad); return np.ascontiguousarray(v[:, k // 2 :: k, k // 2 :: k])
    image, healthy, lab = shrink(out["image"]), shrink(out["healthy"]), near(label)
    image = np.where(lab[..., None] > 0, image, healthy)
    height = (scan["height"] * brain).sum((1, 2)) / np.maximum(brain.sum((1, 2)), 1)
    return PatientSlices(patient_id, image, lab, kept.astype(np.int32), height[kept].astype(np.float32), near(scan["anatomy"]), healthy)
