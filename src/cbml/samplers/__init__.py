"""Batches: one module for each kind; `type` tells their configurations apart."""

from typing import Annotated

from pydantic import Field

from cbml.samplers.base import Batches, BatchesConfig, Drawn, Look
from cbml.samplers.classes import ClassesConfig
from cbml.samplers.clusters import ClustersConfig
from cbml.samplers.neighbours import InstancesConfig, NeighboursConfig
from cbml.samplers.subspaces import SubspacesConfig
from cbml.samplers.two_tasks import TwoTasksConfig

AnyBatches = Annotated[
    ClassesConfig | ClustersConfig | InstancesConfig | NeighboursConfig | SubspacesConfig | TwoTasksConfig,
    Field(discriminator="type"),
]

__all__ = ["AnyBatches", "Batches", "BatchesConfig", "ClassesConfig", "Drawn", "Look"]
