"""CUB-200-2011: 11,788 photographs of 200 bird species (Wah et al., Caltech CNS-TR-2011-001)."""

from pathlib import Path
from typing import ClassVar, Literal

import pandas as pd

from cbml.data.sources.base import ClassShare
from cbml.data.sources.layout import LAYOUT, catalogue_of
from cbml.data.sources.published import PublishedConfig


class Cub200Config(PublishedConfig):
    """CUB-200-2011: the first `split` of the classes (by id) train, the others test, as in Oh Song et al. (CVPR 2016).

    The official split file is not used.
    """

    type: Literal["cub200"]
    split: ClassShare = 0.5

    TITLE: ClassVar = "CUB-200-2011"
    TOP: ClassVar = "CUB_200_2011"
    PARTS: ClassVar = LAYOUT

    def read(self, folder: Path, origin: Path) -> pd.DataFrame:
        return catalogue_of(folder, origin, self.split)
