"""Losses: one module each, found by its place in this package, built by the `type` of its YAML file.

from cbml.losses import CBML

criterion = CBML(form="log")
loss = criterion(embeddings, labels)  # embeddings (B, D) of any length, labels (B,)
"""

import importlib
import pkgutil
from typing import Any

from cbml.losses.base import REGISTRY, AnyLoss, Batch, Loss, LossConfig, Sizes, build_loss, needs, register, total

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def __getattr__(name: str) -> Any:
    """The class of a registered loss, wherever in this package it is."""
    for loss in REGISTRY.values():
        if loss.__name__ == name:
            return loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["AnyLoss", "Batch", "Loss", "LossConfig", "Sizes", "build_loss", "needs", "register", "total"]
