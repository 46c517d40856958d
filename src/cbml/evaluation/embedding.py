"""Embeddings of a list of images."""

from collections.abc import Callable

import torch
from torch import Tensor

from cbml.datasets.images import PackedImages
from cbml.datasets.transforms import center_boxes, crop_resize
from cbml.progress import progress


@torch.no_grad()
def embed(
    model: Callable[[Tensor], Tensor],
    images: PackedImages,
    *,
    crop: int,
    interpolation: str,
    device: torch.device,
    batch_size: int = 120,
) -> Tensor:
    """(N, D) embeddings, on `device`, of the centre crops of all images.

    Args:
        model: an `EmbeddingModel` in eval mode: (B, 3, crop, crop) RGB values of 0 to 255 → (B, D).
    """
    parts = []
    batches = torch.arange(len(images)).split(batch_size)
    for indices in progress(batches, "embed", "images", scale=batch_size):
        boxes = center_boxes(images.sizes[indices], crop)
        parts.append(model(crop_resize(images.batch(indices).to(device), boxes, crop, interpolation=interpolation)))
    return torch.cat(parts)
