"""Datasets; `type` tells their configurations apart."""

from typing import Annotated

from pydantic import Field

from cbml.datasets.cars196 import Cars196Config
from cbml.datasets.cub200 import Cub200Config
from cbml.datasets.folder import FolderConfig
from cbml.datasets.glyphs import GlyphsConfig
from cbml.datasets.inshop import InshopConfig
from cbml.datasets.sop import SopConfig

Dataset = Annotated[
    GlyphsConfig | Cub200Config | Cars196Config | SopConfig | InshopConfig | FolderConfig, Field(discriminator="type")
]

__all__ = [
    "Cars196Config",
    "Cub200Config",
    "Dataset",
    "FolderConfig",
    "GlyphsConfig",
    "InshopConfig",
    "SopConfig",
]
