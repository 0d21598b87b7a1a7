"""metrics.jsonl: a flushed line per logged step, each step once; TensorBoard beside it on request."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from decomp_jax.errors import UserError
from decomp_jax.files import disk_space, replacing


class NotFinite(UserError):
    """A loss term or the gradient stopped being a finite number."""


def check_finite(step: int, metrics: dict[str, float]) -> None:
    """Raises NotFinite naming the first term that is not finite, and its step."""
    for name, value in sorted(metrics.items(), key=lambda item: not item[0].startswith("term/")):
        if not math.isfinite(value):
            raise NotFinite(
                f"step {step}: {name} is {value}; the last good checkpoint is kept: start another "
                "--workdir with a lower --config.train.learning_rate or without the term (from that checkpoint: "
                "--config.train.init_from)"
            )


class StepLog:
    """Metrics stay on the device until a step is logged, so that nothing waits for them."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._data_wait = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time that it takes is logged as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._data_wait += time.perf_counter() - start
        return batch

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the step before the last, so that the host is ahead of the devices by one step and no more."""
        jax.block_until_ready(self._pending[-1:])
        self._pending.append((step, metrics))
        self._steps += 1

    def check(self) -> dict[str, float]:
        """Fetches what is pending. Raises NotFinite at the first step that has a term which is no number."""
        values: dict[str, float] = {}
        for step, metrics in jax.device_get(self._pending):
            values = {name: float(value) for name, value in metrics.items()}
            check_finite(step, values)
        self._pending = self._pending[-1:]
        return values

    def take(self, batch_size: int) -> dict[str, float]:
        """The newest step's metrics, and the times since the clock was restarted."""
        values = self.check()
        seconds = (time.perf_counter() - self._since) / max(self._steps, 1)
        self._pending = []
        return {f"train/{name}": value for name, value in values.items()} | {
            "time/step_seconds": seconds,
            "time/data_wait_seconds": self._data_wait / max(self._steps, 1),
            "time/images_per_second": batch_size / seconds,
        }

    def restart_clock(self) -> None:
        self._steps, self._data_wait, self._since = 0, 0.0, time.perf_counter()


class MetricWriter:
    """Writes WORKDIR/metrics.jsonl, in process 0; a context. Lines after `start_step` are dropped at first.

    Raises UserError if the disk is full.
    """

    def __init__(self, workdir: Path, start_step: int, *, tensorboard: bool = False) -> None:
        self._path = workdir / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._newest: dict[str, float] = {}
        self._board = _open_tensorboard(workdir) if tensorboard and self._writes else None
        if self._writes:
            self._keep(lines_up_to(self._path, start_step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writes:
            with disk_space(self._path):
                self._file.close()
        if self._board:
            self._board.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line; values of the newest line's step are added to that line."""
        if self._writes and self._newest.get("step") == step:
            self._file.close()
            self._keep([*lines_up_to(self._path, step - 1), self._newest | values])
        elif self._writes:
            self._newest = {"step": step, **values}
            with disk_space(self._path):
                self._file.write(json.dumps(self._newest) + "\n")
                self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Panels [B,S,S,1] in [0,1], for TensorBoard alone."""
        if self._board:
            for name, panel in images.items():
                self._board.add_images(name, np.clip(panel, 0, 1), step, dataformats="NHWC")

    def _keep(self, lines: list[dict[str, float]]) -> None:
        with replacing(self._path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._newest = lines[-1] if lines else {}
        self._file = self._path.open("a")


def lines_up_to(path: Path, step: float) -> list[dict[str, float]]:
    """Whole lines of steps up to `step`; a line that was cut short by a kill is dropped."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step and all(type(value) in (int, float) for value in line.values()):
                lines.append(line)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            continue
    return lines


def _open_tensorboard(workdir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--config.train.tensorboard: needs tensorboardX; pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))
