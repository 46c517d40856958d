"""The folder layout of CUB-200-2011, which glyphs have as well.

    images/NNN.Name/*.jpg|png
    images.txt                  <image id> <path under images/>
    classes.txt                 <class id> <name>
    image_class_labels.txt      <image id> <class id>
    train_test_split.txt        <image id> <0|1>

Ids count from 1.
"""

import os.path
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from cbml.data.sources.base import split_classes
from cbml.errors import UserError

LAYOUT = ("images", "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")


def catalogue_of(folder: Path, origin: Path, split: float) -> pd.DataFrame:
    """The catalogue of a dataset folder, in the order of the image ids; see `DatasetConfig.catalogue`.

    Args:
        origin: what an error message calls the folder (the archive it was unpacked from).
        split: the share of the classes, by id, that train.

    Raises:
        UserError: something of the layout is missing, a table is no text or a line of it malformed, an id is unknown or
            given twice, a path has two ids, a class has no image, or an image file is missing or not under images/.
    """
    kinds = {name: Path.is_dir if name == "images" else Path.is_file for name in LAYOUT}
    if missing := [name for name, is_there in kinds.items() if not is_there(folder / name)]:
        raise UserError(
            f"{origin} is not in the layout of CUB-200-2011: {', '.join(missing)} not found; "
            f"expected images (a folder), {', '.join(LAYOUT[1:])}"
        )
    paths = _read_table(folder, "images.txt", origin)
    classes = _read_table(folder, "classes.txt", origin)
    labels = _read_table(folder, "image_class_labels.txt", origin)
    if unpaired := sorted(paths.keys() ^ labels.keys()):
        raise UserError(
            f"{origin}: image id {unpaired[0]} is in only one of images.txt and image_class_labels.txt; "
            "every image needs a line in both"
        )
    images: list[tuple[str, int]] = []
    first: dict[str, int] = {}
    for image, path in sorted(paths.items()):
        if (one := first.setdefault(os.path.normpath(path), image)) != image:
            raise UserError(f"{origin}/images.txt: {path!r} is image {one} and image {image}; an image has one id")
        label = number(labels[image])
        if label is None or label not in classes:
            raise UserError(
                f"{origin}/image_class_labels.txt: image {image} has class id {labels[image][:100]!r}, "
                "which classes.txt does not list"
            )
        if not is_inside(path):
            raise UserError(f"{origin}/images.txt: image {image} is {path!r}; expected a path under images/")
        if not os.path.isfile(folder / "images" / path):  # Path.is_file() fails for a name that is too long
            raise UserError(f"{origin}/images/{path} is missing; images.txt lists it as image {image}")
        images.append((f"images/{path}", label))
    if empty := sorted(classes.keys() - {label for _, label in images}):
        raise UserError(
            f"{origin}: class {empty[0]} ({classes[empty[0]]}) has no images; every class of classes.txt needs some"
        )
    ids = np.array([label for _, label in images], dtype=np.int64)
    columns = {"path": [path for path, _ in images], "label": ids - 1}
    names = [display_name(classes[label]) for _, label in images]
    return pd.DataFrame(columns | {"name": names, "split": split_classes(ids, split)})


def display_name(name: str) -> str:
    """The name of a class for reading: without number and underscores, capitals alone in lower case."""
    name = re.sub(r"^\d+\.", "", name).replace("_", " ")
    return name.lower() if name.isupper() else name


def _read_table(folder: Path, name: str, origin: Path) -> dict[int, str]:
    table = {}
    for n, line in enumerate(read_lines(folder / name, f"{origin}/{name}"), 1):
        text, _, value = line.strip().partition(" ")
        if not (key := number(text)) or not value:
            raise UserError(f"{origin}/{name}, line {n}: {line[:100]!r}; expected '<id, from 1> <value>'")
        if key in table:
            raise UserError(f"{origin}/{name}, line {n}: id {key} is listed twice")
        table[key] = value
    return table


def read_lines(file: Path, shown: str | Path) -> list[str]:
    """The lines of a text file, which an error message calls `shown`.

    Raises:
        UserError: it cannot be read, or is not UTF-8 without NUL bytes.
    """
    try:
        text = file.read_bytes().decode()
        if "\0" in text:
            raise UnicodeError("NUL byte")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{shown} cannot be read ({error}); expected text in UTF-8") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def number(text: str) -> int | None:
    """A whole number from 0, if `text` is one that an int64 holds."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def is_inside(path: str) -> bool:
    """Whether `path` is relative and does not leave the folder it starts from."""
    return not path.startswith("/") and ".." not in PurePosixPath(path).parts
