"""Embeddings of a list of images."""

from collections.abc import Callable

import torch
from torch import Tensor

from cbml.datasets.images import Images
from cbml.datasets.loading import load_batches
from cbml.datasets.transforms import center_boxes
from cbml.progress import progress

# Pixels of a batch whose feature maps a CPU's caches hold; larger ones take up to 1.7 times as long an image.
CPU_BATCH_PIXELS = 200_000


@torch.no_grad()
def embed(
    model: Callable[[Tensor], Tensor],
    images: Images,
    *,
    crop: int,
    interpolation: str,
    device: torch.device,
    batch_size: int = 120,
) -> Tensor:
    """(N, D) embeddings, on `device`, of the centre crops of all images.

    Args:
        model: an `EmbeddingModel` in eval mode: (B, 3, crop, crop) RGB values of 0 to 255 → (B, D).
        batch_size: at most, on a CPU.
    """
    if device.type == "cpu":
        batch_size = min(batch_size, max(1, CPU_BATCH_PIXELS // crop**2))

    def center_crops(indices: Tensor) -> tuple[Tensor]:
        boxes = center_boxes(images.sizes[indices], crop)
        return (images.crops(indices, boxes, crop, interpolation=interpolation),)

    batches = torch.arange(len(images)).split(batch_size)
    loaded = load_batches(center_crops, batches, images, device)
    return torch.cat(
        [model(crops) for (crops,) in progress(loaded, "embed", "images", total=len(batches), scale=batch_size)]
    )
