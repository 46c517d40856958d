"""CUB-200-2011: 11,788 photographs of 200 bird species (Wah et al., Caltech CNS-TR-2011-001)."""

import os.path
import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field

from cbml.datasets.archives import fetch, unpack
from cbml.datasets.layout import LAYOUT, read_layout
from cbml.errors import UserError
from cbml.files import atomic_write
from cbml.progress import progress
from cbml.schema import Schema


class Cub200Config(Schema):
    """Where CUB-200-2011 comes from.

    Args:
        url, size, md5: address, length in bytes and MD5 of the official archive.
        source: an archive or an unpacked folder to take instead, relative to `download`'s `root`. Its layout is
            checked; its size and MD5 are not, so that a subset or a re-packed copy can be used.
    """

    type: Literal["cub200"]
    url: str = Field(pattern="^https?://")
    size: int = Field(gt=0)
    md5: str = Field(pattern="^[0-9a-f]{32}$")
    source: str | None = None

    def download(self, folder: Path, root: Path = Path()) -> None:
        """Create `folder` in the layout of `cbml.datasets.layout`; it is complete or absent.

        Args:
            root: what a relative `source` is relative to.

        Raises:
            UserError: see `fetch`, `unpack` and `read_layout`; or `source` does not exist.
        """
        fetched = folder.with_name(f".{folder.name}-download")  # beside `folder`: it outlives a run that breaks off
        if self.source is None:
            source = fetch(self.url, fetched / "CUB_200_2011.tgz", size=self.size, md5=self.md5)
        else:
            source = root / os.path.expanduser(self.source)
        with atomic_write(folder) as new:
            if source.is_file():
                unpack(source, new, top="CUB_200_2011")
                read_layout(new, origin=source)
            elif source.is_dir():
                copy_dataset(source / "CUB_200_2011" if (source / "CUB_200_2011").is_dir() else source, new)
            else:
                raise UserError(f"source {source} does not exist; expected an archive or folder of CUB-200-2011")
        if self.source is None:
            shutil.rmtree(fetched)


def copy_dataset(source: Path, folder: Path) -> None:
    """Copy the dataset in `source` to `folder`. No hard links: DVC would write-protect the user's own files."""
    files = [path for path, _ in read_layout(source)] + [name for name in LAYOUT if name.endswith(".txt")]
    for file in progress(files, f"copying {source}", "files"):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target)
