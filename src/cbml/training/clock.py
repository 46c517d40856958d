"""Where the time of a run goes."""

import time


class Clock:
    """Seconds by kind: `train`, iterations, of which `data`, their batches, is a part; `refresh`; `validation`.

    Args:
        seconds: of the run so far.
        images: that it has been trained on.
    """

    def __init__(self, seconds: dict[str, float] | None = None, images: int = 0):
        self.seconds = seconds or {"train": 0.0, "data": 0.0, "refresh": 0.0, "validation": 0.0}
        self._kind: str | None = None
        self._since = 0.0
        self._lap = images, self.seconds.copy()

    def start(self, kind: str | None) -> None:
        """From now on, time is of this kind, and of no other; None: of none."""
        now = time.monotonic()
        if self._kind:
            self.seconds[self._kind] += now - self._since
        if self._kind == "data":
            self.seconds["train"] += now - self._since
        self._kind, self._since = kind, now

    def throughput(self, images: int) -> dict[str, float]:
        """The speed of training since the last call, or since the run began or went on.

        With a GPU the percentage is the host's time: an upper bound of what the device waits, which has queued
        iterations to work on, and without its own work on crops.

        Args:
            images: that the run has been trained on in all.
        """
        before, then = self._lap
        passed = self.seconds["train"] - then["train"]
        self._lap = images, self.seconds.copy()
        return {
            "train_images_per_second": (images - before) / passed,
            "train_data_percent": 100 * (self.seconds["data"] - then["data"]) / passed,
        }
