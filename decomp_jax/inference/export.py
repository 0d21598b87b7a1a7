"""`evaluate.py export`: a trained network as a few MB of NumPy arrays with a model card; it reads like its run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decomp_jax.data.records import read_manifest
from decomp_jax.errors import UserError
from decomp_jax.files import making, read_sealed
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.render import render
from decomp_jax.provenance import source_commit
from decomp_jax.training.checkpoint import restore_for_inference, write_exported

CARD, FAILURES = "README.md", "failures.png"


def export_run(workdir: str | Path, data: str | Path, reports: Sequence[str | Path], out: str | Path) -> None:
    """Writes OUT/{parameters.npz, meta.json, README.md, failures.png}: codes and figures from it are those of the run.

    Args:
        workdir: the run: its newest checkpoint is taken.
        data: the data set it was trained on, for the model card.
        reports: of this network, on any data, whose numbers go into the model card; of the first one its failures, too.
        out: directory to be made.

    Raises:
        UserError: `data` or a report are of another run, or `out` exists.
    """
    with making(out) as folder:
        state, meta = restore_for_inference(workdir)
        manifest = read_manifest(data)
        if manifest["digest"] != meta["data_digest"]:
            raise UserError(f"{data}: not the data that {workdir} was trained on")
        model_digest, metrics = Decomposer.restore(workdir).model_digest, []
        for report in reports:
            cure = f"write the report again with `python evaluate.py report --out={report} ...`"
            metrics.append(read_sealed(Path(report) / "metrics.json", cure))
            if metrics[-1]["provenance"]["model_digest"] != model_digest:
                raise UserError(f"{report}: not of the newest checkpoint of {workdir}; write the report again")
        if failed := (Path(reports[0]) / "figures" / FAILURES).exists():
            shutil.copyfile(Path(reports[0]) / "figures" / FAILURES, folder / FAILURES)
        meta["data"] = {name: manifest[name] for name in ("patients", "slices", "splits", "source")}
        meta.setdefault("commit", f"{source_commit()}, at export: the run recorded none")
        start = meta["config"]["train"]["init_from"]
        if start and Path(start).is_dir():
            before = restore_for_inference(start)[1]
            names = ("step", "config", "data", "data_digest", "commit")
            meta["started_from"] = {name: before.get(name) for name in names}
        write_exported(folder, state, meta)
        (folder / CARD).write_text(model_card(Path(out).name, meta, metrics, FAILURES if failed else None))


def model_card(
    name: str, meta: dict[str, Any], reports: Sequence[dict[str, Any]] = (), failures: str | None = None
) -> str:
    """Markdown: what the network reads and says, how it was made, what was measured (if it was), what it is not for.

    Args:
        reports: what their metrics.json hold.
        failures: a picture of what the first of them found wrong.
    """
    start = Path(meta["config"]["train"]["init_from"]).name
    return render("decomp_jax.inference", "model_card.md.jinja", name=name, meta=meta, reports=reports,
                  failures=failures, start=start)
