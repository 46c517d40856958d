"""Unpack the dataset in an archive."""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cbml.data.sources.layout import is_inside
from cbml.errors import UserError
from cbml.progress import progress

CHUNK = 2**16  # bytes
MOST_BYTES = 64 * 2**30  # unpacked from one archive
SPARE_BYTES = 2**30  # left free on the disk
# Of a tar's headers, those of any size, which tarfile reads at once: long names, further attributes.
EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
MOST_HEADER = 2**20  # bytes
# bz2 and gzip raise an OSError; tarfile a ValueError for a name with a NUL byte; zipfile a RuntimeError for a password
# and for a compression that it does not know.
DAMAGES: tuple[type[Exception], ...]
DAMAGES = (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, OSError, RuntimeError, zlib.error)
DAMAGES += (lzma.LZMAError,)


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
            if not name or not is_inside(name) or not is_plain or size < 0:
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
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                output = target.open("wb")
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                raise UserError(
                    f"{archive}: {name!r} is a file here and a folder there ({str(error).partition(':')[0]}); "
                    "get the archive again"
                ) from None
            with output, open_member() as source:
                shutil.copyfileobj(source, output)  # `size` bytes, or an error
                unpacked += output.tell()
    except DAMAGES as error:
        if getattr(error, "errno", None):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{archive}: not a complete tar or zip archive ({reason}); get the archive again") from error


Member = tuple[str, int, bool, bool, Callable[[], Any]]  # name, bytes, is a file, is that or a folder, how to open


class _Header(tarfile.TarInfo):
    """One of a sensible size: tarfile would read any into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED and header.size > MOST_HEADER:
            raise ValueError(f"a header of {header.size} bytes, at most {MOST_HEADER} are allowed")
        return header


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, tarinfo=_Header) as tar:
        for member in tar:
            is_plain = member.isfile() or member.isdir()
            yield member.name, member.size, member.isfile(), is_plain, partial(tar.extractfile, member)
        while tar.fileobj.read(CHUNK):  # up to the checksum, which lies behind the last member
            pass


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            is_file = not member.filename.endswith("/")
            yield member.filename, member.file_size, is_file, is_plain, partial(file.open, member)
