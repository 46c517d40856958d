"""Fetch files over HTTP, verify them, and unpack the dataset in an archive."""

import errno
import hashlib
import lzma
import re
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import requests
from pydantic import Field
from urllib3.exceptions import HTTPError

from cbml.data.sources.layout import is_inside
from cbml.errors import UserError
from cbml.progress import message, progress
from cbml.schema import Count, Schema

CHUNK = 2**16  # bytes; a transfer that breaks off loses less than one chunk
STALL = 60.0  # seconds; a transfer that brings less than one chunk in them has broken off
RETRIES = 5
BACKOFF = 1.0  # seconds before the first retry, doubled before each further one
MOST_BYTES = 64 * 2**30  # unpacked from one archive
SPARE_BYTES = 2**30  # left free on the disk
# bz2 and gzip raise an OSError; tarfile a ValueError for a name with a NUL byte; zipfile a RuntimeError for a password
# and for a compression that it does not know.
DAMAGES: tuple[type[Exception], ...]
DAMAGES = (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, OSError, RuntimeError, zlib.error)
DAMAGES += (lzma.LZMAError,)


class RemoteFile(Schema):
    """A file to fetch.

    Attributes:
        size, md5, sha256: its length in bytes and its hashes, as far as they are known.
    """

    url: Annotated[str, Field(pattern="^https?://")]
    size: Count | None = None
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @property
    def name(self) -> str:
        """That of the file, without folder and query."""
        return PurePosixPath(re.sub(r"[?#].*", "", self.url)).name


def fetch(remote: RemoteFile, path: Path) -> Path:
    """Download a file to `path`, continuing a transfer that broke off, in this run or an earlier one.

    Bytes arrive in `path` + ".part", which gets its final name once size and hashes are right. A `path` that has others
    is fetched again. A file of unknown size is complete when the server says so.

    Raises:
        UserError: the server refuses or stays unreachable (what has arrived is kept), or size or a hash differs (the
            file is deleted).
    """
    if path.exists():
        if not (wrong := _mismatch(path, remote)):
            return path
        message(f"{path}: {wrong}; fetching it again")
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    size = remote.size
    best = failures = 0
    while size is None or _size(part) < size:
        best = max(best, _size(part))
        try:
            size, problem = _transfer(remote.url, part, size)
        except (requests.RequestException, HTTPError, TimeoutError) as error:
            problem = _reason(error)
        failures = 0 if _size(part) - best >= CHUNK or _size(part) == size else failures + 1
        if failures > RETRIES:
            raise UserError(
                f"{_public(remote.url)}: {_size(part)} of {size or 'an unknown number of'} bytes arrived in {part} "
                f"({problem}); run again to continue"
            )
        if failures:
            time.sleep(BACKOFF * 2 ** (failures - 1))
    if wrong := _mismatch(part, remote):
        part.unlink()
        raise UserError(f"{_public(remote.url)}: {wrong}; the file is deleted: run again")
    return part.rename(path)


def _transfer(url: str, part: Path, size: int | None) -> tuple[int | None, str]:
    """Append to `part` what the server still has.

    Returns:
        The size of the whole file, given or as the server says, and why this may not be all of it.
    """
    have = _size(part)
    # identity: offsets would be wrong if a proxy compressed on the fly
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=STALL) as response:
        if response.status_code == 416:
            if size is None and have and response.headers.get("Content-Range") == f"bytes */{have}":
                return have, ""
            part.unlink(missing_ok=True)
            raise UserError(
                f"{_public(url)}: the server's file ends at or before byte {have}, expected "
                f"{size or 'more'} bytes; what had arrived is deleted: run again"
            )
        status = f"the server answered {response.status_code} {response.reason}"
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise UserError(f"{_public(url)}: {status}; check the url")
        if response.status_code not in (200, 206):
            return size, status
        resumed = response.status_code == 206  # otherwise Range was ignored, and the file starts over
        length = response.headers.get("Content-Length", "")
        whole = size or (int(length) + resumed * have if length.isdecimal() else None)
        chunks = progress(
            _chunks(response),
            f"fetching {part.stem}",
            "B",
            total=whole and -(-whole // CHUNK),
            initial=have // CHUNK if resumed else 0,
            scale=CHUNK,
        )
        with part.open("ab" if resumed else "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                if file.tell() > (whole or MOST_BYTES):  # not the expected file, and perhaps an endless one
                    break
    # Without any length, an answer that ended was whole.
    return whole or _size(part), "the server sent no more"


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


def _mismatch(path: Path, expected: RemoteFile) -> str | None:
    """What is wrong with a fetched file, if anything."""
    if expected.size is not None and (found := _size(path)) != expected.size:
        return f"size is {found} bytes, expected {expected.size}"
    hashes = {name: value for name in ("md5", "sha256") if (value := getattr(expected, name))}
    for name, content in _hashes(path, tuple(hashes)).items():
        if content != hashes[name]:
            return f"{name.upper()} is {content}, expected {hashes[name]}"
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hashes(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    if digests:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(CHUNK), b"")
            for block in progress(blocks, f"verifying {path.stem}", "B", total=-(-_size(path) // CHUNK), scale=CHUNK):
                for digest in digests.values():
                    digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def unpack(archive: Path, folder: Path, top: str, wanted: tuple[str, ...]) -> None:
    """Unpack regular files from a tar or zip archive into a folder.

    Args:
        top: a folder in the archive that what is wanted may lie under.
        wanted: patterns (`fnmatch`) of the names there of files and of folders with all that is in them.

    Raises:
        UserError: the archive is neither, is encrypted, truncated or damaged, or does not fit on the disk or into
            `MOST_BYTES`; or any member, wanted or not, is a link or a device or would be written outside of `folder`.
    """
    unpacked = 0
    try:
        with archive.open("rb") as file:
            members = _zip_members if file.read(2) == b"PK" else _tar_members
        for name, size, is_file, is_plain, open_member in progress(
            members(archive), f"unpacking {archive.name}", "files"
        ):
            if not is_inside(name) or not is_plain or size < 0:
                raise UserError(
                    f"{archive}: unsafe member {name!r}; nothing was unpacked, "
                    "expected files and folders under relative paths only"
                )
            path = PurePosixPath(name)
            parts = path.parts[1:] if path.parts[:1] == (top,) else path.parts
            if not (is_file and parts and any(fnmatchcase(parts[0], pattern) for pattern in wanted)):
                continue
            room = min(MOST_BYTES - unpacked, shutil.disk_usage(folder).free - SPARE_BYTES)
            if size > room:
                raise UserError(
                    f"{archive}: {name!r} has {size} bytes, too many after {unpacked}; expected at "
                    f"most {MOST_BYTES} in all, and {SPARE_BYTES} still free on the disk of {folder.parent}"
                )
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_member() as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)  # `size` bytes, or an error
                unpacked += file.tell()
    except DAMAGES as error:
        if getattr(error, "errno", None):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{archive}: not a complete tar or zip archive ({reason}); get the archive again") from error


Member = tuple[str, int, bool, bool, Callable[[], Any]]  # name, bytes, is a file, is that or a folder, how to open


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive) as tar:
        for member in tar:
            is_plain = member.isfile() or member.isdir()
            yield member.name, member.size, member.isfile(), is_plain, partial(tar.extractfile, member)
        while tar.fileobj.read(CHUNK):  # up to the checksum, which lies behind the last member
            pass


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            yield member.filename, member.file_size, not member.is_dir(), is_plain, partial(file.open, member)
