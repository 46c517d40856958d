"""Fetch an archive over HTTP, verify it, and unpack the dataset in it."""

import gzip
import hashlib
import lzma
import shutil
import tarfile
import time
import zlib
from pathlib import Path, PurePosixPath

import requests

from cbml.datasets.layout import LAYOUT
from cbml.errors import UserError
from cbml.progress import progress

CHUNK = 2**16  # bytes; a transfer that breaks off loses less than one chunk
RETRIES = 5
BACKOFF = 1.0  # seconds before the first retry, doubled before each further one
INSTEAD = "give an archive or folder that you have as source=PATH"


def fetch(url: str, path: Path, *, size: int, md5: str) -> Path:
    """Download `url` to `path`, continuing a transfer that broke off, in this run or an earlier one.

    Bytes arrive in `path` + ".part", which gets its final name once its size (in bytes) and MD5 are right.

    Raises:
        UserError: the server refuses or stays unreachable (what has arrived is kept), or size or MD5 differ (the file
            is deleted).
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    best = failures = 0
    while (have := _size(part)) < size:
        best = max(best, have)
        try:
            problem = _transfer(url, part, size)
        except requests.RequestException as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        failures = 0 if _size(part) > best else failures + 1
        if failures > RETRIES:
            raise UserError(
                f"{url}: {_size(part)} of {size} bytes arrived in {part} ({problem}); "
                f"run again to continue, or {INSTEAD}"
            )
        if failures:
            time.sleep(BACKOFF * 2 ** (failures - 1))
    if have > size:
        part.unlink()
        raise UserError(f"{url}: size is {have} bytes, expected {size}; the file is deleted: run again, or {INSTEAD}")
    if (found := _md5(part)) != md5:
        part.unlink()
        raise UserError(f"{url}: MD5 is {found}, expected {md5}; the file is deleted: run again, or {INSTEAD}")
    return part.rename(path)


def _transfer(url: str, part: Path, size: int) -> str:
    """Append to `part` what the server still has; returns why that may not be all."""
    have = _size(part)
    # identity: a proxy that compresses on the fly would shift every offset
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)
            raise UserError(
                f"{url}: the server's file ends at or before byte {have}, expected {size} bytes; what had "
                f"arrived is deleted: run again, or {INSTEAD}"
            )
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise UserError(
                f"{url}: the server answered {response.status_code} {response.reason}; check the url, or {INSTEAD}"
            )
        response.raise_for_status()
        resumed = response.status_code == 206  # otherwise Range was ignored, and the file starts over
        chunks = progress(
            response.iter_content(CHUNK),
            f"fetching {part.stem}",
            "B",
            total=-(-size // CHUNK),
            initial=have // CHUNK if resumed else 0,
            scale=CHUNK,
        )
        with part.open("ab" if resumed else "wb") as file:
            for chunk in chunks:
                file.write(chunk)
    return "the server sent no more"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(CHUNK), b"")
        for block in progress(blocks, f"verifying {path.stem}", "B", total=-(-_size(path) // CHUNK), scale=CHUNK):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path, top: str) -> None:
    """Unpack the regular files of `layout.LAYOUT` from a tar archive, where they may lie under a folder `top`.

    Raises:
        UserError: the archive is no tar, is truncated or damaged, or any member, wanted or not, is a link or a device
            or would be written outside of `folder`.
    """
    folder.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in progress(tar, f"unpacking {archive.name}", "files"):
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"{archive}: unsafe member {member.name!r}; nothing was unpacked, "
                        "expected files and folders under relative paths only"
                    )
                parts = path.parts[1:] if path.parts[:1] == (top,) else path.parts
                if member.isfile() and parts and parts[0] in LAYOUT:
                    target = folder.joinpath(*parts)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(
            f"{archive}: not a complete tar archive ({type(error).__name__}); get the archive again"
        ) from error
