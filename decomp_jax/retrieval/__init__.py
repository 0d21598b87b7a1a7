"""Exact search over banks of discrete codes."""

from decomp_jax.retrieval.bank import BankWriter, CodeBank
from decomp_jax.retrieval.patients import PatientHits
from decomp_jax.retrieval.queries import Queries, by_examples, codes, latents
from decomp_jax.retrieval.search import Hits

__all__ = ["BankWriter", "CodeBank", "Hits", "PatientHits", "Queries", "by_examples", "codes", "latents"]
