"""`evaluate.py report`: encodes queries and references, ranks, measures, and writes the tables, figures and page."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from jaxtyping import Integer
from matplotlib.figure import Figure

from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.errors import UserError
from decomp_jax.evaluation import figures, patients, scores, tables
from decomp_jax.evaluation.counterfactual import counterfactual_table
from decomp_jax.evaluation.features import read_features
from decomp_jax.evaluation.page import write_page
from decomp_jax.evaluation.rankers import Search, rankers
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.evaluation.tables import Table
from decomp_jax.files import replacing, sealed
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.display import STYLE
from decomp_jax.retrieval.statistics import CONFIDENCE, LEAST_PATIENTS, SAMPLES, Bootstrap, Interval
from decomp_jax.training.metrics import lines_up_to

OTHERS = "others"


def write_report(
    workdir: str | Path, data: str | Path, out: str | Path, reference: str = "reference",
    features: Sequence[tuple[str, Path]] = (), slab_mm: float | None = None,
) -> None:
    """Writes OUT/{index.html, metrics.json, metrics.csv, figures/*.png}, of which index.html comes last.

    Args:
        workdir: a training run.
        data: a prepared data set; the split `query` asks, the split named by `reference` is searched. "others": the
            patients of all splits ask, each among all others.
        out: directory to write into; files of an earlier report are replaced.
        features: names and files of vectors to rank by as well; see `features.read_features`.
        slab_mm: as of `inference.encode.encode_split`.

    Raises:
        UserError: the data were prepared otherwise than the model's, a patient is in both splits, or features are of
            other data.
    """
    decomposer = Decomposer.restore(workdir)
    splits = list(read_manifest(data)["splits"]) if reference == OTHERS else ["query", reference]
    groups = [splits] if reference == OTHERS else [[split] for split in splits]
    datasets = {" ".join(group): decomposer.take_images(SliceDataset(data, *group), str(data)) for group in groups}
    settings = next(iter(datasets.values())).settings
    decomposer.check_classes(settings, str(data))
    _require_patients(datasets, data)
    vectors = read_features(features, datasets)
    sets = [SliceSet.encode(decomposer, dataset, name, vectors[name], slab_mm) for name, dataset in datasets.items()]
    search = Search(sets[0], sets[-1], settings, decomposer=decomposer)
    with mpl.rc_context(STYLE):
        metrics, drawn = measure(search)
        metrics["protocol"] |= {"reference split": reference, "slab mm": sets[0].bank.slab_mm}
        drawn["training"] = figures.training_figure(_training_log(Path(workdir) / "metrics.jsonl"))
        if jax.process_index() == 0:
            _write(Path(out), metrics, drawn, search, decomposer.config.to_dict())


def _write(
    out: Path, metrics: Table, drawn: dict[str, Figure | None], search: Search, config: dict[str, Any]
) -> None:
    """The page goes first and comes last: where there is one, the report is whole."""
    page = out / "index.html"
    page.unlink(missing_ok=True)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    files = {name: out / "figures" / f"{name}.png" for name, figure in drawn.items() if figure is not None}
    for name, path in files.items():
        with replacing(path) as file:
            drawn[name].savefig(file)
    plain = _plain(metrics)
    with replacing(out / "metrics.json") as file:
        file.write_text(json.dumps(sealed(plain), indent=1, allow_nan=False) + "\n")
    with replacing(out / "metrics.csv") as file, file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("name", "mean", "low", "high"))
        for name, interval in _intervals(metrics):
            table.writerow((" | ".join(name), *("" if math.isnan(part) else part for part in interval)))
    with replacing(page) as file:
        write_page(file, plain, files, config, search.methods, patients.methods(search))


def measure(search: Search) -> tuple[Table, dict[str, Figure | None]]:
    """All tables and figures of the report but the training curves."""
    query, reference, settings, decomposer = search.query, search.reference, search.settings, search.decomposer
    slice_scores = scores.score(search, rankers(search))
    bootstrap = Bootstrap.draw(query.rows["patient_id"], seed=search.seed)
    summary = tables.Summary.average(slice_scores, bootstrap)
    mixed = tables.mixed_queries(search)
    metrics = {
        "provenance": {
            "model_digest": decomposer.model_digest, "trained on data_digest": decomposer.data_digest,
            "data_digest": query.dataset.digest, "settings": settings.to_json(),
        },
        "protocol": {
            "queries": _counts(query), "references": _counts(reference),
            "methods": {name: method.title for name, method in search.methods.items()},
            "patient methods": {name: method.title for name, method in patients.methods(search).items()},
            "bootstrap samples": SAMPLES, "confidence": CONFIDENCE, "least patients": LEAST_PATIENTS,
            "ranking depth": search.depth, "thresholds": scores.THRESHOLDS,
        },
        **tables.retrieval_tables(summary),
        "columns left out": {
            name: reason for name, reason in scores.kind_columns(query.rows, reference.rows).items() if reason
        },
        "comparisons": tables.comparisons(summary),
        "strata": tables.strata(slice_scores, query, bootstrap),
        "mixed": tables.mixed_table(mixed, query),
        "patients": patients.patient_table(search),
        "segmentation": {"dice": {}} | tables.segmentation_summary(query, settings.lesion_classes).nested(),
        "abnormality": tables.abnormality_table(query),
        "codebooks": tables.codebook_table(reference),
        "counterfactual": counterfactual_table(decomposer, query.dataset, query),
    }
    drawn = {
        "retrieval": figures.retrieval_figure(search, slice_scores, mixed),
        "decomposition": _decomposition_figure(decomposer, query, figures.choose_examples(query)),
        "failures": _decomposition_figure(decomposer, query, figures.choose_failures(query)),
        "codebooks": figures.codebook_figure(reference),
    }
    if metrics["retrieval"]:
        drawn["selectivity"] = figures.selectivity_figure(metrics["retrieval"], search.methods)
    return metrics, drawn


def _decomposition_figure(
    decomposer: Decomposer, query: SliceSet, chosen: Integer[np.ndarray, "n"]
) -> Figure | None:
    if not len(chosen):
        return None
    settings = query.dataset.settings
    fields = ("image", "healthy") if settings.healthy else ("image",)
    images = query.dataset.stack(fields, query.positions[chosen])
    return figures.decomposition_figure(query, chosen, images, query.decompositions(decomposer, chosen), settings)


def _training_log(path: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl; what is no such line is left out, as when a run goes on."""
    return lines_up_to(path, math.inf)


def _counts(slices: SliceSet) -> dict[str, int]:
    patients = len(np.unique(slices.rows["patient_id"]))
    return {"patients": patients, "slices": len(slices), "with a lesion": int(slices.lesion.sum())}


def _require_patients(datasets: dict[str, SliceDataset], data: str | Path) -> None:
    """Raises UserError if there are none, a patient is in two splits, or a single one is to ask among others."""
    for split, dataset in datasets.items():
        if not len(dataset):
            raise UserError(f"{data}: the split {split!r} is empty; prepare the data with patients in it")
    if len(datasets) == 1:
        if len(np.unique(dataset.rows["patient_id"])) == 1:
            raise UserError(f"{data}: has a single patient, which has no others to ask among; prepare more")
        return
    shared = np.intersect1d(*(dataset.rows["patient_id"] for dataset in datasets.values()))
    if len(shared):
        raise UserError(f"{data}: patient {shared[0]} is in both {' and '.join(datasets)}; split by patient")


def _intervals(table: dict[str, Any], name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Interval]]:
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
