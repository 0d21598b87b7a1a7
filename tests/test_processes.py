"""How processes find each other, with real ones."""

import contextlib
import http.server
import signal
import socket
import threading
from collections.abc import Iterator

import jax
import pytest

from decomp_jax import processes
from decomp_jax.errors import EXIT_USER_ERROR, UserError
from tests.conftest import finish, free_address, start_python

# Flags -> joins, and prints the processes, the visible GPUs and what all of them gathered.
JOIN = """
import argparse, sys
import jax
from decomp_jax import processes
from decomp_jax.errors import run_program
def main():
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    processes.join(parser.parse_args())
    gathered = processes.gather(f"process {jax.process_index()}")
    print(jax.process_count(), jax.config.values["jax_cuda_visible_devices"], gathered)
run_program(main)
"""
# The same with JAX_FORCE_TPU_INIT, on what JAX takes for a TPU VM, where it does not set this variable.
ON_TPU_VM = "import os, jax; del os.environ['TPU_SKIP_MDS_QUERY']\n" + JOIN
TOGETHER = "['process 0', 'process 1']"


def slurm(process: int, tasks: int, nodes: int) -> dict[str, str]:
    """The environment of a task of `srun`."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(process), "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": str(nodes),
    }


def outputs(*started) -> list[str]:
    ended = finish(*started)
    assert all(one.returncode == 0 for one in ended), ended
    return [one.stdout.splitlines()[-1] for one in ended]  # gloo prints, too


@pytest.mark.parametrize("nodes, gpus", [(2, "all"), (1, "0")])
def test_tasks_of_slurm_join(nodes, gpus):
    """The only task of a node has all its GPUs; of several, each has the one that JAX gives it."""
    port = free_address().partition(":")[2]
    tasks = [start_python("-c", JOIN, **slurm(i, 2, nodes), JAX_COORDINATOR_PORT=port) for i in range(2)]
    assert outputs(*tasks) == [f"2 {gpus} {TOGETHER}"] * 2


def test_the_only_task_of_slurm_is_alone():
    assert outputs(start_python("-c", JOIN, **slurm(0, 1, 1))) == ["1 all ['process 0']"]


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server, to one of two TPU hosts."""

    def do_GET(self) -> None:
        values = {"agent-worker-number": self.server.worker, "worker-network-endpoints": "localhost,localhost"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(values.get(self.path.rpartition("/")[2], "").encode())

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def metadata_server(worker: str) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        server.worker = worker
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}"
        server.shutdown()


def test_hosts_of_a_tpu_slice_join():
    """Found by the metadata server, with nothing in the environment that a user would set."""
    port = free_address().partition(":")[2]
    with metadata_server("0") as first, metadata_server("1") as second:
        tpu = {"JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": port}
        hosts = [start_python("-c", ON_TPU_VM, **tpu, GCE_METADATA_IP=address) for address in (first, second)]
        assert outputs(*hosts) == [f"2 all {TOGETHER}"] * 2
        alone = start_python("-c", ON_TPU_VM, "--distributed=off", **tpu, GCE_METADATA_IP=first)
        assert outputs(alone) == ["1 all ['process 0']"]


def test_without_a_cluster_a_process_is_alone():
    assert outputs(start_python("-c", JOIN)) == ["1 all ['process 0']"]


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_in_vain_says_so(process):
    job = (f"--coordinator={free_address()}", "--processes=2", f"--process={process}", "--join_timeout=1")
    [done] = finish(start_python("-c", JOIN, *job))
    assert done.returncode == EXIT_USER_ERROR and len(done.stderr.splitlines()) == 1, done
    assert "not all processes joined within 1 s" in done.stderr


def test_a_process_that_waits_answers_sigterm():
    with socket.create_server(("localhost", 0)) as mute:
        address = f"localhost:{mute.getsockname()[1]}"
        process = start_python("-c", JOIN, f"--coordinator={address}", "--processes=2", "--process=1")
        mute.settimeout(100)
        mute.accept()  # it has come to ask the coordinator
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert process.stderr.read() == ""


def test_a_signal_that_reaches_another_thread_is_answered():
    """Nothing interrupts the thread that waits then: what a signal at the very start of the wait does now and then."""
    taken_elsewhere = """
import jax, os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
def initialize(**_):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
jax.distributed.initialize = initialize
"""
    process = start_python("-c", taken_elsewhere + JOIN, "--coordinator=localhost:1", "--processes=2", "--process=1")
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("flags, says", [
    (("--coordinator=localhost", "--processes=2", "--process=1"), "joining the processes failed"),
    (("--coordinator=localhost:1", "--processes=2", "--process=2"), "joining the processes failed"),
    (("--coordinator=localhost:1", "--processes=2"), "give all three, or none"),
])
def test_mistaken_flags_are_told_in_a_line(flags, says):
    [done] = finish(start_python("-c", JOIN, *flags))
    assert done.returncode == EXIT_USER_ERROR and len(done.stderr.splitlines()) == 1 and says in done.stderr, done


def test_processes_that_are_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    flags = processes.argparse.Namespace(
        distributed="off", coordinator=None, processes=None, process=None, join_timeout=1
    )
    with pytest.raises(UserError, match="--distributed=off: this is one of 4 processes"):
        processes.join(flags)
