"""Run by test_shards.py: searches on all devices of a job and saves the answers.

    python sharded_answers.py OUT.npz [COORDINATOR PROCESSES PROCESS]
"""

import dataclasses
import sys

import jax
import numpy as np
from brute_force import KINDS, make_any_queries, make_bank, make_queries

from decomp_jax.retrieval import relative


def main(out: str, *job: str) -> None:
    if job:
        jax.distributed.initialize(job[0], int(job[1]), int(job[2]))
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    answers = {}
    for kind in KINDS:
        bank = whole = make_bank(kind, 9000)
        queries, (any_queries, _) = make_queries(bank, 5), make_any_queries(bank, "counter-example", 5)
        if job:  # A process that reads another's rows answers wrongly.
            mine = np.arange(9000) * int(job[1]) // 9000 == int(job[2])
            wiped = {f"{part}_indices": np.where(mine[:, None, None], getattr(bank, f"{part}_indices"), 0)
                     for part in queries}
            bank = dataclasses.replace(bank, **wiped)
        patients = bank.rows["patient_id"][:5]
        for k, options in ((10, {}), (3, {"exclude": patients, "one_per_patient": True})):
            hits = bank.search(**queries, k=k, mesh=mesh, **options)
            answers |= {f"{kind} {k} rows": hits.rows, f"{kind} {k} distances": hits.distances}
        for count in (1, 5):  # one is scanned otherwise than a batch
            hits = bank.search(any_queries[:count], k=4, exclude=patients[:count], mesh=mesh)
            answers |= {f"{kind} {count} rows": hits.rows, f"{kind} {count} distances": hits.distances}
        latent_queries, _ = make_any_queries(whole, "both latent", 5)
        hits = whole.search(relative(latent_queries), k=6, exclude=patients, mesh=mesh)
        answers |= {f"{kind} relative rows": hits.rows, f"{kind} relative distances": hits.distances}
        slices, _ = make_any_queries(whole, "both latent", 5)
        patient_hits = whole.search_patients(
            slices, heights=np.arange(5.0), within_mm={"normal": 2}, k=6, mesh=mesh,
        )
        answers |= {f"{kind} patients": patient_hits.patients, f"{kind} patient distances": patient_hits.distances}
        answers |= {f"{kind} {path} matches": rows for path, rows in patient_hits.matches.items()}
    np.savez(out, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
