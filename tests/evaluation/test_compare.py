"""Several runs measured alike: the differences against those of the runs themselves."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from decomp_jax.errors import UserError
from decomp_jax.evaluation import compare
from decomp_jax.evaluation.tables import Summary
from decomp_jax.inference.decomposer import Decomposition
from tests.evaluation.fakes import FakeDecomposer, Heads

STEP = 7


class Blind(FakeDecomposer):
    """Sees no lesion in the right half of the image."""

    def decompose(self, images: np.ndarray) -> Decomposition:
        halved = np.array(images)
        half = images.shape[2] // 2
        halved[:, :, half:] = np.where(halved[:, :, half:] > 0, 0.6, 0)
        seen, whole = super().decompose(halved), super().decompose(images)
        return dataclasses.replace(whole, segmentation=seen.segmentation, abnormal_indices=seen.abnormal_indices)


@pytest.fixture(scope="module")
def compared(heads: dict[str, Heads], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    networks = {"sees": FakeDecomposer, "blind": Blind}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SliceDataset", lambda data, split: heads["reference"])
        patch.setattr(compare.Decomposer, "restore", lambda run: _restored(networks[Path(run).name], heads))
        compare.compare_runs([out / name for name in networks], "data", out)
    return out


def _restored(kind: type[FakeDecomposer], heads: dict[str, Heads]) -> FakeDecomposer:
    network = kind(heads["reference"].settings)
    network.step = STEP
    return network


def test_all_runs_are_measured_alike(compared: Path) -> None:
    with (compared / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    values = {(line["run"], line["measure"]): line for line in lines}
    assert len(lines) == 2 * len(compare.MEASURES) and {line["step"] for line in lines} == {str(STEP)}
    for measure in compare.PAIRED:
        sees, blind = (float(values[run, measure]["mean"]) for run in ("sees", "blind"))
        assert values["sees", measure]["difference"] in ("", None)
        assert float(values["blind", measure]["difference"]) == pytest.approx(blind - sees, abs=1e-9)
    for measure in ("segmentation Dice", "whole lesion by abnormal code"):
        assert float(values["blind", measure]["difference"]) < 0
    assert float(values["blind", "anatomy by normal code"]["difference"]) == 0


def test_table_and_figure(compared: Path) -> None:
    text = (compared / "comparison.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| run", "| sees", "| blind", "| minus sees", "| blind"]
    assert len({len(row) for row in rows[:3]}) == len({len(row) for row in rows[3:]}) == 1
    assert (compared / "comparison.png").stat().st_size > 10_000


def test_seeds_of_a_variant_are_averaged() -> None:
    def result(name: str, dice: float) -> compare.Result:
        key = compare.PAIRED["segmentation Dice"]
        return compare.Result(name, STEP, Summary({key: dice}, {key: np.full(10, dice)}), {})

    results = [result("ours-0", 0.2), result("ours-1", 0.4), result("no-layout-0", 0.1)]
    assert {name: len(runs) for name, runs in compare.group_seeds(results).items()} == {"ours": 2, "no-layout": 1}
    assert "| ours | 0.300 (0.200 to 0.400) |" in compare.markdown(results)
    assert "seeds" not in compare.markdown(results[1:])


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run, run: two folders of one name"):
        compare.compare_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"], "data", tmp_path)


def test_labels_of_other_classes_are_refused(
    heads: dict[str, Heads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = FakeDecomposer(dataclasses.replace(heads["reference"].settings, lesion_classes=("ED", "NCR")))
    monkeypatch.setattr(compare, "SliceDataset", lambda data, split: heads["reference"])
    monkeypatch.setattr(compare.Decomposer, "restore", lambda run: network)
    with pytest.raises(UserError, match="data: its lesion classes are NCR, ED, the network's ED, NCR"):
        compare.compare_runs([tmp_path / "run"], "data", tmp_path)
