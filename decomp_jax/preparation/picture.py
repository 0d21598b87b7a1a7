"""Pictures and masks: any 2-D image file, padded to a square and brought to the wanted size.

They are normalised as scans are, over their foreground: pixels brighter than a tenth of the way from the darkest to the
99th percentile, and what these enclose. Bitmaps and NumPy arrays are taken as they are, rows downwards; NIfTI slices as a
radiologist reads them, DICOM images as they ask to be shown.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from decomp_jax.data.schema import FIELD_MM, Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation import dicom
from decomp_jax.preparation.field import field_mean, field_nearest
from decomp_jax.preparation.intensity import scale_intensity
from decomp_jax.preparation.volume import load_volume

FOREGROUND = "above 10 % of the 99th percentile, holes filled"
FOREGROUND_LEVEL = 0.1
JPEG = (".jpg", ".jpeg")
BITMAPS = (".png", *JPEG)
COLOURS = ("P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes other than plain numbers


def load_picture(path: Path) -> np.ndarray:
    """Grey values [rows,columns], float32, of a PNG, JPEG, NIfTI, DICOM or NumPy file; colours become luminance.

    Raises:
        UserError: the file can't be read as one 2-D image of finite values.
    """
    return _as_plane(path, _load_values(path, luminance=True).astype(np.float32))


def load_mask(path: Path) -> np.ndarray:
    """Mask values [rows,columns], int32; those of JPEG files, which are inexact, become 0 and 255.

    Raises:
        UserError: the file can't be read as one 2-D image of whole numbers.
    """
    values = _load_values(path, luminance=False)
    if values.ndim == 3 and values.shape[2] in (3, 4) and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]  # grey, stored as colour
    values = _as_plane(path, values.astype(np.float32))
    if path.suffix.lower() in JPEG:
        return np.where(values >= 128, 255, 0)
    if (values != np.round(values)).any() or values.min() < 0:
        raise UserError(f"{path}: has mask values that are not 0, 1, 2 ...; store class numbers, or 0 and 255")
    return values.astype(np.int32)


def _load_bitmap(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: can't be read as an image ({error}); export it again") from error


def _load_values(path: Path, *, luminance: bool) -> np.ndarray:
    """The values as stored, palette indices and channels last included, or with colours as luminance."""
    name = path.name.lower()
    if name.endswith(BITMAPS):
        image = _load_bitmap(path)
        return np.asarray(image.convert("RGB").convert("L") if luminance and image.mode in COLOURS else image)
    if name.endswith((".nii", ".nii.gz")):
        volume = np.asarray(load_volume(path).dataobj)
        if 1 not in volume.shape:
            raise UserError(f"{path}: is a volume of shape {volume.shape}; give 2-D slices")
        return np.flip(volume.squeeze(volume.shape.index(1))).T
    if name.endswith(".npy"):
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: can't be read as a NumPy array ({error}); save it again") from error
    if name.endswith(dicom.SUFFIX):
        values = dicom.read_single(path, display=luminance)
        return np.asarray(Image.fromarray(values.astype(np.uint8)).convert("L")) if values.ndim == 3 else values
    raise UserError(f"{path}: is no PNG, JPEG, NIfTI, DICOM (.dcm) or .npy file; convert it")


def _as_plane(path: Path, values: np.ndarray) -> np.ndarray:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"{path}: has shape {values.shape}, not rows and columns; give a 2-D image")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: has values that are NaN or infinite; replace them")
    return values


def prepare_picture(path: Path, settings: Settings) -> np.ndarray:
    """A picture as float16 [S,S,1] in [0,1], prepared as the records with these settings were.

    Raises:
        UserError: the file can't be used, or the settings are those of scans.
    """
    if settings.foreground != FOREGROUND:
        raise UserError(f"{path}: the model was trained on scans, not on pictures; give a volume and --slice")
    values = load_picture(path)
    darkest = values.min()
    bright = values > darkest + FOREGROUND_LEVEL * (np.percentile(values, 99) - darkest)
    image = scale_intensity(path, values, ndimage.binary_fill_holes(bright), settings)
    return field_mean(image[None], _pixel_spacing(values), settings.size)[0, ..., None].astype(np.float16)


def prepare_mask(path: Path, image: Path, classes: Mapping[int, int], size: int) -> np.ndarray:
    """The mask of a picture as labels uint8 [size,size]; `classes` maps mask values to labels.

    Raises:
        UserError: a file can't be used, or the mask has another shape than its image.
    """
    mask, shape = load_mask(path), load_picture(image).shape
    if mask.shape != shape:
        raise UserError(f"{path}: has shape {mask.shape} but its image {shape}; give a mask of its size")
    label = np.zeros(mask.shape, np.uint8)
    for value, number in classes.items():
        label[mask == value] = number
    return field_nearest(label[None], _pixel_spacing(label), size)[0]


def _pixel_spacing(values: np.ndarray) -> tuple[float, float]:
    """Pixel height and width at which the longer side fills the field."""
    return (FIELD_MM / max(values.shape),) * 2
