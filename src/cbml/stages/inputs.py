"""What stages read of a dataset: its lists, and their images as a recipe wants them."""

from pathlib import Path

import torch

from cbml.data.images import Images
from cbml.data.lists import ImageList, fingerprint_of, read_list
from cbml.data.packing import Packing, pack_images
from cbml.data.sources import Dataset
from cbml.errors import UserError
from cbml.evaluation.scoring import Scoring
from cbml.files import locked, read_json
from cbml.spec.cell import Cell
from cbml.workspace import Workspace


def fingerprint(workspace: Workspace, dataset: str) -> str:
    """What `build_lists` found the content of a dataset's images and lists to be."""
    return read_json(workspace.lists(dataset) / "summary.json", "build_lists", ("fingerprint",))["fingerprint"]


def dataset_of(workspace: Workspace, cell: Cell) -> Dataset:
    """The option of a cell's dataset: where the images are, and K, as params.yaml has it now, or the cell's own."""
    try:
        now = workspace.params().dataset.get(cell.dataset)
    except UserError:  # none, or of another time
        now = None
    return now if now and now.type == cell.dataset_config.type else cell.dataset_config


def ensure_images(workspace: Workspace, dataset: Dataset) -> Path:
    """The folder of a dataset's images; what can be fetched or made is, if it is not there."""
    folder = workspace.images(dataset)
    if not folder.is_dir():
        with locked(workspace.cache / folder.name, f"waiting for another process, which brings {folder}"):
            if not folder.is_dir():
                dataset.download(folder, workspace.root)
    return folder


def training_list(workspace: Workspace, cell: Cell) -> ImageList:
    """The training images of a cell's dataset; see `read_list`."""
    return read_list(workspace.lists(cell.dataset) / "train.txt")


def test_list(workspace: Workspace, cell: Cell) -> tuple[ImageList, Scoring]:
    """The test images of a cell's dataset, queries before their gallery, and how they are scored; see `read_list`."""
    ks, folder = dataset_of(workspace, cell).ks, workspace.lists(cell.dataset)
    if not (folder / "query.txt").is_file():
        return read_list(folder / "test.txt"), Scoring(ks)
    queries, gallery = (read_list(folder / f"{name}.txt") for name in ("query", "gallery"))
    return queries + gallery, Scoring(ks, len(queries.paths))


def images_of(workspace: Workspace, cell: Cell, images: ImageList) -> Images:
    """The images of a list as the cell's recipe wants them: a part of those of the whole dataset; see `pack_images`.

    Raises:
        UserError: an image cannot be read, or the images are not those of the lists.
    """
    train, (test, scoring) = training_list(workspace, cell), test_list(workspace, cell)
    every = train + test
    print_of_lists = fingerprint(workspace, cell.dataset)
    size = cell.recipe.resize, cell.recipe.interpolation
    dataset = dataset_of(workspace, cell)
    root = workspace.images(dataset)
    if not (Packing(every, root, workspace.cache, print_of_lists).folder(size) / "images.bin").exists():
        ensure_images(workspace, dataset)

    def check(digests: list[str]) -> None:
        queries = scoring.queries or 0
        splits = ["train"] * len(train.paths) + ["query"] * queries
        splits += ["gallery" if queries else "test"] * (len(test.paths) - queries)
        if fingerprint_of(splits, every.paths, every.labels.tolist(), digests) != print_of_lists:
            stages = f"download@{cell.dataset} build_lists@{cell.dataset}"
            raise UserError(
                f"{root}: the images or the lists have changed since the lists were made; again: "
                f"`dvc repro -f -s {stages}`, then `dvc repro`"
            )

    packed = pack_images(
        every, root, workspace.cache, resize=size[0], interpolation=size[1], fingerprint=print_of_lists, check=check
    )
    position = {path: i for i, path in enumerate(every.paths)}
    indices = torch.tensor([position[path] for path in images.paths])
    return packed.subset(indices, torch.from_numpy(images.labels))
