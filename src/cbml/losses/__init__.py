"""Losses: one module each, found by its place in this package, built by the `type` of its YAML file."""

import importlib
import pkgutil

from cbml.losses.base import REGISTRY, Batch, Loss, LossConfig, build_loss, config_union, needs

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

for _, _config in REGISTRY.values():
    _config.model_rebuild(_types_namespace={"AnyLoss": config_union()})

__all__ = ["REGISTRY", "Batch", "Loss", "LossConfig", "build_loss", "config_union", "needs"]
