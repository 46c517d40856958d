"""Crop and resize of whole batches, as matrix products.

Antialiased resampling of a box is linear and separable, so a batch of crops with one box each is two batched matrix
products: rows by (B, out, H), columns by (B, W, out). The weights are those of Pillow's `Image.resize`: a triangle or a
cubic of the output pixel's width, cut off at the box and normalised. A mirrored image has its column weights reversed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
ATTEMPTS = 10


def _filter(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _weights(start: Tensor, length: Tensor, size: int, extent: int, interpolation: str) -> Tensor:
    """(B, size, extent): what each of `extent` input pixels gives to each output pixel of [start, start + length)."""
    scale = length / size
    width = scale.clamp(min=1)[:, None]
    center = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale[:, None]
    # Pillow's window: whole pixels around the support, inside the box.
    reach = SUPPORT[interpolation] * width
    first = torch.maximum((center - reach + 0.5).floor(), start[:, None])
    last = torch.minimum((center + reach + 0.5).floor(), (start + length)[:, None])
    pixel = torch.arange(extent, device=start.device)
    weights = _filter((pixel + 0.5 - center[..., None]) / width[..., None], interpolation)
    weights = weights * ((pixel >= first[..., None]) & (pixel < last[..., None]))
    return weights / weights.sum(-1, keepdim=True)


def crop_resize(
    images: Tensor, boxes: Tensor, size: int, *, flip: Tensor | None = None, interpolation: str = "bilinear"
) -> Tensor:
    """Cut one box from each image and resize it, as Pillow would (within rounding).

    Args:
        images: (B, 3, H, W), uint8.
        boxes: (B, 4) int64: top, left, height, width.
        size: side of the result.
        flip: (B,) bool, which results to mirror left to right.

    Returns:
        (B, 3, size, size) float32, 0 to 255, on the device of `images`.
    """
    height, width = images.shape[-2:]
    top, left, box_height, box_width = boxes.to(images.device, torch.float32).unbind(1)
    rows = _weights(top, box_height, size, height, interpolation)
    columns = _weights(left, box_width, size, width, interpolation)
    if flip is not None:
        columns = torch.where(flip.to(images.device)[:, None, None], columns.flip(1), columns)
    batch, channels = images.shape[:2]
    narrow = torch.bmm(images.float().reshape(batch, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], narrow.view(batch, channels, height, size)).clamp(0, 255)


def random_boxes(sizes: Tensor, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator) -> Tensor:
    """Boxes with the distribution of torchvision's `RandomResizedCrop`.

    Args:
        sizes: (B, 2) int64: height and width of each image.
        scale, ratio: range of the share of the area, and of the aspect ratio (width by height, log-uniform).

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    height, width = sizes.unbind(1)
    shape = (len(sizes), ATTEMPTS)
    area = sizes.prod(1, keepdim=True) * torch.empty(shape).uniform_(*scale, generator=generator)
    aspect = torch.empty(shape).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)
    # No attempt fits: the largest box of an allowed aspect ratio, in the centre.
    wide = (width / height).clamp(*ratio)
    found = fits.any(1)
    w = torch.where(found, w.gather(1, first)[:, 0], torch.minimum(width, (height * wide).round().long()))
    h = torch.where(found, h.gather(1, first)[:, 0], torch.minimum(height, (width / wide).round().long()))
    u = torch.rand(len(sizes), 2, generator=generator, dtype=torch.float64)
    top = torch.where(found, (u[:, 0] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(found, (u[:, 1] * (width - w + 1)).long(), (width - w) // 2)
    return torch.stack([top, left, h, w], 1)


def center_boxes(sizes: Tensor, size: int) -> Tensor:
    """(B, 4) int64 boxes of torchvision's `CenterCrop(size)`, for images of at least that size."""
    start = ((sizes - size) / 2).round().long()
    return torch.cat([start, torch.full_like(sizes, size)], 1)
