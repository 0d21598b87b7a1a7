"""Breaks the method in one place at a time and asks whether the tests notice.

    python benchmarks/mutations.py [--only NAME ...] [--jobs 1] [--write docs/tests.md]

Each mutation replaces one piece of a source file by a wrong one, in a copy of the tracked files, and runs the tests that
stand beside it here. A mutation that no test fails on survives; the program lists the survivors and exits with 1.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import write_measured

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """`old` becomes `new` in `file`; `tests` are the arguments of pytest."""

    file: str
    old: str
    new: str
    tests: str


OBJECTIVE, TERMS, CELLS = "tests/losses/test_objective.py", "tests/losses/test_terms.py", "tests/losses/test_cells.py"
PEER, STEP = "tests/training/test_peer.py", "tests/training/test_step.py"
PIPELINE, VALIDATION, RUN = "tests/data/test_pipeline.py", "tests/training/test_validation.py", "tests/training/test_run.py"
SEARCH, STATISTICS = "tests/retrieval/test_search.py", "tests/retrieval/test_statistics.py"
DECOMPOSER, RELATIVE = "tests/inference/test_decomposer.py", "tests/retrieval/test_relative.py"
VQ, NETWORK, AUGMENT = "tests/models/test_vq.py", "tests/models/test_network.py", "tests/data/test_augment.py"

VOLUMES = "tests/data_prep/test_volumes.py"
SLAB = "tests/inference/test_slab.py"
UPLOAD, ROOM = "tests/room/test_upload.py", "tests/room/test_session.py"
MUTATIONS = {
    # The objective.
    "squares of codes averaged over D": Mutation(
        "decomp_jax/losses/latent.py", "return jnp.sum((z_e - z_q) ** 2, -1)", "return jnp.mean((z_e - z_q) ** 2, -1)", TERMS
    ),
    "commitment moves codes, too": Mutation(
        "decomp_jax/losses/latent.py", "cell_distance(z_e, jax.lax.stop_gradient(z_q))).mean",
        "cell_distance(z_e, z_q)).mean", TERMS,
    ),
    "nothing is asked of lesion cells": Mutation(
        "decomp_jax/losses/latent.py", "((lesion_fraction == 0) *", "((lesion_fraction > 0) *", TERMS
    ),
    "layout of shares, not their roots": Mutation(
        "decomp_jax/losses/latent.py", "return scale * jnp.sqrt(jnp.pad(shares", "return scale * (jnp.pad(shares", TERMS
    ),
    "layout weighs class for place": Mutation(
        "decomp_jax/losses/latent.py", "[whole * fraction, (1 - whole) * class_fractions]",
        "[(1 - whole) * fraction, whole * class_fractions]", TERMS,
    ),
    "equation 3 without its hinge": Mutation(
        "decomp_jax/losses/latent.py", "jnp.maximum(margin - distance, 0.0)", "(margin - distance)", TERMS
    ),
    "equation 3 for images with a lesion": Mutation(
        "decomp_jax/losses/terms.py", "is_normal = 1 - (c.targets.label > 0)", "is_normal = (c.targets.label > 0)", OBJECTIVE
    ),
    "equation 4 weighs by 1 / n": Mutation(
        "decomp_jax/losses/segmentation.py", "jnp.maximum(n, 1.0)) ** 2, 0.0)", "jnp.maximum(n, 1.0)), 0.0)", TERMS
    ),
    "Dice counts the background": Mutation(
        "decomp_jax/losses/segmentation.py", "(probs * onehot)[..., 1:]", "(probs * onehot)[..., :-1]", TERMS
    ),
    "cross-entropy without the background": Mutation(
        "decomp_jax/losses/segmentation.py", "-jnp.sum(onehot * jax.nn.log_softmax(logits), -1)",
        "-jnp.sum((onehot * jax.nn.log_softmax(logits))[..., 1:], -1)", TERMS,
    ),
    "x_plus counts the lesion once": Mutation(
        "decomp_jax/losses/image.py", "for mask in (everywhere, abnormal_mask)", "for mask in (everywhere,)", TERMS
    ),
    "x_minus is held to the pasted image": Mutation(
        "decomp_jax/losses/terms.py", "image.reconstruction_minus(c.outputs.x_minus, c.targets.background,",
        "image.reconstruction_minus(c.outputs.x_minus, c.targets.image,", OBJECTIVE,
    ),
    "x_minus is not asked for what lies under the pasted lesion": Mutation(
        "decomp_jax/losses/terms.py", "(self.targets.background_label == 0)", "(self.targets.label == 0)", OBJECTIVE
    ),
    "structure of the pasted image": Mutation(
        "decomp_jax/losses/terms.py", "z_e, background = c.outputs.latents.normal, c.targets.background",
        "z_e, background = c.outputs.latents.normal, c.targets.image", OBJECTIVE,
    ),
    "structure sees lesions around them": Mutation(
        "decomp_jax/losses/terms.py", "local_contrast(background, c.background_mask, window", "local_contrast(background, window",
        PEER,
    ),
    "structure under pasted lesions counts once": Mutation(
        "decomp_jax/losses/terms.py", "settings.pasted, 1.0)", "1.0, 1.0)", OBJECTIVE
    ),
    "paintings agree inside the lesion": Mutation(
        "decomp_jax/losses/terms.py", "c.outputs.x_plus, 1 - c.abnormal_mask, settings", "c.outputs.x_plus, c.abnormal_mask, settings",
        OBJECTIVE,
    ),
    "lesion cells are most of the cell": Mutation(
        "decomp_jax/config.py", "lesion_cell: float = 0.04", "lesion_cell: float = 0.9", OBJECTIVE
    ),
    "lesion cells are not asked for": Mutation(
        "decomp_jax/losses/terms.py", "cells = lesion_cells(self.lesion_fraction, self.lesion_cell",
        "cells = lesion_cells(self.lesion_fraction, 0.0", PEER,
    ),
    "filling images count": Mutation(
        "decomp_jax/losses/objective.py", "valid @ value / valid.sum()", "value.mean()", OBJECTIVE
    ),
    "a weight is lost": Mutation(
        "decomp_jax/losses/objective.py", "sum(settings.weight * means[name]", "sum(means[name]", OBJECTIVE
    ),
    "SSIM of another window": Mutation(
        "decomp_jax/losses/ssim.py", "WINDOW, SIGMA = 11, 1.5", "WINDOW, SIGMA = 11, 2.0", "tests/losses/test_ssim.py"
    ),
    # The network.
    "SPADE scales by gamma": Mutation("decomp_jax/models/spade.py", "normalised * (1 + gamma)", "normalised * gamma", PEER),
    "no skip connection": Mutation(
        "decomp_jax/models/blocks.py", "return h + (average_pool(x, self.fold) if self.pool else x)", "return h", PEER
    ),
    "losing logits reach SPADE": Mutation(
        "decomp_jax/models/spade.py", "return (logits * winner)[..., 1:]", "return logits[..., 1:]", NETWORK
    ),
    "no straight-through gradient": Mutation(
        "decomp_jax/models/vq.py", "return z_e + jax.lax.stop_gradient(z_q - z_e)", "return z_q + 0 * z_e", VQ
    ),
    "the farthest code": Mutation(
        "decomp_jax/models/vq.py", "distance == distance.min(-1, keepdims=True)", "distance == distance.max(-1, keepdims=True)", VQ
    ),
    "a finding where there is none": Mutation(
        "decomp_jax/models/vq.py", "return jnp.sum(z_e**2, -1) > threshold", "return jnp.sum(z_e**2, -1) <= threshold", VQ
    ),
    "codes are never switched on": Mutation(
        "decomp_jax/models/network.py", "latents.normal + quantised * (codes.z_st_normal - latents.normal)",
        "latents.normal + 0 * (codes.z_st_normal - latents.normal)", f"{NETWORK} {PEER}",
    ),
    "the moving average forgets in the wrong direction": Mutation(
        "decomp_jax/models/vq.py", "total=decay * stats.total + (1 - decay) * total", "total=(1 - decay) * stats.total + decay * total",
        VQ,
    ),
    "living codes are revived": Mutation("decomp_jax/models/vq.py", "(stats.count < below)", "(stats.count >= below)", VQ),
    "\"nothing\" moves": Mutation(
        "decomp_jax/models/vq.py", "& ~(nothing & (jnp.arange(len(codebook)) == 0))", "", STEP
    ),
    "pooling adds up": Mutation(
        "decomp_jax/models/convolution.py", "pooling = sum(shifted) / 4", "pooling = sum(shifted)",
        "tests/models/test_convolution.py",
    ),
    "a folded row reads its neighbour": Mutation(
        "decomp_jax/models/convolution.py", "reads * offset + p - stride * q + centre\n    wide",
        "reads * offset + p - stride * q + centre + 1\n    wide", "tests/models/test_convolution.py"
    ),
    "statistics of a folded row's first pixels": Mutation(
        "decomp_jax/models/blocks.py", "reshape(self.fold, -1).mean(0)", "reshape(self.fold, -1)[0]", NETWORK
    ),
    # The step.
    "one augmentation for ever": Mutation(
        "decomp_jax/training/step.py", "jax.random.fold_in(jax.random.key(config.train.seed), state.step)",
        "jax.random.fold_in(jax.random.key(config.train.seed), 0)", STEP,
    ),
    "quantisation never switched on": Mutation(
        "decomp_jax/training/step.py", "jnp.clip((step - warmup) / warmup, 0.0, 1.0) if warmup else jnp.ones(())",
        "jnp.zeros(())", STEP,
    ),
    "the abnormal codebook learns from all cells": Mutation(
        "decomp_jax/training/step.py", "outputs.codes.lesion_indices, cells)", "outputs.codes.lesion_indices, jnp.ones_like(cells))",
        STEP,
    ),
    "revival never ends": Mutation(
        "decomp_jax/training/step.py", "reviving = step < config", "reviving = step >= 0 * config", STEP
    ),
    "the rate does not fall": Mutation(
        "decomp_jax/training/state.py", "last = config.final_rate * config.learning_rate", "last = config.learning_rate", STEP
    ),
    "pasted lesions keep the brightness of their image": Mutation(
        "decomp_jax/data/augment.py", "gain = mean / jnp.maximum(donor_mean, 1e-3)", "gain = 1.0", AUGMENT
    ),
    "no gamma": Mutation(
        "decomp_jax/data/augment.py", "jnp.clip(image, 1e-6, 1.0) ** gamma, 0.0)", "jnp.clip(image, 1e-6, 1.0), 0.0)", AUGMENT
    ),
    "targets take the gamma, too": Mutation(
        "decomp_jax/data/augment.py", "    return image, targets", "    return image, Targets(image, targets.label, targets.background, targets.background_label)", AUGMENT
    ),
    "labels are not flipped": Mutation(
        "decomp_jax/data/augment.py", "batch = {name: jax.vmap(_mirror)(value, flip) for name, value in batch.items()}",
        "batch = batch | {\"image\": jax.vmap(_mirror)(batch[\"image\"], flip)}", AUGMENT,
    ),
    "labels are turned the other way": Mutation(
        "decomp_jax/data/augment.py", "rows = _resample_lines(values,",
        "sin = sin if jnp.issubdtype(values.dtype, jnp.floating) else -sin\n    rows = _resample_lines(values,", AUGMENT,
    ),
    # Data.
    "every epoch has one order": Mutation(
        "decomp_jax/data/pipeline.py", "        .repeat()", "        .repeat(reseed_each_epoch=False)", PIPELINE
    ),
    "unlabelled slices are trained on as healthy": Mutation(
        "decomp_jax/data/pipeline.py", "labelled = np.flatnonzero(dataset.rows[\"labelled\"])", "labelled = np.arange(len(dataset))",
        PIPELINE,
    ),
    "rows that fill up a batch are valid": Mutation(
        "decomp_jax/data/pipeline.py", "np.arange(len(padded)) < len(rows)}", "np.arange(len(padded)) >= 0}", PIPELINE
    ),
    "damaged records are taken": Mutation(
        "decomp_jax/data/records.py", "if ((crc >> 15 | crc << 17)", "if 0 and ((crc >> 15 | crc << 17)", "tests/data/test_records.py"
    ),
    # Runs.
    "validation finds the query itself": Mutation(
        "decomp_jax/training/validation.py", "exclude=self._rows[\"patient_id\"][queries])", "exclude=self._rows[\"patient_id\"][queries[::-1]])",
        VALIDATION,
    ),
    "validation counts rows that fill up a batch": Mutation(
        "decomp_jax/training/validation.py", "        valid=valid,\n", "", VALIDATION
    ),
    "no population statistics": Mutation(
        "decomp_jax/training/loop.py", "            state = _settled(run, state)\n", "", f"{RUN} -k population"
    ),
    "digests of checkpoints are not compared": Mutation(
        "decomp_jax/training/checkpoint.py", "        if digest(state[name]) != expected:", "        if False:", f"{RUN} -k damage"
    ),
    "processes of a pod are not joined": Mutation(
        "decomp_jax/processes.py", "elif flags.distributed == \"auto\" and not _only_task_of_slurm():", "elif False:",
        "tests/test_processes.py",
    ),
    "settings of processes are not compared": Mutation(
        "decomp_jax/training/loop.py", "        **_settings(run.meta), \"the content of --config.data.dir\": run.dataset.digest,",
        "", "tests/training/test_two_processes.py",
    ),
    # The network in use.
    "abnormality of the least abnormal cell": Mutation(
        "decomp_jax/inference/decomposer.py", "abnormality = jnp.sum(abnormal**2, -1).max((1, 2))",
        "abnormality = jnp.sum(abnormal**2, -1).min((1, 2))",
        DECOMPOSER,
    ),
    "codes of the paths are exchanged": Mutation(
        "decomp_jax/inference/decomposer.py", "normal = lookup(normal_indices, jnp.asarray(self.normal_codebook))",
        "normal = lookup(abnormal_indices, jnp.asarray(self.normal_codebook))", DECOMPOSER,
    ),
    "images prepared otherwise are taken": Mutation(
        "decomp_jax/inference/decomposer.py", "            if other != value:", "            if False:", DECOMPOSER
    ),
    # Retrieval.
    "every answer is certain": Mutation(
        "decomp_jax/retrieval/distance.py", "return Nearest(distance, code, certain[:, None])",
        "return Nearest(distance, code, jnp.ones_like(certain)[:, None])", SEARCH,
    ),
    "bounds above what they bound": Mutation(
        "decomp_jax/retrieval/distance.py", "jnp.clip((table >> shift) + middle * signed, 0, top)",
        "jnp.clip((table >> shift) + 1 + middle * signed, 0, top)", SEARCH,
    ),
    "ties go to the higher row": Mutation(
        "decomp_jax/retrieval/search.py", "np.lexsort((candidates.row, candidates.distance, candidates.query))",
        "np.lexsort((-candidates.row, candidates.distance, candidates.query))", SEARCH,
    ),
    "excluded patients are found": Mutation(
        "decomp_jax/retrieval/search.py", "allowed = (candidates.patient[:, None] != excluded[candidates.query]).all(1)",
        "allowed = (candidates.patient[:, None] != excluded[candidates.query]).any(1)", SEARCH,
    ),
    "several hits a patient": Mutation(
        "decomp_jax/retrieval/search.py", "    if one_per_patient:\n        pair =", "    if False:\n        pair =", SEARCH
    ),
    "relative distances after a single search": Mutation(
        "decomp_jax/retrieval/relative.py", "certain = every | (", "certain = every | first | (", RELATIVE
    ),
    "counter-examples shorten what distances are relative to": Mutation(
        "decomp_jax/retrieval/queries.py", "queries.share[:, None, None] * np.abs(weights)",
        "queries.share[:, None, None] * weights", RELATIVE,
    ),
    "all blocks of queries have the thresholds of the first": Mutation(
        "decomp_jax/retrieval/queries.py", "None if self.share is None else self.share[rows]",
        "None if self.share is None else self.share[:len(self.share[rows])]", RELATIVE,
    ),
    "an image of nothing asks with what is left of its vectors": Mutation(
        "decomp_jax/inference/decomposer.py", "[:, None, None, None], 0, abnormal)",
        "[:, None, None, None], abnormal, abnormal)", DECOMPOSER,
    ),
    # Judging.
    "the ideal ranking is divided by the hits'": Mutation(
        "decomp_jax/retrieval/relevance.py", "def ndcg(gains: Float[np.ndarray, \"q n\"], ideal", "def ndcg(ideal: Float[np.ndarray, \"q n\"], gains",
        "tests/retrieval/test_relevance.py",
    ),
    "means over slices, not patients": Mutation(
        "decomp_jax/retrieval/statistics.py", "        return ratio(sums, sizes)\n", "        return sums\n", STATISTICS
    ),
    "an interval of four patients": Mutation(
        "decomp_jax/retrieval/statistics.py", "enough = defined.sum(0) >= LEAST_PATIENTS", "enough = defined.sum(0) >= 1", STATISTICS
    ),
    "the query's own patient is searched": Mutation(
        "decomp_jax/evaluation/rankers.py", "search.query.rows[\"patient_id\"][block.queries]\n", "None\n",
        "tests/evaluation/test_scores.py",
    ),
    # From files to images.
    "left and right are exchanged": Mutation(
        "decomp_jax/preparation/field.py", "np.flip(array, (rows, columns))", "np.flip(array, rows)",
        "tests/data_prep/test_nifti.py",
    ),
    "the field is off by a pixel": Mutation(
        "decomp_jax/preparation/field.py", "return (margin + np.arange(n + 1)) * spacing", "return (margin + 1 + np.arange(n + 1)) * spacing",
        "tests/data_prep/test_nifti.py",
    ),
    "intensities are not clipped": Mutation(
        "decomp_jax/preparation/intensity.py", "(np.clip((values - values.mean()) / values.std(), low, high) - low)",
        "((values - values.mean()) / values.std() - low)", "tests/data_prep/test_nifti.py",
    ),
    "labels of 2023 are read as those of 2021": Mutation(
        "decomp_jax/preparation/releases.py", "{0: 0, 1: 1, 2: 2, 3: 3}", "{0: 0, 1: 1, 2: 2, 4: 3}",
        "tests/data_prep/test_releases.py",
    ),
    "channels go by their numbers": Mutation(
        "data_prep/volumes.py", "{name: case.images[number] for name, number in numbers.items()",
        "{name: case.images[number] for number, name in enumerate(sorted(numbers))", VOLUMES,
    ),
    "a voxel's class is the largest region": Mutation(
        "data_prep/names.py", "key=lambda region: len(region[1])", "key=lambda region: -len(region[1])", VOLUMES
    ),
    "ignored slices are trained on": Mutation("data_prep/cases.py", "label[~labelled] = 0", "labelled[:] = True", VOLUMES),
    "a window's lower end is 0": Mutation(
        "decomp_jax/preparation/intensity.py", "foreground = data > low", "low, foreground = 0, data > low", VOLUMES
    ),
    "overlapping segments in the order of their numbers": Mutation(
        "decomp_jax/preparation/dicom.py", "np.argsort(-segments.sum((0, 1, 2)), kind=\"stable\")", "range(segments.shape[3])",
        "tests/data_prep/test_series.py",
    ),
    "scans of a DICOM patient are split apart": Mutation(
        "data_prep/series.py", "if any(persons) else case_id", "if not any(persons) else case_id", "tests/data_prep/test_series.py"
    ),
    "a growing set splits by who is there": Mutation(
        "data_prep/splits.py", "    if growing:\n", "    if growing and len(ordered) < len(shares):\n", "tests/data_prep/test_splits.py"
    ),
    "parts are read by name, not in order": Mutation(
        "decomp_jax/data/records.py", "for part in manifest.get(\"parts\", []):",
        "for part in sorted(manifest.get(\"parts\", []), key=lambda part: part[\"digest\"]):", "tests/data_prep/test_join.py"
    ),
    # The reading room.
    "deflated DICOM is unpacked": Mutation("decomp_jax/preparation/dicom.py", "if _DEFLATED in data:", "if not data:", UPLOAD),
    "compressed DICOM is decoded": Mutation(
        "decomp_jax/preparation/dicom.py", "TransferSyntaxUID.is_compressed:", "TransferSyntaxUID.is_private:", UPLOAD
    ),
    "the log tells of patients": Mutation(
        "decomp_jax/preparation/dicom.py", "log.setLevel(logging.CRITICAL)", "log.setLevel(logging.DEBUG)", UPLOAD
    ),
    "voxels are bounded by modality": Mutation("decomp_jax/room/upload.py", "voxels = sum((", "voxels = max((", UPLOAD),
    "scans of one height are one scan": Mutation(
        "decomp_jax/room/upload.py", "for part in slices)).hexdigest()", "for part in slices[1:])).hexdigest()", UPLOAD
    ),
    "every modality is shown as the first": Mutation(
        "decomp_jax/room/session.py", "np.moveaxis(image, -1, -3)", "np.moveaxis(image[..., 0 * np.arange(image.shape[-1])], -1, -3)",
        ROOM,
    ),
    "a scan's slices are matched by number": Mutation(
        "decomp_jax/room/session.py", "heights, pictures = scan.heights,", "heights, pictures = 1.0 * np.arange(len(scan.heights)),",
        ROOM,
    ),
    "patients find themselves": Mutation(
        "decomp_jax/room/session.py", "if question.other_patients and patients", "if not question.other_patients and patients", ROOM
    ),
    # Slabs.
    "slabs reach into other patients": Mutation(
        "decomp_jax/inference/slab.py", "near = (patients[step:] == patients[:-step]) & (apart <= REACH)",
        "near = apart <= REACH", SLAB,
    ),
    "slabs are not normalised": Mutation(
        "decomp_jax/inference/slab.py", "return (weights / weights.sum(1, keepdims=True)).astype(np.float32)",
        "return weights.astype(np.float32)", SLAB,
    ),
    "slabs of normal codes, too": Mutation(
        "decomp_jax/inference/slab.py", "    return Latents(latents.normal, over_slab(around, weights))",
        "    return Latents(*(over_slab(np.pad(part, [(reach, reach)] + [(0, 0)] * 3), weights)"
        " for part in (latents.normal, latents.abnormal)))", SLAB,
    ),
    "slabs end with their batch": Mutation(
        "decomp_jax/inference/slab.py", "for other in (before, own, after)]", "for other in (None, own, None)]", SLAB,
    ),
    "a slice of a scan is asked with by itself": Mutation(
        "decomp_jax/inference/asking.py", "latents = over_scan(latents_of(decomposer, scan.image(near)), scan.position_mm(near), slab_mm)",
        "latents = over_scan(latents_of(decomposer, scan.image(near)), scan.position_mm(near), 0.0)", "tests/inference/test_asking.py",
    ),
    "the room asks with slices by themselves": Mutation(
        "decomp_jax/room/images.py", "found = over_scan(latents, heights[near], self._bank.slab_mm)",
        "found = over_scan(latents, heights[near], 0.0)", ROOM,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MUTATIONS, default=list(MUTATIONS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="document whose measured part takes the list")
    flags = parser.parse_args()
    with ThreadPoolExecutor(flags.jobs) as pool:
        caught = dict(zip(flags.only, pool.map(is_caught, flags.only)))
    lines = list(_table(caught))
    print("\n".join(lines))
    if flags.write:
        write_measured(flags.write, "mutations", lines)
    sys.exit(0 if all(caught.values()) else 1)


def is_caught(name: str) -> bool:
    """Whether a test fails on the mutated sources. Raises ValueError for a mutation that does not apply."""
    mutation = MUTATIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for file in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
            if file and not file.startswith(("docs/", "models/")):
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, tree / file)
        source = (tree / mutation.file).read_text()
        if source.count(mutation.old) != 1:
            raise ValueError(f"{name}: {mutation.old!r} is {source.count(mutation.old)} times in {mutation.file}")
        (tree / mutation.file).write_text(source.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: a test failed; others: pytest could not run them
        raise ValueError(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"{'caught' if done.returncode else 'SURVIVED'}: {name}", file=sys.stderr, flush=True)
    return done.returncode == 1


def _table(caught: dict[str, bool]) -> Iterator[str]:
    yield f"{len(caught)} mutations, {sum(caught.values())} caught.\n"
    yield "| mutation | file | caught by |\n|---|---|---|"
    for name, is_dead in caught.items():
        tests = ", ".join(f"`{test}`" for test in MUTATIONS[name].tests.split()) if is_dead else "**nothing**"
        yield f"| {name} | `{MUTATIONS[name].file}` | {tests} |"


if __name__ == "__main__":
    main()
