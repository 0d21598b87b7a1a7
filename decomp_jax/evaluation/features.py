"""Vectors of others for the slices of a data set: what `report --features NAME=FILE.npy` reads."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.evaluation import patients, rankers
from decomp_jax.evaluation.scratch import blocks


def read_features(
    files: Iterable[tuple[str, Path]], datasets: dict[str, SliceDataset]
) -> dict[str, dict[str, Float[np.ndarray, "n f"]]]:
    """The vectors of each file, by name, for each data set.

    FILE.npy holds a vector a slice, float [N,F], the splits one after the other, each in the order of its
    rows-SPLIT.npy, slices without a label too. FILE.json beside it says what they are of:

        {"data_digest": the digest in the data set's manifest.json, "splits": ["query", "reference"]}

    Args:
        files: names and paths.
        datasets: by the names of their splits, with spaces between.

    Raises:
        UserError: naming the file that is missing, is of other data or splits, has another number of rows, or holds
            anything but finite numbers.
    """
    found: dict[str, dict[str, np.ndarray]] = {splits: {} for splits in datasets}
    for name, path in files:
        if name in found[next(iter(found))] or name in rankers.METHODS or name in patients.METHODS:
            raise UserError(f"--features: {name} is the name of another method; name them apart")
        vectors = _load(path, sum(map(len, datasets.values())))
        _check_source(path, datasets)
        start = 0
        for splits, dataset in datasets.items():
            found[splits][name] = vectors[start : start + len(dataset)]
            start += len(dataset)
    return found


def _check_source(path: Path, datasets: dict[str, SliceDataset]) -> None:
    source = path.with_suffix(".json")
    try:
        meta = json.loads(source.read_text())
        digest, splits = meta["data_digest"], meta["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{source}: can\'t be read ({error!r}); write {{"data_digest": ..., "splits": [...]}} of what '
                        f"{path.name} was made of") from None
    wanted = " ".join(datasets).split()
    if digest != next(iter(datasets.values())).digest:
        raise UserError(f"{source}: data_digest is not that of the data set; make the features of its slices")
    if splits != wanted:
        raise UserError(f"{source}: splits are {splits}, this report takes {wanted}; make the features of these, in "
                        "this order")


def _load(path: Path, slices: int) -> Float[np.ndarray, "n f"]:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: no .npy file that can be read ({error}); write it with numpy.save") from None
    if vectors.ndim != 2 or len(vectors) != slices or not vectors.shape[1] or vectors.dtype.kind != "f":
        raise UserError(f"{path}: is {vectors.dtype} {list(vectors.shape)}; needs a vector a slice, float [{slices},F]")
    for block in blocks(slices):
        if not np.isfinite(vectors[block]).all():
            raise UserError(f"{path}: rows {block.start} to {block.stop - 1} hold NaN or infinity; leave none in")
    return vectors.view(np.ndarray)
