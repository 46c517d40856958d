"""What a dataset says of itself, and its images as a table."""

import hashlib
import json
import math
import os.path
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field

from cbml.errors import UserError
from cbml.schema import Count, Schema

COLUMNS = ["path", "label", "name", "split"]
SPLITS = (["train", "test"], ["train", "query", "gallery"])  # the splits of self-retrieval, of query against gallery
SHOWN = 3  # classes, in a message


def _with_one(ks: list[int]) -> list[int]:
    if 1 not in ks or sorted(set(ks)) != ks:
        raise ValueError(f"ks {ks} must be rising and begin with 1")
    return ks


Ks = Annotated[list[Count], AfterValidator(_with_one)]
ClassShare = Annotated[float, Field(gt=0, lt=1)]


class DatasetConfig(Schema):
    """What every dataset's option says.

    Attributes:
        type: tells the datasets apart.
        ks: the K of Recall@K.
        watch: a file or folder; when DVC finds it changed, the stage `download` looks at the dataset again.
        skip_unreadable: leave out, and count, images that cannot be decoded, instead of stopping.
    """

    type: str
    ks: Ks = [1, 2, 4, 8]
    watch: str = ""
    skip_unreadable: bool = False

    def folder(self, data: Path, root: Path) -> Path:
        """Where the images are, or will be.

        Args:
            data: the folder of those that are fetched or made. What makes other images is another folder in it.
            root: what a relative path of the option is relative to.
        """
        raise NotImplementedError

    def download(self, folder: Path, root: Path = Path()) -> None:
        """Create `folder`, complete or not at all.

        Args:
            root: what a relative path of the option is relative to.

        Raises:
            UserError: the images cannot be had.
        """
        raise NotImplementedError

    def catalogue(self, folder: Path) -> pd.DataFrame:
        """One row per image, in the order of the lists: `COLUMNS`.

        `path` is relative to `folder`, or absolute if it is elsewhere; `label` counts from 0; `name` is that of the
        class, for reading; `split` is one of those of `SPLITS`.

        Raises:
            UserError: `folder` does not hold the dataset in its layout.
        """
        raise NotImplementedError


def own_folder(data: Path, kind: str, made_from: Any) -> Path:
    """The folder in `data` of what is made from these plain values."""
    return data / f"{kind}-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]}"


def split_classes(labels: np.ndarray, share: float) -> np.ndarray:
    """The split of each image: the first `share` of the classes, by label, train, and the others test."""
    classes = np.unique(labels)
    count = math.ceil(share * len(classes) - 0.5)  # a half of an odd number is rounded down
    return np.where(np.isin(labels, classes[:count]), "train", "test")


def check_catalogue(table: pd.DataFrame, origin: str | Path) -> None:
    """Check that a catalogue can be trained and tested on.

    Args:
        origin: what a message calls it.

    Raises:
        UserError: splits other than those of `SPLITS`; an image in two rows; a class in training and test; fewer
            than two classes in either; classes of one image everywhere, so that no image has another one of its class.
    """
    splits = set(table.split)
    if splits not in map(set, SPLITS):
        allowed = " or ".join(", ".join(names) for names in SPLITS)
        raise UserError(f"{origin}: its images are split into {', '.join(sorted(splits))}; allowed: {allowed}")
    paths = table.path.map(os.path.normpath)
    if len(twice := paths[paths.duplicated()]):
        raise UserError(f"{origin}: {len(twice)} images are in two rows, e.g. {twice.iloc[0]!r}; expected one for each")
    train, test = table[table.split == "train"], table[table.split != "train"]
    counts = [part.label.nunique() for part in (train, test)]
    if min(counts) < 2:
        raise UserError(
            f"{origin} has {counts[0]} classes to train and {counts[1]} to test; at least 4 are needed, two of each"
        )
    if len(shared := test[test.label.isin(train.label)].drop_duplicates("label")):
        raise UserError(
            f"{origin}: {len(shared)} classes are both in training and in test, {_some(shared.name)}; "
            "a class must be in one of them, because models are tested on classes that they have not seen"
        )
    if train.label.is_unique:
        raise UserError(f"{origin}: no class has two images to train on; a loss compares images of one class")
    if "test" in splits:
        answered = not test.label.is_unique
    else:
        answered = test.label[test.split == "query"].isin(test.label[test.split == "gallery"]).any()
    if not answered:
        raise UserError(
            f"{origin}: no image to test has another one of its class to be found; at least one class needs two images"
            + ("" if "test" in splits else ", one of the queries and one of the gallery")
        )


def _some(names: pd.Series) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")
