"""The one exception that a user can cause, and how a script shows it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, and what is allowed."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`: a `UserError` or Ctrl-C ends it with one line and exit status 1 or 130."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)
