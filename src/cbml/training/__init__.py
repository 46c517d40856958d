"""Training: the loop, and one cell from lists to files."""

from cbml.training.cell import build, run_cell
from cbml.training.loop import Trained, train

__all__ = ["Trained", "build", "run_cell", "train"]
