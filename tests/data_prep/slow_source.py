"""`python -m data_prep phantom` with patients that take ten minutes, or that end their worker."""

import os
import signal
import sys
import time

import numpy as np

from data_prep import __main__ as program
from data_prep import phantom
from data_prep.slices import PatientSlices
from decomp_jax.data.schema import Settings
from decomp_jax.errors import run_program

SIZE = 8


def settings(size: int) -> Settings:
    return Settings("phantom", SIZE)


def patient(patient_id: str, *, seed: int, size: int) -> PatientSlices:
    rng = np.random.default_rng(int(patient_id[-4:]))
    return PatientSlices(
        patient_id=patient_id,
        image=rng.random((3, SIZE, SIZE, 1)).astype(np.float16),
        label=np.zeros((3, SIZE, SIZE), np.uint8),
        slice_index=np.arange(3, dtype=np.int32),
        position_mm=np.arange(3, dtype=np.float32),
    )


def dies_or_lingers(patient_id: str, *, seed: int, size: int) -> PatientSlices:
    if patient_id.endswith("0003"):
        if os.environ.get("DIE"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return patient(patient_id, seed=seed, size=size)


if __name__ == "__main__":
    phantom.settings, phantom.prepare = settings, dies_or_lingers
    print(os.getpid(), file=sys.stderr)
    run_program(program.main)
