"""What a bank is asked: flags, files and rows become images, drawings and queries."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.display import fitting
from decomp_jax.inference.sketch import region_weights, sketch_latents
from decomp_jax.inference.slab import latents_of, over_scan, slab_around
from decomp_jax.preparation.drawing import load_drawing
from decomp_jax.preparation.picture import FOREGROUND, prepare_picture
from decomp_jax.preparation.scan import Scan, open_scan
from decomp_jax.retrieval import CodeBank, Queries, by_examples, codes, latents, relative
from decomp_jax.retrieval.queries import PATHS
from decomp_jax.types import Latents

BATCH = 16  # slices of a scan decomposed at a time


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, as the flags of the same names say.

    Attributes:
        image: a volume, with `slice_index` unless all of it is asked with, and a `mask` of the brain where the skull is
            not stripped; or a picture.
        slice_index: slice of `image`, and of a sketch or a region that is a volume.
        lesion_from: another image, with `lesion_slice` and `lesion_mask`, whose lesion is looked for in place of the
            first one's.
        sketch: label map of the network's lesion classes, looked for in place of the image's lesion.
        region: mask of the part of the image that counts. Where either lies, `load_drawing` says.
        weight: share of the lesion in a search by both codes; 0.5 is their plain sum.
        like, unlike: rows of the bank.
        codes: compares codes with codes by squared L2, as the paper does; else what is asked is not quantised, and
            distances are relative.
        one_per_patient: keeps the nearest slice of each patient.
        level: "slice", or "patient": all of `image` is asked with, and patients are ranked.
        within_mm: for patients, how far apart in height matched slices may be; the bank's rule without it.
    """

    image: Path | None = None
    slice_index: int | None = None
    mask: Path | None = None
    lesion_from: Path | None = None
    lesion_slice: int | None = None
    lesion_mask: Path | None = None
    sketch: Path | None = None
    region: Path | None = None
    weight: float | None = None
    like: Sequence[int] = ()
    unlike: Sequence[int] = ()
    codes: bool = False
    by: Literal["normal", "abnormal", "both"] = "both"
    one_per_patient: bool = False
    level: Literal["slice", "patient"] = "slice"
    within_mm: float | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return PATHS if self.by == "both" else (self.by,)

    def check(self) -> None:
        """Raises UserError if the flags don't go together."""
        def require(right: object, message: str) -> None:
            if not right:
                raise UserError(message)

        require(self.lesion_from is None or self.by == "both",
                "--lesion_from: searches for the anatomy of one image with the lesion of another; use --by=both, not "
                f"--by={self.by}")
        require(self.lesion_slice is None and self.lesion_mask is None or self.lesion_from is not None,
                "--lesion_slice, --lesion_mask: are of --lesion_from; give that, too (it may be the same scan)")
        require(self.mask is None or self.image is not None, "--mask: is of --image; give that, too")
        require(self.sketch is None or self.by != "normal",
                "--sketch: is a lesion, which --by=normal leaves out; use --by=abnormal, or --by=both with --image")
        require(self.sketch is None or self.lesion_from is None,
                "--sketch, --lesion_from: both give the lesion; leave one out")
        require(self.weight is None or self.by == "both",
                f"--weight: shares out a search by both codes; use --by=both, not --by={self.by}")
        require(self.weight is None or 0 <= self.weight <= 1,
                f"--weight: is the share of the lesion, from 0 to 1, not {self.weight}")
        if self.level == "patient":
            others = ("slice_index", "lesion_from", "sketch", "like", "unlike", "one_per_patient", "weight")
            given = [name.removesuffix("_index") for name in others if getattr(self, name) != getattr(Question, name)]
            require(self.image is not None, "--level=patient: asks with a whole scan; give --image")
            require(not given, f"--level=patient: asks with all of --image; leave out --{', --'.join(given)}")
            require(self.within_mm is None or self.within_mm >= 0,
                    f"--within_mm: is a distance, 0 or more, not {self.within_mm}")
            return
        require(self.within_mm is None, "--within_mm: is of --level=patient; leave it out, or ask for patients")
        require(self.image is not None or self.sketch is not None or self.like,
                "--image: nothing to ask with; give an image, or --sketch and --by=abnormal, or --like")
        require(self.image is not None or self.lesion_from is None,
                "--lesion_from: needs an anatomy to go with; give --image, too (it may be the same scan)")
        require(self.image is not None or self.sketch is None or self.by == "abnormal",
                f"--sketch: has no anatomy to search --by={self.by} with; give --image, too, or use --by=abnormal")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a question shows.

    Attributes:
        queries: one, or one for each slice of a scan.
        images: the image, and the one whose lesion is looked for; or all slices of a scan.
        lesions: labels that the network sees in them.
        names: of the images, in two lines.
        heights: of a scan's slices in mm.
        sketch: label map that fills the field of view.
        region: mask that fills the field of view.
        painted: what the network paints of an anatomy and a lesion that come from two places.
    """

    queries: Queries
    images: Float[np.ndarray, "n s s c"] | None = None
    lesions: UInt8[np.ndarray, "n s s"] | None = None
    names: Sequence[str] = ()
    heights: Float[np.ndarray, "n"] | None = None
    sketch: Integer[np.ndarray, "t t"] | None = None
    region: Bool[np.ndarray, "t t"] | None = None
    painted: Float[np.ndarray, "s s c"] | None = None


def read_slice(question: Question, decomposer: Decomposer, bank: CodeBank) -> Asked:
    """A question about slices, its files read. Raises UserError if one can't be used."""
    sources = [(question.image, question.slice_index, question.mask),
               (question.lesion_from, question.lesion_slice, question.lesion_mask)]
    sources = [source for source in sources if source[0] is not None]
    for flag, (path, index, _) in zip(("--slice", "--lesion_slice"), sources):
        if (index is None) != (decomposer.settings.foreground == FOREGROUND):
            cure = (f"on pictures; leave the slice of {path} out" if index is not None
                    else f"on scans; name the slice of {path}, from the feet up")
            raise UserError(f"{flag}: the network was trained {cure}")
    scans = [_open(*source, decomposer) for source in sources]
    asked = scans[0] if any(scans) else question.image and Path(question.image)
    sketch, region = _read_drawings(question, decomposer, asked)
    images, lesions, points = None, None, {}
    if sources:
        images = np.stack([
            prepare_picture(Path(path), decomposer.settings) if scan is None else scan.shown(index)
            for scan, (path, index, _) in zip(scans, sources)
        ])
        of_sources = [
            decomposer.latents(image[None]) if scan is None else _of_slice(decomposer, scan, index, bank.slab_mm)
            for image, scan, (_, index, _) in zip(images, scans, sources)
        ]
        output = decomposer.explain(jax.tree.map(lambda *parts: np.concatenate(parts), *of_sources))
        lesions = output.segmentation.argmax(-1).astype(np.uint8)
        points = {"normal": output.z_e_normal[:1], "abnormal": output.z_e_abnormal[-1:]}
    if sketch is not None:
        with _naming(question.sketch):
            points["abnormal"] = sketch_latents(decomposer, sketch)[None]
    quantised = _quantised(decomposer, points)
    two_places = len(sources) > 1 or bool(sources) and sketch is not None
    return Asked(
        _queries(question, decomposer, bank, quantised if question.codes else points, region), images, lesions,
        names=[fitting(Path(path).name) + ("" if index is None else f"\nslice {index}") for path, index, _ in sources],
        sketch=sketch, region=region, painted=decomposer.paint(*quantised.values())[0] if two_places else None,
    )


def read_scan(question: Question, decomposer: Decomposer, bank: CodeBank) -> Asked:
    """A question about patients, with all slices of a scan. Raises UserError if a file can't be used."""
    scan = _open_scan(question.image, question.mask, decomposer)
    _, region = _read_drawings(question, decomposer, scan)
    slices = scan.filled_slices
    images, heights = scan.image(slices), scan.position_mm(slices)
    of_slabs = over_scan(latents_of(decomposer, images), heights, bank.slab_mm)
    batches = [
        decomposer.explain(jax.tree.map(lambda part: part[start : start + BATCH], of_slabs))
        for start in range(0, len(images), BATCH)
    ]
    lesions = np.concatenate([output.segmentation.argmax(-1).astype(np.uint8) for output in batches])
    points = {path: np.concatenate([getattr(output, f"z_e_{path}") for output in batches]) for path in PATHS}
    if question.codes:
        points = _quantised(decomposer, points)
    return Asked(_queries(question, decomposer, bank, points, region), images, lesions, region=region,
                 heights=heights, names=[f"slice {index}" for index in slices])


def _of_slice(decomposer: Decomposer, scan: Scan, index: int, slab_mm: float) -> Latents:
    """Latents [1,h,w,D] of a slice, the abnormal ones of the slab around it."""
    slices = scan.filled_slices
    near = slices[slab_around(scan.position_mm(slices), int(np.searchsorted(slices, index)), slab_mm)]
    latents = over_scan(latents_of(decomposer, scan.image(near)), scan.position_mm(near), slab_mm)
    return jax.tree.map(lambda part: part[near == index], latents)


def _queries(
    question: Question, decomposer: Decomposer, bank: CodeBank, points: Mapping[str, np.ndarray],
    region: Bool[np.ndarray, "t t"] | None,
) -> Queries:
    kind = codes if question.codes else latents
    asked = [kind(**{path: points[path] for path in question.paths})] if points else []
    like, unlike = (
        [codes(**{path: getattr(bank, f"{path}_indices")[[row]] for path in question.paths}) for row in rows]
        for rows in (question.like, question.unlike)
    )
    queries = by_examples(asked + like, unlike, weight=0.5 if question.weight is None else question.weight)
    queries = queries if question.codes else relative(queries)
    if region is None:
        return queries
    with _naming(question.region):
        return region_weights(region, decomposer.grid) * queries


def _read_drawings(question: Question, decomposer: Decomposer, asked: Scan | Path | None
                   ) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The label map of --sketch and the mask of --region, on what is asked with."""
    sketch, region = (
        None if path is None else load_drawing(Path(path), decomposer.settings, question.slice_index, asked)
        for path in (question.sketch, question.region)
    )
    return sketch, None if region is None else region > 0


def _quantised(decomposer: Decomposer, points: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of latents; of a path that isn't there, none."""
    if not points:
        return {}
    there = {path: points.get(path, np.zeros_like(next(iter(points.values())))) for path in PATHS}
    indices = decomposer.quantize(there["normal"], there["abnormal"])
    return {path: getattr(indices, f"{path}_indices") for path in PATHS if path in points}


def _open(path: Path, slice_index: int | None, mask: Path | None, decomposer: Decomposer) -> Scan | None:
    """The scan, None where it is a picture."""
    if slice_index is not None:
        return _open_scan(path, mask, decomposer)
    if mask is not None:
        raise UserError(f"{mask}: is of a volume; name the slice of {path}, too")
    return None


def _open_scan(path: Path, mask: Path | None, decomposer: Decomposer) -> Scan:
    scan = open_scan(Path(path), decomposer.settings, mask and Path(mask))
    return decomposer.take_images(scan, str(path))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts a file's name before what is said of its content."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
