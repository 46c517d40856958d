"""What an interrupted run continues from."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from cbml.errors import UserError
from cbml.files import locked, read_json, read_tensors, write_tensors, write_text
from cbml.progress import message

SHARE = 0.05  # of the time, at most, goes into checkpoints
RESUME = "CBML_RESUME"  # environment variable: `always` continues what other code began, `never` starts again


class Checkpoint:
    """The state of a run, a dict of tensors and plain values, and weights of earlier iterations that its result needs.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._not_before = 0.0

    def part(self, name: str) -> "Checkpoint":
        """That of a part of the run, which goes with this one."""
        return Checkpoint(self.folder / name)

    def read(self) -> dict[str, Any] | None:
        """The state, or None before the first one.

        Raises:
            UserError: it is damaged.
        """
        file = self.folder / "state.pt"
        return read_tensors(file, "train") if file.is_file() else None

    def write(self, state: dict[str, Any], *, weights: tuple[str, ...] = (), now: bool = False) -> None:
        """Replace the state, and delete kept weights but these; unless the time for it is used up, and not `now`."""
        began = time.monotonic()
        if not now and began < self._not_before:
            return
        write_tensors(self.folder / "state.pt", state)
        for file in self.folder.glob("*.pt"):
            if file.stem not in ("state", *weights):
                file.unlink()
        self._not_before = time.monotonic() + (time.monotonic() - began) * (1 / SHARE - 1)

    def keep(self, name: str, weights: dict[str, Tensor]) -> None:
        """Keep a state dict in the file `weights(name)`."""
        write_tensors(self.weights(name), weights)

    def weights(self, name: str) -> Path:
        """The file of `keep`."""
        return self.folder / f"{name}.pt"


@contextmanager
def acquire(folder: Path, label: str, made_with: dict[str, str]) -> Iterator[Checkpoint]:
    """The checkpoint of a run, for the time of the block this process's alone; says from where it goes on, and why.

    Each code has a checkpoint of its own, so a run does not go on with other code or packages than it began with,
    unless the environment variable `CBML_RESUME` is `always`. A damaged checkpoint is deleted.

    Args:
        folder: named after everything that determines the run: a changed parameter never continues an old one.
        label: what messages call the run.
        made_with: code and packages by name.
    """
    with locked(folder, f"{label}: another process trains it, waiting"):
        own = folder / hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:10]
        resume = os.environ.get(RESUME)
        if resume == "never":
            shutil.rmtree(own, ignore_errors=True)
        if not _usable(own, label):
            others = [other for other in folder.glob("[!.]*/") if other != own and _usable(other, label)]
            if others and resume != "never":
                other = max(others, key=lambda other: (other / "made_with.json").stat().st_mtime)
                what = _differences(read_json(other / "made_with.json", "train"), made_with)
                if resume == "always":
                    message(f"{label}: goes on from a checkpoint that was made with {what}")
                    other.rename(own)
                else:
                    message(
                        f"{label}: starts again: its checkpoint was made with {what}; {RESUME}=always goes on from it"
                    )
        write_text(own / "made_with.json", json.dumps(made_with, indent=2))
        yield Checkpoint(own)


def _usable(folder: Path, label: str) -> bool:
    """Whether there is a checkpoint; if it or a part of it is damaged, it is deleted."""
    try:
        states = [Checkpoint(part).read() for part in (folder, *folder.glob("[!.]*/"))]
    except UserError as error:
        message(f"{label}: starts again: {error}")
        shutil.rmtree(folder)
        return False
    return any(states)


def _differences(theirs: dict[str, str], ours: dict[str, str]) -> str:
    return ", ".join(
        f"{name} {theirs.get(name, 'absent')} (now {ours.get(name, 'absent')})"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    )


def remove(folder: Path) -> None:
    """Delete all checkpoints of a run, whose result is safe; wait for a process that holds them."""
    with locked(folder, f"{folder.name}: another process trains it, waiting"):
        shutil.rmtree(folder, ignore_errors=True)
