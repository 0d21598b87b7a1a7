"""The processes of a run: how they find each other, and how they agree."""

import argparse
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from decomp_jax.errors import EXIT_USER_ERROR, UserError, tell

GRACE = 60  # seconds by which JAX waits longer than we do, because its own timeout ends in a stack trace
FLAGS = ("distributed", "coordinator", "processes", "process", "join_timeout")
ALONE = "--distributed=off runs one process alone"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `join`, the same for every program that several processes can run."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--distributed", choices=("auto", "off"), default="auto",
                       help="auto: join the other processes of a TPU slice, srun, mpirun or Kubernetes; off: run alone")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: address of process 0")
    group.add_argument("--processes", type=int, help="elsewhere: number of processes")
    group.add_argument("--process", type=int, help="elsewhere: index of this process")
    group.add_argument("--join_timeout", type=float, default=300, metavar="SECONDS",
                       help="give up waiting for the others after this time (default: %(default)s)")


def join(flags: argparse.Namespace) -> None:
    """Joins the processes of a run, before devices are used. A process that waits for the others ends at a signal.

    Raises UserError if only some of --coordinator, --processes and --process are given, or if this is one of several
    processes that were not joined.
    """
    address = {"coordinator_address": flags.coordinator, "num_processes": flags.processes, "process_id": flags.process}
    given = [value is not None for value in address.values()]
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes, --process: give all three, or none")
    if all(given):
        _initialize(flags.join_timeout, **address, cluster_detection_method="deactivate")
    elif flags.distributed == "auto" and not _only_task_of_slurm():
        _initialize(flags.join_timeout, local_device_ids=[] if one_task_a_node() else None)
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"--distributed={flags.distributed}: this is one of {jax.process_count()} processes that share "
                        "the devices, and they were not joined; use --distributed=auto or --coordinator in all of them")
    gather("")  # connects the devices while all processes are at the same place


def _only_task_of_slurm() -> bool:
    """Under Slurm outside of `srun`, or its only task. JAX would join it to itself and take one GPU."""
    return "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1


def one_task_a_node() -> bool:
    """Under `srun` with one task on each node, which then takes all GPUs of its node; JAX would take one."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    return tasks is not None and tasks == os.environ.get("SLURM_STEP_NUM_NODES")


def _initialize(timeout: float, **options: Any) -> None:
    """`jax.distributed.initialize`; returns without effect if it is to detect a cluster and there is none.

    Detection is JAX's own: the metadata server of Google's TPU hosts, GKE, Slurm, Open MPI, Kubernetes. Its public sign
    of "no cluster" is a ValueError that asks for the coordinator's address. The call can't be interrupted, so that it
    runs in a thread; this thread waits for it, where signals and the timeout are noticed. It waits by the second: a
    signal that comes as a wait begins, or to a thread of JAX's, does not end the wait.
    """
    failures: list[Exception] = []

    def connect() -> None:
        try:
            # The shutdown waits at most so long for processes that have failed.
            jax.distributed.initialize(
                initialization_timeout=int(timeout) + GRACE, shutdown_timeout_seconds=GRACE, **options
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    deadline = time.monotonic() + timeout
    try:
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(min(timeout, 1))
    except SystemExit as stop:
        os._exit(stop.code)
    if thread.is_alive():
        where = options.get("coordinator_address")
        tell(f"{f'--coordinator={where}' if where else '--distributed=auto'}: not all processes joined within "
             f"{timeout:g} s; start all with the same command, or wait longer with --join_timeout. {ALONE}")
        os._exit(EXIT_USER_ERROR)
    no_cluster = "cluster_detection_method" not in options and "coordinator_address" in "".join(map(str, failures))
    if failures and not no_cluster:
        tell(f"joining the processes failed: {failures[0]}. {ALONE}")
        os._exit(EXIT_USER_ERROR)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order. All processes must call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    padded = np.pad(data, (0, -(-size // 1024) * 1024 - len(data)))  # few sizes, so that little is compiled
    return [row.tobytes().rstrip(b"\0").decode() for row in multihost_utils.process_allgather(padded)]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block without communication, from which all processes go on or none: the error of one is raised in all.

    Raises UserError for an error of another process.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = gather("" if failure is None else f"{failure}" or type(failure).__name__)
    if failure is not None:
        raise failure
    for process, message in enumerate(messages):
        if message:
            raise UserError(f"in process {process}: {message}")


def require_equal(values: dict[str, Any]) -> None:
    """Raises UserError, in all processes, naming the first of these values in which one differs from process 0."""
    first, *others = map(json.loads, gather(json.dumps(values, default=str)))
    for process, other in enumerate(others, start=1):
        for name in first:
            if first[name] != other.get(name):
                raise UserError(
                    f"{name} differs: {first[name]} in process 0, {other.get(name)} in process {process}; start all "
                    "processes with the same command, code and data"
                )
