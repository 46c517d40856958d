"""Fetch an archive over HTTP, verify it, and unpack the dataset in it."""

import errno
import hashlib
import lzma
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import requests
from urllib3.exceptions import HTTPError

from cbml.datasets.layout import LAYOUT, is_inside
from cbml.errors import UserError
from cbml.progress import message, progress

CHUNK = 2**16  # bytes; a transfer that breaks off loses less than one chunk
STALL = 60.0  # seconds; a transfer that brings less than one chunk in them has broken off
RETRIES = 5
BACKOFF = 1.0  # seconds before the first retry, doubled before each further one
MOST_BYTES = 64 * 2**30  # unpacked from one archive
SPARE_BYTES = 2**30  # left free on the disk
INSTEAD = "give an archive or folder that you have as source=PATH"


def fetch(url: str, path: Path, *, size: int, md5: str) -> Path:
    """Download `url` to `path`, continuing a transfer that broke off, in this run or an earlier one.

    Bytes arrive in `path` + ".part", which gets its final name once its size (in bytes) and MD5 are right. A `path`
    that has another size or MD5 is fetched again.

    Raises:
        UserError: the server refuses or stays unreachable (what has arrived is kept), or size or MD5 differ (the file
            is deleted).
    """
    if path.exists():
        if not (wrong := _mismatch(path, size, md5)):
            return path
        message(f"{path}: {wrong}; fetching it again")
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    best = failures = 0
    while (have := _size(part)) < size:
        best = max(best, have)
        try:
            problem = _transfer(url, part, size)
        except (requests.RequestException, HTTPError, TimeoutError) as error:
            problem = _reason(error)
        failures = 0 if _size(part) - best >= min(CHUNK, size - best) else failures + 1
        if failures > RETRIES:
            raise UserError(
                f"{_public(url)}: {_size(part)} of {size} bytes arrived in {part} ({problem}); "
                f"run again to continue, or {INSTEAD}"
            )
        if failures:
            time.sleep(BACKOFF * 2 ** (failures - 1))
    if wrong := _mismatch(part, size, md5):
        part.unlink()
        raise UserError(f"{_public(url)}: {wrong}; the file is deleted: run again, or {INSTEAD}")
    return part.rename(path)


def _transfer(url: str, part: Path, size: int) -> str:
    """Append to `part` what the server still has; returns why that may not be all."""
    have = _size(part)
    # identity: a proxy that compresses on the fly would shift every offset
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=STALL) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)
            raise UserError(
                f"{_public(url)}: the server's file ends at or before byte {have}, expected {size} bytes; what had "
                f"arrived is deleted: run again, or {INSTEAD}"
            )
        status = f"the server answered {response.status_code} {response.reason}"
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise UserError(f"{_public(url)}: {status}; check the url, or {INSTEAD}")
        if response.status_code not in (200, 206):
            return status
        resumed = response.status_code == 206  # otherwise Range was ignored, and the file starts over
        chunks = progress(
            _chunks(response),
            f"fetching {part.stem}",
            "B",
            total=-(-size // CHUNK),
            initial=have // CHUNK if resumed else 0,
            scale=CHUNK,
        )
        with part.open("ab" if resumed else "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                if file.tell() > size:  # not the expected file, and perhaps one without end
                    break
    return "the server sent no more"


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """What arrives, `CHUNK` bytes at a time.

    Raises:
        requests.RequestException, HTTPError: the transfer broke off.
        TimeoutError: a chunk took more than `STALL` seconds. requests' own timeout is one between two bytes, so a
            server that sends one now and then would be waited for without end.
    """
    chunk, began = b"", time.monotonic()
    while some := response.raw.read1(CHUNK):
        chunk += some
        if len(chunk) >= CHUNK:
            yield chunk
            chunk, began = b"", time.monotonic()
        elif time.monotonic() > began + STALL:
            break
    yield chunk
    if some:
        raise TimeoutError(errno.ETIMEDOUT, f"fewer than {CHUNK} bytes in {STALL:g} s")


def _public(url: str) -> str:
    """`url` without the user, password and query that it may hold."""
    return re.sub(r"(?<=://)[^/?#]*@|[?#].*", "", url)


def _reason(error: BaseException | None) -> str:
    """Why a transfer broke off, without the text of requests' errors, which repeats the URL."""
    reason = type(error).__name__
    while error:
        if strerror := getattr(error, "strerror", None):
            return f"{reason}: {strerror}"
        error = error.__context__
    return reason


def _mismatch(path: Path, size: int, md5: str) -> str | None:
    """What is wrong with a file that should have this size and MD5, if anything."""
    if (found := _size(path)) != size:
        return f"size is {found} bytes, expected {size}"
    if (content := _md5(path)) != md5:
        return f"MD5 is {content}, expected {md5}"
    return None


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
        UserError: the archive is no tar, is truncated or damaged, or does not fit on the disk or into `MOST_BYTES`; or
            any member, wanted or not, is a link or a device or would be written outside of `folder`.
    """
    folder.mkdir()
    unpacked = 0
    try:
        with tarfile.open(archive) as tar:
            for member in progress(tar, f"unpacking {archive.name}", "files"):
                if not is_inside(member.name) or not (member.isfile() or member.isdir()) or member.size < 0:
                    raise UserError(
                        f"{archive}: unsafe member {member.name!r}; nothing was unpacked, "
                        "expected files and folders under relative paths only"
                    )
                path = PurePosixPath(member.name)
                parts = path.parts[1:] if path.parts[:1] == (top,) else path.parts
                if not (member.isfile() and parts and parts[0] in LAYOUT):
                    continue
                room = min(MOST_BYTES - unpacked, shutil.disk_usage(folder).free - SPARE_BYTES)
                if member.size > room:
                    raise UserError(
                        f"{archive}: {member.name!r} has {member.size} bytes, too many after {unpacked}; expected at "
                        f"most {MOST_BYTES} in all, and {SPARE_BYTES} still free on the disk of {folder.parent}"
                    )
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source  # as a regular file has one
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)  # `member.size` bytes, or an error
                    unpacked += file.tell()
            while tar.fileobj.read(CHUNK):  # up to the checksum, which lies behind the last member
                pass
    # bz2 and gzip raise an OSError, and tarfile a ValueError for a name with a NUL byte
    except (tarfile.TarError, EOFError, ValueError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(
            f"{archive}: not a complete tar archive ({type(error).__name__}); get the archive again"
        ) from error
