"""Boxes, and the crops that they cut from images: image by image on a CPU, a whole batch at a time on a GPU."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
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


def _weights(length: Tensor, size: int, extent: int, interpolation: str) -> Tensor:
    """(B, size, extent): what each of `extent` input pixels gives to each output pixel of a box of `length`."""
    scale = length / size
    width = scale.clamp(min=1)[:, None]
    center = (torch.arange(size, device=length.device) + 0.5) * scale[:, None]
    # Pillow's window: whole pixels around the support, inside the box.
    reach = SUPPORT[interpolation] * width
    first = (center - reach + 0.5).floor().clamp(min=0)
    last = torch.minimum((center + reach + 0.5).floor(), length[:, None])
    pixel = torch.arange(extent, device=length.device)
    weights = _filter((pixel + 0.5 - center[..., None]) / width[..., None], interpolation)
    weights = weights * ((pixel >= first[..., None]) & (pixel < last[..., None]))
    return weights / weights.sum(-1, keepdim=True)


def crop_each(
    data: Tensor, starts: Tensor, widths: Tensor, boxes: Tensor, size: int, *, flip: Tensor, interpolation: str
) -> Tensor:
    """Cut one box from each image and resize it, as Pillow would; one image after another, on the CPU.

    Args:
        data: uint8, images' (H, W, 3) values one after another.
        starts: (B,) int64, in pixels, where in `data` each image begins.
        widths: (B,) int64, of the images.
        boxes: (B, 4) int64: top, left, height, width. A box of the result's size is copied.
        size: side of the result.
        flip: (B,) bool, which results to mirror left to right.

    Returns:
        (B, 3, size, size) uint8.
    """
    crops = np.empty((len(boxes), 3, size, size), dtype=np.uint8)
    images = zip(starts.tolist(), widths.tolist(), boxes.tolist(), flip.tolist(), strict=True)
    # NumPy makes the copies: PyTorch's would start a team of threads in every thread that calls this.
    for crop, (start, stride, (top, left, height, width), mirrored) in zip(crops, images, strict=True):
        first = start + top * stride + left
        pixels = data.as_strided((height, width, 3), (3 * stride, 3, 1), 3 * first).numpy()
        if (height, width) != (size, size):
            # Channels last and contiguous: what the vectorised kernel for bytes takes.
            part = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
            part = F.interpolate(part, (size, size), mode=interpolation, antialias=True)
            pixels = part[0].permute(1, 2, 0).numpy()
        crop[:] = (pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1)
    return torch.from_numpy(crops)


def crop_together(
    data: Tensor, starts: Tensor, widths: Tensor, boxes: Tensor, size: int, *, flip: Tensor, interpolation: str
) -> Tensor:
    """`crop_each` (within rounding) for a whole batch at a time, on the device of `data`, without waiting for it.

    Antialiased resampling of a box is linear and separable, so a batch is two batched matrix products: rows by
    (B, size, h), columns by (B, w, size), h and w the largest of all boxes. The weights are those of Pillow's
    `Image.resize`: a triangle or a cubic of the output pixel's width, cut off at the box and normalised.
    """
    batch, (height, width) = len(boxes), boxes[:, 2:].amax(0).tolist()
    first = starts + boxes[:, 0] * widths + boxes[:, 1]
    first, stride, extents, flip = (
        tensor.to(data.device, non_blocking=True) for tensor in (first, widths, boxes[:, 2:], flip)
    )
    # Past a box's end its last row and column are repeated; their weight is 0.
    row = torch.minimum(torch.arange(height, device=data.device), extents[:, :1] - 1)
    column = torch.minimum(torch.arange(width, device=data.device), extents[:, 1:] - 1)
    pixels = data.view(-1, 3)[first[:, None, None] + row[:, :, None] * stride[:, None, None] + column[:, None]]
    rows = _weights(extents[:, 0].float(), size, height, interpolation)
    columns = _weights(extents[:, 1].float(), size, width, interpolation)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    narrow = torch.bmm(pixels.permute(0, 3, 1, 2).reshape(batch, 3 * height, width).float(), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], narrow.view(batch, 3, height, size)).clamp(0, 255).round().byte()


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


def color_jitter(
    crops: Tensor, shares: Sequence[float], generator: torch.Generator, own: slice = slice(None), of: int = 0
) -> Tensor:
    """Change brightness, contrast, saturation and hue of each crop by factors of its own, in this order.

    Args:
        crops: (B, 3, H, W) uint8.
        shares: the largest change of each; factors are uniform in 1 ± share, the shift of hue in ± share.
        own, of: these crops are those rows of a batch of so many, for all of which factors are drawn.
    """
    import torchvision.transforms.v2.functional as F2  # only those who use it wait for it

    factors = ((2 * torch.rand(of or len(crops), 4, generator=generator) - 1) * torch.tensor(shares))[own]
    adjustments = (F2.adjust_brightness, F2.adjust_contrast, F2.adjust_saturation, F2.adjust_hue)
    results = []
    for crop, drawn in zip(crops, (factors + torch.tensor([1.0, 1.0, 1.0, 0.0])).tolist(), strict=True):
        for adjust, factor, share in zip(adjustments, drawn, shares, strict=True):
            crop = adjust(crop, factor) if share else crop
        results.append(crop)
    return torch.stack(results)


def center_boxes(sizes: Tensor, size: int) -> Tensor:
    """(B, 4) int64 boxes of torchvision's `CenterCrop(size)`, for images of at least that size."""
    start = ((sizes - size) / 2).round().long()
    return torch.cat([start, torch.full_like(sizes, size)], 1)
