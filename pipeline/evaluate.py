"""Stage `evaluate`: the metrics of a trained cell, runs/<dataset>/<cell>, into evaluations/<dataset>/<cell>."""

import sys
from pathlib import Path

from cbml import tracking
from cbml.errors import run_main
from cbml.evaluation.cell import evaluate_cell


def main() -> None:
    evaluate_cell(Path(sys.argv[1]), state=tracking.root())


if __name__ == "__main__":
    run_main(main)
