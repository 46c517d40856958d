"""Remove from DVC's cache what was damaged in place, through a hard link to it."""

import hashlib
import os
from pathlib import Path

from cbml.errors import UserError
from cbml.progress import message, progress
from cbml.workspace import Workspace


def remove_damaged(workspace: Workspace) -> list[Path]:
    """Remove every object of DVC's cache whose content is not what its name says; return them.

    DVC trusts an object that is read-only, and would bring a damaged one back for good. Without it, the next
    `dvc repro` runs the stage that makes it.

    Raises:
        UserError: DVC is not installed, works on this checkout now, or does not know it.
    """
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
    except ModuleNotFoundError:
        raise UserError("DVC is not installed, and so has no cache; pip install dvc") from None
    try:
        repo = Repo(str(workspace.root))
        with repo.lock:
            return _remove_damaged(Path(repo.cache.local.path))
    except DvcException as error:
        raise UserError(f"DVC: {' '.join(str(error).split())}") from error


def _remove_damaged(cache: Path) -> list[Path]:
    objects = sorted(file for file in cache.glob("??/*") if file.is_file())
    damaged = []
    for file in progress(objects, f"read {cache}", "files"):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if f"{file.parent.name}{file.name}".removesuffix(".dir") != digest:
            os.utime(file)  # a link to it elsewhere: DVC looks at that again
            file.unlink()
            message(f"{file}: damaged, removed")
            damaged.append(file)
    return damaged
