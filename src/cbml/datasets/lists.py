"""Lists of images, `images/PATH,label` a line: the only thing that training and evaluation know of a dataset."""

import hashlib
import json
import os.path
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cbml.datasets.layout import is_inside, number, read_layout, read_lines
from cbml.errors import UserError
from cbml.files import atomic_write
from cbml.progress import progress

MOST_PIXELS = 2**28 // 3  # 256 MiB of RGB, from where on Pillow warns of a decompression bomb


@dataclass(frozen=True)
class ImageList:
    """Images of a list, in its order: paths relative to the dataset folder, and labels (int64, shape (N,))."""

    paths: list[str]
    labels: np.ndarray

    @property
    def num_classes(self) -> int:
        return len(np.unique(self.labels))

    @property
    def class_names(self) -> dict[int, str]:
        """The name of every label for reading, after the folder that its images lie in."""
        folders = {label: Path(path).parent.name for path, label in zip(self.paths, self.labels.tolist(), strict=True)}
        return {label: display_name(folder) for label, folder in folders.items()}

    def subset(self, indices: np.ndarray) -> "ImageList":
        """Those of the images, in the order of `indices`."""
        return ImageList([self.paths[index] for index in indices], self.labels[indices])


def display_name(folder: str) -> str:
    """The name of a class for reading: its folder's without number and underscores, capitals alone in lower case."""
    name = re.sub(r"^\d+\.", "", folder).replace("_", " ")
    return name.lower() if name.isupper() else name


def build_lists(dataset: Path, out: Path) -> dict:
    """Split a dataset by class, decoding every image once, and write the folder `out`.

    The first half of the classes (by id) train, the second half test, as in Oh Song et al. (CVPR 2016); the official
    split file is not used. A label is the class id - 1, so no label occurs in both lists.

    Returns:
        What `summary.json` holds: `fingerprint` (first 16 hex digits of a SHA-256 over the lists, and in them path,
        label and content of every image), and for each list its number of `images` and `classes`.

    Raises:
        UserError: see `read_layout` and `decode`; or a list would have fewer than two classes.
    """
    images = [(path, class_id - 1) for path, class_id in read_layout(dataset)]
    classes = sorted({label for _, label in images})
    if len(classes) < 4:
        raise UserError(f"{dataset} has {len(classes)} classes; at least 4 are needed, two to train and two to test")
    first_to_test = classes[len(classes) // 2]
    lists = {
        "train": [image for image in images if image[1] < first_to_test],
        "test": [image for image in images if image[1] >= first_to_test],
    }

    def digest(entry: tuple[str, str, int]) -> str:
        name, path, label = entry
        decode(dataset / path)
        return f"{name},{path},{label},{hashlib.sha256((dataset / path).read_bytes()).hexdigest()}\n"

    entries = [(name, *image) for name, members in lists.items() for image in members]
    fingerprint = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for line in progress(pool.map(digest, entries), "checking", "images", total=len(entries)):
            fingerprint.update(line.encode())
    summary: dict[str, Any] = {"fingerprint": fingerprint.hexdigest()[:16]}
    with atomic_write(out) as new:
        new.mkdir()
        for name, members in lists.items():
            (new / f"{name}.txt").write_text("".join(f"{path},{label}\n" for path, label in members), encoding="utf-8")
            summary[name] = {"images": len(members), "classes": len({label for _, label in members})}
        (new / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def decode(source: Path | BinaryIO) -> Image.Image:
    """An RGB image.

    Raises:
        UserError: Pillow cannot read it, or it has more than `MOST_PIXELS`.
    """
    try:
        with Image.open(source) as file:
            if file.width * file.height > MOST_PIXELS:
                raise Image.DecompressionBombError(
                    f"{file.width} x {file.height} pixels, at most {MOST_PIXELS} allowed"
                )
            return file.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise UserError(f"{name_of(source)}: not an image that Pillow can read ({error})") from None


def name_of(source: Path | BinaryIO) -> str:
    """What an error message calls the source of an image."""
    return str(source) if isinstance(source, Path) else "image"


def read_list(path: Path, root: Path) -> ImageList:
    """Read a list of images under the dataset folder `root`; labels stay as written.

    Raises:
        UserError: the list is missing, empty or no text, a line is malformed, or an image is not there.
    """
    if not path.is_file():
        raise UserError(f"image list {path} does not exist; build_lists writes it")
    paths, labels = [], []
    for n, line in enumerate(read_lines(path, path), 1):
        image, _, label = line.rpartition(",")
        if not image or not is_inside(image) or number(label) is None:
            raise UserError(f"{path}, line {n}: {line[:100]!r}; expected 'images/PATH,label' with a label from 0")
        if not os.path.isfile(root / image):
            raise UserError(f"{path}, line {n}: {root / image} does not exist")
        paths.append(image)
        labels.append(number(label))
    if not paths:
        raise UserError(f"{path} is empty; expected lines 'images/PATH,label'")
    return ImageList(paths, np.array(labels, dtype=np.int64))


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
