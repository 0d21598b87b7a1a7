"""Worker processes that end when they are told to, in the middle of whatever they do."""

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from decomp_jax.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def map_in_order(
    function: Callable[[Any], Any], items: Sequence[Any], *, workers: int, unit: str
) -> Iterator[tuple[Any, Any]]:
    """Yields (item, `function(item)` or the UserError it raised) in the order of `items`, with a progress bar.

    Workers are a few items ahead. Close the iterator to end them at once.

    Raises:
        UserError: a worker process died.
    """
    # Each worker has a pipe of its own and this thread is the only one to read it: nobody waits for a killed worker.
    processes: dict[Connection, BaseProcess] = {}
    try:
        with _signals_held():
            for _ in range(min(workers, len(items))):
                _start(function, processes)
        with tqdm(total=len(items), unit=unit, dynamic_ncols=True) as bar:
            for item, result in zip(items, _results(items, list(processes))):
                bar.update()
                yield item, result
    except (EOFError, ConnectionError) as error:
        raise UserError("--workers: a worker process died, likely for lack of memory; use fewer --workers") from error
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _start(function: Callable[[Any], Any], processes: dict[Connection, BaseProcess]) -> None:
    parent_end, child_end = multiprocessing.Pipe()
    with child_end:
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(child_end, function), daemon=True)
        processes[parent_end] = process
        process.start()


def _results(items: Sequence[Any], workers: Sequence[Connection]) -> Iterator[Any]:
    """Results in order; at most twice as many items as workers are under way or wait for their turn."""
    idle, running, finished = list(workers), {}, {}
    submitted = 0
    for i in range(len(items)):
        while True:
            while idle and submitted < min(len(items), i + 2 * len(workers)):
                idle[-1].send(items[submitted])
                running[idle.pop()] = submitted
                submitted += 1
            if i in finished:
                break
            for ready in connection.wait(list(running)):
                finished[running.pop(ready)] = ready.recv()
                idle.append(ready)
        result = finished.pop(i)
        if isinstance(result, Exception) and not isinstance(result, UserError):
            raise result
        yield result


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life: it ends when its parent does, at the latest after the item under way."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_call(function, pipe.recv()))


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is through; processes started in it never see them."""
    resource_tracker.ensure_running()  # would unblock them if it were started in between
    held = []
    handlers = {number: signal.signal(number, lambda number, _: held.append(number)) for number in _SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited; the signals may still reach other threads here
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in held:
        signal.raise_signal(number)
