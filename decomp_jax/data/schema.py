"""What a prepared data set holds: the names, classes and constants that records, checkpoints and banks share.

A data set is a directory:

    manifest.json                  counts, digest, `Settings`
    slices.csv                     one line a slice, in record order within each split (`SLICE_COLUMNS` + extra columns)
    slices/1.0.0/slices-SPLIT.tfrecord-*   the records, written by TFDS

A record holds `image` float16 [S,S,C] in [0,1] with background 0, `label` uint8 [S,S] (0 background, i+1 for
`lesion_classes[i]`), and where the source has them `anatomy` uint8 [S,S] (0 none, i+1 for `anatomy_classes[i]`) and
`healthy` float16 [S,S,C] (the same slice without the lesion), beside `patient_id` and `slice_index`.
"""

import dataclasses
from typing import Any

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "query", "reference")
SLICE_COLUMNS = ("split", "patient_id", "slice_index", "position_mm", "has_abnormality", "labelled")

GLIOMA_CLASSES = ("NCR", "ED", "ET")
ANATOMY_CLASSES = (
    "left cerebrum", "right cerebrum", "left cerebellum", "right cerebellum", "left ventricle", "right ventricle",
)
MODALITIES = ("t1ce", "t1", "t2", "flair")

# z-scores over brain voxels are clipped to this range and mapped to [0, 1].
INTENSITY_CLIP = (-3.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images were prepared. Equal settings mean that images may be compared.

    Attributes:
        source: "brats", "images" or "phantom".
        size: side S of the square image, in pixels.
        modalities: name of each channel.
        foreground: rule for the pixels that the z-score is taken over ("nonzero": volume voxels other than 0).
        intensity_clip: z-scores that map to 0 and 1.
        lesion_classes: names of labels 1..L.
        anatomy_classes: names of anatomy labels 1..A; empty without anatomy.
        healthy: whether records hold the lesion-free image.
    """

    source: str
    size: int
    modalities: tuple[str, ...] = ("t1ce",)
    foreground: str = "nonzero"
    intensity_clip: tuple[float, float] = INTENSITY_CLIP
    lesion_classes: tuple[str, ...] = GLIOMA_CLASSES
    anatomy_classes: tuple[str, ...] = ()
    healthy: bool = False

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The part that decides whether a network trained on one data set can read another's images."""
        return {name: getattr(self, name) for name in ("size", "modalities", "foreground", "intensity_clip")}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
