"""Pictures and masks: any 2-D image file, padded to a square and brought to the wanted size.

They are normalised as scans are, over their foreground: pixels brighter than a tenth of the way from the darkest to the
99th percentile, and what these enclose. Bitmaps and NumPy arrays are taken as they are, rows downwards; NIfTI slices as a
radiologist reads them, DICOM images as they ask to be shown. What a file is, its first bytes say, not its name.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float16, Float32
from numpy.lib import format as npy
from PIL import Image
from scipy import ndimage

from decomp_jax.data.schema import FIELD_MM, Settings
from decomp_jax.errors import UserError
from decomp_jax.files import UNREADABLE
from decomp_jax.preparation import dicom
from decomp_jax.preparation.field import field_mean, field_nearest
from decomp_jax.preparation.intensity import scale_intensity
from decomp_jax.preparation.volume import check_same_grid, load_volume

FOREGROUND = "above 10 % of the 99th percentile, holes filled"
FOREGROUND_LEVEL = 0.1
BITMAPS = (".png", ".jpg", ".jpeg")
COLOURS = ("P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes other than plain numbers
ORIENTATION = 0x0112  # the EXIF tag that says how a picture is to be turned; 1: not at all
LUMINANCE = (19595, 38470, 7471)  # of red, green and blue, in 65536ths
BLACK, WHITE = [0, 0, 0], [255, 255, 255]
# Of a JPEG mask: where neighbours differ by less than FLAT there is no edge, which compression would have smeared.
FLAT = 40
JPEG_BLACK, JPEG_WHITE = 48, 208
STRAY = 4  # pixels that are flat and grey all the same


def load_picture(path: Path) -> np.ndarray:
    """Grey values [rows,columns], float32, of a PNG, JPEG, NIfTI, DICOM or NumPy file; colours become luminance, on black.

    Raises:
        UserError: the file can't be read as one 2-D image of finite values.
    """
    if is_bitmap(path):
        return _grey(path, _load_bitmap(path))
    values = _load_array(path, display=True)
    return _as_plane(path, _luminance(values) if path.name.lower().endswith(dicom.SUFFIX) else values)


def parse_picture(path: Path, data: bytes) -> np.ndarray:
    """`load_picture` of the bytes of a PNG, JPEG or DICOM file; `path` names it in errors."""
    if data[dicom.MARK_AT:].startswith(dicom.MARK):
        return _as_plane(path, _luminance(dicom.read_single(path, display=True, file=io.BytesIO(data))))
    return _grey(path, _load_bitmap(path, data))


def _luminance(values: np.ndarray) -> np.ndarray:
    """Of a DICOM frame in colours, of 8 or 16 bits, by the weights that Pillow has; another stays as it is."""
    if values.ndim != 3 or values.shape[2] not in (3, 4):
        return values
    return (values[..., :3].astype(np.int64) @ LUMINANCE + 0x8000) >> 16


def _grey(path: Path, image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        image = _on_black(image)
    return _as_plane(path, np.asarray(image.convert("RGB").convert("L") if image.mode in COLOURS else image))


def load_mask(path: Path) -> np.ndarray:
    """Mask values [rows,columns], int32; those of JPEG files, which are inexact, are 0 and 255.

    Raises:
        UserError: the file can't be read as one 2-D image of whole numbers.
    """
    values = _as_plane(path, _mask_of_bitmap(path, _load_bitmap(path)) if is_bitmap(path) else _load_array(path, display=False))
    if (values != np.round(values)).any() or values.min() < 0:
        raise UserError(f"{path}: has mask values that are not 0, 1, 2 ...; store class numbers, or 0 and 255")
    return values.astype(np.int32)


def is_bitmap(path: Path) -> bool:
    """Raises UserError where the name is that of no kind of picture."""
    name = path.name.lower()
    if not name.endswith((*BITMAPS, ".nii", ".nii.gz", ".npy", dicom.SUFFIX)):
        raise UserError(f"{path}: is no PNG, JPEG, NIfTI, DICOM (.dcm) or .npy file; convert it")
    return name.endswith(BITMAPS)


def _load_bitmap(path: Path, data: bytes | None = None) -> Image.Image:
    def source() -> Path | io.BytesIO:
        return path if data is None else io.BytesIO(data)

    try:
        with Image.open(source(), formats=("PNG", "JPEG")) as image:
            image.verify()  # the checksums of a PNG, which decoding does not look at
        with Image.open(source(), formats=("PNG", "JPEG")) as image:
            turned = image.getexif().get(ORIENTATION, 1) != 1
            frames = getattr(image, "n_frames", 1) if image.format == "PNG" else 1
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: can't be read as an image ({error}); export it again") from error
    if turned:
        raise UserError(f"{path}: its EXIF orientation says that it is to be turned; save it upright, without the tag")
    if frames > 1:
        raise UserError(f"{path}: holds {frames} pictures; save each to a file of its own")
    return image


def _on_black(image: Image.Image) -> Image.Image:
    """What is transparent is background. An alpha channel that is the same everywhere says nothing."""
    with_alpha = image.convert("RGBA")
    low, high = with_alpha.getchannel("A").getextrema()
    if low == high:
        return with_alpha.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), with_alpha).convert("RGB")


def _mask_of_bitmap(path: Path, image: Image.Image) -> np.ndarray:
    """Numbers as stored, or indices of a palette; 0 and 255 of JPEG files and of palettes of black and white."""
    if image.has_transparency_data:
        *colours, (transparent, opaque) = image.convert("RGBA").getextrema()
        alone = transparent < opaque and all(low == high for low, high in colours)  # the mask is in the alpha channel
        if alone or _on_black(image).tobytes() != image.convert("RGBA").convert("RGB").tobytes():
            raise UserError(f"{path}: its alpha channel says other than its colours; save the mask in grey, without alpha")
    if image.mode in ("P", "PA"):
        return _mask_of_palette(path, image)
    if image.mode == "LA":
        image = image.convert("L")
    values = np.asarray(image)
    if image.mode in ("RGB", "RGBA"):
        values = values[..., :3]
        if (values != values[..., :1]).any():
            raise UserError(f"{path}: has shape {values.shape} and colours; store class numbers 0, 1, 2 ... in grey, or 0 and 255")
        values = values[..., 0]
    return _without_smear(path, values) if image.format in ("JPEG", "MPO") else values


def _mask_of_palette(path: Path, image: Image.Image) -> np.ndarray:
    """Which of a palette's colours is the background? The first, where it alone is black; else black beside white."""
    indices = np.asarray(image.getchannel(0) if image.mode == "PA" else image)
    colours = np.zeros((256, 3), int)
    palette = np.reshape(image.getpalette("RGB"), (-1, 3))
    colours[: len(palette)] = palette
    used = np.unique(indices)
    black = [index for index in used.tolist() if colours[index].tolist() == BLACK]
    if colours[0].tolist() == BLACK and black in ([], [0]):
        return indices
    others = [index for index in used.tolist() if index not in black]
    if any(colours[index].tolist() != WHITE for index in others) or len(black) > 1 and not others:
        raise UserError(f"{path}: the first colour of its palette is {tuple(colours[0].tolist())}, so that the background "
                        "is not known; store class numbers 0, 1, 2 ... in grey, or 0 and 255")
    return colours[indices, 0]


def _without_smear(path: Path, values: np.ndarray) -> np.ndarray:
    """A black and white mask from what JPEG made of it. Class numbers do not survive JPEG."""
    if values.ndim == 2 and values.any():
        flat = ndimage.maximum_filter(values, 3).astype(int) - ndimage.minimum_filter(values, 3) < FLAT
        grey = flat & (values >= JPEG_BLACK) & (values < JPEG_WHITE)
        if values.max() < JPEG_WHITE or np.count_nonzero(grey) > STRAY:
            raise UserError(f"{path}: is a JPEG mask other than black and white; save it as PNG, from the original")
    return np.where(values >= 128, 255, 0)


def _load_array(path: Path, *, display: bool) -> np.ndarray:
    """As stored, or of DICOM as displayed; a NIfTI slice with its rows from the front or the top, its columns from the right."""
    if path.name.lower().endswith(".npy"):
        try:
            with path.open("rb") as file:
                return npy.read_array(file, allow_pickle=False)
        except UNREADABLE as error:
            raise UserError(f"{path}: can't be read as a NumPy array ({error}); save it again") from error
    if path.name.lower().endswith(dicom.SUFFIX):
        return dicom.read_single(path, display=display)
    return _slice_of(path, load_volume(path))


def _slice_of(path: Path, volume: nib.Nifti1Image) -> np.ndarray:
    if 1 not in volume.shape:
        raise UserError(f"{path}: is a volume of shape {volume.shape}; give 2-D slices")
    return np.flip(np.asarray(volume.dataobj).squeeze(volume.shape.index(1))).T


def _as_plane(path: Path, values: np.ndarray) -> np.ndarray:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"{path}: has shape {values.shape}, not rows and columns; give a 2-D image")
    if values.dtype.kind not in "biuf":
        raise UserError(f"{path}: has values of type {values.dtype}; save numbers")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: has values that are NaN or infinite; replace them")
    return values.astype(np.float32)


def prepare_picture(path: Path, settings: Settings) -> np.ndarray:
    """A picture as float16 [S,S,1] in [0,1], prepared as the records with these settings were.

    Raises:
        UserError: the file can't be used, or the settings are those of scans.
    """
    if settings.foreground != FOREGROUND:
        raise UserError(f"{path}: the model was trained on scans, not on pictures; give a volume and --slice")
    return prepare_values(path, load_picture(path), settings)


def prepare_values(path: Path, values: Float32[np.ndarray, "y x"], settings: Settings) -> Float16[np.ndarray, "s s 1"]:
    """`prepare_picture` of grey values that are loaded; `path` names them in errors."""
    darkest = values.min()
    bright = values > darkest + FOREGROUND_LEVEL * (np.percentile(values, 99) - darkest)
    image = scale_intensity(path, values, ndimage.binary_fill_holes(bright), settings)
    return field_mean(image[None], _pixel_spacing(values), settings.size)[0, ..., None].astype(np.float16)


def prepare_mask(path: Path, image: Path, classes: Mapping[int, int], size: int) -> np.ndarray:
    """The mask of a picture as labels uint8 [size,size]; `classes` maps mask values to labels.

    Raises:
        UserError: a file can't be used, or the mask has another shape or lies elsewhere than its image.
    """
    check_same_frame(path, image)
    mask, shape = load_mask(path), load_picture(image).shape
    if mask.shape != shape:
        raise UserError(f"{path}: has shape {mask.shape} but its image {shape}; give a mask of its size")
    label = np.zeros(mask.shape, np.uint8)
    for value, number in classes.items():
        label[mask == value] = number
    return field_nearest(label[None], _pixel_spacing(label), size)[0]


def check_same_frame(path: Path, image: Path) -> None:
    """Refuses what does not lie on its image: NIfTI slices are turned upright by their affines, other files are not."""
    of_mask, of_image = (file.name.lower().endswith((".nii", ".nii.gz")) for file in (path, image))
    if of_mask != of_image:
        raise UserError(f"{path}: of {path.name} and {image.name} one is NIfTI, and how its rows run in the other is not "
                        "known; save both as NIfTI, or neither")
    if of_mask:
        check_same_grid(path, load_volume(path), image, load_volume(image))


def _pixel_spacing(values: np.ndarray) -> tuple[float, float]:
    """Pixel height and width at which the longer side fills the field."""
    return (FIELD_MM / max(values.shape),) * 2
