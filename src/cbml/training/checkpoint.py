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
from cbml.files import Damaged, damaged, locked, read_json, read_tensors, set_aside, write_tensors, write_text
from cbml.progress import message

SHARE = 0.05  # of the time, at most, goes into checkpoints
BUSY = "another process trains or evaluates it, waiting"
RESUME = "CBML_RESUME"  # environment variable: `always` continues what other code began, `never` starts again


class Checkpoint:
    """The state of a run, a dict of tensors and plain values, and weights of earlier iterations that its result needs.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._not_before = 0.0
        self._kept: set[str] = set()  # names of weights that are there, unless somebody took them away

    def part(self, name: str) -> "Checkpoint":
        """That of a part of the run, which goes with this one."""
        return Checkpoint(self.folder / name)

    def read(self) -> dict[str, Any] | None:
        """The state, or None before the first one.

        Raises:
            Damaged: it is, or weights that go with it are damaged or missing.
            UserError: it cannot be read now.
        """
        file = self.folder / "state.pt"
        if not file.exists():
            return None
        state = read_tensors(file, "train")
        self._kept.update(state.pop("weights", ()))
        for name in sorted(self._kept):
            if not self.weights(name).exists():
                raise damaged(self.weights(name), "missing", "train")
            read_tensors(self.weights(name), "train")
        return state

    def write(self, state: dict[str, Any], *, weights: tuple[str, ...] = (), now: bool = False) -> None:
        """Replace the state, and delete kept weights but these; unless the time for it is used up, and not `now`."""
        began = time.monotonic()
        if not now and began < self._not_before:
            return
        self._kept.intersection_update(weights)
        write_tensors(self.folder / "state.pt", state | {"weights": sorted(self._kept)})
        for file in self.folder.glob("*.pt"):
            if file.stem not in ("state", *weights):
                file.unlink()
        self._not_before = time.monotonic() + (time.monotonic() - began) * (1 / SHARE - 1)

    def keep(self, name: str, weights: dict[str, Tensor]) -> None:
        """Keep a state dict in the file `weights(name)`."""
        write_tensors(self.weights(name), weights)
        self._kept.add(name)

    def weights(self, name: str) -> Path:
        """The file of `keep`."""
        return self.folder / f"{name}.pt"


@contextmanager
def acquire(folder: Path, label: str, made_with: dict[str, str]) -> Iterator[Checkpoint]:
    """The checkpoint of a run, for the time of the block this process's alone; says from where it goes on, and why.

    Each code has a checkpoint of its own, so a run does not go on with other code or packages than it began with,
    unless the environment variable `CBML_RESUME` is `always`. A damaged checkpoint is set aside, not deleted; one that
    cannot be read for another reason, as an I/O error or too little memory, is an error and stays.

    Args:
        folder: named after everything that determines the run: a changed parameter never continues an old one.
        label: what messages call the run.
        made_with: code and packages by name.
    """
    with locked(folder, f"{label}: {BUSY}"):
        own = folder / hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:10]
        resume = os.environ.get(RESUME)
        if resume == "never":
            shutil.rmtree(own, ignore_errors=True)
        if not _usable(own, label) and resume != "never":
            # Of these only that is read, and may stop the run, which it is going to continue.
            others = [other for other in folder.glob("[!.]*/") if other != own and any(other.glob("**/state.pt"))]
            for other in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
                what = _differences(other / "made_with.json", made_with)
                if resume != "always":
                    message(
                        f"{label}: starts again: its checkpoint was made with {what}; {RESUME}=always goes on from it"
                    )
                    break
                if _usable(other, label):
                    message(f"{label}: goes on from a checkpoint that was made with {what}")
                    shutil.rmtree(own, ignore_errors=True)  # begun, and without a state
                    other.rename(own)
                    break
        write_text(own / "made_with.json", json.dumps(made_with, indent=2))
        yield Checkpoint(own)


def _usable(folder: Path, label: str) -> bool:
    """Whether there is a checkpoint; if it or a part of it is damaged, it is set aside."""
    try:
        states = [Checkpoint(part).read() for part in (folder, *folder.glob("[!.]*/"))]
    except Damaged as error:
        message(f"{label}: starts again: {error}; the checkpoint is kept as {set_aside(folder)}")
        return False
    return any(states)


def _differences(file: Path, ours: dict[str, str]) -> str:
    try:
        theirs = dict(read_json(file, "train"))
    except (UserError, TypeError, ValueError):
        return f"unknown code ({file} cannot be read)"
    return ", ".join(
        f"{name} {theirs.get(name, 'absent')} (now {ours.get(name, 'absent')})"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    )


@contextmanager
def removing(folder: Path) -> Iterator[bool]:
    """Hold all checkpoints of a run for the block, after which its result is safe, and they are deleted.

    Yields whether another process had them first.
    """
    with locked(folder, f"{folder.name}: {BUSY}") as waited:
        yield waited
        shutil.rmtree(folder, ignore_errors=True)
