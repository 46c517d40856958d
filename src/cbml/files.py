"""Files that are either complete or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cbml.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or a folder; rename it to `path` when the block succeeds.

    What a killed process left there is removed first, so two processes must not write the same path at once.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        temporary = folder / path.name
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all, in the place of one that is there."""
    with atomic_write(target) as temporary:
        shutil.copytree(source, temporary)


def read_json(path: Path, stage: str) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing or is not JSON; `stage` is the one that writes it.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the stage {stage} writes it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); the stage {stage} writes it") from None
