"""metrics.jsonl: a flushed line per logged step, each step once; TensorBoard beside it on request."""

import json
import math
import os
from pathlib import Path
from typing import Any

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


class MetricWriter:
    """Appends to WORKDIR/metrics.jsonl, in process 0. On a resumed run lines after `start_step` are dropped first.

    Raises UserError if the disk is full.
    """

    def __init__(self, workdir: Path, start_step: int, *, tensorboard: bool = False) -> None:
        self._path = Path(os.devnull)
        if jax.process_index() == 0:
            self._path = workdir / "metrics.jsonl"
            with replacing(self._path) as file:
                file.write_text("".join(_lines_up_to(self._path, start_step)))
        self._file = self._path.open("a")
        self._board = _open_tensorboard(workdir) if tensorboard and jax.process_index() == 0 else None

    def write(self, step: int, values: dict[str, float]) -> None:
        with disk_space(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Panels [B,S,S,1] in [0,1], for TensorBoard alone."""
        if self._board:
            for name, panel in images.items():
                self._board.add_images(name, np.clip(panel, 0, 1), step, dataformats="NHWC")

    def close(self) -> None:
        with disk_space(self._path):
            self._file.close()
        if self._board:
            self._board.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of steps up to `step`; a line that was cut short by a kill is dropped."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    return kept


def _open_tensorboard(workdir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--config.train.tensorboard: needs tensorboardX; pip install 'decomp-jax[tensorboard]'"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))
