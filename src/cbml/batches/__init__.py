"""Batches: one module for each kind; `type` tells their configurations apart."""

from typing import Annotated

from pydantic import Field

from cbml.batches.base import Batches, BatchesConfig, Drawn, Look
from cbml.batches.classes import ClassesConfig
from cbml.batches.clusters import ClustersConfig
from cbml.batches.neighbours import InstancesConfig, NeighboursConfig
from cbml.batches.subspaces import SubspacesConfig
from cbml.batches.two_tasks import TwoTasksConfig

AnyBatches = Annotated[
    ClassesConfig | ClustersConfig | InstancesConfig | NeighboursConfig | SubspacesConfig | TwoTasksConfig,
    Field(discriminator="type"),
]

__all__ = ["AnyBatches", "Batches", "BatchesConfig", "ClassesConfig", "Drawn", "Look"]
