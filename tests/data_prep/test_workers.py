import contextlib
import multiprocessing
import threading
import time

import pytest

from data_prep.workers import map_in_order
from decomp_jax.errors import UserError

MEGABYTES = 64


def halved(number: int) -> float:
    time.sleep(0.05 * (number % 3))
    if number == 4:
        raise UserError("4: no use")
    if number == 7:
        raise ZeroDivisionError
    return number / 2


def blob(number: int) -> bytes:
    return bytes(MEGABYTES << 20)


def test_results_are_in_order_and_mistakes_among_them():
    results = dict(map_in_order(halved, range(7), workers=3, unit="number"))
    assert isinstance(mistake := results.pop(4), UserError) and str(mistake) == "4: no use"
    assert list(results.items()) == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (5, 2.5), (6, 3.0)]


def test_a_fault_is_raised_with_the_workers_traceback():
    with pytest.raises(ZeroDivisionError) as fault:
        list(map_in_order(halved, range(9), workers=2, unit="number"))
    assert "in halved" in fault.value.__notes__[0]


def test_nothing_is_waited_for_when_workers_are_ended_while_they_write():
    threads = threading.active_count()
    for _ in range(3):
        with contextlib.closing(map_in_order(blob, range(100), workers=3, unit="blob")) as blobs:
            assert len(next(blobs)[1]) == MEGABYTES << 20
            time.sleep(0.3)  # the pipes are full
        assert not multiprocessing.active_children() and threading.active_count() <= threads + 1  # tqdm's
