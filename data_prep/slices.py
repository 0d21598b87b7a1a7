"""Writes prepared slices as TFRecord shards: workers prepare patients, one TFDS builder writes them in order."""

import collections
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

# Keep TensorFlow quiet; it reads these when it loads, which is when TFDS first writes.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer as tfds_writer
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from decomp_jax.data.schema import FORMAT_VERSION, SPLITS, Settings
from decomp_jax.errors import UserError

MIN_CONTENT = 0.01  # share of pixels other than 0 from which equal images can't be chance


@dataclasses.dataclass(frozen=True)
class PatientSlices:
    """One patient's prepared slices, stacked.

    Attributes:
        patient_id: unique within the data set.
        image: float16 [n,S,S,C] in [0,1], background 0.
        label: uint8 [n,S,S], zeros where not labelled.
        slice_index: int32 [n], position in the volume, from inferior to superior.
        position_mm: float32 [n], height along the axis; NaN where unknown.
        anatomy: uint8 [n,S,S], or None.
        healthy: float16 [n,S,S,C], the slices without the lesion, or None.
        labelled: whether `label` is known, for all slices or [n].
        columns: further values [n] that travel to `slices.csv`; the same names for every patient.
    """

    patient_id: str
    image: np.ndarray
    label: np.ndarray
    slice_index: np.ndarray
    position_mm: np.ndarray
    anatomy: np.ndarray | None = None
    healthy: np.ndarray | None = None
    labelled: bool | np.ndarray = True
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The slices' lines of `slices.csv`; truth values are 0 or 1."""
        n = len(self.image)
        columns = {
            "split": [split] * n,
            "patient_id": [self.patient_id] * n,
            "slice_index": self.slice_index,
            "position_mm": [f"{height:.3f}" for height in self.position_mm],
            "has_abnormality": self.label.any(axis=(1, 2)).astype(int),
            "labelled": np.broadcast_to(self.labelled, n).astype(int),
            **self.columns,
        }
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    def records(self) -> Iterator[dict[str, Any]]:
        tensors = {"image": self.image, "label": self.label, "anatomy": self.anatomy, "healthy": self.healthy}
        tensors = {name: values for name, values in tensors.items() if values is not None}
        for i, slice_index in enumerate(self.slice_index):
            yield {**{name: values[i] for name, values in tensors.items()},
                   "patient_id": self.patient_id, "slice_index": int(slice_index)}


class _StableWriter(tfds_writer.ExampleWriter):
    """Sorts the features of each record, whose serialised order otherwise changes from run to run."""

    def write(self, path: Path, examples: Iterator[tuple[int, bytes]]) -> Any:
        records = ((key, tf_example_pb2.Example.FromString(record)) for key, record in examples)
        return super().write(path, ((key, record.SerializeToString(deterministic=True)) for key, record in records))


class Slices(tfds.core.GeneratorBasedBuilder):
    """Writes `data_dir/slices/1.0.0/slices-SPLIT.tfrecord-*` from iterators of (key, record)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: Path, settings: Settings, examples: Mapping[str, Iterator[tuple[int, dict]]]):
        self._settings = settings
        self._examples = examples
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        def tensor(*shape: int, dtype: type) -> tfds.features.Tensor:
            # Raw bytes: without an encoding TFDS stores a float16 in four bytes; zlib reads several times slower.
            return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)

        settings, size, channels = self._settings, self._settings.size, len(self._settings.modalities)
        features = {
            "image": tensor(size, size, channels, dtype=np.float16),
            "label": tensor(size, size, dtype=np.uint8),
        }
        if settings.anatomy_classes:
            features["anatomy"] = tensor(size, size, dtype=np.uint8)
        if settings.healthy:
            features["healthy"] = tensor(size, size, channels, dtype=np.float16)
        features |= {"patient_id": tfds.features.Text(), "slice_index": tfds.features.Scalar(dtype=np.int32)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in self._examples}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        return self._examples[split]

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        return _StableWriter(self.info.file_format)


def write_dataset(
    out: Path,
    *,
    settings: Settings,
    splits: Mapping[str, str],
    prepare: Callable[[str], PatientSlices],
    workers: int,
    on_error: Literal["stop", "skip"],
    source: Mapping[str, Any] | None = None,
) -> None:
    """Prepares every patient and writes the data set `out` (see `decomp_jax.data.schema`), whole or not at all.

    Args:
        out: directory to make.
        settings: what `prepare` gives.
        splits: patient_id -> split.
        prepare: picklable; runs in worker processes and raises `UserError` for a patient that can't be used.
        workers: number of processes; the bytes written do not depend on it.
        on_error: "skip" leaves out the patients that can't be used and lists them in the manifest.
        source: what else the manifest should tell about where the data came from.

    Raises:
        UserError: `out` exists, a patient can't be used, two patients have an image in common, or a split has lost all
            its patients.
    """
    writer = _Writer(splits, on_error)
    with _whole_or_nothing(out) as partial:
        _write_records(partial, settings, writer, prepare, workers)
        with open(partial / "slices.csv", "w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(writer.rows[0]))
            table.writeheader()
            table.writerows(writer.rows)
        manifest = {
            "format_version": FORMAT_VERSION,
            "digest": _digest(partial, settings),
            **writer.counts(),
            "settings": settings.to_json(),
            "skipped": writer.skipped,
            "source": dict(source or {}),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _write_records(
    partial: Path, settings: Settings, writer: "_Writer", prepare: Callable[[str], PatientSlices], workers: int
) -> None:
    with contextlib.closing(map_in_order(prepare, writer.patient_ids, workers=workers, unit="patient")) as prepared:
        examples = {split: writer.examples(split, prepared) for split in SPLITS if split in writer.splits.values()}
        builder = Slices(data_dir=partial, settings=settings, examples=examples)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(None):  # what TFDS prints is about downloads
            builder.download_and_prepare(
                download_dir=partial / "downloads", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        shutil.rmtree(partial / "downloads")  # empty


class _Writer:
    """Passes patients on to TFDS, split by split, and keeps the books: table, skipped patients, image fingerprints."""

    def __init__(self, splits: Mapping[str, str], on_error: str):
        self.splits = splits
        self.patient_ids = sorted(splits, key=lambda patient_id: (SPLITS.index(splits[patient_id]), patient_id))
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self._on_error = on_error
        self._fingerprints: dict[bytes, str] = {}

    def examples(self, split: str, prepared: Iterator[tuple[str, Future]]) -> Iterator[tuple[int, dict]]:
        first_row = len(self.rows)
        n = sum(of == split for of in self.splits.values())
        for position, (patient_id, future) in enumerate(itertools.islice(prepared, n)):
            try:
                patient = future.result()
                self._refuse_twin(patient)
            except UserError as error:
                if self._on_error == "stop":
                    raise
                self.skipped.append({"patient_id": patient_id, "error": str(error)})
                continue
            self.rows += patient.rows(split)
            # TFDS orders records by key and sorts them in buckets of equal key ranges out of 2^128, each read into
            # memory at once: keys spread over the whole range keep the buckets small.
            start = position * 2**128 // n
            yield from enumerate(patient.records(), start)
        if len(self.rows) == first_row:
            raise UserError(f"split {split}: every patient was skipped, first because of {self.skipped[-1]['error']}")

    def _refuse_twin(self, patient: PatientSlices) -> None:
        """Refuses a slice that another patient has too, unless it is all but empty."""
        fingerprints = {
            hashlib.sha256(image.tobytes()).digest(): patient.patient_id
            for image in patient.image if np.count_nonzero(image) > MIN_CONTENT * image.size
        }
        if shared := self._fingerprints.keys() & fingerprints:
            twin = self._fingerprints[shared.pop()]
            raise UserError(f"{patient.patient_id}: has the same images as {twin}; remove one of the two")
        self._fingerprints |= fingerprints

    def counts(self) -> dict[str, Any]:
        slices = collections.Counter(row["split"] for row in self.rows)
        patients = collections.Counter(split for split, _ in {(row["split"], row["patient_id"]) for row in self.rows})
        return {
            "patients": patients.total(),
            "slices": slices.total(),
            "splits": {name: {"patients": patients[name], "slices": slices[name]} for name in SPLITS if slices[name]},
        }


@contextlib.contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """Gives a directory beside `out` that becomes `out` at the end, or is removed."""
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or name another directory")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a directory that can be written") from error
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(directory: Path, settings: Settings) -> str:
    """SHA-256 over the settings, the table and the shards."""
    digest = hashlib.sha256(json.dumps(settings.to_json(), sort_keys=True).encode())
    for path in (directory / "slices.csv", *sorted(directory.glob("slices/*/*.tfrecord-*"))):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


_function: Callable[[Any], Any]  # of a worker process


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its workers
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)


def map_in_order(
    function: Callable[[Any], Any], items: Sequence[Any], *, workers: int, unit: str
) -> Iterator[tuple[Any, Future]]:
    """Yields (item, finished future of `function(item)`) in the order of `items`, a few ahead, with a progress bar.

    Close the iterator to end the worker processes at once.

    Raises:
        UserError: a worker process died.
    """
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(function,)
    )
    to_submit = iter(items)
    pending = collections.deque()
    try:
        with tqdm(total=len(items), unit=unit, dynamic_ncols=True) as bar:
            while True:
                with _signals_held():  # a worker whose start is cut off ends in a traceback of its own
                    for item in itertools.islice(to_submit, 2 * workers - len(pending)):
                        pending.append((item, pool.submit(_call, item)))
                if not pending:
                    return
                item, future = pending.popleft()
                if isinstance(future.exception(), BrokenProcessPool):
                    raise BrokenProcessPool
                bar.update()
                yield item, future
    except BrokenProcessPool as error:
        raise UserError("--workers: a worker process died, likely for lack of memory; use fewer --workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Lets SIGINT and SIGTERM wait until the block is through."""
    held = []
    handlers = {
        number: signal.signal(number, lambda *received: held.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, _ in held:
        signal.raise_signal(number)
