"""Any images that a user has: a folder of class folders, or a table."""

import os
import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from cbml.data.sources.base import COLUMNS, ClassShare, DatasetConfig, split_classes
from cbml.errors import UserError
from cbml.files import parse_csv
from cbml.progress import message

TABLES = (".csv", ".parquet")
EXPECTED = ".avif, .bmp, .gif, .jpeg, .jpg, .png, .tif, .webp, or another format that Pillow reads"
# Formats that Pillow knows by name, and leaves to other programs: plots, documents, films, measurements.
NO_PIXELS = {".bufr", ".emf", ".eps", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".ps", ".wmf"}
NUMBER = re.compile(r"-?\d+(\.\d+)?")  # also as pandas writes it where another row has none: 7.0


class FolderConfig(DatasetConfig):
    """Images where the user has them; they are not copied.

    Attributes:
        path: a folder with a folder of images for each class, or a table (CSV, Parquet) with the columns `path`
            (relative to the table's folder, or absolute), `label` (any text: the class) and, if it says more than which
            classes train, `split`: train and test, or train, query and gallery.
        split: the share of the classes, in the order of their names, that train; None: the table's column `split`, and
            a half if it has none.
    """

    type: Literal["folder"]
    path: Annotated[str, Field(min_length=1)]
    split: ClassShare | None = None

    def folder(self, data: Path, root: Path) -> Path:
        path = root / os.path.expanduser(self.path)
        return path.parent if path.suffix.lower() in TABLES and not path.is_dir() else path

    def download(self, folder: Path, root: Path = Path()) -> None:
        raise UserError(f"{folder} does not exist; path names a folder of class folders, or a CSV or Parquet file")

    def catalogue(self, folder: Path) -> pd.DataFrame:
        file = folder / Path(self.path).name
        table = _read_table(file, folder) if file.suffix.lower() in TABLES and not file.is_dir() else _walk(folder)
        numeric = all(NUMBER.fullmatch(name) for name in table.label.unique())
        names = sorted(table.label.unique(), key=(lambda name: (Decimal(name), name)) if numeric else None)
        labels = table.label.map({name: label for label, name in enumerate(names)}).to_numpy(np.int64)
        columns = {"path": table.path, "label": labels, "name": table.label}
        split = table.split if self.split is None and "split" in table else split_classes(labels, self.split or 0.5)
        return pd.DataFrame(columns | {"split": split})


@dataclass(frozen=True)
class Found:
    """What a folder holds, and the folders in it: `images`, and how much was left out or is behind a link.

    Attributes:
        images: paths that begin with the folder's.
        others: the number of files that are no images, by their names.
        links: the number of folders that are links.
        loops: of those, how many lead to a folder that was looked at already, and are left out.
    """

    images: list[str]
    others: int
    links: int
    loops: int


def find_images(folder: str | Path, above: Set[str] = frozenset()) -> Found:
    """The images in a folder and in folders of it, also behind links; what is hidden (`.name`) does not count.

    Every real folder is looked at once, so links may make a loop.

    Args:
        above: more real folders that are not entered.
    """
    images: list[str] = []
    others = links = loops = 0
    seen = {*above, *_with_parents(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        entered = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            links += os.path.islink(path)
            if real in seen:
                loops += 1
            else:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        shown = sorted(name for name in files if not name.startswith("."))
        found = [os.path.join(parent, name) for name in shown if os.path.splitext(name)[1].lower() in suffixes()]
        images += found
        others += len(shown) - len(found)
    return Found(images, others, links, loops)


def _with_parents(folder: str | Path) -> frozenset[str]:
    """A folder and those around it, without links."""
    real = Path(os.path.realpath(folder))
    return frozenset(map(str, (real, *real.parents)))


@cache
def suffixes() -> frozenset[str]:
    """How the names of images end: of all formats that Pillow itself decodes."""
    return frozenset(end for end, name in Image.registered_extensions().items() if name in Image.OPEN) - NO_PIXELS


def _walk(folder: Path) -> pd.DataFrame:
    """Path and label of every image in the class folders of a folder, and in folders of these."""
    rows: list[tuple[str, str]] = []
    others = links = inner = loops = 0
    empty, above = [], _with_parents(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.is_dir():
            others += entry.is_file() and not entry.name.startswith(".")
            continue
        if os.path.realpath(entry.path) in above:
            loops += 1
            continue
        found = find_images(entry.path, above)
        others, inner, loops = others + found.others, inner + found.links, loops + found.loops
        links += entry.is_symlink()
        rows += [(os.path.relpath(path, folder), entry.name) for path in found.images]
        if not found.images:
            empty.append(entry.name)
    if not rows:
        raise UserError(f"{folder}: no images; expected a folder for each class, with {EXPECTED} in it")
    _check_names([path for path, _ in rows], folder)
    if others or empty:
        message(f"{folder}: left out: {others} files that are no images in a class folder, {len(empty)} empty folders")
    if loops:
        message(f"{folder}: left out: {loops} links to folders that are in there already")
    if links or inner:
        what = [f"{links} class folders"] * bool(links) + [f"{inner} folders in class folders"] * bool(inner)
        message(
            f"{folder}: {' and '.join(what)} are links, behind which DVC does not look; after a change there, "
            "`dvc repro -f -s download@folder`, then `dvc repro`"
        )
    return pd.DataFrame(rows, columns=["path", "label"])


def _read_table(file: Path, folder: Path) -> pd.DataFrame:
    """Path, label and, if it is there, split of a table, as text."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a CSV or Parquet file with columns path, label")
    try:
        if file.suffix.lower() == ".csv":
            table = parse_csv(file, dtype=str, keep_default_na=False)
        else:
            table = pd.read_parquet(file)
            named = [name for name in table.index.names if name in COLUMNS and name not in table]
            table = (table.reset_index(named) if named else table).reset_index(drop=True)
    except Exception as error:  # pandas and what reads Parquet for it raise errors of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{file} cannot be read ({reason}); expected a CSV or Parquet file, in UTF-8") from None
    if table.empty and len(table.columns):
        raise UserError(f"{file}: no rows; expected one for each image")
    if missing := [name for name in ("path", "label") if name not in table]:
        raise UserError(
            f"{file}: no column {', '.join(missing)}; expected path, label and optionally split, "
            f"found {', '.join(map(str, table.columns))[:200]}"
        )
    table = table[[name for name in ("path", "label", "split") if name in table]]
    absent, table = table.isna(), table.astype(str)
    for name in table:
        text = table[name].str.strip()
        if (empty := (absent[name] | (text == "")).to_numpy()).any():
            raise UserError(f"{file}, row {empty.argmax() + 1}: no {name}; every image needs one")
        if name != "path":
            table = table.assign(**{name: text})
    table = table.assign(path=[_place(path, str(folder)) for path in table.path])
    if (twice := table.path.duplicated().to_numpy()).any():
        raise UserError(f"{file}, row {twice.argmax() + 1}: {table.path[twice.argmax()]!r} is listed twice")
    _check_names(table.path, folder)
    for row, path in enumerate(table.path, 1):
        if not os.path.isfile(folder / path):
            raise UserError(f"{file}, row {row}: {folder / path} does not exist; paths are relative to {folder}")
    return table


def _place(path: str, folder: str) -> str:
    """A path as one relative to `folder` if it is in there, else as an absolute one; in either case without `..`."""
    whole = os.path.join(folder, path)
    if os.pardir in Path(whole).parts:  # which leads elsewhere behind a link than its text says
        folder = os.path.realpath(folder)
        whole = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
    relative = os.path.relpath(whole, folder)
    return os.path.abspath(whole) if relative.split(os.sep)[0] == os.pardir else relative


def _check_names(paths: Iterable[str], folder: Path) -> None:
    for path in paths:
        if set(path) & set("\n\r\0") or path != path.encode(errors="replace").decode():
            raise UserError(f"{folder}: no list can hold {path!r}; rename it, in UTF-8 and without line breaks")
