"""Files that are either complete or absent, and one line about those that are damaged."""

import errno
import itertools
import json
import os
import shutil
import socket
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cbml.errors import UserError, shortage, trouble
from cbml.progress import message

MEND = "python -m pipeline.clean --damaged"  # what removes from DVC's cache what was damaged in place


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or a folder; rename it to `path` when the block succeeds.

    Every process has a temporary folder of its own, so several may write the same path: the last one stays. What a
    killed process left there is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:100]}.{socket.gethostname()}."
    for left in path.parent.glob(f"{_literal(prefix)}*.partial"):
        if not _alive(left.name.removeprefix(prefix).removesuffix(".partial")):
            shutil.rmtree(left, ignore_errors=True)
    folder = path.with_name(f"{prefix}{os.getpid()}.partial")
    folder.mkdir()
    try:
        temporary = folder / path.name
        yield temporary
        for attempt in itertools.count():
            with suppress(FileNotFoundError, NotADirectoryError):
                if temporary.is_dir():  # which cannot be renamed over another folder
                    os.replace(f"{path}/", folder / f"replaced-{attempt}")
            try:
                os.replace(temporary, path)
                break
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # another process was faster
                    raise
    finally:
        shutil.rmtree(folder)


def _literal(name: str) -> str:
    """A glob pattern that matches `name` alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # of another user
        return True
    return int(pid) != os.getpid()


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[bool]:
    """Hold a lock beside `path` for the block; say `waiting` if another process has it. Yields whether one had it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    waited = False
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waited = True
        try:
            lock.acquire(timeout=1)
        except Timeout:
            message(waiting)
            lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


def share(file: Path, copy: Path) -> None:
    """Let a file and a copy of it take the disk's space once, where the disk can. For files that nobody changes."""
    with suppress(OSError), atomic_write(copy) as temporary:
        os.link(file.resolve(), temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Any) -> None:
    """`torch.save`, whole or not at all."""
    import torch

    # Through a file of Python's: PyTorch's own does not say why it could not write.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(tensors, file)


def read_json(path: Path, stage: str, names: tuple[str, ...] = ()) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing or damaged, or is no object with these `names`; `stage` is the one that writes it.
    """
    with _reading(path, stage):
        content = json.loads(path.read_text(encoding="utf-8"))
        if absent := [name for name in names if not isinstance(content, dict) or name not in content]:
            raise ValueError(f"no {absent[0]}")
        return content


def parse_csv(path: Path, **options: Any) -> Any:
    """pandas' `read_csv`; but where a row has more values than the header, no column becomes an index: a ValueError."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(path, index_col=False, **options)
        except pd.errors.ParserWarning:
            raise ValueError("a row has more values than the header; one with a comma in it needs quotes") from None


def read_csv(path: Path, stage: str, columns: tuple[str, ...] = (), **options: Any) -> Any:
    """The content of a CSV file as a DataFrame; `options` are pandas'. A column without a `dtype` is of numbers.

    Raises:
        UserError: it is missing or damaged, ends within a line, has no rows, lacks one of `columns`, or has text where
            numbers belong; `stage` is the one that writes it.
    """
    with _reading(path, stage):
        table = parse_csv(path, **options)
        if path.read_bytes()[-1:] != b"\n":
            raise ValueError("it ends within a line")
        if absent := [name for name in columns if name not in table]:
            raise ValueError(f"no column {absent[0]}")
        if table.empty:
            raise ValueError("no rows")
        text = options.get("dtype", {})
        if wrong := [name for name in table if name not in text and table[name].dtype.kind not in "iufb"]:
            raise ValueError(f"not only numbers in the column {wrong[0]}")
        return table


def read_tensors(path: Path, stage: str) -> Any:
    """What `torch.save` wrote, tensors and plain values only, on the CPU; the file's checksums are checked first.

    Raises:
        UserError: it is missing or damaged; `stage` is the one that writes it.
    """
    import torch

    with _reading(path, stage):
        with zipfile.ZipFile(path) as archive:  # torch.load does not check
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_arrays(path: Path, stage: str, names: tuple[str, ...]) -> Any:
    """The NumPy arrays of these names that an .npz file holds, by name.

    Raises:
        UserError: it is missing or damaged, or lacks one of `names`; `stage` is the one that writes it.
    """
    import numpy as np

    with _reading(path, stage), np.load(path) as arrays:
        return {name: arrays[name] for name in names}


class Damaged(UserError):
    """The content of a file is not what was written."""


def damaged(path: Path, reason: str, stage: str) -> Damaged:
    """What to raise where the content of a file is not what `stage` writes."""
    return Damaged(f"{path}: damaged ({reason}); {cure(path, stage)}")


def cure(path: Path, stage: str) -> str:
    """What makes a damaged file of a stage whole again, for good."""
    with suppress(OSError):
        if path.stat().st_nlink > 1:
            return f"DVC's cache may have the same bytes: `{MEND}`, then `dvc repro`"
    return f"run the stage {stage} again, which writes it"


def set_aside(path: Path) -> Path:
    """Rename what is damaged, a file or a folder, to a hidden name beside it; nothing is deleted. Returns that name."""
    asides = (path.with_name(f".damaged-{number}-{path.name}") for number in itertools.count(1))
    return path.rename(next(aside for aside in asides if not aside.exists()))


@contextmanager
def _reading(path: Path, stage: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the stage {stage} writes it") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, expected a file; move it away, the stage {stage} writes the file") from None
    except Exception as error:  # damage shows in as many types as there are readers
        if shortage(error):
            raise
        if refused := trouble(error):
            raise UserError(f"{path}: cannot be read ({refused}); nothing says that it is damaged") from error
        reason = " ".join(f"{error}".split())[:200]
        raise damaged(path, f"{type(error).__name__}: {reason}", stage) from error
