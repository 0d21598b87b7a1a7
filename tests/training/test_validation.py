import numpy as np
from tests.training.test_run import config_for

from decomp_jax.data.records import SliceDataset
from decomp_jax.mesh import data_mesh
from decomp_jax.retrieval import CodeBank
from decomp_jax.training import loop
from decomp_jax.training.state import create_state, make_optimizer
from decomp_jax.training.validation import Validation


def validate(phantom, monkeypatch, **train):
    """Metrics, and the rows of the reference split that were read."""
    config = config_for(phantom, **train)
    dataset = SliceDataset(str(phantom), "reference")  # two patients
    read = []
    stack = dataset.stack
    monkeypatch.setattr(dataset, "stack", lambda names, rows: read.extend(rows) or stack(names, rows))
    model = loop.make_model(config, dataset)
    state = create_state(config, model, make_optimizer(config.train), data_mesh())
    metrics = Validation(config, model, data_mesh(), dataset, lambda: None)(state)
    return metrics, np.unique(read), dataset.rows


def test_batches_do_not_matter(phantom, monkeypatch):
    """Nor do the rows that fill up the last one; Dice over the batch is the one term that looks beyond an image."""
    whole, read, rows = validate(phantom, monkeypatch, batch_size=64)
    padded, again, _ = validate(phantom, monkeypatch, batch_size=8)
    assert len(read) == len(again) == len(rows) and len(rows) % 8 > 1  # of one row alone the mean would not change
    for name in whole:
        if name not in ("val/term/soft_dice", "val/loss/total"):
            np.testing.assert_allclose(whole[name], padded[name], rtol=1e-4, err_msg=name)
    assert {"val/retrieval/normal_dice@5", "val/retrieval/abnormal_dice@5", "val/loss/total"} <= {*whole}


def test_so_many_slices_of_all_patients(phantom, monkeypatch):
    _, read, rows = validate(phantom, monkeypatch, batch_size=8, eval_slices=9)
    assert len(read) == 9 and {*rows["patient_id"][read]} == {*rows["patient_id"]}


def test_no_slice_is_found_by_its_own_patient(phantom, monkeypatch):
    paths = []
    search = CodeBank.search

    def seen(bank, *arguments, **options):
        hits, path = search(bank, *arguments, **options), "abnormal" if "abnormal" in options else "normal"
        patients = bank.rows["patient_id"]
        asks = patients[bank.rows["has_abnormality"]] if path == "abnormal" else patients
        assert ((patients[hits.rows] != asks[:, None]) | (hits.rows < 0)).all() and (hits.rows >= 0).any()
        paths.append(path)
        return hits

    monkeypatch.setattr(CodeBank, "search", seen)
    validate(phantom, monkeypatch, batch_size=8, eval_slices=24)
    assert sorted(paths) == ["abnormal", "normal"]
