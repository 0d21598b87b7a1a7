"""A network made ready for images of another origin."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.signal import correlate
from skimage.measure import block_reduce

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.files import sealed
from decomp_jax.inference import adapt as module
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.mesh import data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.checkpoint import digest, restore_for_inference, write_exported
from decomp_jax.training.state import create_state, make_optimizer
from tests.inference.test_decomposer import CONFIG


def export(folder: Path, size: int) -> Path:
    """A network for phantoms of that size, of random parameters."""
    model = DecompositionNet(CONFIG.model, size=size, channels=1, lesion_classes=3)
    state = create_state(CONFIG, model, make_optimizer(CONFIG.train), data_mesh())
    arrays = {name: jax.device_get(getattr(state, name)) for name in ("params", "batch_stats", "codebook_stats")}
    arrays["codebook_stats"] = {path: dataclasses.asdict(stats) for path, stats in arrays["codebook_stats"].items()}
    settings = {"source": "phantom", "size": size}
    meta = {"config": CONFIG.to_dict(), "settings": settings, "data_digest": "d" * 64, "step": 7, "commit": "c0ffee",
            "digests": {name: digest(tree) for name, tree in arrays.items()}}
    folder.mkdir()
    write_exported(folder, arrays, meta)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> Path:
    folder = export(tmp_path_factory.mktemp("model") / "before", 64)
    meta = json.loads((folder / "meta.json").read_text())
    meta["settings"] = SliceDataset(phantom, "train").settings.to_json()
    (folder / "meta.json").write_text(json.dumps(sealed({name: meta[name] for name in meta if name != "digest"})))
    return folder


def test_statistics_are_those_of_the_images(model: Path, phantom: Path, tmp_path: Path, monkeypatch) -> None:
    """Those of the first normalisation, whose inputs SciPy computes: 5x5 kernel, bias, mean of 2x2 pixels."""
    monkeypatch.setattr(module, "BATCH_PER_DEVICE", 1)  # so that all images count, and alike
    module.adapt(model, phantom, tmp_path / "after", splits=["query", "reference"])
    before, after = (restore_for_inference(folder)[0] for folder in (model, tmp_path / "after"))
    images = [SliceDataset(phantom, split).stack(("image",))["image"] for split in ("query", "reference")]
    inputs, conv = np.concatenate(images)[..., 0].astype(np.float64), after["params"]["encoder"]["conv"]
    kernels = conv["kernel"][:, :, 0].transpose(2, 0, 1)[:, None]
    filtered = np.stack([correlate(inputs, kernel, "same") for kernel in kernels], -1) + conv["bias"]
    pooled = block_reduce(filtered, (1, 2, 2, 1), np.mean)
    first = after["batch_stats"]["encoder"]["normal_block_0"]["BatchNorm_0"]["BatchNorm_0"]
    np.testing.assert_allclose(first["mean"], pooled.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(first["var"], pooled.var((1, 2)).mean(0), rtol=1e-3, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])


def test_it_is_another_network_and_says_what_it_was_adapted_to(model: Path, phantom: Path, tmp_path: Path) -> None:
    module.adapt(model, phantom, tmp_path / "after", images=64)
    assert Decomposer.restore(tmp_path / "after").model_digest != Decomposer.restore(model).model_digest
    meta = json.loads((tmp_path / "after" / "meta.json").read_text())
    assert meta["adapted_to"]["data_digest"] == SliceDataset(phantom, "train").digest
    assert meta["data_digest"] == "d" * 64 and meta["adapted_to"]["patients"] == 10
    assert "Adapted without labels" in (tmp_path / "after" / "README.md").read_text()


def test_images_prepared_otherwise_are_refused(phantom: Path, tmp_path: Path) -> None:
    small = export(tmp_path / "before", 16)
    with pytest.raises(UserError, match="prepared with size=64, the network was trained on 16"):
        module.adapt(small, phantom, tmp_path / "after")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
