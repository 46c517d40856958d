"""What is written down of a run, row by row."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from cbml.errors import UserError

Row = dict[str, float]


class History:
    """The rows of a run: those whose values are still on the device, those that are not logged, and all of the others.

    Args:
        label: of the run, for messages.
        log: takes new rows.
        losses, validations: of the run so far.
    """

    def __init__(
        self, label: str, log: Callable[[list[Row]], None], losses: Sequence[Row] = (), validations: Sequence[Row] = ()
    ):
        self.label, self._log = label, log
        self.losses, self.validations = [*losses], [*validations]
        self._pending: list[dict[str, Any]] = []
        self._unlogged: list[Row] = []

    def step(self, iteration: int, lr: float, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Note an iteration. Does not wait for the device."""
        row: dict[str, Any] = {"iteration": iteration, "loss": loss.detach(), "lr": lr}
        if len(terms) > 1:
            row |= {f"loss_{name}": value.detach() for name, value in terms.items()}
        self._pending.append(row)

    def settle(self) -> None:
        """Take all noted iterations from the device, which waits for it.

        Raises:
            UserError: a loss is not finite; those before it are logged.
        """
        for pending in self._pending:
            row = {name: value if name == "iteration" else float(value) for name, value in pending.items()}
            if not math.isfinite(row["loss"]):
                self.flush()
                raise UserError(
                    f"{self.label}: the loss is not finite at iteration {row['iteration']} ({row}); "
                    "lower the recipe's lr or change the loss's parameters"
                )
            self.losses.append(row)
            self._unlogged.append(row)
        self._pending.clear()

    def validated(self, row: Row) -> None:
        """Note an evaluation."""
        self.validations.append(row)
        self._unlogged.append(row)

    def best(self, metric: str) -> int:
        """The first iteration whose evaluation has the highest value; 0 before that of a trained network."""
        trained = [row for row in self.validations if row["iteration"]]
        return int(max(trained, key=lambda row: row[metric])["iteration"]) if trained else 0

    def flush(self, *more: Row) -> None:
        """Log what is not logged yet, and these rows."""
        self._log([*self._unlogged, *more])
        self._unlogged = []
