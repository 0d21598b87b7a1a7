"""Our training step beside the same network, losses, augmentation and optimiser in PyTorch, and beside the chip's limits.

    python benchmarks/training.py [--cases configs/demo.py,64,16 ...] [--rounds 12] [--write docs/training.md]
    python benchmarks/training.py --one-core
    python benchmarks/training.py --check

A case is configuration, image side, batch. Both do the whole step: augmentation, forward, losses, backward, Adam,
codebooks, metrics. On a CPU (float32) the methods take turns in one process; on a GPU (the configuration's type) each
has the chip to itself, in processes that take turns, for two steps of 240 images would not fit beside each other.
`--one-core` takes the process's CPU time on one core, which other work on the machine hardly changes; PyTorch's threads
wait for each other so badly on a busy machine that times of the clock say nothing there.
`--check`, which every run begins with, loads our parameters into the peer and compares outputs, losses, gradients and
codebooks. Needs torch.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
ONE_CORE = "--one-core" in sys.argv
if ONE_CORE:  # before JAX and PyTorch count the cores
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import load_config, spread, write_measured
from torch_peer import Trainer, largest_differences, nchw

from decomp_jax.data.augment import augment
from decomp_jax.losses.objective import objective
from decomp_jax.mesh import data_mesh, keep_host_memory, replicated, sharded
from decomp_jax.models.convolution import convolve
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import create_state, make_optimizer
from decomp_jax.training.step import compile_train_step, update_codebooks
from decomp_jax.types import Outputs

keep_host_memory()  # as train.py does; PyTorch's memory is kept, too
ON_GPU = jax.default_backend() == "gpu"
DEVICE = "cuda" if ON_GPU else "cpu"
CASES = ("configs/brats.py,256,240",) if ON_GPU else (
    "configs/demo.py,64,16", "configs/demo.py,128,8", "configs/brats.py,256,2",
)
METHODS = ("ours", "torch eager", "torch.compile") if ON_GPU else ("ours", "torch eager")
STEPS = 10 if ON_GPU else 1  # a timing; a GPU runs ahead of the host
# Narrow convolutions of the two models: batch, side, channels in and out, taps.
NARROW = ((16, 64, 8, 8, 3), (16, 64, 16, 8, 3), (16, 64, 3, 8, 3), (16, 64, 8, 1, 5), (2, 256, 16, 16, 3))
now = time.process_time if ONE_CORE else time.perf_counter
Step = Callable[[], object]


class Case:
    """Model, configuration and a batch as it comes from the records."""

    def __init__(self, text: str) -> None:
        path, size, batch = text.split(",")
        self.text, self.size, self.batch = f"{path}, {size} px, batch {batch}", int(size), int(batch)
        config = load_config(path)
        if not ON_GPU:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
        self.config = config
        self.model = DecompositionNet(config.model, size=self.size, channels=1, lesion_classes=3)
        self.tx = make_optimizer(config.train)
        self.image, self.label = images(self.batch, self.size)

    def state(self) -> object:
        return create_state(self.config, self.model, self.tx, data_mesh())

    def compiled(self) -> jax.stages.Compiled:
        mesh = data_mesh()
        step = compile_train_step(self.model, self.tx, self.config, mesh)
        batch = {"image": self.image, "label": self.label}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded(mesh)), batch)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), jax.eval_shape(self.state)
        )
        return step.lower(state, shapes).compile()

    def trainer(self, compiled: bool = False) -> Trainer:
        autocast = self.config.model.dtype == "bfloat16"
        return Trainer(self.model, self.config, DEVICE, compiled=compiled, autocast=autocast)

    def method(self, name: str) -> Step:
        """A step on a batch that is on the device already; its result waits for the device when asked for."""
        if name == "ours":
            step, state = self.compiled(), self.state()
            batch = jax.device_put({"image": self.image, "label": self.label}, sharded(data_mesh()))

            def ours() -> object:
                nonlocal state
                state, metrics = step(state, batch)
                return metrics["loss/total"]

            return ours
        trainer = self.trainer(name == "torch.compile")
        image, label = nchw(self.image).to(DEVICE), torch.from_numpy(self.label).to(DEVICE)
        return lambda: trainer.step(image, label)["total"]


def convolution_of_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def images(n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Float16 images [n,S,S,1]: bright discs with a lesion in every other; and labels uint8 [n,S,S]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size - 0.5
    radius = np.hypot(y, x)
    image = np.where(radius < 0.4, 0.3 + 0.3 * rng.random((n, size, size)), 0)
    lesion = np.hypot(y - 0.1, x + 0.1)
    label = np.select([lesion < 0.03, lesion < 0.06, lesion < 0.1], [1, 3, 2], 0) * (np.arange(n) % 2)[:, None, None]
    image = np.where(label > 0, image + 0.1 * label, image)
    return image[..., None].astype(np.float16), label.astype(np.uint8)


def measure(case: Case, methods: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds a step, a round each; methods take turns."""
    steps = {name: case.method(name) for name in methods}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for i in range(rounds + 2):
        for name, step in steps.items():
            time.sleep(0.05)  # the other's threads stop spinning
            start = now()
            for _ in range(STEPS):
                result = step()
            float(result)
            if i >= 2:  # the first rounds compile and warm up
                times[name].append((now() - start) / STEPS)
    return times


def measure_apart(text: str, rounds: int, repeats: int = 3) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name in METHODS:
            command = [sys.executable, __file__, "--cases", text, "--rounds", str(-(-rounds // repeats)), "--only", name]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            times[name] += json.loads(run.stdout)
    return times


def ceilings(dtype: str) -> tuple[float, float]:
    """FLOP/s of a product of matrices, and bytes/s of copying a long array, on this device now."""
    side, length = (8192, 1 << 29) if ON_GPU else (2048, 1 << 26)
    a = jnp.ones((side, side), dtype)
    x = jnp.zeros(length, jnp.float32)
    multiply, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1)

    def best(work: Callable[[], jax.Array]) -> float:
        times = []
        for _ in range(6):
            start = now()
            work().block_until_ready()
            times.append(now() - start)
        return min(times)

    return 2 * side**3 / best(lambda: multiply(a)), 8 * length / best(lambda: copy(x))


def limits(case: Case, seconds: float) -> str:
    cost = case.compiled().cost_analysis()
    rate, bandwidth = ceilings(case.config.model.dtype)
    compute, memory = cost["flops"] / rate, cost["bytes accessed"] / bandwidth
    return (
        f"| {case.text} | {cost['flops'] / 1e9:.1f} | {cost['bytes accessed'] / 1e9:.2f} | {rate / 1e9:,.0f} | "
        f"{bandwidth / 1e9:.1f} | {compute * 1e3:.1f} | {memory * 1e3:.1f} | {seconds * 1e3:.1f} | "
        f"{max(compute, memory) / seconds:.0%} |"
    )


def median_seconds(work: dict[str, Step], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, part in work.items():
            start = now()
            jax.block_until_ready(part())
            if i:  # the first compiles
                times[name].append(now() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def pieces(case: Case, rounds: int) -> dict[str, float]:
    """Seconds (median) of the step's parts, each compiled alone; the backward pass is what the gradient adds."""
    config, model, state = case.config, case.model, case.state()
    key, step = jax.random.key(0), jnp.int32(0)
    batch = {"image": jnp.asarray(case.image, jnp.float32), "label": jnp.asarray(case.label, jnp.int32)}
    augmented = jax.jit(lambda batch: augment(key, batch, config.augment))
    image, targets = augmented(batch)

    def forward(params: dict) -> Outputs:
        variables = {"params": params, "batch_stats": state.batch_stats}
        return model.apply(variables, image, quantised=1.0, train=True, mutable=["batch_stats"])[0]

    def losses(outputs: Outputs) -> jax.Array:
        return objective(outputs, targets, config.objective,
                         nothing=bool(config.model.nothing_threshold))[0]

    forward_jit, losses_jit = jax.jit(forward), jax.jit(losses)
    gradient = jax.jit(jax.value_and_grad(lambda params: losses(forward(params))))
    outputs, (_, gradients) = forward_jit(state.params), gradient(state.params)
    quantise = jax.jit(lambda params, latents: model.apply({"params": params}, latents, method="quantize"))
    adam = jax.jit(case.tx.update)
    books = jax.jit(lambda params, stats: update_codebooks(key, params, stats, outputs, targets, step, config))
    work: dict[str, Step] = {
        "augmentation": lambda: augmented(batch),
        "forward": lambda: forward_jit(state.params),
        "of which nearest codes": lambda: quantise(state.params, outputs.latents),
        "losses": lambda: losses_jit(outputs),
        "forward, losses and backward": lambda: gradient(state.params),
        "Adam": lambda: adam(gradients, state.opt_state, state.params),
    }
    if config.model.codebook_decay:
        work["codebooks"] = lambda: books(state.params, state.codebook_stats)
    return median_seconds(work, rounds)


def narrow_convolutions(rounds: int) -> Iterator[str]:
    """Lines of our convolutions of few channels and XLA's own, milliseconds: forward, and gradient of the input."""
    for shape in NARROW:
        batch, side, inputs, outputs, taps = shape
        x, kernel = jnp.ones((batch, side, side, inputs)), jnp.ones((taps, taps, inputs, outputs))
        result, found = jnp.ones((batch, side, side, outputs)), []
        for convolution in (convolution_of_xla, convolve):
            forward = jax.jit(convolution)
            backward = jax.jit(lambda x, kernel, result, f=convolution: jax.vjp(lambda x: f(x, kernel), x)[1](result))
            for work in (lambda: forward(x, kernel), lambda: backward(x, kernel, result)):
                found.append(median_seconds({"": work}, rounds)[""] * 1e3)
        cells = " | ".join(f"{value:.2f}" for value in (found[0], found[2], found[1], found[3]))
        yield f"| {batch} x {side} px, {inputs} to {outputs}, {taps}x{taps} | {cells} |"


def report(texts: list[str], rounds: int) -> Iterator[str]:
    path, size, _ = texts[0].split(",")
    case = Case(f"{path},{size},4")
    config = case.config.replace({"model.dtype": "float32", "model.revive_below": 0.0})
    model = case.model.clone(config=config.model)
    differences = largest_differences(config, model, case.state(), case.image.astype(np.float32), case.label.astype(np.int32))
    told = ", ".join(f"{what} {value:.0e}" for what, value in differences.items())
    yield f"The peer is the same network: largest differences, as a share of the largest value compared: {told}."
    if max(differences.values()) > 5e-3:  # Flax's variance in one pass loses digits where a channel's mean is far from 0
        raise SystemExit(f"the peer differs from ours: {told}")
    if rounds == 0:
        return
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    cores = "CPU time of one core" if ONE_CORE else f"{os.cpu_count()} cores"
    yield (f"\n{device}, {cores}, jax {jax.__version__}, torch {torch.__version__}, load "
           f"{os.getloadavg()[0]:.1f} at the start; medians (quartiles) of {rounds} rounds.")
    yield "\n| case | method | images/s | time over ours |\n|---|---|---|---|"
    steps = {}
    for text in texts:
        case = Case(text)
        times = measure_apart(text, rounds) if ON_GPU else measure(case, METHODS, rounds)
        steps[text] = float(np.median(times["ours"]))
        for name, values in times.items():
            ratios = np.divide(values, times["ours"])
            yield f"| {case.text} | {name} | {case.batch / np.median(values):.1f} | {spread(ratios)} |"
    yield ("\n| case | GFLOP a step | GB a step | matmul GFLOP/s | copy GB/s | compute floor ms | memory floor ms | "
           "step ms | share of the floor |\n|---|---|---|---|---|---|---|---|---|")
    for text, seconds in steps.items():
        yield limits(Case(text), seconds)
    yield f"\nParts of {Case(texts[0]).text}, each compiled alone:\n\n| part | ms |\n|---|---|"
    for name, seconds in pieces(Case(texts[0]), rounds).items():
        yield f"| {name} | {seconds * 1e3:.1f} |"
    if not ON_GPU:
        yield ("\nConvolutions of few channels, ms:\n\n| convolution | forward: XLA | ours | gradient of the input: XLA | "
               "ours |\n|---|---|---|---|---|")
        yield from narrow_convolutions(rounds)
    yield f"\nLoad at the end: {os.getloadavg()[0]:.1f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="configuration,side,batch")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--one-core", action="store_true", help="CPU time of one core")
    parser.add_argument("--check", action="store_true", help="only compare the peer with ours")
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps(measure(Case(flags.cases[0]), (flags.only,), flags.rounds)[flags.only]))
        return
    lines = []
    for line in report(flags.cases, 0 if flags.check else flags.rounds):
        print(line, flush=True)
        lines.append(line)
    if flags.write:
        write_measured(flags.write, "step on one core" if flags.one_core else "step", lines)


if __name__ == "__main__":
    main()
