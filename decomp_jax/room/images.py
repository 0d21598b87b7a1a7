"""The images of a reading room: those of the archive, and those that a reader brings, which stay in memory."""

import base64
import binascii
import collections
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float16, Integer, UInt8

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decomposer, Decomposition
from decomp_jax.inference.slab import latents_of, over_scan, slab_around
from decomp_jax.retrieval import CodeBank
from decomp_jax.room.archive import Archive
from decomp_jax.room.upload import Slices
from decomp_jax.types import Latents

UNLABELLED = 255
# Decompositions that are kept; images decomposed at a time, but for a few, which are decomposed one by one.
KEPT = 64
KEPT_LATENTS = 1024  # of single slices, some 16 KB each
MOST_LATENT = 1e6
BATCH = 16
FEW = 4


class Picture(NamedTuple):
    """An image that is asked with.

    Attributes:
        image: float [S,S,C]; None where only its codes are at hand.
        decomposition: what the network says of it, without the first axis; None where only its codes are at hand.
        indices: integers [h,w] of each path.
        row: its row of the bank, None for an image that was brought.
    """

    image: np.ndarray | None
    label: np.ndarray
    decomposition: Decomposition | None
    indices: dict[str, np.ndarray]
    row: int | None


class Read(NamedTuple):
    """An image that is to be decomposed: of the bank's row, or brought, with abnormal latents of its slab if known."""

    key: Any
    image: np.ndarray | None
    label: np.ndarray
    row: int | None
    slab: np.ndarray | None


class Pictures:
    """The archive's images by row, and a reader's by their pixels.

    Attributes:
        at_hand: whether the archive's pixels are there; else it shows what the network paints from the codes.
    """

    def __init__(
        self, decomposer: Decomposer, bank: CodeBank, dataset: SliceDataset | None, archive: Archive
    ) -> None:
        self._decomposer, self._bank, self._dataset, self._archive = decomposer, bank, dataset, archive
        self._kept: collections.OrderedDict[Any, Decomposition] = collections.OrderedDict()
        self._latents: collections.OrderedDict[Hashable, Latents] = collections.OrderedDict()
        self._unlabelled = np.full(self.shape[:2], UNLABELLED, np.uint8)
        self.at_hand = dataset is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        settings = self._decomposer.settings
        return settings.size, settings.size, len(settings.modalities)

    def archived(self, rows: np.ndarray) -> tuple[Float16[np.ndarray, "n s s c"], UInt8[np.ndarray, "n s s"]]:
        """Images and labels of rows of the bank; `UNLABELLED` where a slice has no label."""
        if self._dataset is None:
            # A few widths alone: each is compiled for.
            padded = np.pad(rows, (0, -len(rows) % BATCH), mode="edge")
            images = [
                self._decomposer.paint(*(
                    np.array(indices[padded[i:i + BATCH]], np.int32)
                    for indices in (self._bank.normal_indices, self._bank.abnormal_indices)
                )) for i in range(0, len(padded), BATCH)
            ]
            images = np.concatenate(images)[:len(rows)].astype(np.float16)
            return images, np.full(images.shape[:3], UNLABELLED, np.uint8)
        fields = self._dataset.stack(("image", "label"), rows)
        fields["label"][~self._dataset.rows["labelled"][rows]] = UNLABELLED
        return fields["image"], fields["label"]

    def pictures(self, references: list[dict[str, Any]]) -> list[Picture]:
        """Images by what a page calls them: {"row": number}, or {"pixels": base64 of float16 [S,S,C]} and, of a slice
        of a scan, {"slab": base64 of float32 [h,w,D]}, its abnormal latents.

        Raises:
            UserError: a reference names no image.
        """
        read = [self._read(reference) for reference in references]
        found = self._decompose([one for one in read if one.image is not None])
        pictures = []
        for key, image, label, row, _ in read:
            decomposition = found.get(key)
            pictures.append(Picture(image, label, decomposition, self._indices(decomposition, row), row))
        return pictures

    def scan(self, name: str, scan: Slices) -> list[Picture]:
        """All slices of a scan that was brought by this name."""
        everything = np.arange(len(scan.images))
        return [
            Picture(image, self._unlabelled, decomposition, self._indices(decomposition, None), None)
            for image, decomposition in zip(scan.images, self._explain(self.of_scan(name, scan, everything)))
        ]

    def of_scan(self, name: str, scan: Slices, chosen: Integer[np.ndarray, "k"]) -> Latents:
        """Latents of slices of a scan that was brought, the abnormal ones of slabs as the bank's are."""
        return self._of_slabs(lambda near: [(name, i) for i in near], scan.images.__getitem__, scan.heights, chosen)

    def _of_slabs(
        self, name: Callable[[np.ndarray], list[Hashable]], images: Callable[[np.ndarray], np.ndarray],
        heights: Float[np.ndarray, "n"], chosen: Integer[np.ndarray, "k"],
    ) -> Latents:
        """Latents of the chosen slices of a scan, whose slices `name` names and `images` reads by their positions.

        Neighbours of one slice are neighbours of others, so that latents of single slices are kept.
        """
        near = np.unique(np.concatenate([slab_around(heights, at, self._bank.slab_mm) for at in chosen]))
        names = name(near)
        new = [i for i, key in enumerate(names) if key not in self._latents]
        if new:
            found = latents_of(self._decomposer, images(near[new]))
            self._latents |= {names[i]: jax.tree.map(lambda part: np.array(part[j]), found) for j, i in enumerate(new)}
        latents = jax.tree.map(lambda *those: np.stack(those), *(self._latents[key] for key in names))
        _forget(self._latents, names, KEPT_LATENTS)
        found = over_scan(latents, heights[near], self._bank.slab_mm)
        return jax.tree.map(lambda part: part[np.searchsorted(near, chosen)], found)

    def _read(self, reference: dict[str, Any]) -> Read:
        if "row" in reference:
            row = checked_row(reference["row"], len(self._bank))
            if not self.at_hand:
                return Read(row, None, self._unlabelled, row, None)
            images, labels = self.archived(np.array([row]))
            return Read(row, images[0], labels[0], row, None)
        image = _floats(reference.get("pixels"), "<f2", self.shape)
        if image.min() < 0 or image.max() > 1:
            raise UserError("image: has values outside 0 to 1; bring it again")
        slab = None
        if "slab" in reference:
            grid, codebook = self._bank.grid, self._decomposer.abnormal_codebook
            slab = _floats(reference["slab"], "<f4", (*grid, codebook.shape[1]))
            if np.abs(slab).max() > MOST_LATENT:
                raise UserError("image: has values that no network gives; bring it again")
        return Read(image.tobytes() + (b"" if slab is None else slab.tobytes()), image, self._unlabelled, None, slab)

    def _decompose(self, read: list[Read]) -> dict[Any, Decomposition]:
        """Of each key."""
        new = {one.key: one for one in read if one.key not in self._kept}
        latents = self._of_rows({one.row for one in new.values() if one.row is not None})
        latents |= {key: self._of_image(one) for key, one in new.items() if one.row is None}
        if latents:
            stacked = jax.tree.map(lambda *those: np.concatenate(those), *latents.values())
            self._kept |= zip(latents, self._explain(stacked))
        found = {one.key: self._kept[one.key] for one in read}
        _forget(self._kept, found, KEPT)
        return found

    def _of_rows(self, rows: set[int]) -> dict[int, Latents]:
        """Latents [1,h,w,D] of rows of the bank, patient by patient."""
        latents, left = {}, set(rows)
        heights = self._bank.heights if self._bank.has_mm else np.full(len(self._bank), np.nan)
        while left:
            of_patient = self._archive.slices_of(next(iter(left)))
            chosen = np.flatnonzero(np.isin(of_patient, [*left]))
            found = self._of_slabs(
                lambda near: of_patient[near].tolist(), lambda near: self.archived(of_patient[near])[0],
                heights[of_patient], chosen,
            )
            for i, row in enumerate(of_patient[chosen].tolist()):
                latents[row] = jax.tree.map(lambda part: part[i : i + 1], found)
            left -= latents.keys()
        return latents

    def _of_image(self, one: Read) -> Latents:
        latents = self._decomposer.latents(one.image[None])
        return latents if one.slab is None else Latents(latents.normal, one.slab[None])

    def _explain(self, latents: Latents) -> list[Decomposition]:
        """In batches of one or of `BATCH`, since each width is compiled for."""
        size = 1 if len(latents.normal) <= FEW else BATCH
        explained = []
        for start in range(0, len(latents.normal), size):
            some = jax.tree.map(lambda part: part[start : start + size], latents)
            count = len(some.normal)
            padded = jax.tree.map(lambda part: np.pad(part, [(0, size - count)] + [(0, 0)] * 3), some)
            output = vars(self._decomposer.explain(padded))
            # Copied: a view would keep what was explained with it.
            explained += [
                Decomposition(**{name: np.array(value[i]) for name, value in output.items()}) for i in range(count)
            ]
        return explained

    def _indices(self, decomposition: Decomposition | None, row: int | None) -> dict[str, np.ndarray]:
        source, at = (self._bank, row) if decomposition is None else (decomposition, ...)
        return {path: np.asarray(getattr(source, f"{path}_indices")[at], np.int32) for path in ("normal", "abnormal")}


def _forget(kept: collections.OrderedDict[Any, Any], used: Iterable[Any], most: int) -> None:
    """Leaves those used last."""
    for key in used:
        kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def _floats(text: Any, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Raises UserError unless `text` is the base64 of finite numbers of that shape."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise UserError("image: needs a row of the archive, or pixels in base64; choose the image again") from None
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if len(data) != size:
        raise UserError(f"image: has {len(data)} bytes and not the {size} of an image of this network; bring it again")
    values = np.frombuffer(data, kind).reshape(shape)
    if not np.isfinite(values).all():
        raise UserError("image: has values that are no numbers; bring it again")
    return values


def checked_row(row: Any, size: int) -> int:
    """Raises UserError unless `row` is the number of one of `size` rows."""
    if type(row) is not int or not 0 <= row < size:
        raise UserError(f"row: must be a whole number from 0 to {size - 1}; choose the slice again")
    return row


def drawn(runs: Any, size: int, most: int) -> UInt8[np.ndarray, "s s"]:
    """A drawing from its run lengths, [value, count, value, count, ...] row by row, values 0 to `most`.

    Raises:
        UserError: they are no drawing of that size.
    """
    whole = isinstance(runs, list) and len(runs) % 2 == 0 and len(runs) <= 2 * size * size
    if not whole or not all(type(number) is int and 0 <= number <= size * size for number in runs):
        raise UserError("drawing: needs run lengths, value and count by turns; draw it again")
    values, counts = runs[::2], runs[1::2]
    if sum(counts) != size * size or max(values) > most:
        raise UserError(f"drawing: must have {size} x {size} pixels of values 0 to {most}; draw it again")
    return np.repeat(np.array(values, np.uint8), counts).reshape(size, size)


