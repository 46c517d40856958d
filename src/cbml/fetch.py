"""Fetch files over HTTP, and verify them."""

import errno
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from typing import Annotated

import requests
from pydantic import Field
from urllib3.exceptions import HTTPError

from cbml.errors import UserError
from cbml.progress import message, progress
from cbml.schema import Count, Schema

CHUNK = 2**16  # bytes; a transfer that breaks off loses less than one chunk
STALL = 60.0  # seconds; a server that does not answer in them, or then brings less than one chunk, has broken off
RETRIES = 5
BACKOFF = 1.0  # seconds before the first retry, doubled before each further one
MOST_BYTES = 64 * 2**30  # of a file of unknown size


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
                f"{public(remote.url)}: {_size(part)} of {size or 'an unknown number of'} bytes arrived in {part} "
                f"({problem}); run again to continue"
            )
        if failures:
            time.sleep(BACKOFF * 2 ** (failures - 1))
    if wrong := _mismatch(part, remote):
        part.unlink()
        raise UserError(f"{public(remote.url)}: {wrong}; the file is deleted: run again")
    return part.rename(path)


def _transfer(url: str, part: Path, size: int | None) -> tuple[int | None, str]:
    """Append to `part` what the server still has.

    Returns:
        The size of the whole file, given or as the server says, and why this may not be all of it.
    """
    have = _size(part)
    # identity: a proxy that compresses on the fly would shift every offset
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    response, first = _answer(url, headers)
    with response:
        if response.status_code == 416:
            if size is None and have and response.headers.get("Content-Range") == f"bytes */{have}":
                return have, ""
            part.unlink(missing_ok=True)
            raise UserError(
                f"{public(url)}: the server's file ends at or before byte {have}, expected "
                f"{size or 'more'} bytes; what had arrived is deleted: run again"
            )
        status = f"the server answered {response.status_code} {response.reason}"
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise UserError(f"{public(url)}: {status}; check the url")
        if response.status_code not in (200, 206):
            return size, status
        resumed = response.status_code == 206  # otherwise Range was ignored, and the file starts over
        length = response.headers.get("Content-Length", "")
        whole = size or (int(length) + resumed * have if length.isdecimal() else None)
        chunks = progress(
            _chunks(response, first),
            f"fetching {part.stem}",
            "B",
            total=whole and -(-whole // CHUNK),
            initial=have // CHUNK if resumed else 0,
            scale=CHUNK,
        )
        with part.open("ab" if resumed else "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                if file.tell() > (whole or MOST_BYTES):  # not the expected file, and perhaps one without end
                    break
    # Without any length, an answer that ended was whole.
    return whole or _size(part), "the server sent no more"


def _answer(url: str, headers: dict[str, str]) -> tuple[requests.Response, bytes]:
    """The answer to a request, and the first bytes of its body.

    Raises:
        requests.RequestException, HTTPError: there is none.
        TimeoutError: it took more than `STALL` seconds. requests' own timeout is one between two bytes, so a header
            that drips, or one `100 Continue` after another, would be waited for without end.
    """
    answers: SimpleQueue[tuple[requests.Response, bytes] | BaseException] = SimpleQueue()

    def ask() -> None:
        try:
            response = requests.get(url, headers=headers, stream=True, timeout=STALL)
            answers.put((response, response.raw.read1(CHUNK)))
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=STALL)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {STALL:g} s") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _chunks(response: requests.Response, first: bytes) -> Iterator[bytes]:
    """What arrives after the `first` bytes, with them, `CHUNK` bytes at a time.

    Raises:
        requests.RequestException, HTTPError: the transfer broke off.
        TimeoutError: a chunk took more than `STALL` seconds. requests' own timeout is one between two bytes, so a
            server that sends one now and then would be waited for without end.
    """
    chunk, began, some = b"", time.monotonic(), first
    while some:
        chunk += some
        if len(chunk) >= CHUNK:
            yield chunk
            chunk, began = b"", time.monotonic()
        elif time.monotonic() > began + STALL:
            break
        some = response.raw.read1(CHUNK)
    yield chunk
    if some:
        raise TimeoutError(errno.ETIMEDOUT, f"fewer than {CHUNK} bytes in {STALL:g} s")


def public(url: str) -> str:
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
