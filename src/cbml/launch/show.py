"""What people see of a launch: the cells under way, one line each, and how many are done."""

import shutil
import sys
import time
from typing import Any

from cbml.launch.pending import Pending
from cbml.progress import message

LOG_SECONDS = 60.0  # between two notes of how far the cells are, in a log


class Display:
    """On a terminal, lines that are written anew; in a log, one for each event and some every minute.

    Args:
        cells: all of them.
    """

    def __init__(self, cells: list[Pending]):
        self.cells = {cell.key: cell for cell in cells}
        self.done, self.failed, self._begun = 0, 0, dict[str, int]()
        self._terminal, self._lines = sys.stderr.isatty(), 0
        self._start = self._shown = time.monotonic()

    def update(self, states: dict[str, dict[str, Any]], running: list[str]) -> None:
        """Show the states of these cells; see `Keeper`."""
        for key, state in states.items():
            if state.get("attempts", 0) > self._begun.get(key, 0):
                self._begun[key] = state["attempts"]
                again = f" again, for the {state['attempts']}. time," if state["attempts"] > 1 else ""
                self.event(f"{key}: begins{again} on {_place(state)}")
        lines = [self._line(key, states[key]) for key in running if key in states]
        waiting = len(running) - len(lines)
        if self._terminal:
            size = shutil.get_terminal_size()
            shown = lines[: size.lines - 3]
            if left := len(lines) - len(shown):
                shown.append(f"… and {left} more")
            self._clear()
            print("\n".join(line[: size.columns - 1] for line in [*shown, self._bar(waiting)]), file=sys.stderr)
            self._lines = len(shown) + 1
        elif time.monotonic() - self._shown > LOG_SECONDS:
            self._shown = time.monotonic()
            for line in [*lines, self._bar(waiting)]:
                message(line)

    def event(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        message(text)

    def _clear(self) -> None:
        if self._lines:
            print(f"\x1b[{self._lines}A\x1b[J", end="", file=sys.stderr)
        self._lines = 0

    def _line(self, key: str, state: dict[str, Any]) -> str:
        cell = self.cells[key]
        if not cell.run_folder:  # a process of `pipeline.tune`
            return f"{key}: {state.get('trial', 'begins')}, {_place(state)}"
        parts = [f"iteration {state['iteration']} of {cell.iterations}"] if "iteration" in state else ["begins"]
        parts += [f"{state['speed']} images/s"] if "speed" in state else []
        parts += [f"Recall@1 {state['recall']:.1f} %"] if "recall" in state else []
        return f"{key}: {', '.join(parts)}, {_place(state)}"

    def _bar(self, waiting: int) -> str:
        total, width = len(self.cells), 30
        full = round(width * self.done / total)
        minutes, seconds = divmod(round(time.monotonic() - self._start), 60)
        counts = f"{self.done} of {total} done, {self.failed} failed, {waiting} waiting"
        return f"{'█' * full}{'░' * (width - full)} {counts}, {minutes}:{seconds:02}"


def _place(state: dict[str, Any]) -> str:
    gpus = state.get("gpus")
    return f"{state.get('place', '?')}{f', GPU {gpus}' if gpus else ''}"
