"""All kinds of batch samplers; `type` tells their configurations apart."""

from typing import Annotated

from pydantic import Field

from cbml.samplers.classes import ClassesConfig
from cbml.samplers.clusters import ClustersConfig
from cbml.samplers.neighbours import InstancesConfig, NeighboursConfig
from cbml.samplers.subspaces import SubspacesConfig
from cbml.samplers.two_tasks import TwoTasksConfig

AnyBatchSampler = Annotated[
    ClassesConfig | ClustersConfig | InstancesConfig | NeighboursConfig | SubspacesConfig | TwoTasksConfig,
    Field(discriminator="type"),
]
