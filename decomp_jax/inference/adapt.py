"""`evaluate.py adapt`: a trained network made ready for images of another origin, without a label of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.data.schema import SPLITS
from decomp_jax.errors import UserError
from decomp_jax.files import making
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.export import CARD, model_card
from decomp_jax.mesh import data_mesh, to_host
from decomp_jax.training.checkpoint import digest, restore_for_inference, write_exported
from decomp_jax.training.population import full_batches, population_statistics

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
        decomposer = Decomposer.restore(workdir)
        dataset = decomposer.take_images(SliceDataset(data, *splits), str(data))
        if not len(dataset):
            raise UserError(f"{data}: no slices in {', '.join(splits)}; name other splits")
        mesh = data_mesh()
        batch_size = BATCH_PER_DEVICE * mesh.size
        rows = full_batches(np.arange(len(dataset)), images, batch_size)
        batches = split_batches(dataset, ("image",), mesh, batch_size=batch_size, rows=rows)
        state, meta = restore_for_inference(workdir)
        statistics = population_statistics(
            state["params"], state["batch_stats"], (batch["image"] for batch, _ in batches), model=decomposer.model,
            drop_channel=decomposer.config.augment.drop_channel,
        )
        state["batch_stats"] = to_host(statistics)
        meta["digests"]["batch_stats"] = digest(state["batch_stats"])
        meta["adapted_to"] = {
            "data_digest": dataset.digest, "source": read_manifest(data)["source"], "splits": list(splits),
            "patients": len(np.unique(dataset.rows["patient_id"])), "slices": len(rows),
        }
        write_exported(folder, state, meta)
        (folder / CARD).write_text(model_card(Path(out).name, meta))
