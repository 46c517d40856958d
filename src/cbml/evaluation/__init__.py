"""Evaluation: embeddings, exact retrieval, metrics."""

from cbml.evaluation.metrics import evaluate
from cbml.evaluation.retrieval import retrieve

__all__ = ["evaluate", "retrieve"]
