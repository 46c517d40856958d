"""Progress of long work: a bar on a terminal, a line every few seconds in a log."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOG_SECONDS = 10.0
SILENT = os.environ.get("RANK", "0") != "0"  # of several processes of `torchrun` the first one speaks


def progress(
    items: Iterable[T], label: str, unit: str, *, total: int | None = None, initial: int = 0, scale: int = 1
) -> Iterator[T]:
    """Yield from `items`, showing how many are done, the rate and the time left.

    Args:
        label: what is being done, in front of the count.
        unit: what is counted ("images", "B"); an item counts as `scale` of them.
        total, initial: in items: how many there are, and how many an earlier run has done.
    """
    if SILENT:
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    meter = {
        "total": total and total * scale,
        "unit": f" {unit}",
        "unit_scale": unit == "B" or scale > 1,
        "prefix": label,
    }
    if sys.stderr.isatty():
        meter["desc"] = meter.pop("prefix")
        with tqdm(initial=initial * scale, leave=False, dynamic_ncols=True, **meter) as bar:
            for item in items:
                yield item
                bar.update(scale)
        return
    start = shown = time.monotonic()
    done = initial
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - shown >= LOG_SECONDS:
            shown = now
            print(
                tqdm.format_meter(done * scale, elapsed=now - start, initial=initial * scale, ncols=100, **meter),
                file=sys.stderr,
                flush=True,
            )


def message(text: str) -> None:
    """Print a line to standard error without breaking a bar."""
    if not SILENT:
        tqdm.write(text, file=sys.stderr)
