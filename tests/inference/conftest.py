from tests.evaluation.conftest import decomposer, heads, query, reference

__all__ = ["decomposer", "heads", "query", "reference"]
