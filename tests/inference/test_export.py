"""The model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from decomp_jax.config import Config
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.inference.export import model_card
from decomp_jax.training.checkpoint import restore_for_inference
from tests.conftest import ROOT

NONE = {"mean": 0.25, "low": None, "high": None}
SOME = {"mean": 0.5, "low": 0.4, "high": 0.6}


def card(name: str = "model", *, reports: int = 1, failures: str | None = None, **changes: Any) -> str:
    settings = Settings("phantom", 64, lesion_classes=("NCR", "<script>"))
    counts = {"patients": 12, "slices": 1234, "with a lesion": 600}
    data = {"patients": 20, "slices": 2000, "splits": {"train": counts}, "source": {"seed": 3}}
    meta = {
        "config": Config().to_dict(), "settings": settings.to_json(), "data_digest": "d" * 64, "step": 10_000,
        "commit": "c0ffee", "data": data,
    }
    dice = {"normal": {"dice@5": SOME}, "abnormal": {"dice@5": NONE, "whole_dice@5": NONE}}
    methods = ("normal", "abnormal", "normal_relative", "pixel_l2", "random", "oracle_normal", "oracle_abnormal", "oracle_whole")
    metrics = {
        "protocol": {"queries": counts, "references": counts, "reference split": "reference"},
        "provenance": {"data_digest": "d" * 64, "settings": settings.to_json()}, "abnormality": {}, "counterfactual": {},
        "retrieval": dict.fromkeys(methods, dice), "segmentation": {"dice": {"whole lesion": SOME}},
    }
    other = metrics | {
        "protocol": metrics["protocol"] | {"reference split": "others", "slab mm": 4.0},
        "provenance": {"data_digest": "a" * 64, "settings": Settings("brats", 64).to_json()},
        "segmentation": {"dice": {"whole lesion": NONE}, "lesion-free slices with a finding": SOME},
    }
    return model_card(name, meta | changes, [metrics, other][:reports], failures)


@pytest.mark.parametrize("change", [{"step": None}, {"settings": []}, {"digests": {}}, {"config": {"model": {}}}])
def test_an_edited_meta_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(ROOT / "models" / "phantom64", tmp_path / "model")
    meta = tmp_path / "model" / "meta.json"
    text = json.loads(meta.read_text())
    for edited in (text | change, {name: value for name, value in text.items() if name not in change}, [text]):
        meta.write_text(json.dumps(edited))
        with pytest.raises(UserError, match="model/meta.json: .*; "):
            restore_for_inference(tmp_path / "model")


def test_numbers_have_their_intervals_or_say_why_not() -> None:
    text = card()
    assert "| anatomy Dice@5 by normal code | 0.500 (0.400 to 0.600) | 0.500 (" in text
    assert text.count("| the same as queries are ranked | 0.500 (0.400 to 0.600) |") == 1
    assert "0.250 (too few patients)" in text and "None" not in text
    assert "1,234 slices of 12 patients asked,\n1,234 slices of 12 patients searched." in text
    assert f"### phantom `{'d' * 16}`: held-out patients of the data" in text
    assert "| Dice of the lesion that it draws | 0.50 (0.40 to 0.60) | | 1 |" in text and "in which it draws" not in text
    assert "10,000 steps" in text and "from scratch" in text and "commit c0ffee" in text and "seed=3" in text


def test_each_report_has_its_table() -> None:
    first, second = card(reports=2, failures="failures.png").split(f"### brats `{'a' * 16}`: other data")
    assert "12 patients asked,\neach patient among the others. Means" in second and "searched" not in second
    assert "in which it draws one | 0.50 (0.40 to 0.60) | | 0 |" in second and "in which it draws one" not in first
    assert "![Failures" in second and "](failures.png)" in second and f"Where it fails (phantom `{'d' * 16}`)" in second
    assert "Failures" not in card(reports=2)


def test_how_scans_were_prepared_is_said_where_it_is_not_as_ever() -> None:
    settings = Settings("volumes", 64, ("CT",), "window", (-100.0, 250.0), field_mm=400.0, plane="coronal")
    line = "64x64 pixels, CT, values from -100.0 to 250.0, a field of 400.0 mm, coronal slices. It refuses"
    assert line in card(settings=settings.to_json())
    assert "64x64 pixels, t1ce. It refuses" in card()


def test_a_run_that_started_from_another_says_so() -> None:
    config = Config().to_dict()
    config["train"]["init_from"] = "/somewhere/models/first"
    before = {"step": 500, "data_digest": "e" * 64, "commit": "babe"}
    text = " ".join(card(config=config, started_from=before).split())
    assert f"from the parameters of first (500 steps on data `{'e' * 16}`, commit babe)" in text
    assert "/somewhere" not in text


def test_slabs_are_named_where_codes_are_of_them() -> None:
    assert [card(reports=reports).count("a deviation of 4 mm") for reports in (1, 2)] == [0, 1]


def test_names_are_text() -> None:
    assert "<script" not in card("<script>")


def test_an_adapted_network_says_to_what_and_that_it_was_not_measured() -> None:
    adapted = {"slices": 1_280, "patients": 9, "splits": ["train", "query"], "data_digest": "a" * 64}
    text = card(reports=0, adapted_to=adapted)
    assert f"1,280 slices of\n  9 patients (train, query; digest `{'a' * 16}`)" in text
    assert "\n\n## What was measured\n\nNothing yet" in text and "Dice@5" not in text
