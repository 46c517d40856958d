"""Images as arrays of bytes: from a file, and many of them at once with the crops that are cut from them.

Decoding JPEGs is most of what an input pipeline does. Doing it once (see `packing`) leaves crop and resize, which
happen where the bytes are: in a GPU's memory if they fit, else on the CPU.
"""

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from cbml.data.crops import center_boxes, color_jitter, crop_each, crop_together, random_boxes
from cbml.errors import UserError, trouble

MOST_PIXELS = 2**28 // 3  # 256 MiB of RGB, from where on Pillow warns of a decompression bomb
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# By EXIF's orientation: how to turn the pixels of a file.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: Path | BinaryIO) -> Image.Image:
    """An upright RGB image.

    Of an animation it is the first one; transparency is left out; 16 bits per channel become 8.

    Raises:
        UserError: Pillow cannot read it, it has more than `MOST_PIXELS`, or its pixels are floating-point numbers, of
            which nobody knows the range.
    """
    try:
        with Image.open(source) as file:
            width, height = upright_size(file)
            if width * height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, at most {MOST_PIXELS} allowed")
            turn = UPRIGHT.get(_orientation(file))
            if file.mode == "F":
                raise ValueError("pixels are floating-point numbers; save it with 8 or 16 bits a channel")
            if file.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
                image = Image.fromarray((np.asarray(file).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
            else:
                image = file.convert("RGB")
            return image if turn is None else image.transpose(turn)
    except Exception as error:  # Pillow's decoders raise errors of many types
        if trouble(error):  # which says nothing of the image
            raise
        raise UserError(f"{name_of(source)}: not an image that Pillow can read ({error})") from None


def upright_size(file: Image.Image) -> tuple[int, int]:
    """Width and height of what `decode` returns, of an opened file, without decoding it."""
    return file.size[::-1] if _orientation(file) in (5, 6, 7, 8) else file.size


def _orientation(file: Image.Image) -> int:
    # Pillow turns a TIFF by itself; and looking for the tag of a PNG that does not begin with it would decode it.
    if file.format == "TIFF" or (file.format == "PNG" and "exif" not in file.info):
        return 1
    return file.getexif().get(ExifTags.Base.Orientation, 1)


def name_of(source: Path | BinaryIO) -> str:
    """What an error message calls the source of an image."""
    return str(source) if isinstance(source, Path) else "image"


def resized(width: int, height: int, resize: int) -> tuple[int, int]:
    """Width and height with the short side at `resize`; the long side is truncated to whole pixels."""
    short = min(width, height)
    return (width, height) if short == resize else (resize * width // short, resize * height // short)


def resize_to(image: Image.Image, resize: int, interpolation: str, name: str) -> np.ndarray:
    """(H, W, 3) uint8 with the short side at `resize`, as torchvision's `Resize(int)` does.

    Raises:
        UserError: it would have more than `MOST_PIXELS`; `name` is what to call it.
    """
    size = resized(*image.size, resize)
    if size != image.size:
        if size[0] * size[1] > MOST_PIXELS:
            raise UserError(
                f"{name}: {image.width} x {image.height} pixels become {size[0]} x {size[1]} at short side {resize}; "
                f"at most {MOST_PIXELS} are allowed"
            )
        image = image.resize(size, RESAMPLING[interpolation])
    return np.asarray(image)


def load_image(source: Path | BinaryIO, *, resize: int, interpolation: str) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB with its short side at `resize`; see `decode` and `resize_to`."""
    return resize_to(decode(source), resize, interpolation, name_of(source))


def one_after_another(sizes: Tensor) -> Tensor:
    """(N,) int64: where images of these `sizes` (N, 2) begin, in pixels, if each does where the one before it ends."""
    areas = sizes.prod(1)
    return areas.cumsum(0) - areas


class Cropped:
    """What all images have that crops are cut from: those of training and those of evaluation."""

    sizes: Tensor

    def crops(
        self, indices: Tensor, boxes: Tensor, size: int, *, flip: Tensor | None = None, interpolation: str = "bilinear"
    ) -> Tensor:
        """Cut a box from each of some images and resize it, as Pillow would (within rounding).

        Args:
            indices: (B,) int64.
            boxes: (B, 4) int64: top, left, height, width.
            size: side of the result.
            flip: (B,) bool, which results to mirror left to right.
            interpolation: "bilinear" or "bicubic", antialiased.

        Returns:
            (B, 3, size, size) uint8.
        """
        raise NotImplementedError

    def random_crops(
        self,
        indices: Tensor,
        generator: torch.Generator,
        *,
        size: int,
        scale: Sequence[float],
        ratio: Sequence[float],
        flip: bool,
        jitter: Sequence[float] | None,
        interpolation: str,
        own: slice = slice(None),
    ) -> Tensor:
        """(B, 3, size, size) uint8, as they are trained on; they depend on these arguments alone.

        Args:
            own: make these rows alone, as they are in the whole batch.
        """
        boxes = random_boxes(self.sizes[indices], scale, ratio, generator)
        mirrored = torch.rand(len(indices), generator=generator) < 0.5 if flip else None
        mirrored = mirrored if mirrored is None else mirrored[own]
        found = self.crops(indices[own], boxes[own], size, flip=mirrored, interpolation=interpolation)
        return color_jitter(found, jitter, generator, own, len(indices)) if jitter else found

    def center_crops(self, indices: Tensor, size: int, interpolation: str) -> Tensor:
        """(B, 3, size, size) uint8, as they are evaluated on."""
        return self.crops(indices, center_boxes(self.sizes[indices], size), size, interpolation=interpolation)


@dataclass
class PackedImages(Cropped):
    """Decoded images of a list, in its order.

    Attributes:
        data: uint8, images' (H, W, 3) RGB values one after another.
        sizes: (N, 2) int64, height and width of each.
        labels: (N,) int64.
        starts: (N,) int64: where in `data` each image begins, in pixels; by default, each where the one before it ends.
    """

    data: Tensor
    sizes: Tensor
    labels: Tensor
    starts: Tensor = None  # type: ignore[assignment]  # until `__post_init__`

    def __post_init__(self) -> None:
        if self.starts is None:
            self.starts = one_after_another(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def of(cls, arrays: list[np.ndarray]) -> "PackedImages":
        """Images (H, W, 3) in memory, without labels."""
        data = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        sizes = torch.tensor([array.shape[:2] for array in arrays])
        return cls(data, sizes, torch.zeros(len(arrays), dtype=torch.int64))

    @property
    def nbytes(self) -> int:
        """Of these images, decoded."""
        return 3 * int(self.sizes.prod(1).sum())

    @property
    def on_gpu(self) -> bool:
        return self.data.is_cuda

    def crops(
        self,
        indices: Tensor,
        boxes: Tensor,
        size: int,
        *,
        flip: Tensor | None = None,
        interpolation: str = "bilinear",
    ) -> Tensor:
        """See `Cropped.crops`; the result is where `data` is."""
        flip = torch.zeros(len(indices), dtype=torch.bool) if flip is None else flip
        crop = crop_each if self.data.device.type == "cpu" else crop_together
        starts, widths = self.starts[indices], self.sizes[indices, 1]
        return crop(self.data, starts, widths, boxes, size, flip=flip, interpolation=interpolation)

    def subset(self, indices: Tensor, labels: Tensor) -> "PackedImages":
        """Those of the images, in the order of `indices` and with `labels`; nothing is copied."""
        return PackedImages(self.data, self.sizes[indices], labels, self.starts[indices])

    def to(self, device: torch.device) -> "PackedImages":
        """The same images on `device`, without what else is in `data`."""
        order = self.starts.argsort()
        data = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        filled = 0
        for piece in self._pieces():
            data[filled : filled + len(piece)] = piece
            filled += len(piece)
        starts = torch.empty_like(self.starts)
        starts[order] = one_after_another(self.sizes[order])
        return replace(self, data=data, starts=starts)

    def touch(self) -> None:
        """Read a memory-mapped file's part with these images, from its beginning to its end."""
        for piece in self._pieces():
            piece[:: mmap.PAGESIZE].sum()

    def _pieces(self) -> list[Tensor]:
        """These images' parts of `data`, in order; neighbours are one part."""
        order = self.starts.argsort()
        firsts, lasts = 3 * self.starts[order], 3 * (self.starts + self.sizes.prod(1))[order]
        begins = torch.ones(len(self), dtype=torch.bool)
        begins[1:] = firsts[1:] != lasts[:-1]
        ends = begins.roll(-1)
        return [
            self.data[first:last] for first, last in zip(firsts[begins].tolist(), lasts[ends].tolist(), strict=True)
        ]


@dataclass(frozen=True)
class EncodedImages(Cropped):
    """Images of a list that are too large to be kept decoded: the same crops as of `PackedImages`, from the files.

    Attributes:
        files: of each image.
        sizes: (N, 2) int64, height and width of each when it is decoded to short side `resize`.
        labels: (N,) int64.
        resize, interpolation: see `load_image`.
    """

    files: Sequence[Path]
    sizes: Tensor
    labels: Tensor
    resize: int
    interpolation: str

    def __len__(self) -> int:
        return len(self.files)

    on_gpu = False

    @property
    def nbytes(self) -> int:
        """See `PackedImages.nbytes`."""
        return 3 * int(self.sizes.prod(1).sum())

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())

    def crops(self, indices: Tensor, boxes: Tensor, size: int, **options: Any) -> Tensor:
        """See `PackedImages.crops`.

        Raises:
            UserError: an image cannot be decoded.
        """
        load = partial(load_image, resize=self.resize, interpolation=self.interpolation)
        arrays = list(self._threads.map(load, [self.files[index] for index in indices.tolist()]))
        return PackedImages.of(arrays).crops(torch.arange(len(indices)), boxes, size, **options)

    def subset(self, indices: Tensor, labels: Tensor) -> "EncodedImages":
        """See `PackedImages.subset`."""
        files = [self.files[index] for index in indices.tolist()]
        return replace(self, files=files, sizes=self.sizes[indices], labels=labels)


Images = PackedImages | EncodedImages
