"""Decoded images on disk: every image of a dataset, decoded once, in one file for each size that it is resized to."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cbml.data.images import EncodedImages, Images, PackedImages, decode, resize_to, upright_size
from cbml.data.lists import ImageList
from cbml.data.loading import prefetch
from cbml.errors import UserError, trouble
from cbml.files import atomic_write, locked, write_text
from cbml.progress import message, progress

PACKED_GB = "CBML_PACKED_GB"  # environment variable: the most that decoded images of one size may take of the disk
DEFAULT_GB = 64
SPARE_BYTES = 2 * 2**30  # left free on the disk
CHUNK = 512  # images between two records of progress
NAMED = 1000  # unreadable images, in a message

Size = tuple[int, str]  # `resize` and `interpolation` of `load_image`


@dataclass(frozen=True)
class Inspected:
    """What is known of files before their images are decoded.

    Attributes:
        digests: hex digits of the SHA-256 of each; empty if it cannot be read.
        sizes: (N, 2) int64, upright width and height of each; 0 if it is unreadable.
        unreadable: why, by position.
    """

    digests: list[str]
    sizes: np.ndarray
    unreadable: dict[int, str]

    def shapes(self, size: Size) -> np.ndarray:
        """(N, 2) height and width of every image when it is resized, as `resize_to` does."""
        short = self.sizes.min(1, keepdims=True).clip(min=1)
        return np.where(short == size[0], self.sizes, size[0] * self.sizes // short)[:, ::-1]

    def starts(self, size: Size) -> np.ndarray:
        """(N + 1,) where each of these begins, in pixels, one after another, and where the last one ends."""
        return np.concatenate([[0], self.shapes(size).prod(1).cumsum()])


def inspect(files: Sequence[Path], label: str) -> Inspected:
    """Read every file once, for its hash and the size of its image."""

    def look(file: Path) -> tuple[str, tuple[int, int], str | None]:
        digest = ""
        try:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            with Image.open(file) as image:
                return digest, upright_size(image), None
        except Exception as error:  # Pillow's decoders raise errors of many types
            if trouble(error):  # which says nothing of the image
                raise
            reason = f"{file}: not an image that Pillow can read ({error})" if digest else str(error)
            return digest, (0, 0), reason

    looked = prefetch(look, files, 2 * (os.cpu_count() or 1))
    digests, sizes, reasons = zip(*progress(looked, f"read {label}", "images", total=len(files)), strict=True)
    unreadable = {i: reason for i, reason in enumerate(reasons) if reason}
    return Inspected(list(digests), np.array(sizes, dtype=np.int64), unreadable)


def pack_images(
    images: ImageList,
    root: Path,
    cache: Path,
    *,
    resize: int,
    interpolation: str,
    fingerprint: str,
    check: Callable[[list[str]], None] = lambda digests: None,
) -> Images:
    """The images of a list with their short side at `resize`: decoded, by this call or an earlier one.

    Those that would take more of the disk than `CBML_PACKED_GB`, or than it has, are decoded each time that they are
    needed.

    Args:
        root, cache, fingerprint: see `Packing`.
        check: called with the hashes of the files, those that were decoded or are about to be; raises a UserError if
            they are not what is wanted.

    Raises:
        UserError: an image cannot be decoded; or that of `check`.
    """
    packing, size = Packing(images, root, cache, fingerprint), (resize, interpolation)
    with packing.acquire():
        found = packing.open(size)
        if isinstance(found, PackedImages) or (found and found.nbytes > packing.room):
            with suppress(UserError):  # of these files, or of other lists: the files will tell
                check(packing.digests(size))
                return found
        inspected = inspect(packing.files, root.name)
        if unreadable := inspected.unreadable:
            raise unreadable_error(unreadable, len(inspected.sizes))
        check(inspected.digests)
        fitting = packing.fitting([size], inspected)
        if fitting and (unreadable := packing.decode(fitting, inspected)):
            packing.discard()
            raise unreadable_error(unreadable, len(inspected.sizes))
        packing.keep([size], inspected, np.arange(len(inspected.sizes)), packing)
        packed = packing.open(size)
        assert packed  # as `keep` has written it
        return packed


@dataclass(frozen=True)
class Packing:
    """The decoded images of a dataset: where they are, and how they come there.

    Attributes:
        images: all of the dataset.
        root: the folder that their paths are relative to.
        cache: where the decoded images are kept; they can be deleted at any time.
        fingerprint: identifies the content of the images.
    """

    images: ImageList
    root: Path
    cache: Path
    fingerprint: str

    @cached_property
    def files(self) -> list[Path]:
        return [self.root / path for path in self.images.paths]

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(json.dumps([self.fingerprint, self.images.paths]).encode()).hexdigest()[:16]

    def folder(self, size: Size) -> Path:
        """Of the images of a size: `index.npy`, where each begins, its height and its width, all in pixels, and in the
        last row where they end; the hashes of their files, `digests.npy`; and, if they fit, they themselves,
        `images.bin`, and the CRC-32 of each, `checksums.npy`."""
        return self.cache / f"{self._key}-{_name(size)}"

    @property
    def _unfinished(self) -> Path:
        return self.cache / f"{self._key}.partial"

    @property
    def room(self) -> float:
        """How many bytes of the disk the images of a size may take."""
        self.cache.mkdir(parents=True, exist_ok=True)
        allowed = float(os.environ.get(PACKED_GB, DEFAULT_GB)) * 2**30
        return min(allowed, shutil.disk_usage(self.cache).free - SPARE_BYTES)

    def acquire(self) -> AbstractContextManager[bool]:
        """Keep other processes from decoding the same images for the time of the block."""
        path = self.cache / self._key
        return locked(path, f"waiting for another process, which decodes the same images ({path}.lock)")

    def open(self, size: Size) -> Images | None:
        """The images of a size, decoded or, if there was no room for that, from their files; None before `keep`, or if
        what it kept is damaged, which is looked for once a process.

        Raises:
            OSError, MemoryError: they cannot be read for another reason.
        """
        folder, labels = self.folder(size), torch.from_numpy(self.images.labels)
        if not folder.exists():
            return None
        try:
            index, data = np.load(folder / "index.npy"), None
            if (folder / "images.bin").exists():
                index, data, checksums = _open(folder)
                if (state := _state(folder)) not in _whole:
                    if (wrong := np.flatnonzero(_checksums(index, data) != checksums)).size:
                        raise ValueError(f"wrong checksums of {wrong.size} images, e.g. {self.images.paths[wrong[0]]}")
                    _whole.add(state)
            starts, shapes = torch.from_numpy(index[:-1, 0].copy()), torch.from_numpy(index[:-1, 1:].copy())
            if len(shapes) != len(labels) or (shapes.amin(1) != size[0]).any():
                raise ValueError("of other images")
        except Exception as error:  # NumPy raises errors of many types
            if trouble(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            message(f"{folder}: the decoded images are damaged ({reason}); decoding them again")
            return None
        if data is None:
            return EncodedImages(self.files, shapes, labels, *size)
        return PackedImages(torch.from_numpy(data), shapes, labels, starts)

    def digests(self, size: Size) -> list[str]:
        """The hashes of the files whose images `keep` kept; none if that record is damaged."""
        try:
            return [digest.decode() for digest in np.load(self.folder(size) / "digests.npy").tolist()]
        except Exception as error:  # NumPy raises errors of many types
            if trouble(error):
                raise
            return []

    def fitting(self, sizes: Sequence[Size], inspected: Inspected) -> list[Size]:
        """Those sizes of which the decoded images fit on the disk, all of them together; says which do not."""
        fitting: list[Size] = []
        taken = 0
        for size in sizes:
            needed = 3 * int(inspected.starts(size)[-1])
            if needed <= (room := self.room - taken):
                fitting.append(size)
                taken += needed
            else:
                message(
                    f"{self.root.name}: decoded to short side {size[0]}, {len(inspected.sizes):,} images take "
                    f"{needed / 2**30:.3g} GB; {max(room, 0) / 2**30:.3g} GB of the disk may be used (free space, "
                    f"{PACKED_GB}): they are decoded each time that they are needed"
                )
        return fitting

    def decode(self, sizes: Sequence[Size], inspected: Inspected) -> dict[int, str]:
        """Decode every image once and write it in each of these sizes, for `keep`.

        It goes on where an earlier call was cut off, and takes what was decoded to these sizes before, also of another
        fingerprint: that has the images that are new or changed decoded, and no others.

        Returns:
            Why an image cannot be read, by position.
        """
        folder, total = self._unfinished, len(self.files)
        starts = {size: inspected.starts(size) for size in sizes}
        done, unreadable = self._progress(starts) or (0, dict(inspected.unreadable))
        if not done:
            self.discard()
            folder.mkdir(parents=True)
        known = [_known(self.cache, size) for size in sizes]

        def load(i: int) -> list[np.ndarray] | str:
            file, digest = self.files[i], inspected.digests[i]
            if i in unreadable:
                return unreadable[i]
            if known and all(digest in each for each in known):
                whole = [array for each in known if (array := each[digest]()) is not None]
                if len(whole) == len(sizes):
                    return whole
            try:
                image = decode(file)
                arrays = [resize_to(image, *size, str(file)) for size in sizes]
            except UserError as error:
                return str(error)
            same = image.size == tuple(inspected.sizes[i])
            return arrays if same else f"{file}: changed while it was read"

        with ExitStack() as stack:
            outputs = {
                size: stack.enter_context((folder / _name(size)).open("r+b" if done else "wb")) for size in sizes
            }
            loaded = prefetch(load, range(done, total), 2 * (os.cpu_count() or 1))
            for i, result in enumerate(
                progress(loaded, f"decode {self.root.name}", "images", total=total, initial=done), done
            ):
                if isinstance(result, str):
                    unreadable[i] = result
                else:
                    for output, size, array in zip(outputs.values(), sizes, result, strict=True):
                        output.seek(3 * starts[size][i])
                        output.write(array.data)
                if (i + 1) % CHUNK == 0 or i + 1 == total:
                    for size, output in outputs.items():
                        output.truncate(3 * starts[size][i + 1])
                    state = {"sizes": sizes, "done": i + 1, "unreadable": unreadable}
                    write_text(folder / "progress.json", json.dumps(state))
        return unreadable

    def _progress(self, starts: dict[Size, np.ndarray]) -> tuple[int, dict[int, str]] | None:
        """How many images an earlier call of `decode` for the same sizes has done, and which it could not read."""
        try:
            state = json.loads((self._unfinished / "progress.json").read_text(encoding="utf-8"))
            done = state["done"]
            written = [(self._unfinished / _name(size)).stat().st_size for size in starts]
            whole = all(size >= 3 * each[done] for size, each in zip(written, starts.values(), strict=True))
            if whole and state["sizes"] == [list(size) for size in starts]:
                return done, {int(i): reason for i, reason in state["unreadable"].items()}
        except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
            pass
        return None

    def keep(self, sizes: Sequence[Size], inspected: Inspected, chosen: np.ndarray, packing: "Packing") -> None:
        """Make what `decode` wrote the images of `packing`, which has the `chosen` of these."""
        digests = np.array(inspected.digests, dtype="S64")[chosen]
        for size in sizes:
            starts, written = inspected.starts(size), self._unfinished / _name(size)
            index = np.column_stack([starts[:-1], inspected.shapes(size)])[chosen]
            with atomic_write(packing.folder(size)) as new:
                new.mkdir()
                index = np.concatenate([index, [[starts[-1], 0, 0]]])
                np.save(new / "index.npy", index)
                np.save(new / "digests.npy", digests)
                if written.is_file():
                    written.rename(new / "images.bin")
                    np.save(new / "checksums.npy", _checksums(index, _data(new)))
        self.discard()

    def discard(self) -> None:
        """Delete what `decode` wrote."""
        shutil.rmtree(self._unfinished, ignore_errors=True)


def unreadable_error(unreadable: dict[int, str], total: int, hint: str = "") -> UserError:
    """What to raise for these images of so many: it names them, up to a bound."""
    reasons = [unreadable[i] for i in sorted(unreadable)]
    named = "; ".join(reasons[:NAMED]) + (f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else "")
    return UserError(f"{len(reasons)} of {total} images cannot be read: {named}{hint}")


def of_two_classes(digests: Sequence[str], labels: Sequence[int]) -> list[tuple[int, int]]:
    """Positions of pairs of files with the same content and two labels."""
    first: dict[str, int] = {}
    pairs = [(first.setdefault(digest, i), i) for i, digest in enumerate(digests)]
    return [(one, other) for one, other in pairs if labels[one] != labels[other]]


def _name(size: Size) -> str:
    return f"{size[0]}-{size[1]}"


_whole: set[tuple[str, int, int]] = set()  # the `_state` of the folders whose checksums were right


def _state(folder: Path) -> tuple[str, int, int]:
    facts = (folder / "images.bin").stat()
    return str(folder.resolve()), facts.st_ino, facts.st_mtime_ns


def _open(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The index, the bytes and the checksums of a folder of decoded images."""
    index, data, checksums = np.load(folder / "index.npy"), _data(folder), np.load(folder / "checksums.npy")
    if len(data) != 3 * index[-1, 0] or index.min() < 0 or (index[:, 0] + index[:, 1:].prod(1)).max() > index[-1, 0]:
        raise ValueError("its sizes do not add up")
    if checksums.shape != (len(index) - 1,):
        raise ValueError("checksums of other images")
    return index, data, checksums


def _data(folder: Path) -> np.ndarray:
    # Copy-on-write: PyTorch has no read-only tensors and warns about read-only memory.
    return np.memmap(folder / "images.bin", dtype=np.uint8, mode="c")


def _checksums(index: np.ndarray, data: np.ndarray) -> np.ndarray:
    """(N,) uint32, the CRC-32 of each image, computed in threads."""
    crc = prefetch(lambda place: zlib.crc32(_pixels(data, *place).data), index[:-1].tolist(), 2 * (os.cpu_count() or 1))
    return np.fromiter(crc, dtype=np.uint32, count=len(index) - 1)


def _known(cache: Path, size: Size) -> dict[str, Callable[[], np.ndarray | None]]:
    """What gives each image that was decoded to this size before, if it is whole, by the hash of its file."""
    known: dict[str, Callable[[], np.ndarray | None]] = {}
    for file in cache.glob(f"*-{_name(size)}/digests.npy"):
        try:
            index, data, checksums = _open(file.parent)
            for digest, place, checksum in zip(np.load(file).tolist(), index[:-1].tolist(), checksums, strict=True):
                known[digest.decode()] = partial(_if_whole, data, place, checksum)
        except Exception:  # damaged: `open` reports it when the images are needed
            continue
    return known


def _if_whole(data: np.ndarray, place: list[int], checksum: int) -> np.ndarray | None:
    pixels = _pixels(data, *place)
    return pixels if zlib.crc32(pixels.data) == checksum else None


def _pixels(data: np.ndarray, start: int, height: int, width: int) -> np.ndarray:
    return data[3 * start : 3 * (start + height * width)].reshape(height, width, 3)
