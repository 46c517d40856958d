"""Lists of images, `images/PATH,label` a line: the only thing that training and evaluation know of a dataset."""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cbml.datasets.layout import read_layout
from cbml.errors import UserError
from cbml.files import atomic_write
from cbml.progress import progress


@dataclass(frozen=True)
class ImageList:
    """Images of a list, in its order: paths relative to the dataset folder, and labels (int64, shape (N,))."""

    paths: list[str]
    labels: np.ndarray

    @property
    def num_classes(self) -> int:
        return len(np.unique(self.labels))

    @property
    def folders(self) -> list[str]:
        """The folder of each image, which is named after its class."""
        return [Path(path).parent.name for path in self.paths]


def build_lists(dataset: Path, out: Path, *, validation_classes: float = 0.0) -> dict:
    """Split a dataset by class, decoding every image once, and write the folder `out`.

    The first half of the classes (by id) train, the second half test, as in Oh Song et al. (CVPR 2016); the official
    split file is not used. A label is the class id - 1, so no label occurs in both lists.

    Args:
        dataset: a folder in the layout of `cbml.datasets.layout`.
        validation_classes: share of the training classes, the last ones, to hold out. `train.txt` still holds all
            training classes; `validation.txt` and `train_without_validation.txt` divide them.

    Returns:
        What `summary.json` holds: `fingerprint` (first 16 hex digits of a SHA-256 over path, label and content of every
        image), and for each list its number of `images` and `classes`.

    Raises:
        UserError: see `read_layout`; or an image cannot be decoded, or a list would have fewer than two classes.
    """
    images = [(path, class_id - 1) for path, class_id in read_layout(dataset)]
    classes = sorted({label for _, label in images})
    if len(classes) < 4:
        raise UserError(f"{dataset} has {len(classes)} classes; at least 4 are needed, two to train and two to test")
    train, test = classes[: len(classes) // 2], classes[len(classes) // 2 :]
    lists = {"train": train, "test": test}
    if validation_classes:
        held_out = round(validation_classes * len(train))
        if not 2 <= held_out <= len(train) - 2:
            raise UserError(
                f"validation_classes={validation_classes} holds out {held_out} of {len(train)} training "
                "classes; at least 2 must be held out and 2 remain"
            )
        lists |= {"train_without_validation": train[:-held_out], "validation": train[-held_out:]}

    def digest(image: tuple[str, int]) -> str:
        path, label = image
        content = (dataset / path).read_bytes()
        try:
            Image.open(io.BytesIO(content)).load()
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise UserError(
                f"{dataset / path} cannot be decoded ({type(error).__name__}); expected a complete JPEG or PNG file"
            ) from error
        return f"{path},{label},{hashlib.sha256(content).hexdigest()}\n"

    fingerprint = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for line in progress(pool.map(digest, images), "checking", "images", total=len(images)):
            fingerprint.update(line.encode())
    summary = {"fingerprint": fingerprint.hexdigest()[:16]}
    with atomic_write(out) as new:
        new.mkdir()
        for name, members in lists.items():
            chosen = set(members)
            lines = [f"{path},{label}\n" for path, label in images if label in chosen]
            (new / f"{name}.txt").write_text("".join(lines))
            summary[name] = {"images": len(lines), "classes": len(members)}
        (new / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def read_list(path: Path, root: Path) -> ImageList:
    """Read a list of images under the dataset folder `root`; labels stay as written.

    Raises:
        UserError: the list is missing or empty, a line is malformed, or an image is not there.
    """
    if not path.is_file():
        raise UserError(
            f"image list {path} does not exist; build_lists writes it (those for validation: if validation_classes > 0)"
        )
    paths, labels = [], []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        image, _, label = line.rpartition(",")
        if not image or not label.isdecimal():
            raise UserError(f"{path}, line {number}: {line!r}; expected 'images/PATH,label' with a label from 0")
        if not (root / image).is_file():
            raise UserError(f"{path}, line {number}: {root / image} does not exist")
        paths.append(image)
        labels.append(int(label))
    if not paths:
        raise UserError(f"{path} is empty; expected lines 'images/PATH,label'")
    return ImageList(paths, np.array(labels, dtype=np.int64))


def check_disjoint(train: ImageList, test: ImageList) -> None:
    """Raises a UserError if a class is in both lists: the protocol tests on classes never seen in training."""
    shared = np.intersect1d(train.labels, test.labels)
    if len(shared):
        examples = ", ".join(map(str, shared[:3]))
        raise UserError(
            f"{len(shared)} classes are in both the training and the test list, e.g. labels {examples}; "
            "the lists must have no class in common"
        )
