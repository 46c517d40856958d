"""Stanford Online Products: 120,053 photographs of 22,634 products (Oh Song et al., CVPR 2016)."""

import os.path
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import pandas as pd

from cbml.data.sources.base import Ks
from cbml.data.sources.layout import is_inside, number, read_lines
from cbml.data.sources.published import PublishedConfig
from cbml.errors import UserError

LISTS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}


class SopConfig(PublishedConfig):
    """Stanford Online Products, split by its own lists. A class is one item on sale, in one of twelve categories."""

    type: Literal["sop"]
    ks: Ks = [1, 10, 100, 1000]
    split: Literal["official"] = "official"

    TITLE: ClassVar = "Stanford Online Products"
    TOP: ClassVar = "Stanford_Online_Products"
    PARTS: ClassVar = ("*_final", *LISTS.values())

    def read(self, folder: Path, origin: Path) -> pd.DataFrame:
        rows = []
        for split, name in LISTS.items():
            for n, line in enumerate(read_lines(folder / name, f"{origin}/{name}")[1:], 2):
                image, product, category, path = [*line.split(maxsplit=3), *[""] * 4][:4]
                class_id = number(product)
                if not (number(image) and class_id and number(category) and is_inside(path)):
                    raise UserError(
                        f"{origin}/{name}, line {n}: {line[:100]!r}; expected 'image_id class_id super_class_id path'"
                    )
                if not os.path.isfile(folder / path):
                    raise UserError(f"{origin}/{path} is missing; {name} lists it")
                item = PurePosixPath(path)
                shown = f"{item.parent.name.removesuffix('_final')} {item.stem.rpartition('_')[0]}"
                rows.append((path, class_id - 1, shown.replace("_", " "), split))
        return pd.DataFrame(rows, columns=["path", "label", "name", "split"])
