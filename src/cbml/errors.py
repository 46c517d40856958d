"""The one exception that a user can cause, and how a script ends."""

import errno
import sys
from collections.abc import Callable

SAME = "the same command continues where it stopped"


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, and what is allowed."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input, Ctrl-C, a full disk and too little memory end it with one line."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted: {SAME}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if reason := shortage(error):
            sys.exit(f"error: {reason}: make room, and {SAME}")
        if isinstance(error, OSError) and error.errno:  # a file where a folder should be, no permission, …
            sys.exit(f"error: {error}")
        raise


def shortage(error: BaseException | None) -> str | None:
    """What the machine ran out of, if that is why `error` was raised: disk or memory, in a few words."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({error.filename})" if error.filename else "the disk is full"
        if "disk is full" in text:  # SQLite's words for it
            return "the disk is full"
        # PyTorch's class for a GPU, and its words for a CPU.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in text:
            return f"too little memory ({text.strip().partition(chr(10))[0] or type(error).__name__})"
        error = error.__cause__ or error.__context__
    return None
