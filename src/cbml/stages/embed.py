"""Use a trained cell on any images: their embeddings, and which images are most similar to them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cbml import trained
from cbml.data.sources.folder import EXPECTED, find_images
from cbml.errors import UserError
from cbml.evaluation.retrieval import retrieve
from cbml.files import atomic_write, write_text
from cbml.progress import message
from cbml.report.search.page import Found, search_page
from cbml.training.device import device_context, set_up
from cbml.workspace import Workspace


@dataclass(frozen=True)
class Embedded:
    """Images with their embeddings by one model, (N, D)."""

    files: list[Path]
    embeddings: np.ndarray

    def nearest(self, k: int, gallery: "Embedded | None" = None) -> list[Found]:
        """Of each image the `k` most similar of a gallery, or of the others here. No file is found for itself."""
        among = gallery or self
        embeddings = [torch.from_numpy(each.embeddings) for each in (self, among)]
        no_classes = [torch.zeros(len(each)) for each in embeddings]
        if gallery is None:
            indices, similarities = retrieve(embeddings[0], no_classes[0], k)
        else:
            indices, similarities = retrieve(embeddings[0], no_classes[0], k + 1, embeddings[1], no_classes[1])
        itself = {file: file.resolve() for file in {*self.files, *among.files}}
        return [
            [
                (among.files[index], value)
                for index, value in zip(row, values, strict=True)
                if gallery is None or itself[among.files[index]] != itself[file]
            ][:k]
            for file, row, values in zip(self.files, indices.tolist(), similarities.tolist(), strict=True)
        ]


def load_model(model: str, workspace: Workspace) -> trained.Trained:
    """The trained cell of a run folder, of a folder that was exported, of an MLflow run by its id, or of a cell by its
    key.

    Raises:
        UserError: it is none of these.
    """
    if Path(model).is_dir():
        return trained.load(model)
    from cbml.tracking.model import find_model  # MLflow takes seconds to import

    return trained.load(find_model(workspace, model))


def embed_images(model: trained.Trained, images: list[Path]) -> Embedded:
    """The embeddings of images, computed as `evaluate` does it: on the same device, in the recipe's precision.

    Args:
        images: files, and folders that are searched for them.

    Raises:
        UserError: a folder has no images, or one cannot be read.
    """
    files = find_files(images)
    with device_context(model.cell.recipe) as fabric:
        set_up(model.network, fabric, model.cell.recipe)
        return Embedded(files, model.embed(files))


def embed(
    name: str,
    images: list[Path],
    workspace: Workspace,
    *,
    out: Path,
    neighbours: int = 0,
    gallery: list[Path] | None = None,
    page: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Write the embeddings of images to the .npz file `out`: `paths` (N,) and `embeddings` (N, D).

    Args:
        name: of the model; see `load_model`.
        images: files, and folders that are searched for them.
        neighbours: how many of the most similar images are found for each, among the others or in the gallery.
        gallery: files and folders, like `images`.
        page: where the page with them is written.
        overwrite: replace files that are there.

    Returns:
        What was written, and the neighbours in text.

    Raises:
        UserError: a file is there already; an image cannot be read; there is nothing to be near to.
    """
    written = [out, *([page] if page else [])]
    if there := [str(file) for file in written if file.exists() and not overwrite]:
        raise UserError(f"{', '.join(there)}: exists; name another with --out or --page, or pass --overwrite")
    if neighbours and not gallery and len(images) == 1 and not images[0].is_dir():
        raise UserError(f"{images[0]}: one image has no neighbours; name where to search for them: --gallery PATH")
    model = load_model(name, workspace)
    queries = embed_images(model, images)
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        np.savez(file, paths=[str(each) for each in queries.files], embeddings=queries.embeddings)
    lines = [f"{out}: {len(queries.files)} embeddings of {queries.embeddings.shape[1]}"]
    if neighbours:
        found = queries.nearest(neighbours, embed_images(model, gallery) if gallery else None)
        lines += as_text(queries.files, found)
        if page:
            write_text(page, search_page(f"Nearest images by {model.cell.name}", queries.files, found))
            lines.append(f"The page: {page.resolve().as_uri()}")
    return "\n".join(lines)


def as_text(files: list[Path], found: list[Found]) -> list[str]:
    """Each image in a line, and the images that were found for it below."""
    lines = []
    for file, images in zip(files, found, strict=True):
        lines += [str(file), *(f"    {value:.3f} {other}" for other, value in images)]
    return lines


def find_files(paths: list[Path]) -> list[Path]:
    """These files, and the images in these folders.

    Raises:
        UserError: a folder has no images.
    """
    return [file for path in paths for file in (_pictures(path) if path.is_dir() else [path])]


def _pictures(folder: Path) -> list[Path]:
    found = find_images(folder)
    if not found.images:
        raise UserError(f"{folder}: no images; expected {EXPECTED}")
    if found.others or found.loops:
        message(f"{folder}: left out: {found.others} files that are no images, {found.loops} links that make a loop")
    return sorted(map(Path, found.images))
