import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import fake_devices

SCRIPT = Path(__file__).with_name("sharded_answers.py")
ROOT = Path(__file__).parents[2]


def start(out: Path, devices: int, *job: object) -> subprocess.Popen:
    environment = {**os.environ, **fake_devices(devices), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(out), *map(str, job)], env=environment)


def wait(*runs: subprocess.Popen) -> None:
    assert [run.wait(timeout=300) for run in runs] == [0] * len(runs)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("shards") / "one.npz"
    wait(start(out, 1))
    return dict(np.load(out))


def assert_same(out: Path, expected: dict[str, np.ndarray]) -> None:
    answers = dict(np.load(out))
    assert answers.keys() == expected.keys()
    for name, values in answers.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize("devices", [3, 8])
def test_same_answer_on_any_number_of_devices(devices: int, tmp_path: Path, one_device: dict[str, np.ndarray]) -> None:
    wait(start(tmp_path / "hits.npz", devices))
    assert_same(tmp_path / "hits.npz", one_device)


def test_same_answer_in_two_processes(tmp_path: Path, one_device: dict[str, np.ndarray]) -> None:
    """Each process reads its own half of the rows; both get the whole answer."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    outs = [tmp_path / f"{process}.npz" for process in range(2)]
    wait(*(start(out, 2, coordinator, 2, process) for process, out in enumerate(outs)))
    for out in outs:
        assert_same(out, one_device)
