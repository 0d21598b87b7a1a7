import jax.numpy as jnp
import numpy as np
from tests.training.test_run import config_for

from decomp_jax.data.records import SliceDataset
from decomp_jax.mesh import data_mesh
from decomp_jax.training import loop, validation
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
    metrics = Validation(config, model, data_mesh(), dataset)(state)
    return metrics, np.unique(read), dataset.rows


def test_batches_do_not_matter(phantom, monkeypatch):
    whole, read, rows = validate(phantom, monkeypatch, batch_size=64)
    padded, again, _ = validate(phantom, monkeypatch, batch_size=7)
    assert len(read) == len(again) == len(rows)
    for name in whole:
        if "segmentation_dice" in name or "retrieval" in name:
            np.testing.assert_allclose(whole[name], padded[name], rtol=1e-5)
    assert {"val/retrieval/normal_dice@5", "val/retrieval/abnormal_dice@5", "val/loss/total"} <= {*whole}


def test_so_many_slices_of_all_patients(phantom, monkeypatch):
    _, read, rows = validate(phantom, monkeypatch, batch_size=8, eval_slices=9)
    assert len(read) == 9 and {*rows["patient_id"][read]} == {*rows["patient_id"]}


def test_padded_rows_do_not_count(monkeypatch):
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 3, (2, 6, 4, 4)).astype(np.uint8)
    valid = np.arange(6) < 4
    monkeypatch.setattr(
        validation, "_measure",
        lambda variables, batch, **_: ({"term/nothing": jnp.arange(6.0)}, {"predicted": jnp.asarray(predicted)}),
    )
    batch = {"label": jnp.asarray(label), "valid": jnp.asarray(valid)}
    sums, pixels, _ = validation._measure_valid({}, batch, model=None, config=None, classes=2)
    assert sums == {"term/nothing": 0 + 1 + 2 + 3}
    for c in (1, 2):
        a, b = label[:4] == c, predicted[:4] == c
        assert pixels[c - 1].tolist() == [(a & b).sum(), a.sum() + b.sum()]
