"""Evaluation: embeddings, exact retrieval, and what follows from it. Tensors in, numbers out.

from cbml.evaluation import evaluate, recall_at_k

recall_at_k(embeddings, labels, ks=(1, 2, 4, 8))  # by K, in percent
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """`evaluate` and `recall_at_k`, on demand: other modules of this package are used without them."""
    if name in ("evaluate", "recall_at_k"):
        return getattr(importlib.import_module(f"{__name__}.metrics"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
