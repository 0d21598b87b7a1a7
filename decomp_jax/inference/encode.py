"""The `evaluate.py encode` command: a split's slices to a bank of codes, streamed."""

import contextlib
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.slab import default_slab_mm, with_slab_latents
from decomp_jax.mesh import data_mesh, to_host
from decomp_jax.retrieval import BankWriter, CodeBank


def encode_split(
    workdir: str | Path, data: str | Path, split: str, out: str | Path, slab_mm: float | None = None
) -> None:
    """Writes the codes of all slices of `split` to the bank directory `out`; an interrupted run leaves nothing there.

    Args:
        slab_mm: deviation of the slab that an abnormal code is of (`decomp_jax.inference.slab`), whose rule it is
            without it; 0 encodes each slice by itself.

    Raises:
        UserError: the images were prepared otherwise than the network's, or `out` exists.
    """
    decomposer = Decomposer.restore(workdir)
    dataset = decomposer.take_images(SliceDataset(data, split), str(data))
    slab_mm = default_slab_mm(decomposer.settings, decomposer.grid) if slab_mm is None else slab_mm
    writer = BankWriter(
        out,
        rows=dataset.rows,
        normal_codebook=decomposer.normal_codebook,
        abnormal_codebook=decomposer.abnormal_codebook,
        grid=(decomposer.grid, decomposer.grid),
        meta={
            "model_digest": decomposer.model_digest,
            "data_digest": dataset.digest,
            "preprocessing": dataset.settings.preprocessing,
            "slab_mm": slab_mm,
            "data": str(Path(data).absolute()),
            "split": split,
        },
    )
    writes = jax.process_index() == 0
    progress = {"total": len(dataset), "unit": "slice", "desc": f"encode {split}", "disable": not writes}
    with writer if writes else contextlib.nullcontext(), tqdm(**progress) as bar:
        batches = ((count, batch) for batch, count in split_batches(dataset, ("image",), data_mesh()))
        for count, _, latents in with_slab_latents(decomposer, batches, dataset.rows, slab_mm):
            codes = decomposer.quantize(latents.normal, latents.abnormal)
            normal, abnormal = to_host((codes.normal_indices, codes.abnormal_indices))
            if writes:
                writer.append(normal[:count], abnormal[:count])
            bar.update(count)


def restore_with_bank(workdir: str | Path, bank: str | Path) -> tuple[Decomposer, CodeBank]:
    """The network of a run, and a bank that it encoded. Raises UserError if another network did."""
    decomposer, encoded = Decomposer.restore(workdir), CodeBank.load(bank)
    if encoded.meta.get("model_digest") != decomposer.model_digest:
        raise UserError(f"{bank}: encoded by another network than {workdir}; encode it again with --workdir={workdir}")
    return decomposer, encoded


def encoded_by(bank: CodeBank, data: str | Path | None = None) -> SliceDataset:
    """The images that a bank encodes, row by row: of the folder they were encoded from, or where that is now.

    Raises UserError if they aren't there, or aren't those.
    """
    data, split = data or bank.meta.get("data", ""), bank.meta.get("split", "")
    try:
        digest = read_manifest(data)["digest"]
    except (UserError, OSError):
        raise UserError(f"{data}: the data set is not there, or not the only one in the bank") from None
    if digest != bank.meta.get("data_digest"):
        raise UserError(f"{data}: the data set has changed since the bank was encoded, or is not the only one in it")
    dataset = SliceDataset(data, split)
    names = ("patient_id", "slice_index")
    if len(dataset) != len(bank) or any(not np.array_equal(dataset.rows[name], bank.rows[name]) for name in names):
        raise UserError(f"{data}: is not the only data set or split in the bank")
    return dataset
