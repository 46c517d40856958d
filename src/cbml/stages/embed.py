"""Use a trained cell on any images."""

from pathlib import Path

import numpy as np
import torch

from cbml import trained
from cbml.data.sources.folder import EXPECTED, find_images
from cbml.errors import UserError
from cbml.evaluation.retrieval import retrieve
from cbml.files import atomic_write
from cbml.progress import message
from cbml.training.device import device_context, set_up
from cbml.workspace import Workspace


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


def embed_images(model: trained.Trained, images: list[Path], out: Path) -> tuple[list[Path], np.ndarray]:
    """Write the embeddings of images to an .npz file: `paths` (N,) and `embeddings` (N, D).

    They are computed as `evaluate` does it: on the same device, in the recipe's precision.

    Args:
        images: files, and folders that are searched for them.

    Raises:
        UserError: a folder has no images, or one cannot be read.
    """
    files = [file for path in images for file in (_pictures(path) if path.is_dir() else [path])]
    with device_context(model.cell.recipe) as fabric:
        set_up(model.network, fabric, model.cell.recipe)
        embeddings = model.embed(files)
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        np.savez(file, paths=[str(each) for each in files], embeddings=embeddings)
    return files, embeddings


def nearest(files: list[Path], embeddings: np.ndarray, k: int) -> str:
    """Each image with the `k` most similar others, in text."""
    no_classes = torch.zeros(len(files))
    indices, similarities = (found.tolist() for found in retrieve(torch.from_numpy(embeddings), no_classes, k))
    lines = []
    for file, others, values in zip(files, indices, similarities, strict=True):
        lines.append(str(file))
        lines += [f"    {value:.3f} {files[other]}" for other, value in zip(others, values, strict=True)]
    return "\n".join(lines)


def _pictures(folder: Path) -> list[Path]:
    found = find_images(folder)
    if not found.images:
        raise UserError(f"{folder}: no images; expected {EXPECTED}")
    if found.others or found.loops:
        message(f"{folder}: left out: {found.others} files that are no images, {found.loops} links that make a loop")
    return sorted(map(Path, found.images))
