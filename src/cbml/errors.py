"""The one exception that a user can cause, and how a script begins and ends."""

import ctypes
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

SAME = "the same command continues where it stopped"
# How PyTorch, oneDNN, C++, the linker and Python say that memory (or room for a thread) is short.
MEMORY_WORDS = re.compile(
    "can't allocate|cannot allocate|bad_alloc|out of memory|not enough memory|can't start new thread|"
    "could not create a primitive|failed to map segment|error return without exception set",
    re.IGNORECASE,
)
# What the machine may answer although nothing is wrong with a file. Not every system has all of these.
REFUSALS = (
    "EIO EACCES EPERM EMFILE ENFILE ESTALE EAGAIN EBUSY ETIMEDOUT ENODEV ENXIO EREMOTEIO ENOTCONN EHOSTDOWN EROFS"
)
IO_ERRORS = {getattr(errno, name) for name in REFUSALS.split() if hasattr(errno, name)}
IN_THE_WAY = {
    errno.EISDIR: ": a folder is where a file belongs, move it away",
    errno.ENOTDIR: ": a file is where a folder belongs, move it away",
    errno.EEXIST: ": a file is where a folder belongs, move it away",
}


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, and what is allowed."""


def prepare_script() -> None:
    """What a script does before it imports anything large.

    Names of files are UTF-8, whatever the locale says: Python starts again in its UTF-8 mode where that is another
    encoding. And what cannot be imported for lack of memory is one line.
    """
    sys.excepthook = _report
    located = sys.argv[0] == "-m"  # the program itself, which Python is about to run
    if located and sys.getfilesystemencoding() != "utf-8" and "PYTHONUTF8" not in os.environ:
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)  # what the terminal shows
        os.execv(sys.executable, sys.orig_argv)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if reason := shortage(error):
        print(_no_room(reason), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _no_room(reason: str) -> str:
    sys.unraisablehook = lambda _: None  # what else fails for it while Python ends
    return f"error: {reason}: make room, and {SAME}"


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input, Ctrl-C, a full disk and too little memory end it with one line.

    What the output's encoding cannot express is written as `\\xNN`, `\\uNNNN`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted: {SAME}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if reason := shortage(error):
            sys.exit(_no_room(reason))
        if isinstance(error, OSError) and error.errno:  # a file where a folder should be, no permission, …
            sys.exit(f"error: {error}{IN_THE_WAY.get(error.errno, '')}")
        raise


def shortage(error: BaseException | None) -> str | None:
    """What the machine ran out of, if that is why `error` was raised: disk or memory, in a few words."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({error.filename})" if error.filename else "the disk is full"
        if "disk is full" in text:  # SQLite's words for it
            return "the disk is full"
        # PyTorch's class for a GPU, and the words of everybody else.
        if "torchvision::nms does not exist" in text and (reason := _why_torchvision_is_not_loaded()):
            return reason
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        known = known or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        said = [line for line in text.splitlines() if MEMORY_WORDS.search(line)]
        if known or said:
            line = (said or text.strip().splitlines() or [type(error).__name__])[0]
            return f"too little memory ({line.strip()[:200]})"
        error = error.__cause__ or error.__context__
    return None


def _why_torchvision_is_not_loaded() -> str | None:
    """torchvision goes on if its library cannot be loaded, and does not say why: the same is tried once more."""
    package = Path(sys.modules["torch"].__file__ or "").parents[1] / "torchvision"
    try:
        for library in package.glob("_C*.so"):
            ctypes.CDLL(str(library))
    except (OSError, MemoryError) as error:  # or it is of another release of PyTorch
        return shortage(error)
    return "too little memory (for torchvision)"  # as there was room for it now


def trouble(error: BaseException | None) -> str | None:
    """What of the machine, and not of a file's content, `error` was raised for: a `shortage`, an I/O error, no
    permission. A file that cannot be read for such a reason may be as good as ever."""
    if reason := shortage(error):
        return reason
    while error is not None:
        if isinstance(error, OSError) and error.errno in IO_ERRORS:
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None
