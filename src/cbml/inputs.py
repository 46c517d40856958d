"""What a cell reads: the lists of its dataset, and their images as its recipe wants them."""

from pathlib import Path

from cbml.config import Cell
from cbml.datasets.images import PackedImages, pack_images
from cbml.datasets.lists import ImageList, read_list
from cbml.files import read_json


def fingerprint(dataset: str) -> str:
    """What `build_lists` found the content of the dataset's images to be."""
    return read_json(Path("lists", dataset, "summary.json"), "build_lists")["fingerprint"]


def list_file(dataset: str, name: str) -> Path:
    """Where `build_lists` writes the list `name` of a dataset."""
    return Path("lists", dataset, f"{name}.txt")


def list_of(cell: Cell, name: str) -> ImageList:
    """The list `name` (`train`, `test`, …) of a cell's dataset; see `read_list`."""
    return read_list(list_file(cell.dataset, name), Path("data", cell.dataset))


def images_of(cell: Cell, images: ImageList, *, state: Path) -> PackedImages:
    """The decoded images of a list; `state` is where the decoded copies are kept between runs."""
    return pack_images(
        images,
        Path("data", cell.dataset),
        state / ".cache",
        resize=cell.recipe.resize,
        interpolation=cell.interpolation,
        fingerprint=fingerprint(cell.dataset),
    )
