"""Embeddings of a list of images."""

from collections.abc import Callable

import torch
from torch import Tensor

from cbml.data.images import Images
from cbml.data.loading import load_batches
from cbml.distributed import from_all, rank, world
from cbml.progress import progress

BATCH = 120
# Pixels of a batch whose feature maps fit a CPU's caches; larger batches take up to 1.7 times as long per image.
CPU_BATCH_PIXELS = 200_000


def batch_size(crop: int, device: torch.device) -> int:
    """How many images of `crop` × `crop` pixels to embed at a time."""
    return min(BATCH, max(1, CPU_BATCH_PIXELS // crop**2)) if device.type == "cpu" else BATCH


@torch.no_grad()
def embed(
    model: Callable[[Tensor], Tensor],
    images: Images,
    *,
    crop: int,
    interpolation: str,
    device: torch.device,
) -> Tensor:
    """(N, D) embeddings, on `device`, of the centre crops of all images. Several processes share the work.

    Args:
        model: an `EmbeddingModel` in eval mode: (B, 3, crop, crop) RGB values of 0 to 255 → (B, D).
    """
    size = batch_size(crop, device)

    def center_crops(indices: Tensor) -> tuple[Tensor]:
        return (images.center_crops(indices, crop, interpolation),)

    batches = torch.arange(len(images)).split(size)[rank() :: world()]  # the same ones, however many share them
    loaded = load_batches(center_crops, batches, images, device)
    shown = progress(loaded, "embed", "images", total=len(batches), scale=size)
    return torch.cat(from_all([model(crops) for (crops,) in shown], device))
