"""What a prepared data set holds: the names, classes and constants that records, checkpoints and banks share.

A data set is a directory:

    manifest.json                    `Settings`, counts, the layout of a record, SHA-256 of each file, digest
    rows-SPLIT.npy                   structured array, a row a slice in record order (`row_dtype`)
    slices/slices-SPLIT.tfrecord-*   the records; with slices/features.json, TensorFlow Datasets can read them, too
    fingerprints.npy                 uint64 a slice, split by split: hash of the image, 0 where it is all but empty

or data sets joined: manifest.json, which names their folders as `parts`, and rows. Records stay where they are; those
of a split follow each other part by part. By fingerprints parts are searched for twins when they are joined.

A record is a `tf.train.Example` of the fields in `Settings.fields` as raw bytes: `image` in [0,1] with background 0,
`label` (0 background, i+1 for `lesion_classes[i]`), and where the source has them `anatomy` (0 none, i+1 for
`anatomy_classes[i]`) and `healthy` (the same slice without the lesion). All records of a data set have the same length
and the same layout, so that a field is read at an offset known beforehand.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

FORMAT_VERSION = 2
MANIFEST_CONTENT = ("patients", "slices", "splits", "settings", "record", "files")  # beside digest, source, ...
SPLITS = ("train", "validation", "query", "reference")
FINGERPRINTS = "fingerprints.npy"

# A TFRecord file is `length, crc, data, crc` again and again.
RECORD_HEADER = 12
RECORD_FOOTER = 4

GLIOMA_CLASSES = ("NCR", "ED", "ET")
ANATOMY_CLASSES = (
    "left cerebrum", "right cerebrum", "left cerebellum", "right cerebellum", "left ventricle", "right ventricle",
)
MODALITIES = ("t1ce", "t1", "t2", "flair")
# What sets of images call their channels: letters and digits alone, in lower case.
CHANNEL_ALIASES = {
    "t1ce": ("t1ce", "t1c", "t1gd"),
    "t1": ("t1", "t1w", "t1n"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2flair", "t2f"),
    "CT": ("ct",),
}

# z-scores over brain voxels are clipped to this range and mapped to [0, 1].
INTENSITY_CLIP = (-3.0, 5.0)
FIELD_MM = 256.0
# What decides whether a network trained on one data set can read another's images.
PREPROCESSING = ("size", "modalities", "foreground", "intensity_clip", "field_mm", "plane")
# Settings younger than the format: files hold them where they differ from these, so that older files compare equal.
YOUNGER = {"field_mm": FIELD_MM, "plane": "axial"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images were prepared. Equal settings mean that images may be compared.

    Attributes:
        source: "brats", "volumes", "images" or "phantom".
        size: side S of the square image, in pixels.
        modalities: name of each channel.
        foreground: rule for the pixels that show the body. "nonzero": volume voxels other than 0; "window": those above
            `intensity_clip[0]`; `preparation.picture.FOREGROUND`: pictures.
        intensity_clip: what maps to 0 and 1: z-scores over the foreground, or with "window" the values as stored (HU).
        lesion_classes: names of labels 1..L.
        anatomy_classes: names of anatomy labels 1..A; empty without anatomy.
        healthy: whether records hold the lesion-free image.
        field_mm: side of the square field that a slice of a volume is cut or padded to; pictures fill it.
        plane: of the slices, "axial", "coronal" or "sagittal".
    """

    source: str
    size: int
    modalities: tuple[str, ...] = ("t1ce",)
    foreground: str = "nonzero"
    intensity_clip: tuple[float, float] = INTENSITY_CLIP
    lesion_classes: tuple[str, ...] = GLIOMA_CLASSES
    anatomy_classes: tuple[str, ...] = ()
    healthy: bool = False
    field_mm: float = FIELD_MM
    plane: str = "axial"

    @property
    def fields(self) -> dict[str, np.dtype]:
        """Type and shape of each field of a record, as a NumPy subarray type."""
        image = np.dtype(("<f2", (self.size, self.size, len(self.modalities))))
        label = np.dtype(("u1", (self.size, self.size)))
        fields = {"image": image, "label": label}
        if self.anatomy_classes:
            fields["anatomy"] = label
        if self.healthy:
            fields["healthy"] = image
        return fields

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The part that decides whether a network trained on one data set can read another's images, as `to_json`."""
        return {name: value for name, value in self.to_json().items() if name in PREPROCESSING}

    def to_json(self) -> dict[str, Any]:
        """For JSON; younger settings are left out where they have the value that older data have."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in YOUNGER or value != YOUNGER[name]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """From what `to_json` gave, of this version or an older one."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def row_dtype(id_length: int, columns: Mapping[str, Any] | None = None) -> np.dtype:
    """Type of a row, for patient ids of at most so many characters and further columns {name: type}."""
    return np.dtype([
        ("patient_id", f"U{id_length}"), ("slice_index", "i4"), ("position_mm", "f4"), ("has_abnormality", "?"),
        ("labelled", "?"), *(columns or {}).items(),
    ])


ROW_COLUMNS = row_dtype(1).names


def content_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 that names a data set: over what its manifest says of it, and so over all its files' checksums.

    Of a joined one, over the digests of its parts, wherever they lie.
    """
    content = {name: manifest.get(name) for name in MANIFEST_CONTENT}
    if "parts" in manifest:
        content["parts"] = [part["digest"] for part in manifest["parts"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
