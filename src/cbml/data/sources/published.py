"""Datasets that others publish: fetched from a mirror, or taken from where the user has them."""

import os.path
import shutil
from pathlib import Path
from typing import ClassVar

import pandas as pd

from cbml.data.sources.archives import unpack
from cbml.data.sources.base import DatasetConfig, own_folder
from cbml.errors import UserError
from cbml.fetch import RemoteFile, fetch
from cbml.files import atomic_write
from cbml.progress import message

COPIED = (".mat", ".txt")  # files of a mirror that are no archives


class PublishedConfig(DatasetConfig):
    """Where a published dataset comes from.

    Attributes:
        mirrors: tried in this order; each a list of files that make up the dataset, archives and others. Those of the
            first identify it.
        source: an archive, or a folder, that is used where it is, to take instead; not checked by size and hash.
        counts: of each split, the number of images and of classes that it must have; None: not checked.
    """

    mirrors: list[list[RemoteFile]] = []
    source: str | None = None
    counts: dict[str, tuple[int, int]] | None = None

    TITLE: ClassVar[str]
    TOP: ClassVar[str]  # the folder that archives have everything in
    PARTS: ClassVar[tuple[str, ...]]  # what is unpacked: see `unpack`
    INSTEAD: ClassVar[str] = "give an archive or folder that you have as source=PATH"

    def folder(self, data: Path, root: Path) -> Path:
        """See `DatasetConfig`.

        Raises:
            UserError: `source` does not exist.
        """
        if self.source is None:
            return own_folder(data, self.type, [file.model_dump() for file in (self.mirrors or [[]])[0]])
        source = root / os.path.expanduser(self.source)
        if source.is_dir():
            return source / self.TOP if (source / self.TOP).is_dir() else source
        if not source.is_file():
            raise UserError(f"source {source} does not exist; expected an archive or folder of {self.TITLE}")
        facts = source.stat()
        return own_folder(data, self.type, [str(source), facts.st_size, facts.st_mtime_ns])

    def download(self, folder: Path, root: Path = Path()) -> None:
        """See `DatasetConfig`, `fetch` and `unpack`."""
        if self.source is not None:
            self._unpack([root / os.path.expanduser(self.source)], folder)
            return
        fetched = folder.with_name(f".{folder.name}-download")  # beside `folder`: it outlives a run that breaks off
        reasons: list[str] = []
        for files in self.mirrors:
            if reasons:
                message(f"{reasons[-1]}; trying the next mirror")
            try:
                self._unpack([fetch(file, fetched / file.name) for file in files], folder)
                shutil.rmtree(fetched)
                return
            except UserError as error:
                reasons.append(str(error))
        raise UserError("; ".join([*reasons, f"{self.TITLE}: {self.INSTEAD}"]))

    def _unpack(self, files: list[Path], folder: Path) -> None:
        with atomic_write(folder) as new:
            new.mkdir()
            for file in files:
                if file.name.endswith(COPIED):
                    shutil.copy(file, new)
                else:
                    unpack(file, new, self.TOP, self.PARTS)
            self.catalogue(new, files[0])

    def catalogue(self, folder: Path, origin: Path | None = None) -> pd.DataFrame:
        """See `DatasetConfig`.

        Args:
            origin: what a message calls the folder, if not `folder` (the archive that it was unpacked from).

        Raises:
            UserError: something of the layout is missing or malformed, or the counts are not `counts`.
        """
        origin = origin or folder
        table = self.read(folder, origin)
        found = {split: (len(rows), rows.label.nunique()) for split, rows in table.groupby("split", sort=False)}
        if self.counts is not None and found != self.counts:
            raise UserError(f"{origin}: has {_counts(found)}; expected {_counts(self.counts)} (counts=null: anything)")
        return table

    def read(self, folder: Path, origin: Path) -> pd.DataFrame:
        """`catalogue` without its check of the counts."""
        raise NotImplementedError


def _counts(counts: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{split} {images:,} images of {classes:,} classes" for split, (images, classes) in counts.items())
