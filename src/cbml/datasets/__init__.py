"""Datasets, each kept in the folder layout of CUB-200-2011; `type` tells their configurations apart."""

from typing import Annotated

from pydantic import Field

from cbml.datasets.cub200 import Cub200Config
from cbml.datasets.glyphs import GlyphsConfig

Dataset = Annotated[GlyphsConfig | Cub200Config, Field(discriminator="type")]

__all__ = ["Cub200Config", "Dataset", "GlyphsConfig"]
