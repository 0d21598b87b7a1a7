"""Two real processes: how they join, agree, and stop."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from decomp_jax.errors import EXIT_UNFINISHED, EXIT_USER_ERROR
from decomp_jax.inference.encode import encode_split
from decomp_jax.inference.search import search_banks
from decomp_jax.retrieval import CodeBank
from decomp_jax.training import loop
from decomp_jax.training.checkpoint import restore_for_inference
from tests.conftest import FAST_COMPILE, finish, free_address, start_python
from tests.training.test_run import assert_same_run, config_for, done

SCRIPT = Path(__file__).with_name("two_processes.py")


def start_two(*command: object) -> list[subprocess.Popen]:
    job = (*command, f"--coordinator={free_address()}", "--processes=2")
    return [start_python(*job, f"--process={i}", XLA_FLAGS=FAST_COMPILE) for i in range(2)]


@pytest.fixture(scope="module")
def two(phantom, finished, tmp_path_factory):
    """The folder of what two processes did together."""
    out = tmp_path_factory.mktemp("two")
    for ended in finish(*start_two(SCRIPT, phantom, finished, out)):
        assert ended.returncode == 0, ended.stderr
    return out


def told(folder: Path, what: str) -> list[str | bool]:
    """What each process was told."""
    return [json.loads((folder / f"told-{process}.json").read_text())[what] for process in range(2)]


def test_two_processes_train_as_one(two, finished):
    assert told(two, "trained") == [True, True]
    assert_same_run(two / "two", finished)


def test_two_processes_encode_and_search_as_one(two, phantom, tmp_path):
    for split in ("query", "reference"):
        encode_split(two / "two", phantom, split, tmp_path / split)
        by_two, by_one = (CodeBank.load(folder / split, verify=True) for folder in (two, tmp_path))
        for name in ("normal_indices", "abnormal_indices", "normal_codebook", "abnormal_codebook", "rows"):
            np.testing.assert_array_equal(getattr(by_two, name), getattr(by_one, name))
    search_banks(tmp_path / "reference", tmp_path / "query", by="both", k=5, out=tmp_path / "hits.csv", pairs=None,
                 exclude_same_patient=False, one_per_patient=False)
    assert (two / "hits.csv").read_text() == (tmp_path / "hits.csv").read_text()


@pytest.mark.parametrize("what, says", [
    ("settings", "--config.train.seed differs: 0 in process 0, 7 in process 1"),
    ("data", "the content of --config.data.dir differs: "),
    ("folders", "/folder-1: is another folder than process 0's; name one that all share"),
    ("no data", "/nowhere/manifest.json: not found"),
    ("unreadable", "8: can't be read now ([Errno 116] Stale file handle); it is left as it is"),
])
def test_both_are_told_before_the_first_step(two, what, says):
    assert all(says in line for line in told(two, what)), told(two, what)
    assert not list((two / what.replace(" ", "-")).glob("checkpoints/*.damaged"))
    if what == "unreadable":
        assert restore_for_inference(two / what)[1]["step"] == 8


def test_damage_that_one_process_sees_sends_both_to_the_older_checkpoint(two, finished):
    assert told(two, "damaged") == [True, True]
    names = {path.name for path in (two / "damaged" / "checkpoints").iterdir()}
    assert names == {"4", "8", "8.damaged"}
    assert_same_run(two / "damaged", finished)


def test_one_process_goes_on_from_a_checkpoint_of_two(two, phantom, finished):
    (two / "two" / "done.json").unlink()
    (two / "two" / "checkpoints" / "8").rename(two / "two" / "checkpoints" / "8.damaged")
    assert loop.run(config_for(phantom, eval_every=8), two / "two")
    assert_same_run(two / "two", finished)
    assert done(two / "two")["steps"] == 8


def demo(phantom: Path, workdir: Path) -> tuple[str, ...]:
    return ("train.py", "--config=configs/demo.py", f"--config.data.dir={phantom}", f"--workdir={workdir}",
            "--config.model.widths=(4,4)", "--config.model.own_blocks=0", "--config.train.eval_every=0",
            "--config.train.log_every=1", "--config.train.batch_size=4", "--config.model.spade_width=4",
            "--config.model.full_resolution_block=False", "--config.augment.rotation=0", "--config.augment.scale=0",
            "--config.augment.transplant=0", "--config.augment.intensity=0")


def test_refused_programs_end(phantom, tmp_path):
    """To the exit of the programs: nobody waits for the other."""
    (tmp_path / "bank").mkdir()
    command = ("evaluate.py", "encode", f"--workdir={tmp_path}", f"--data={phantom}", f"--out={tmp_path}/bank")
    for ended in finish(*start_two(*command, "--split=query")):
        assert ended.returncode == EXIT_USER_ERROR, ended.stderr
        assert "bank: exists already" in ended.stderr.strip().splitlines()[-1]


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(phantom, tmp_path):
    """As a cluster does that takes back one host."""
    processes = start_two(*demo(phantom, tmp_path))
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert all(process.poll() is None for process in processes), finish(*processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(*processes)
    assert [one.returncode for one in ended] == [EXIT_UNFINISHED] * 2, ended
    assert f"stopped by a signal at step {restore_for_inference(tmp_path)[1]['step']};" in ended[0].stderr
