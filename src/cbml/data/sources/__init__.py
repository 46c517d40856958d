"""Datasets; `type` tells their configurations apart."""

from typing import Annotated

from pydantic import Field

from cbml.data.sources.cars196 import Cars196Config
from cbml.data.sources.cub200 import Cub200Config
from cbml.data.sources.folder import FolderConfig
from cbml.data.sources.glyphs import GlyphsConfig
from cbml.data.sources.inshop import InshopConfig
from cbml.data.sources.sop import SopConfig

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
