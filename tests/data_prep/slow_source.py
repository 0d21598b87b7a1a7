"""`python -m data_prep phantom` with quick patients; with FAULT, one takes ten minutes or ends its worker."""

import os
import signal
import time

import numpy as np

from data_prep import __main__ as program
from data_prep import phantom
from data_prep.slices import PatientSlices
from decomp_jax.data.schema import Settings
from decomp_jax.errors import run_program

SIZE = 8


def settings(*_: object) -> Settings:
    return Settings("phantom", SIZE)


def patient(patient_id: str, **_: object) -> PatientSlices:
    rng = np.random.default_rng(int(patient_id[-4:]))
    return PatientSlices(
        patient_id=patient_id,
        image=rng.random((3, SIZE, SIZE, 1)).astype(np.float16),
        label=np.zeros((3, SIZE, SIZE), np.uint8),
        slice_index=np.arange(3, dtype=np.int32),
        position_mm=np.arange(3, dtype=np.float32),
    )


def with_fault(patient_id: str, **options: object) -> PatientSlices:
    fault = os.environ.get("FAULT") if patient_id.endswith("0003") else None
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "linger":
        time.sleep(600)
    return patient(patient_id, **options)


if __name__ == "__main__":
    phantom.settings, phantom.prepare = settings, with_fault
    run_program(program.main)
