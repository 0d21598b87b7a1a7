"""The command: its one line, its end, what it refuses and what it leaves behind."""

import dataclasses
import gzip
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.room import serve
from tests.conftest import start_python
from tests.evaluation.fakes import FakeDecomposer
from tests.room.test_upload import body, scan

# A room of drawn heads, whose network is said to read scans.
PROGRAM = """
from decomp_jax.errors import run_program
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.room.serve import serve_room
from decomp_jax.room.session import Room
from tests.evaluation.fakes import FakeDecomposer, Heads
heads = Heads(2, 3, seed=0)
decomposer = FakeDecomposer(heads.settings)
bank = SliceSet.encode(decomposer, heads, "reference").bank
Room.warm_up = lambda self: []
run_program(lambda: serve_room(Room(decomposer, bank, heads, bank_digest=""), 0))
"""


def test_it_prints_an_address_ends_by_sigterm_and_leaves_nothing(tmp_path: Path) -> None:
    program = start_python("-c", PROGRAM, TMPDIR=str(tmp_path))
    try:
        address, token = program.stdout.readline().strip().split("/#")
        assert address.startswith("http://127.0.0.1:") and len(token) >= 43
        request = urllib.request.Request(f"{address}/api/bring", body([gzip.compress(scan())]), method="PUT", headers={
            "Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"})
        assert b'"slices": [2, 3, 4, 5, 6, 7]' in urllib.request.urlopen(request, timeout=200).read()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/api/about", timeout=200)
        assert b"Reading room" in urllib.request.urlopen(address, timeout=200).read()
        program.terminate()
        out, err = program.communicate(timeout=200)
    finally:
        program.kill()
    assert program.returncode == 143 and not out and "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_it_ends_while_it_is_laid_out(tmp_path: Path) -> None:
    """At once, but for the step that is under way."""
    program = start_python("-c", PROGRAM.replace("self: []", "self: [lambda: __import__('time').sleep(1)] * 600"))
    try:
        assert program.stdout.readline().startswith("http://127.0.0.1:")
        program.terminate()
        _, errors = program.communicate(timeout=200)
    finally:
        program.kill()
    assert program.returncode == 143, errors


def test_a_port_that_is_taken_is_told() -> None:
    with serve._listening(0) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=f"--port={port}: can't be listened on"):
            serve._listening(port)
    with pytest.raises(UserError, match="--port=99999"):
        serve._listening(99999)


@pytest.mark.parametrize(("model", "data", "message"), [
    ("other", None, "encoded by another network"), ("m" * 64, "gone", "gone: the data set is not there"),
])
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decomposer: FakeDecomposer, reference, model: str,
    data: str | None, message: str,
) -> None:
    monkeypatch.setattr(Decomposer, "restore", lambda workdir: decomposer)
    meta = {**reference.bank.meta, "model_digest": model}
    dataclasses.replace(reference.bank, meta=meta).save(tmp_path / "bank")
    with pytest.raises(UserError, match=message):
        serve.serve("run", tmp_path / "bank", data, 0)
