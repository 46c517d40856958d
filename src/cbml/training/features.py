"""A frozen trunk: its pooled features are computed once, and stand for the images from then on."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cbml.data.crops import center_boxes, color_jitter, random_boxes
from cbml.data.images import Images
from cbml.data.lists import ImageList
from cbml.data.loading import load_batches
from cbml.data.open import Data
from cbml.errors import UserError
from cbml.evaluation.embedding import batch_size
from cbml.files import locked, write_text
from cbml.models.embedding_model import EmbeddingModel, OnFeatures
from cbml.models.weights import weights_sha256
from cbml.progress import progress
from cbml.spec.recipe import Recipe
from cbml.training.device import device_context, set_up

CHUNK = 240  # images between two notes of how far it is
# What of a recipe determines the features: of a centre crop, and of a view.
CENTRE = ("resize", "crop", "interpolation", "precision")
VIEW = (*CENTRE, "scale", "ratio", "flip", "color_jitter")


@dataclass(frozen=True)
class Features:
    """Features of images in place of the images themselves; see `Cropped`, whose crops these are of.

    Attributes:
        centre: (M, C) float16, of the centre crops.
        views: (T, C) float16 each, of random crops; of the first T images alone.
        rows: (N,) int64, of each image its row in these.
        labels: (N,) int64.
    """

    centre: Tensor
    views: tuple[Tensor, ...]
    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return len(self) * self.centre[:1].nbytes * (1 + len(self.views))

    @property
    def on_gpu(self) -> bool:
        return self.centre.is_cuda

    def random_crops(self, indices: Tensor, generator: torch.Generator, **_: Any) -> Tensor:
        """(B, C) float32: one view of each image, by chance."""
        rows, chosen = self.rows[indices], torch.randint(len(self.views), (len(indices),), generator=generator)
        found = torch.stack([view[rows] for view in self.views])
        return found[chosen, torch.arange(len(rows))].float()

    def center_crops(self, indices: Tensor, *_: Any) -> Tensor:
        """(B, C) float32."""
        return self.centre[self.rows[indices]].float()

    def subset(self, indices: Tensor, labels: Tensor) -> "Features":
        """Those of the images, in the order of `indices` and with `labels`; nothing is copied."""
        return replace(self, rows=self.rows[indices], labels=labels)

    def to(self, device: torch.device) -> "Features":
        """The same on `device`."""
        views = self.views if self.views and int(self.rows.max()) < len(self.views[0]) else ()
        centre, *placed = (table[self.rows].to(device) for table in (self.centre, *views))
        return Features(centre, tuple(placed), torch.arange(len(self)), self.labels)

    def touch(self) -> None:
        """Read what is memory-mapped from its beginning to its end."""
        for table in (self.centre, *self.views):
            table[:, :1].sum()


def learned(network: EmbeddingModel, recipe: Recipe) -> EmbeddingModel:
    """What is trained of a network: all of it, or its head, on the features of a frozen trunk."""
    return OnFeatures(network) if recipe.train == "head" else network


def images_for(
    recipe: Recipe, data: Data, network: EmbeddingModel, *, trunk: Any, label: str, views: int | None = None
) -> Callable[[ImageList], Images]:
    """What gives a list's images for what is `learned`: as they are, or features; computed where they are not there.

    Args:
        trunk: what determines the network's trunk beside its weights.
        views: None for as many as the recipe says; 0 where only centre crops are wanted.
    """
    if recipe.train == "all":
        return data.images
    with device_context(recipe) as fabric:
        features = compute_features(
            set_up(network, fabric, recipe).eval(),
            data.every,
            recipe,
            views=recipe.views if views is None else views,
            training=len(data.train.paths),
            cache=data.cache,
            identity=[data.fingerprint, trunk, weights_sha256(network.trunk.state_dict())],
            device=fabric.device,
            label=label,
        )
    return lambda listed: cast(Images, features.subset(data.rows(listed), torch.from_numpy(listed.labels)))


def compute_features(
    model: EmbeddingModel,
    images: Images,
    recipe: Recipe,
    *,
    views: int,
    training: int,
    cache: Path,
    identity: Any,
    device: torch.device,
    label: str,
) -> Features:
    """The trunk's features of images, from the cache as far as they are there.

    A view is drawn as the recipe says, from `identity` and its number alone, so that all seeds and losses share it.
    Each is a file of its own: a run with more views computes those that are new.

    Args:
        model: in eval mode, on `device`, in the recipe's precision.
        views: of each training image.
        training: so many of the images, the first ones, have views.
        identity: what determines the features beside the recipe: the images in their order, and the trunk.

    Raises:
        UserError: a feature is not finite in half precision.
    """

    def table(view: int) -> Tensor:
        fields = {name: getattr(recipe, name) for name in (VIEW if view else CENTRE)}
        key = hashlib.sha256(json.dumps([identity, fields, view], sort_keys=True).encode()).hexdigest()[:16]
        file = cache / f"features-{key}.npy"
        if not file.is_file():
            with locked(file, f"{label}: another process computes the same features, waiting"):
                if not file.is_file():
                    what = f"features, view {view} of {views}" if view else "features"
                    chosen = images if not view else images.subset(torch.arange(training), images.labels[:training])
                    _compute(model, chosen, recipe, view, int(key[:15], 16), file, device, f"{label}: {what}")
        return torch.from_numpy(np.load(file, mmap_mode="c"))

    centre, *others = (table(view) for view in range(views + 1))
    return Features(centre, tuple(others), torch.arange(len(images)), images.labels)


@torch.no_grad()
def _compute(
    model: EmbeddingModel,
    images: Images,
    recipe: Recipe,
    view: int,
    seed: int,
    file: Path,
    device: torch.device,
    label: str,
) -> None:
    """Write the features of the images' centres, or of one view of each; goes on where an earlier call was cut off."""
    part, note = file.with_suffix(".partial"), file.with_suffix(".progress")
    done = int(note.read_text(encoding="utf-8")) if part.is_file() and note.is_file() else 0
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = len(images), model.num_features
    table = np.lib.format.open_memmap(part, "r+" if done else "w+", np.float16, shape)
    generator = torch.Generator().manual_seed(seed)
    boxes, flips = center_boxes(images.sizes, recipe.crop), torch.zeros(len(images), dtype=torch.bool)
    if view:
        boxes = random_boxes(images.sizes, recipe.scale, recipe.ratio, generator)
        if recipe.flip:
            flips = torch.rand(len(images), generator=generator) < 0.5
    size = batch_size(recipe.crop, device)

    def batches() -> Iterator[Tensor]:
        for start in range(done, len(images), CHUNK):
            yield from torch.arange(start, min(start + CHUNK, len(images))).split(size)

    def crops(rows: Tensor) -> tuple[int, int, Tensor]:
        found = images.crops(rows, boxes[rows], recipe.crop, flip=flips[rows], interpolation=recipe.interpolation)
        if view and recipe.color_jitter:  # its draws are each image's own, whatever a batch is
            each = zip(rows.tolist(), found.split(1), strict=True)
            found = torch.cat(
                [color_jitter(x, recipe.color_jitter, torch.Generator().manual_seed(seed + i)) for i, x in each]
            )
        return int(rows[0]), int(rows[-1]) + 1, found

    loaded = load_batches(crops, batches(), images, device)
    total = -(-len(images) // size)
    for first, last, pixels in progress(loaded, label, "images", total=total, initial=done // size, scale=size):
        found = cast(Tensor, model.outputs(pixels, ("features",)).features).half()
        if not found.isfinite().all():
            raise UserError(f"{label}: image {first} or one soon after it: not finite in half precision")
        table[first:last] = found.cpu().numpy()
        if last % CHUNK == 0:
            table.flush()
            write_text(note, str(last))
    table.flush()
    part.rename(file)
    note.unlink(missing_ok=True)
