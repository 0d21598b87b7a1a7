"""`evaluate.py export`: a trained network as a few MB of NumPy arrays with a model card; it reads like its run."""

import json
from pathlib import Path
from typing import Any

from decomp_jax.config import Config
from decomp_jax.data.records import read_manifest
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.files import making
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.provenance import source_commit
from decomp_jax.training.checkpoint import restore_for_inference, write_exported

CARD = "README.md"


def export_run(workdir: str | Path, data: str | Path, report: str | Path, out: str | Path) -> None:
    """Writes OUT/{parameters.npz, meta.json, README.md}: codes and figures from it are those of the run.

    Args:
        workdir: the run: its newest checkpoint is taken.
        data: the data set it was trained on, for the model card.
        report: a report of this network, on any data, whose numbers go into the model card.
        out: directory to be made.

    Raises:
        UserError: `data` or `report` are of another run, or `out` exists.
    """
    with making(out) as folder:
        state, meta = restore_for_inference(workdir)
        manifest, metrics = read_manifest(data), _read_metrics(Path(report) / "metrics.json")
        if manifest["digest"] != meta["data_digest"]:
            raise UserError(f"{data}: not the data that {workdir} was trained on")
        if metrics["provenance"]["model_digest"] != Decomposer.restore(workdir).model_digest:
            raise UserError(f"{report}: not of the newest checkpoint of {workdir}; write the report again")
        meta["data"] = {name: manifest[name] for name in ("patients", "slices", "splits", "source")}
        meta["config"]["data"]["dir"] = ""  # a path of this machine; the digest names the data
        meta.setdefault("commit", f"{source_commit()}, at export: the run recorded none")
        start = meta["config"]["train"]["init_from"]
        if start and Path(start).is_dir():
            before = restore_for_inference(start)[1]
            meta["started_from"] = {name: before.get(name) for name in ("step", "config", "data", "data_digest", "commit")}
        write_exported(folder, state, meta)
        (folder / CARD).write_text(model_card(Path(out).name, meta, metrics))


def _read_metrics(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: not found; write the report with `python evaluate.py report --out={path.parent} ...`")
    return json.loads(path.read_text())


def model_card(name: str, meta: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown: what the network reads and says, how it was made, what was measured, what it is not for."""
    config, settings, data = Config.from_dict(meta["config"]), Settings.from_json(meta["settings"]), meta["data"]
    splits = ", ".join(f"{split} {count['patients']:,}" for split, count in data["splits"].items())
    made = " ".join(f"{key}={value}" for key, value in data["source"].items())
    queries, references = (metrics["protocol"][part] for part in ("queries", "references"))
    tested = metrics["provenance"]["data_digest"]
    where = "held-out patients of the data it was trained on" if tested == meta["data_digest"] else "other data"
    start = f"the parameters of {Path(config.train.init_from).name}" if config.train.init_from else "scratch"
    if before := meta.get("started_from"):
        start += f""" ({before["step"]:,} steps on data `{before["data_digest"][:16]}`, commit {before["commit"]})"""
    return f"""# {name}

A network trained by this repository, without its optimiser. It stands wherever a run does:

    python evaluate.py encode --workdir=models/{name} --data=DATA --split=reference --out=BANK
    python evaluate.py report --workdir=models/{name} --data=DATA --out=REPORT
    python train.py --config=CONFIG --workdir=RUN --config.data.dir=DATA --config.train.init_from=models/{name}

## What it reads and says

- Images: {settings.source}, {settings.size}x{settings.size} pixels, {", ".join(settings.modalities)}. It refuses
  images that `python -m data_prep` prepared otherwise.
- Two grids of codes, {config.model.codebook_size} codes of {config.model.code_dim} numbers each: anatomy as it would
  look healthy, and abnormality. Labels: {", ".join(settings.lesion_classes)}.

## How it was made

- Data: {data["patients"]:,} patients, {data["slices"]:,} slices ({splits} patients); {settings.source}, {made};
  digest `{meta["data_digest"][:16]}`.
- Training: {meta["step"]:,} steps of {config.train.batch_size} slices, seed {config.train.seed}, from
  {start}. All settings are in `meta.json`.
- Code: commit {meta["commit"]}.

## What was measured

{queries["slices"]:,} slices of {queries["patients"]:,} patients asked, {references["slices"]:,} slices of
{references["patients"]:,} patients searched:
{where} (digest `{tested[:16]}`).
Means over patients with 95 % bootstrap intervals; `evaluate.py report` gives all tables.

{_numbers(metrics)}
## What it is not for

Not a medical device: no diagnosis, no treatment. It knows images like those it was trained on; on others its codes mean
little until it is trained further.

Apache-2.0, as the code.
"""


def _numbers(metrics: dict[str, Any]) -> str:
    lines = ["| measure | this network | pixels, L2 | best possible |", "|---|---|---|---|"]
    for title, target, measure, oracle in (
        ("anatomy Dice@5 by normal code", "normal", "dice@5", "oracle_normal"),
        ("lesion-class Dice@5 by abnormal code", "abnormal", "dice@5", "oracle_abnormal"),
        ("whole-lesion Dice@5 by abnormal code", "abnormal", "whole_dice@5", "oracle_whole"),
    ):
        if target in metrics["retrieval"].get("random", {}):
            cells = (_interval(metrics["retrieval"][name][target][measure], 3) for name in (target, "pixel_l2", oracle))
            lines.append(f"| {title} | {' | '.join(cells)} |")
    if "auroc" in metrics["abnormality"]:
        lines.append(f"| slices with a lesion, AUROC | {_interval(metrics['abnormality']['auroc'], 2)} | | 1 |")
    truth = metrics["counterfactual"].get("images")
    if truth:
        lines.append(f"""| lesion-free painting: dB nearer to the truth than the input, inside the lesion | {
            _interval(truth["x_minus"]["psnr gain inside"], 1)} | | |""")
    return "\n".join(lines) + "\n"


def _interval(value: dict[str, float | None], digits: int) -> str:
    mean, low, high = ("?" if part is None else f"{part:.{digits}f}" for part in value.values())
    return f"{mean} ({low} to {high})"
