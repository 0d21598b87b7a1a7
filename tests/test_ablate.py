"""The launcher, with a stand-in for train.py."""

import time
from pathlib import Path

import pytest

from decomp_jax import ablate
from decomp_jax.errors import EXIT_FAULT, UserError
from tests.conftest import ROOT

# Ends well, fails, or waits to be stopped, by the name of the variant; says which flags it got.
TRAIN = """
import signal, sys, time
from pathlib import Path
flags = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[1:])
workdir = Path(flags["workdir"])
print(sys.argv[1:], flush=True)
if flags["config"].endswith(":no_layout"):
    sys.exit("a fault")
if flags["config"].endswith("no_revival"):
    signal.signal(signal.SIGTERM, lambda *_: ((workdir / "saved").touch(), sys.exit(75)))
    (workdir / "ready").touch()
    time.sleep(60)
(workdir / "done.json").write_text("{}")
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    compared = []
    monkeypatch.setattr(ablate, "compare_runs", lambda runs, data, out: (
        compared.extend(path.name for path in runs), (out / "comparison.md").write_text("the table\n")
    ))

    def start(*flags: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["ablate", "--data=D", "--out=runs", f"--config={ROOT}/configs/demo.py", *flags])
        ablate.main()
        return compared

    return start


def test_every_variant_is_trained_alike_and_compared(launch, tmp_path: Path, capsys) -> None:
    names = ["recommended", "paper_sane+nothing", "no_warmup"]
    assert launch(f"--variants={','.join(names)}", "--jobs=2", "--config.train.steps=9") == names
    for name in names:
        log = (tmp_path / "runs" / name / "train.log").read_text()
        assert f"configs/demo.py:{name}" in log and "--config.train.steps=9" in log
    assert capsys.readouterr().out == "the table\n"


def test_seeds_are_runs_of_their_own(launch, tmp_path: Path) -> None:
    assert launch("--variants=recommended,no_warmup", "--seeds=0,3") == [
        "recommended-0", "recommended-3", "no_warmup-0", "no_warmup-3"
    ]
    assert "--config.train.seed=3" in (tmp_path / "runs" / "no_warmup-3" / "train.log").read_text()


def test_a_failed_variant_is_named_and_the_others_compared(launch, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        launch("--variants=no_layout,recommended")
    assert stop.value.code == EXIT_FAULT
    assert "no_layout: not trained to its end; see runs/no_layout/train.log" in capsys.readouterr().err
    assert "a fault" in (tmp_path / "runs" / "no_layout" / "train.log").read_text()
    assert (tmp_path / "runs" / "comparison.md").exists()


def test_stopped_the_launcher_stops_its_trainings(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "runs" / "no_revival" / "ready"

    def stop_when_ready(seconds: float) -> None:
        sleep(seconds)
        if ready.exists():
            raise SystemExit(143)

    sleep = time.sleep
    monkeypatch.setattr(ablate.time, "sleep", stop_when_ready)
    with pytest.raises(SystemExit):
        launch("--variants=no_revival")
    assert (ready.parent / "saved").exists() and not (tmp_path / "runs" / "comparison.md").exists()


def test_jobs_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert [ablate._devices(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["0,2", "1,3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert ablate._devices(1, 2) == {}


@pytest.mark.parametrize("flag, says", [
    ("--variants=no_such", "no_such: no such name"), ("--variants=codebook_2048", "changes nothing here"),
    ("--jobs=0", "must be at least 1"), ("--weights=x", "not a flag"), ("--variants=no_layout,no_layout", "there twice"),
    ("--config.model.codebook_size=9", "the variants differ in it"), ("--config=x.py", "no configuration file"),
    ("--config.model.size=9", "config.model.size: no such setting"),
])
def test_mistaken_flags(launch, capsys, flag: str, says: str) -> None:
    variants = ["--variants=recommended,codebook_512"] if "--variants" not in flag else []
    with pytest.raises((SystemExit, UserError)) as stop:
        launch(*variants, flag)
    assert says in capsys.readouterr().err + str(stop.value)
