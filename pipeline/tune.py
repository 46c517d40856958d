"""Tune each loss of params.yaml by the same number of trials, on classes that are not the test's; writes a preset."""

import argparse
import sys

from cbml.errors import run_main
from cbml.launch.driver import launch_tune
from cbml.stages.tune import tune
from cbml.tuning.study import Budget
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--trials", type=int, default=Budget.trials, help="for each loss (default: %(default)s)")
    parser.add_argument("--folds", type=int, default=Budget.folds, help="of training classes (default: %(default)s)")
    parser.add_argument("--metric", choices=["map_at_r", "recall_at_1"], default=Budget.metric)
    parser.add_argument("--seed", type=int, default=Budget.seed)
    parser.add_argument("--storage", metavar="URL", help="where Optuna keeps the studies, for several machines")
    parser.add_argument("--processes", type=int, metavar="N", help="on every GPU, or machine: this or RAY_ADDRESS")
    options = vars(parser.parse_args())
    dataset, storage, processes = (options.pop(name) for name in ("dataset", "storage", "processes"))
    workspace = Workspace.here()
    if processes is not None:
        arguments = [dataset, *(f"--{name}={value}" for name, value in options.items())]
        if launch_tune(workspace, arguments + (["--storage", storage] if storage else []), processes):
            sys.exit(1)
    tune(workspace, dataset, Budget(**options), storage)


if __name__ == "__main__":
    run_main(main)
