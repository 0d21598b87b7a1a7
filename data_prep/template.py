"""The MNI152 head that phantom patients are made of, as it comes inside nilearn, and its regions by rule.

Arrays are [slice, row, column]: slices from inferior to superior, rows from anterior to posterior, columns from the
right to the left. Points are (z, y, x) in mm of MNI152 along these axes: z upwards, y backwards, x to the left.
"""

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from decomp_jax.data.schema import ANATOMY_CLASSES
from decomp_jax.preparation.field import planar

FLUID_T1 = 0.3  # of cerebrospinal fluid in the template
MARGIN = 8  # voxels kept around the brain
PULL_MM = 4  # voxel width of `Template.ventricle_pull`


@dataclasses.dataclass(frozen=True)
class Template:
    """MNI152 in voxels of 1 mm, cropped to the brain.

    Attributes:
        origin: [3], mm, the first voxel.
        t1: T1 weighted image, sharpened, since an average of 152 heads is blurred; fluid outside the brain.
        white: white matter fraction.
        depth: mm below the brain's surface; negative outside.
        dura: 0..1, where falx, tentorium, venous sinuses and choroid plexus enhance.
        anatomy: uint8, 0 or 1 + index in `ANATOMY_CLASSES`.
        ventricle_pull: [3,...] in voxels of `PULL_MM`: towards the lateral ventricles, of length 1 near their walls
            and fading over a centimetre.
    """

    origin: np.ndarray
    t1: np.ndarray
    white: np.ndarray
    depth: np.ndarray
    dura: np.ndarray
    anatomy: np.ndarray
    ventricle_pull: np.ndarray

    def index(self, points: np.ndarray, voxel: int = 1) -> np.ndarray:
        """Points [3,...] in mm as array indices of a volume with voxels of that many mm."""
        return (points - self.origin.reshape(3, *[1] * (points.ndim - 1))) / voxel


@functools.cache
def load_template() -> Template:
    """Takes seconds, once a process."""
    from nilearn import datasets  # slow to import

    image = datasets.load_mni152_template(resolution=1)
    tissues = datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1)
    volumes = [planar(np.asarray(volume.dataobj, np.float32), "axial") for volume in (image, *tissues)]
    first = image.affine[:3, 3]
    last = first + np.array(image.shape) - 1

    inside = np.argwhere(volumes[0] > 0)
    start, stop = np.maximum(inside.min(axis=0) - MARGIN, 0), inside.max(axis=0) + 1 + MARGIN
    t1, grey, white = (np.ascontiguousarray(volume[tuple(map(slice, start, stop))]) for volume in volumes)
    origin = np.array([first[2], -last[1], -last[0]]) + start
    axes = (np.arange(at, at + n, dtype=np.float32) for at, n in zip(origin, t1.shape))
    points = np.meshgrid(*axes, indexing="ij", sparse=True)

    brain = t1 > 0
    depth = (ndimage.distance_transform_edt(brain) - ndimage.distance_transform_edt(~brain)).astype(np.float32)
    anatomy = _regions(t1, grey + white, points)
    filled = np.where(brain, t1, FLUID_T1)
    sharpened = filled + 0.8 * (filled - ndimage.gaussian_filter(filled, 1.5))
    dura = _dura(t1, depth, points)
    return Template(origin.astype(np.float32), sharpened, white, depth, dura, anatomy, _ventricle_pull(anatomy))


def _tentorium(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Height of the surface between cerebrum and cerebellum, a quadratic in y and |x|."""
    side = np.abs(x)
    return -27 + y - 1.2 * side - 0.01 * y**2 + 0.004 * side**2 + 0.0095 * side * y


def _regions(t1: np.ndarray, tissue: np.ndarray, points: list[np.ndarray]) -> np.ndarray:
    """ANATOMY_CLASSES by rule; brain stem, third and fourth ventricle and the cisterns around them stay 0."""
    z, y, x = points

    def ellipsoid(centre: tuple[int, int, int], radii: tuple[int, int, int]) -> np.ndarray:
        return sum(((axis - c) / r) ** 2 for axis, c, r in zip(points, centre, radii)) < 1

    brain, dark = t1 > 0, (t1 < 0.55) & (tissue < 0.6)
    below = z < _tentorium(y, x)
    stem = ellipsoid((-26, 27, 0), (22, 14, 13)) | ellipsoid((-52, 40, 0), (24, 9, 10))
    third_ventricle = dark & (np.abs(x) < 6) & (y > -4) & (y < 38) & (z > -14) & (z < 12)
    centre = (np.abs(x) < 36) & (y > -30) & (y < 52) & (z > -8) & (z < 33)

    left = np.zeros(t1.shape, np.uint8)
    left[brain & ~below] = 1 + ANATOMY_CLASSES.index("left cerebrum")
    left[brain & below & (t1 > 0.45)] = 1 + ANATOMY_CLASSES.index("left cerebellum")
    left[stem | third_ventricle] = 0
    left[_lateral_ventricles(dark & centre)] = 1 + ANATOMY_CLASSES.index("left ventricle")
    return left + ((left > 0) & (x < 0))  # the right side's class follows the left's


def _lateral_ventricles(dark: np.ndarray) -> np.ndarray:
    """The two largest dark parts that keep to one side, and the voxels that they share with tissue."""
    parts, _ = ndimage.label(ndimage.binary_opening(dark))
    sizes = np.bincount(parts.ravel())
    sizes[np.unique(parts[:, :, dark.shape[2] // 2])] = 0  # background, and what crosses the midline
    return ndimage.binary_dilation(np.isin(parts, np.argsort(sizes)[-2:]), np.ones((3, 3, 3)))


def _dura(t1: np.ndarray, depth: np.ndarray, points: list[np.ndarray]) -> np.ndarray:
    """Falx and sagittal sinus in the midline, tentorium and transverse sinuses above the cerebellum, choroid plexus."""
    z, y, x = points
    height = z - _tentorium(y, x)
    fissure = np.clip((0.72 - t1) / 0.1, 0, 1)
    falx = np.exp(-((x / 1.2) ** 2)) * np.clip((30 - depth) / 12, 0, 1) * (height > 0)
    tentorium = 0.8 * np.exp(-((height / 1.5) ** 2)) * np.clip((30 - depth) / 20, 0, 1) * (y > 30)
    sagittal_sinus = np.exp(-((x / 3) ** 2)) * np.clip((4 - depth) / 3, 0, 1) * ((z > 20) | (y > 60))
    choroid_plexus = 0.9 * np.exp(-(((np.abs(x) - 23) / 5) ** 2 + ((y - 40) / 6) ** 2 + ((z - 6) / 6) ** 2))
    in_fissure = np.maximum(np.maximum(falx, tentorium), choroid_plexus)
    return np.where(t1 > 0, np.maximum(fissure * in_fissure, sagittal_sinus), 0)


def _ventricle_pull(anatomy: np.ndarray) -> np.ndarray:
    sides = [1 + ANATOMY_CLASSES.index(f"{side} ventricle") for side in ("left", "right")]
    elsewhere = ~np.isin(anatomy[::PULL_MM, ::PULL_MM, ::PULL_MM], sides)
    nearness = np.exp(-ndimage.distance_transform_edt(elsewhere, sampling=PULL_MM) / 12)
    pull = np.stack(np.gradient(ndimage.gaussian_filter(nearness, 1)))
    return (pull / np.linalg.norm(pull, axis=0).max()).astype(np.float32)
