"""TFRecord shards of fixed-size records, and the metadata with which TensorFlow Datasets reads them."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

# Keep TensorFlow quiet; it reads these when it loads, which is when the first shard is opened.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf
from tensorflow_datasets.proto import tf_example_pb2

from decomp_jax.data.schema import RECORD_FOOTER, RECORD_HEADER, Settings

SHARD_BYTES = 1 << 30


class RecordFormat:
    """The serialised form that all records of a data set share but for the bytes of their fields.

    Attributes:
        features: the same for TensorFlow Datasets.
        offsets: first byte of each field in a serialised record.
    """

    def __init__(self, settings: Settings) -> None:
        self.features = tfds.features.FeaturesDict({
            # Without an encoding TFDS stores a float16 in four bytes; zlib reads several times slower.
            name: tfds.features.Tensor(shape=field.shape, dtype=field.base, encoding=tfds.features.Encoding.BYTES)
            for name, field in settings.fields.items()
        })
        rng = np.random.default_rng(0)
        marks = {name: rng.bytes(field.itemsize) for name, field in settings.fields.items()}
        example = self.features.serialize_example({
            name: np.frombuffer(marks[name], field.base).reshape(field.shape)
            for name, field in settings.fields.items()
        })
        # The order of a protobuf's map changes from run to run unless asked for.
        template = tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)
        self.offsets = {name: template.index(mark) for name, mark in marks.items()}
        self._type = np.dtype({
            "names": list(marks), "formats": list(settings.fields.values()), "offsets": list(self.offsets.values()),
            "itemsize": len(template),
        })
        self._template = np.frombuffer(template, np.uint8)

    @property
    def itemsize(self) -> int:
        """Bytes of a serialised record."""
        return self._type.itemsize

    def serialize(self, fields: Mapping[str, np.ndarray]) -> list[bytes]:
        """Records of the fields [n,...]."""
        serialized = np.tile(self._template, (len(fields["image"]), 1))
        records = serialized.view(self._type)[:, 0]
        for name in self._type.names:
            records[name] = fields[name]
        return [record.tobytes() for record in serialized]

    def layout(self) -> dict[str, object]:
        """Where a reader of TFRecord files finds the fields: bytes of a framed record, and offsets in it."""
        return {
            "bytes": RECORD_HEADER + self.itemsize + RECORD_FOOTER,
            "offsets": {name: RECORD_HEADER + offset for name, offset in self.offsets.items()},
        }


class ShardWriter:
    """The shards of one split; all but the last hold the same number of records.

    Attributes:
        lengths: records in each shard.
        checksums: SHA-256 of each file, by name, once closed.
        ends: the last record's checksum of each file, likewise.
    """

    def __init__(self, folder: Path, split: str, record_bytes: int) -> None:
        self._folder, self._split = folder, split
        self._most = max(1, SHARD_BYTES // (RECORD_HEADER + record_bytes + RECORD_FOOTER))
        self._file: tf.io.TFRecordWriter | None = None
        self._digests: list[tuple[str, str]] = []
        self.lengths: list[int] = []
        self.checksums: dict[str, str] = {}
        self.ends: dict[str, str] = {}

    def write(self, record: bytes) -> None:
        if self._file is None:
            self._file = tf.io.TFRecordWriter(str(self._unfinished(len(self.lengths))))
            self.lengths.append(0)
        self._file.write(record)
        self.lengths[-1] += 1
        if self.lengths[-1] == self._most:
            self._close_file()

    def close(self) -> None:
        """Gives the files their names, which say how many there are."""
        if self._file is not None:
            self._close_file()
        for i, (digest, end) in enumerate(self._digests):
            name = f"slices-{self._split}.tfrecord-{i:05d}-of-{len(self._digests):05d}"
            self._unfinished(i).rename(self._folder / name)
            self.checksums[name], self.ends[name] = digest, end

    def _unfinished(self, i: int) -> Path:
        return self._folder / f"{self._split}-{i:05d}"

    def _close_file(self) -> None:
        self._file.close()
        self._file = None
        with self._unfinished(len(self._digests)).open("rb") as file:  # still in memory, as a rule
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(-RECORD_FOOTER, os.SEEK_END)
            self._digests.append((digest, file.read().hex()))


def write_metadata(folder: Path, record: RecordFormat, shards: Mapping[str, ShardWriter]) -> None:
    """features.json and dataset_info.json, for `tfds.builder_from_directory(folder)`."""
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=record.features,
        split_infos=[
            tfds.core.SplitInfo(name=split, shard_lengths=one.lengths, num_bytes=sum(one.lengths) * record.itemsize)
            for split, one in shards.items()
        ],
        check_data=False,
        disable_shuffling=True,
    )
