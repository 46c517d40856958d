"""Stage `evaluate`: the metrics of a trained cell, runs/<dataset>/<cell>, into evaluations/<dataset>/<cell>."""

import argparse
from pathlib import Path

from cbml import tracking
from cbml.config import load_params
from cbml.errors import run_main
from cbml.evaluation.cell import evaluate_cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that the stage `train` wrote")
    run = parser.parse_args().run
    evaluate_cell(run, state=tracking.root(), register=load_params().register_models)


if __name__ == "__main__":
    run_main(main)
