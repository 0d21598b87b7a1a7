"""Run by test_two_processes.py, in two processes: what they do together, and what each is told when they differ.

    python two_processes.py PHANTOM RUN OUT --coordinator=... --processes=2 --process=I

RUN is the finished run of one process. Writes OUT/told-I.json, and what training and encoding leave.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import shutil
from pathlib import Path

import jax

from decomp_jax import processes
from decomp_jax.data.schema import content_digest
from decomp_jax.errors import UserError
from decomp_jax.inference.encode import encode_split
from decomp_jax.inference.search import search_banks
from decomp_jax.processes import gather
from decomp_jax.training import checkpoint, loop
from tests.training.conftest import shared_compilation
from tests.training.test_run import config_for

parser = argparse.ArgumentParser()
for name in ("phantom", "run", "out"):
    parser.add_argument(name, type=Path)
processes.add_flags(parser)
args = parser.parse_args()
processes.join(args)
second = jax.process_index() == 1
config = config_for(args.phantom, eval_every=8)
told = {}


def unfinished(name: str) -> Path:
    """A copy of the finished run that lacks its last file."""
    workdir = args.out / name
    if not second:
        shutil.copytree(args.run, workdir)
        (workdir / "done.json").unlink()
    gather("")
    return workdir


def attempt(name: str, config: object, workdir: Path) -> None:
    try:
        told[name] = loop.run(config, workdir)
    except UserError as error:
        told[name] = str(error)


def fail_in_second(error: Exception) -> None:
    """From now on process 1 can't read the state of step 8."""
    read = checkpoint._read_state

    def fails(folder: Path, *rest: object) -> object:
        if second and folder.name == "8":
            raise error
        return read(folder, *rest)

    checkpoint._read_state = fails


contextlib.ExitStack().enter_context(shared_compilation())
attempt("trained", config, args.out / "two")
for split in ("query", "reference"):
    encode_split(args.out / "two", args.phantom, split, args.out / split)
gather("")
search_banks(args.out / "reference", args.out / "query", by="both", k=5, out=args.out / "hits.csv", pairs=None,
             exclude_same_patient=False, one_per_patient=False)

seed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7))
attempt("settings", seed if second else config, args.out / "settings")

data = args.out / f"data-{second}"
shutil.copytree(args.phantom, data)
if second:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["settings"]["source"] = "elsewhere"
    (data / "manifest.json").write_text(json.dumps({**manifest, "digest": content_digest(manifest)}))
attempt("data", dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(data))), args.out / "data")

attempt("folders", config, args.out / f"folder-{jax.process_index()}")

attempt("no data", config_for(Path("/nowhere") if second else args.phantom), args.out / "none")


read = checkpoint._read_state
workdir = unfinished("unreadable")
fail_in_second(OSError(errno.ESTALE, "Stale file handle"))
attempt("unreadable", config, workdir)
checkpoint._read_state = read

workdir = unfinished("damaged")
fail_in_second(checkpoint.Damage("other bytes"))
attempt("damaged", config, workdir)
(args.out / f"told-{jax.process_index()}.json").write_text(json.dumps(told))
