"""A dataset, opened once: its lists, and their images as a recipe wants them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cbml.data.images import Images
from cbml.data.lists import ImageList, fingerprint_of, read_list
from cbml.data.packing import Packing, Size, pack_images
from cbml.data.scoring import Scoring
from cbml.errors import UserError
from cbml.files import MEND, read_json


@dataclass(frozen=True)
class Data:
    """Lists and images of a dataset. Each file is read when it is asked for, and once.

    Attributes:
        lists: the folder that `build_lists` wrote.
        root: the folder of the images.
        cache: see `Packing`.
        ks: the K of Recall@K.
        size: what the images are resized to.
        ensure_images: brings the images if they are not there; returns `root`.
    """

    lists: Path
    root: Path
    cache: Path
    ks: list[int]
    size: Size
    ensure_images: Callable[[], Path]

    @cached_property
    def fingerprint(self) -> str:
        """What `build_lists` found the content of images and lists to be."""
        return read_json(self.lists / "summary.json", "build_lists", ("fingerprint",))["fingerprint"]

    @cached_property
    def train(self) -> ImageList:
        """The images to train on; see `read_list`."""
        return read_list(self.lists / "train.txt")

    @cached_property
    def _tested(self) -> dict[str, ImageList]:
        names = ("query", "gallery") if (self.lists / "query.txt").is_file() else ("test",)
        return {name: read_list(self.lists / f"{name}.txt") for name in names}

    @cached_property
    def test(self) -> ImageList:
        """The images to test on, queries before their gallery, if the dataset has these; see `read_list`."""
        if "test" in self._tested:
            return self._tested["test"]
        return self._tested["query"] + self._tested["gallery"]

    @property
    def scoring(self) -> Scoring:
        """How `test` is scored."""
        return Scoring(self.ks, len(self._tested["query"].paths) if "query" in self._tested else None)

    def images(self, listed: ImageList) -> Images:
        """The images of a list that is a part of `train` or `test`; see `pack_images`.

        Raises:
            UserError: an image cannot be read, or the images are not those of the lists.
        """
        return self.every.subset(self.rows(listed), torch.from_numpy(listed.labels))

    def rows(self, listed: ImageList) -> Tensor:
        """(N,) int64: where the images of such a list are in `every`."""
        return torch.tensor([self._rows[path] for path in listed.paths])

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {path: row for row, path in enumerate([*self.train.paths, *self.test.paths])}

    @cached_property
    def every(self) -> Images:
        """All images of `train` and then of `test`, decoded by this or an earlier call."""
        every, (resize, interpolation), fingerprint = self.train + self.test, self.size, self.fingerprint
        if not (Packing(every, self.root, self.cache, fingerprint).folder(self.size) / "images.bin").exists():
            self.ensure_images()
        return pack_images(
            every,
            self.root,
            self.cache,
            resize=resize,
            interpolation=interpolation,
            fingerprint=fingerprint,
            check=self._check,
        )

    def _check(self, digests: list[str]) -> None:
        """Raises a UserError if images of these hashes are not those that the lists were made of."""
        every = self.train + self.test
        parts = {"train": self.train, **self._tested}
        splits = [name for name, part in parts.items() for _ in part.paths]
        whole = len(digests) == len(splits)
        if not whole or fingerprint_of(splits, every.paths, every.labels.tolist(), digests) != self.fingerprint:
            stages = f"download@{self.lists.name} build_lists@{self.lists.name}"
            raise UserError(
                f"{self.root}: the images or the lists in {self.lists} have changed since the lists were made; again: "
                f"`{MEND}`, `dvc repro -f -s {stages}`, then `dvc repro`"
            )
