"""`evaluate.py report`: encodes queries and references, ranks, measures, and writes the tables, figures and page."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.evaluation import figures, scores, tables
from decomp_jax.evaluation.counterfactual import counterfactual_table
from decomp_jax.evaluation.page import write_page
from decomp_jax.evaluation.rankers import METHODS, rankers
from decomp_jax.evaluation.slices import SliceSet, decomposed
from decomp_jax.evaluation.tables import Table
from decomp_jax.files import replacing
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.display import STYLE
from decomp_jax.inference.encode import require_same_classes, require_same_preparation
from decomp_jax.retrieval.statistics import CONFIDENCE, Bootstrap, Interval

SEED = 0


def write_report(workdir: str | Path, data: str | Path, out: str | Path, reference: str = "reference") -> None:
    """Writes OUT/{index.html, metrics.json, metrics.csv, figures/*.png}, of which index.html comes last.

    Args:
        workdir: a training run.
        data: a prepared data set; the split `query` asks, the split named by `reference` is searched.
        out: directory to write into; files of an earlier report are replaced.

    Raises:
        UserError: the data were prepared otherwise than the model's, or a patient is in both splits.
    """
    decomposer = Decomposer.restore(workdir)
    datasets = {split: SliceDataset(data, split) for split in ("query", reference)}
    settings = datasets["query"].settings
    require_same_preparation(decomposer.settings, settings, str(data))
    require_same_classes(decomposer.settings, settings, str(data))
    _require_disjoint(datasets, data)
    query, references = (SliceSet.encode(decomposer, dataset, split) for split, dataset in datasets.items())
    with mpl.rc_context(STYLE):
        metrics, drawn = measure(decomposer, datasets["query"], query, references)
        metrics["protocol"]["reference split"] = reference
        drawn["training"] = figures.training_figure(_training_log(Path(workdir) / "metrics.jsonl"))
        if jax.process_index() == 0:
            _write(Path(out), metrics, drawn, decomposer.config.to_dict())


def _write(out: Path, metrics: Table, drawn: dict[str, Figure | None], config: dict[str, Any]) -> None:
    """The page goes first and comes last: where there is one, the report is whole."""
    page = out / "index.html"
    page.unlink(missing_ok=True)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    files = {name: out / "figures" / f"{name}.png" for name, figure in drawn.items() if figure is not None}
    for name, path in files.items():
        with replacing(path) as file:
            drawn[name].savefig(file)
    with replacing(out / "metrics.json") as file:
        file.write_text(json.dumps(_plain(metrics), indent=1, allow_nan=False) + "\n")
    with replacing(out / "metrics.csv") as file, file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("name", "mean", "low", "high"))
        table.writerows((" | ".join(name), *values) for name, values in _intervals(metrics))
    with replacing(page) as file:
        write_page(file, metrics, files, config)


def measure(
    decomposer: Decomposer, dataset: SliceDataset, query: SliceSet, reference: SliceSet
) -> tuple[Table, dict[str, Figure]]:
    """All tables and figures of the report but the training curves."""
    settings = dataset.settings
    depth = min(scores.DEPTH, len(reference))
    methods = rankers(query, reference, depth=depth, lesion_classes=len(settings.lesion_classes), seed=SEED)
    overlap = scores.label_overlap(query, reference, settings)
    found = scores.score(query, reference, methods, overlap)
    bootstrap = Bootstrap.of(query.rows["patient_id"], seed=SEED)
    summary = tables.Summary.of(found, bootstrap)
    mixed = tables.mixed_queries(query, reference, overlap, seed=SEED)
    metrics = {
        "provenance": {
            "model_digest": decomposer.model_digest, "trained on data_digest": decomposer.data_digest,
            "data_digest": dataset.digest, "settings": settings.to_json(),
        },
        "protocol": {
            "queries": _counts(query), "references": _counts(reference), "methods": METHODS,
            "bootstrap samples": len(bootstrap.counts), "confidence": CONFIDENCE, "ranking depth": depth,
            "thresholds": scores.THRESHOLDS,
        },
        **tables.retrieval_tables(summary),
        "comparisons": tables.comparisons(summary),
        "strata": tables.strata(found, query, bootstrap),
        "mixed": tables.mixed_table(mixed, query),
        "segmentation": {"dice": {}} | tables.segmentation_summary(query, settings.lesion_classes).nested(),
        "abnormality": tables.abnormality_table(query),
        "codebooks": tables.codebook_table(reference),
        "counterfactual": counterfactual_table(decomposer, dataset, query),
    }
    drawn = {
        "retrieval": figures.retrieval_figure(query, reference, found, mixed, overlap, settings),
        "decomposition": _decomposition_figure(decomposer, dataset, query),
        "codebooks": figures.codebook_figure(reference),
    }
    if metrics["retrieval"]:
        drawn["selectivity"] = figures.selectivity_figure(metrics["retrieval"])
    return metrics, drawn


def _decomposition_figure(decomposer: Decomposer, dataset: SliceDataset, query: SliceSet) -> Figure:
    chosen = figures.choose_examples(query)
    healthy = None
    if dataset.settings.healthy:
        healthy = dataset.stack(("healthy",), query.positions[chosen])["healthy"]
    output = next(decomposed(decomposer, query.image[chosen], "paint examples"))
    return figures.decomposition_figure(query, chosen, output, healthy, dataset.settings)


def _training_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _counts(slices: SliceSet) -> dict[str, int]:
    patients = len(np.unique(slices.rows["patient_id"]))
    return {"patients": patients, "slices": len(slices), "with a lesion": int(slices.lesion.sum())}


def _require_disjoint(datasets: dict[str, SliceDataset], data: str | Path) -> None:
    for split, dataset in datasets.items():
        if not len(dataset):
            raise UserError(f"{data}: the split {split!r} is empty; prepare the data with patients in it")
    ours, theirs = (np.unique(dataset.rows["patient_id"]) for dataset in datasets.values())
    both = np.intersect1d(ours, theirs)
    if len(both):
        raise UserError(f"{data}: patient {both[0]} is in both {' and '.join(datasets)}; split by patient")


def _intervals(table: dict[str, Any], name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple]]:
    for key, value in table.items():
        if isinstance(value, Interval):
            yield (*name, key), value
        elif isinstance(value, dict):
            yield from _intervals(value, (*name, key))


def _plain(value: Any) -> Any:
    """As JSON knows it: intervals as objects, numbers of six digits, null where a number is undefined."""
    if isinstance(value, Interval):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
