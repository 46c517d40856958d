"""Stage `evaluate`: the metrics of a trained cell, runs/<dataset>/<cell>, into evaluations/<dataset>/<cell>."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.stages.evaluate import evaluate_cell
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that the stage `train` wrote")
    run = parser.parse_args().run
    workspace = Workspace.here()
    evaluate_cell(run, workspace, register=workspace.params().register_models)


if __name__ == "__main__":
    run_main(main)
