"""`evaluate.py adapt`: a trained network made ready for images of another origin, without a label of them."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.data.schema import SPLITS
from decomp_jax.errors import UserError
from decomp_jax.files import making
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.export import CARD, model_card
from decomp_jax.mesh import data_mesh, to_host
from decomp_jax.training.checkpoint import digest, restore_for_inference, write_exported
from decomp_jax.training.population import population_statistics

BATCH_PER_DEVICE = 64


def adapt(workdir: str | Path, data: str | Path, out: str | Path, *, splits: Sequence[str] | None = None,
          images: int = 2_048) -> None:
    """Writes OUT, a network as `export` writes it: that of `workdir` with the batch statistics of `data`'s images.

    Nothing else changes: codebooks, and what a code means, stay. Labels are not read. Its banks are other banks, since
    the same image gets other codes. (Nado et al. 2020 and Schneider et al. 2020 adapt classifiers in this way.)

    Args:
        workdir: a run or an exported network.
        splits: of `data`, whose images are taken; all by default.
        images: about so many, drawn at random from all of them alike.

    Raises:
        UserError: the images were prepared otherwise than the network's, or there are none, or `out` exists.
    """
    splits = splits or SPLITS
    with making(out) as folder:
        decomposer, manifest = Decomposer.restore(workdir), read_manifest(data)
        datasets = [SliceDataset(data, split) for split in splits]
        decomposer.check_images(datasets[0].settings, str(data))
        batch = BATCH_PER_DEVICE * jax.device_count()
        rows = _shares([len(dataset) for dataset in datasets], images, batch)
        if not sum(map(len, rows)):
            raise UserError(f"{data}: no slices in {', '.join(splits)}; name other splits")
        state, meta = restore_for_inference(workdir)
        batches = _batches(datasets, rows, batch)
        statistics = population_statistics(state["params"], state["batch_stats"], batches, model=decomposer.model)
        state["batch_stats"] = to_host(statistics)
        meta["digests"]["batch_stats"] = digest(state["batch_stats"])
        patients = {patient for dataset in datasets for patient in dataset.rows["patient_id"].tolist()}
        meta["adapted_to"] = {
            "data_digest": manifest["digest"], "source": manifest["source"], "splits": list(splits),
            "patients": len(patients), "slices": sum(map(len, rows)),
        }
        meta["config"]["data"]["dir"] = ""  # a path of this machine
        write_exported(folder, state, meta)
        (folder / CARD).write_text(model_card(Path(out).name, meta, None))


def _shares(lengths: Sequence[int], images: int, batch: int) -> list[np.ndarray]:
    """Rows of each split at random, in proportion to its length: full batches, or all of a split that has less."""
    random, share = np.random.default_rng(0), min(images / max(sum(lengths), 1), 1.0)
    counts = [math.ceil(share * length) for length in lengths]
    return [random.permutation(n)[: max(count // batch, 1) * batch] for n, count in zip(lengths, counts)]


def _batches(
    datasets: Sequence[SliceDataset], rows: Sequence[np.ndarray], batch: int
) -> Iterator[Float[jax.Array, "b s s c"]]:
    for dataset, chosen in zip(datasets, rows):
        for images, _ in split_batches(dataset, ("image",), data_mesh(), batch_size=batch, rows=chosen):
            yield images["image"]
