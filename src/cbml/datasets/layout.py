"""The folder layout of CUB-200-2011, which every dataset here is kept in.

    images/NNN.Name/*.jpg|png
    images.txt                  <image id> <path under images/>
    classes.txt                 <class id> <name>
    image_class_labels.txt      <image id> <class id>
    train_test_split.txt        <image id> <0|1>

Ids count from 1.
"""

from pathlib import Path

from cbml.errors import UserError

LAYOUT = ("images", "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")


def read_layout(folder: Path, origin: Path | None = None) -> list[tuple[str, int]]:
    """Read and check a dataset folder.

    Args:
        origin: what an error message calls the folder, if not `folder` (the archive it was unpacked from).

    Returns:
        For every image, in the order of the image ids: its path relative to `folder`, and its class id (1-based).

    Raises:
        UserError: something of the layout is missing, a line is malformed, an id is unknown or given twice, a class has
            no image, or an image file is missing.
    """
    origin = origin or folder
    if missing := [name for name in LAYOUT if not (folder / name).exists()]:
        raise UserError(
            f"{origin} is not in the layout of CUB-200-2011: {', '.join(missing)} not found; "
            f"expected {', '.join(LAYOUT)}"
        )
    paths = _read_table(folder, "images.txt", origin)
    classes = _read_table(folder, "classes.txt", origin)
    labels = _read_table(folder, "image_class_labels.txt", origin)
    if unpaired := sorted(paths.keys() ^ labels.keys()):
        raise UserError(
            f"{origin}: image id {unpaired[0]} is in only one of images.txt and image_class_labels.txt; "
            "every image needs a line in both"
        )
    images = []
    for image, path in sorted(paths.items()):
        label = labels[image]
        if not label.isdecimal() or int(label) not in classes:
            raise UserError(
                f"{origin}/image_class_labels.txt: image {image} has class id {label!r}, "
                "which classes.txt does not list"
            )
        if not (folder / "images" / path).is_file():
            raise UserError(f"{origin}/images/{path} is missing; images.txt lists it as image {image}")
        images.append((f"images/{path}", int(label)))
    if empty := sorted(classes.keys() - {label for _, label in images}):
        raise UserError(
            f"{origin}: class {empty[0]} ({classes[empty[0]]}) has no images; every class of classes.txt needs some"
        )
    return images


def _read_table(folder: Path, name: str, origin: Path) -> dict[int, str]:
    table = {}
    for number, line in enumerate((folder / name).read_text(errors="replace").splitlines(), 1):
        key, _, value = line.strip().partition(" ")
        if not key.isdecimal() or int(key) < 1 or not value:
            raise UserError(f"{origin}/{name}, line {number}: {line!r}; expected '<id, from 1> <value>'")
        if int(key) in table:
            raise UserError(f"{origin}/{name}, line {number}: id {key} is listed twice")
        table[int(key)] = value
    return table
