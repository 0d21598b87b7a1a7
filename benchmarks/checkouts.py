"""The training step of this checkout beside that of another one, say of an earlier commit.

    git worktree add /tmp/before 71111ea && python benchmarks/checkouts.py /tmp/before [--rounds 21]

Two processes take turns, ten steps of `configs/demo.py` each. Prints the ratio of their times, ours to the other's.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent.parent
# Only what both checkouts have; run in the folder of each.
STEPS = """
import importlib.util, sys, time
sys.path.insert(0, "")
from decomp_jax.mesh import data_mesh, keep_host_memory
keep_host_memory()
import jax.numpy as jnp, numpy as np
from decomp_jax.config import Config
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import create_state, make_optimizer
from decomp_jax.training.step import compile_train_step

spec = importlib.util.spec_from_file_location("demo", "configs/demo.py")
spec.loader.exec_module(demo := importlib.util.module_from_spec(spec))
config = Config.from_dict(demo.get_config().to_dict())
model = DecompositionNet(config.model, size=64, channels=1, lesion_classes=3)
tx, mesh = make_optimizer(config.train), data_mesh()
state, train_step = create_state(config, model, tx, mesh), compile_train_step(model, tx, config, mesh)
rng = np.random.default_rng(0)
y, x = np.mgrid[:64, :64] / 64 - 0.5
radius = np.hypot(y - 0.1, x + 0.1)
lesion = np.select([radius < 0.03, radius < 0.06, radius < 0.1], [1, 3, 2], 0)
image = np.where(np.hypot(y, x) < 0.4, 0.3 + 0.3 * rng.random((16, 64, 64)), 0)
batch = {"image": jnp.asarray(image[..., None], jnp.float16),
         "label": jnp.asarray(lesion * (np.arange(16) % 2)[:, None, None], jnp.uint8)}
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(10):
        state, metrics = train_step(state, batch)
    float(metrics["loss/total"])
    print((time.perf_counter() - start) / 10, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    ours, other = (
        subprocess.Popen([sys.executable, "-c", STEPS], cwd=folder, text=True, **pipes) for folder in (HERE, args.other)
    )

    def timed(process: subprocess.Popen) -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    for process in (ours, other):
        timed(process)  # compiles
    times = np.array([
        (timed(ours), timed(other)) if i % 2 else (timed(other), timed(ours))[::-1] for i in range(args.rounds)
    ])
    for process in (ours, other):
        process.stdin.close()
        process.wait()
    low, median, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75])
    milliseconds = np.median(times, axis=0) * 1e3
    print(f"{milliseconds[0]:.0f} ms, the other {milliseconds[1]:.0f} ms: {median:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
