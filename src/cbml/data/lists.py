"""Lists of images, `PATH,label` a line: the only thing that training and evaluation know of a dataset.

The folder of a dataset's lists holds `train.txt`, and `test.txt` or `query.txt` and `gallery.txt`; `classes.txt`,
`label name` a line; and `summary.json`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from cbml.data.sources.base import SPLITS
from cbml.data.sources.layout import number, read_lines
from cbml.errors import UserError, trouble
from cbml.files import atomic_write, cure, damaged


@dataclass(frozen=True)
class ImageList:
    """Images of a list, in its order.

    Attributes:
        paths: relative to the folder of the dataset's images, or absolute.
        labels: (N,) int64.
        class_names: of each label, for reading.
    """

    paths: list[str]
    labels: np.ndarray
    class_names: dict[int, str] = field(default_factory=dict)

    def __add__(self, other: "ImageList") -> "ImageList":
        """These images, and then those of another list of the same dataset."""
        labels = np.concatenate([self.labels, other.labels])
        return ImageList(self.paths + other.paths, labels, self.class_names | other.class_names)

    @property
    def num_classes(self) -> int:
        return len(np.unique(self.labels))

    def subset(self, indices: np.ndarray) -> "ImageList":
        """Those of the images, in the order of `indices`."""
        return ImageList([self.paths[index] for index in indices], self.labels[indices], self.class_names)


def fingerprint_of(splits: Sequence[str], paths: Sequence[str], labels: Sequence[int], digests: Sequence[str]) -> str:
    """16 hex digits of a SHA-256 over, list by list, the path, the label and the content of every image.

    Args:
        digests: hex digits of the SHA-256 of each file.
    """
    content = hashlib.sha256()
    for row in zip(splits, paths, labels, digests, strict=True):
        content.update(f"{','.join(map(str, row))}\n".encode())
    return content.hexdigest()[:16]


def in_lists(catalogue: pd.DataFrame) -> pd.DataFrame:
    """The rows of a catalogue list by list, in the order of `SPLITS`."""
    parts = [catalogue[catalogue.split == name] for name in dict.fromkeys(sum(SPLITS, []))]
    return pd.concat(parts, ignore_index=True)


def write_lists(catalogue: pd.DataFrame, digests: Sequence[str], out: Path, **facts: int) -> dict:
    """Write the folder of a dataset's lists.

    Args:
        catalogue: see `in_lists`.
        digests: see `fingerprint_of`.
        facts: for the summary.

    Returns:
        What `summary.json` holds: `fingerprint`; for each list, and as `test` for query and gallery together, the
        number of `images` and `classes`; and `facts`.
    """
    parts = {name: catalogue[catalogue.split == name] for name in catalogue.split.unique()}
    summary: dict[str, Any] = {"fingerprint": fingerprint_of(catalogue.split, catalogue.path, catalogue.label, digests)}
    for name, rows in {**parts, "test": catalogue[catalogue.split != "train"]}.items():
        summary[name] = {"images": len(rows), "classes": int(rows.label.nunique())}
    summary |= facts
    with atomic_write(out) as new:
        new.mkdir()
        for name, rows in parts.items():
            lines = [f"{path},{label}\n" for path, label in zip(rows.path, rows.label, strict=True)]
            (new / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        names = dict(sorted(zip(catalogue.label, catalogue.name, strict=True)))
        lines = [f"{label} {' '.join(name.split()) or label}\n" for label, name in names.items()]
        (new / "classes.txt").write_text("".join(lines), encoding="utf-8")
        (new / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def read_list(path: Path) -> ImageList:
    """Read a list of images; labels stay as written. Whether the images are there is not looked at.

    Raises:
        UserError: the list or its classes are missing, empty or no text, a line is malformed, or a class has no name.
    """
    classes, names = path.with_name("classes.txt"), {}
    for n, line in _lines(classes):
        text, _, name = line.partition(" ")
        if (label := number(text)) is None or not name:
            raise damaged(classes, f"line {n}: {line[:100]!r}; expected 'label name'", "build_lists")
        names[label] = name
    paths, labels = [], []
    for n, line in _lines(path):
        image, _, text = line.rpartition(",")
        label = number(text)
        if not image or label is None or ".." in PurePosixPath(image).parts:
            reason = f"line {n}: {line[:100]!r}; expected 'PATH,label' with a label from 0"
            raise damaged(path, reason, "build_lists")
        if label not in names:
            raise damaged(path, f"line {n}: label {label} is not in classes.txt", "build_lists")
        paths.append(image)
        labels.append(label)
    return ImageList(paths, np.array(labels, dtype=np.int64), {label: names[label] for label in set(labels)})


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, from 1."""
    if not path.is_file():
        raise UserError(f"image list {path} does not exist; build_lists writes it")
    try:
        lines = read_lines(path, path)
    except UserError as error:
        if trouble(error):
            raise
        raise UserError(f"{error}; {cure(path, 'build_lists')}") from None
    if not lines:
        raise damaged(path, "it is empty", "build_lists")
    if not path.read_bytes().endswith(b"\n"):  # else a label of 12 may have become one of 1
        raise damaged(path, "it ends in the middle of a line", "build_lists")
    return enumerate(lines, 1)


def hold_out(images: ImageList, share: float) -> tuple[ImageList, ImageList]:
    """The images of a training list without, and with only, the last `share` of its classes (by label).

    Raises:
        UserError: fewer than two classes would be held out or remain.
    """
    classes = np.unique(images.labels)
    count = round(share * len(classes))
    if not 2 <= count <= len(classes) - 2:
        raise UserError(
            f"validation_classes={share} holds out {count} of {len(classes)} training classes; "
            "at least 2 must be held out and 2 remain"
        )
    held_out = images.labels >= classes[-count]
    return images.subset(np.flatnonzero(~held_out)), images.subset(np.flatnonzero(held_out))


def check_disjoint(train: ImageList, test: ImageList) -> None:
    """Raises a UserError if a class is in both lists: the protocol tests on classes never seen in training."""
    shared = np.intersect1d(train.labels, test.labels)
    if len(shared):
        examples = ", ".join(map(str, shared[:3]))
        raise UserError(
            f"{len(shared)} classes are in both the training and the test list, e.g. labels {examples}; "
            "the lists must have no class in common"
        )
