"""The images of a reading room: those of the archive, and those that a reader brings, which stay in memory."""

import base64
import binascii
import collections
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16, UInt8

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decomposer, Decomposition
from decomp_jax.retrieval import CodeBank

UNLABELLED = 255
# Decompositions that are kept; images decomposed at a time, but for a few, which are decomposed one by one.
KEPT = 64
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


class Pictures:
    """The archive's images by row, and a reader's by their pixels.

    Attributes:
        at_hand: whether the archive's pixels are there; else it shows what the network paints from the codes.
    """

    def __init__(self, decomposer: Decomposer, bank: CodeBank, dataset: SliceDataset | None) -> None:
        self._decomposer, self._bank, self._dataset = decomposer, bank, dataset
        self._kept: collections.OrderedDict[Any, Decomposition] = collections.OrderedDict()
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
        """Images by what a page calls them, {"row": number} or {"pixels": base64 of float16 [S,S,C]}.

        Raises:
            UserError: a reference names no image.
        """
        return self._pictures([self._read(reference) for reference in references])

    def prepared(self, images: Float16[np.ndarray, "n s s c"]) -> list[Picture]:
        """Images that `upload` has prepared."""
        return self._pictures([self._brought(image) for image in images])

    def _pictures(self, read: list[tuple[Any, np.ndarray | None, np.ndarray, int | None]]) -> list[Picture]:
        found = self._decompose([(key, image) for key, image, *_ in read if image is not None])
        pictures = []
        for key, image, label, row in read:
            decomposition = found.get(key)
            pictures.append(Picture(image, label, decomposition, self._indices(decomposition, row), row))
        return pictures

    def _read(self, reference: dict[str, Any]) -> tuple[Any, np.ndarray | None, np.ndarray, int | None]:
        if "row" in reference:
            row = checked_row(reference["row"], len(self._bank))
            if not self.at_hand:
                return row, None, self._unlabelled, row
            images, labels = self.archived(np.array([row]))
            return row, images[0], labels[0], row
        pixels = reference.get("pixels")
        try:
            data = base64.b64decode(pixels, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise UserError("image: needs a row of the archive, or pixels in base64; choose the image again") from None
        if len(data) != 2 * int(np.prod(self.shape)):
            raise UserError(f"image: has {len(data)} bytes and not the {2 * int(np.prod(self.shape))} of an image of "
                            "this network; bring it again")
        image = np.frombuffer(data, "<f2").reshape(self.shape)
        if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
            raise UserError("image: has values outside 0 to 1; bring it again")
        return self._brought(image)

    def _brought(self, image: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, None]:
        return image.tobytes(), image, self._unlabelled, None

    def _decompose(self, images: list[tuple[Any, np.ndarray]]) -> dict[Any, Decomposition]:
        """Of each key; in batches of one or of `BATCH`, since each width is compiled for."""
        new = list({key: image for key, image in images if key not in self._kept}.items())
        while new:
            size = 1 if len(new) <= FEW else BATCH
            some, new = new[:size], new[size:]
            stacked = np.stack([image for _, image in some] + [some[-1][1]] * (size - len(some)))
            output = self._decomposer.decompose(stacked)
            for i, (key, _) in enumerate(some):
                # copied: a view would keep what was decomposed with it
                self._kept[key] = Decomposition(**{name: np.array(value[i]) for name, value in vars(output).items()})
        found = {key: self._kept[key] for key, _ in images}
        for key in found:
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _indices(self, decomposition: Decomposition | None, row: int | None) -> dict[str, np.ndarray]:
        source, at = (self._bank, row) if decomposition is None else (decomposition, ...)
        return {path: np.asarray(getattr(source, f"{path}_indices")[at], np.int32) for path in ("normal", "abnormal")}


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


