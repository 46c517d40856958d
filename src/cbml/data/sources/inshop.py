"""In-Shop Clothes Retrieval, of DeepFashion: 52,712 photographs of 7,982 items (Liu et al., CVPR 2016)."""

import os.path
from pathlib import Path
from typing import ClassVar, Literal

import pandas as pd

from cbml.data.sources.base import SPLITS, Ks
from cbml.data.sources.layout import is_inside, number, read_lines
from cbml.data.sources.published import PublishedConfig
from cbml.errors import UserError

PARTITION = "list_eval_partition.txt"


class InshopConfig(PublishedConfig):
    """In-Shop Clothes Retrieval, split by its own list: queries are searched for in a gallery.

    It has no mirror: its publishers hand it out themselves. `source` holds `list_eval_partition.txt`, or `Eval/` with
    it, and `img/` (or `img_highres/`), or `Img/` with that.
    """

    type: Literal["inshop"]
    ks: Ks = [1, 10, 20, 30, 40]
    split: Literal["official"] = "official"

    TITLE: ClassVar = "In-Shop Clothes Retrieval"
    TOP: ClassVar = "In-shop Clothes Retrieval Benchmark"
    PARTS: ClassVar = ("img", "img_highres", "Img", PARTITION, "Eval")
    INSTEAD: ClassVar = (
        "there is no address to fetch it from: from the Google Drive folder that "
        "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html links to, get Img/img.zip (256 x 256 "
        "pixels; no password) and Eval/list_eval_partition.txt, put both into one folder, unpack img.zip there, and "
        "name that folder: -S dataset.inshop.source=PATH"
    )

    def read(self, folder: Path, origin: Path) -> pd.DataFrame:
        partition = folder / "Eval" / PARTITION if (folder / "Eval").is_dir() else folder / PARTITION
        above = "Img/" if (folder / "Img").is_dir() else ""
        images = next((name for name in ("img", "img_highres") if (folder / above / name).is_dir()), None)
        if images is None or not partition.is_file():
            raise UserError(
                f"{origin} is not in the layout of {self.TITLE}: expected {PARTITION} (or Eval with it) and img, a "
                "folder (or Img with it)"
            )
        rows = []
        shown = f"{origin}/{partition.relative_to(folder)}"
        for n, line in enumerate(read_lines(partition, shown)[2:], 3):
            path, item, split = [*line.split(), *[""] * 3][:3]
            label = number(item.removeprefix("id_"))
            if not (path.startswith("img/") and is_inside(path) and label and split in SPLITS[1]):
                raise UserError(
                    f"{shown}, line {n}: {line[:100]!r}; expected 'img/PATH id_NUMBER' and train, query or gallery"
                )
            path = f"{above}{images}/{path.removeprefix('img/')}"
            if not os.path.isfile(folder / path):
                raise UserError(f"{origin}/{path} is missing; {PARTITION} lists it")
            category = " ".join(Path(path).parts[-4:-2]) if path.count("/") > 3 else ""
            rows.append((path, label - 1, f"{category} {label}".replace("_", " ").strip(), split))
        return pd.DataFrame(rows, columns=["path", "label", "name", "split"])
