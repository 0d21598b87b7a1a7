"""The `evaluate.py encode` command: a split's slices to a bank of codes, streamed."""

import contextlib
from pathlib import Path

import jax
from tqdm import tqdm

from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.mesh import data_mesh, to_host
from decomp_jax.retrieval import BankWriter


def encode_split(workdir: str | Path, data: str | Path, split: str, out: str | Path) -> None:
    """Writes the codes of all slices of `split` to the bank directory `out`; an interrupted run leaves nothing there.

    Raises UserError if the images were prepared otherwise than the network's, or `out` exists.
    """
    decomposer = Decomposer.restore(workdir)
    dataset = SliceDataset(data, split)
    decomposer.check_images(dataset.settings, str(data))
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
            "data": str(Path(data).absolute()),
            "split": split,
        },
    )
    writes = jax.process_index() == 0
    progress = {"total": len(dataset), "unit": "slice", "desc": f"encode {split}", "disable": not writes}
    with writer if writes else contextlib.nullcontext(), tqdm(**progress) as bar:
        for batch, count in split_batches(dataset, ("image",), data_mesh()):
            codes = decomposer.encode(batch["image"])
            normal, abnormal = to_host((codes.normal_indices, codes.abnormal_indices))
            if writes:
                writer.append(normal[:count], abnormal[:count])
            bar.update(count)
