"""Decoded images: every image of a list, resized once, in one memory-mapped array of bytes.

Decoding JPEGs is most of what an input pipeline does. Doing it once leaves crop and resize, which happen where the
bytes are: in a GPU's memory if they fit, else on the CPU.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cbml.datasets.lists import MOST_PIXELS, ImageList, decode, name_of
from cbml.datasets.transforms import crop_each, crop_together
from cbml.errors import UserError
from cbml.files import atomic_write, locked
from cbml.progress import message, progress

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CHUNK = 256


@dataclass(frozen=True)
class PackedImages:
    """The images of a list, in its order.

    Attributes:
        data: uint8, all images' (H, W, 3) RGB values one after another.
        sizes: (N, 2) int64, height and width of each.
        labels: (N,) int64.
    """

    data: Tensor
    sizes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def of(cls, arrays: list[np.ndarray]) -> "PackedImages":
        """Images (H, W, 3) in memory, without labels."""
        data = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        return cls(
            data, torch.tensor([array.shape[:2] for array in arrays]), torch.zeros(len(arrays), dtype=torch.int64)
        )

    @cached_property
    def starts(self) -> Tensor:
        """(N,) int64: where in `data` each image begins, in pixels."""
        areas = self.sizes.prod(1)
        return areas.cumsum(0) - areas

    def crops(
        self,
        indices: Tensor,
        boxes: Tensor,
        size: int,
        *,
        flip: Tensor | None = None,
        interpolation: str = "bilinear",
    ) -> Tensor:
        """Cut a box from each of some images and resize it, as Pillow would (within rounding).

        Args:
            indices: (B,) int64.
            boxes: (B, 4) int64: top, left, height, width.
            size: side of the result.
            flip: (B,) bool, which results to mirror left to right.
            interpolation: "bilinear" or "bicubic", antialiased.

        Returns:
            (B, 3, size, size) uint8, where `data` is.
        """
        flip = torch.zeros(len(indices), dtype=torch.bool) if flip is None else flip
        crop = crop_each if self.data.device.type == "cpu" else crop_together
        starts, widths = self.starts[indices], self.sizes[indices, 1]
        return crop(self.data, starts, widths, boxes, size, flip=flip, interpolation=interpolation)

    def to(self, device: torch.device) -> "PackedImages":
        """The same images with `data` on `device`."""
        return PackedImages(self.data.to(device), self.sizes, self.labels)


def pack_images(
    images: ImageList, root: Path, cache: Path, *, resize: int, interpolation: str, fingerprint: str
) -> PackedImages:
    """Decode a list of images to short side `resize`, or open the copy of an earlier call if it is whole.

    Args:
        root: the dataset folder that the list's paths are relative to.
        cache: folder for the decoded copies; they can be deleted at any time.
        fingerprint: identifies the content of the dataset's images.

    Raises:
        UserError: an image cannot be decoded.
    """
    key = json.dumps([fingerprint, images.paths, resize, interpolation])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    waiting = f"waiting for another process, which decodes the same images ({folder}.lock)"
    with locked(folder, waiting):
        if folder.exists():
            try:
                return _open(folder, images, resize)
            except Exception as error:  # NumPy raises errors of many types
                message(f"{folder}: the decoded images are damaged ({type(error).__name__}); decoding them again")
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            _decode(images, root, temporary, resize, interpolation)
        return _open(folder, images, resize)


def load_image(source: Path | BinaryIO, *, resize: int, interpolation: str) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB with its short side at `resize`, as torchvision's `Resize(int)` does.

    Raises:
        UserError: see `decode`; or it would have more than `MOST_PIXELS`.
    """
    image = decode(source)
    short = min(image.size)
    if short != resize:
        # The long side is truncated to whole pixels.
        width, height = (resize * side // short for side in image.size)
        if width * height > MOST_PIXELS:
            raise UserError(
                f"{name_of(source)}: {image.width} x {image.height} pixels become {width} x {height} at short side "
                f"{resize}; at most {MOST_PIXELS} are allowed"
            )
        image = image.resize((width, height), RESAMPLING[interpolation])
    return np.asarray(image)


def _open(folder: Path, images: ImageList, resize: int) -> PackedImages:
    sizes = np.load(folder / "sizes.npy")
    # Copy-on-write: PyTorch has no read-only tensors and warns about read-only memory.
    data = np.memmap(folder / "images.bin", dtype=np.uint8, mode="c")
    if sizes.shape != (len(images.paths), 2) or (sizes.min(1) != resize).any() or 3 * sizes.prod(1).sum() != len(data):
        raise ValueError("its sizes do not add up")
    return PackedImages(torch.from_numpy(data), torch.from_numpy(sizes), torch.from_numpy(images.labels))


def _decode(images: ImageList, root: Path, folder: Path, resize: int, interpolation: str) -> None:
    load = partial(load_image, resize=resize, interpolation=interpolation)
    sizes = []
    with ThreadPoolExecutor() as pool, open(folder / "images.bin", "wb") as file:
        # A chunk at a time, so that a slow disk does not leave the whole dataset in memory.
        chunks = (images.paths[i : i + CHUNK] for i in range(0, len(images.paths), CHUNK))
        decoded = (image for chunk in chunks for image in pool.map(load, [root / path for path in chunk]))
        for image in progress(decoded, f"decode {root.name}", "images", total=len(images.paths)):
            file.write(image.tobytes())
            sizes.append(image.shape[:2])
    np.save(folder / "sizes.npy", np.array(sizes, dtype=np.int64))
