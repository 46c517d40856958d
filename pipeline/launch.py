"""Train every cell that DVC lacks on all GPUs here, or on RAY_ADDRESS; then `dvc repro` takes what was trained."""

import argparse
import sys

from cbml.errors import run_main
from cbml.launch.driver import Options, commands, launch, summary
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells-per-gpu", type=int, metavar="N", default=1, help="that share one (default: 1)")
    parser.add_argument("--gpus-per-cell", type=int, metavar="N", help="that share a cell's batches (default: 1)")
    parser.add_argument("--cpus-per-cell", type=int, metavar="N", help="its threads; without GPUs, cores / N at once")
    parser.add_argument("--gpus", type=int, metavar="N", help="offer so many here, whatever is there: for a test")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", help="only the commands, one a line, for another scheduler")
    only.add_argument("--dry-run", action="store_true", help="only what would be trained, and what DVC has")
    given = vars(parser.parse_args())
    printed, dry = given.pop("print"), given.pop("dry_run")
    options, workspace = Options(**given), Workspace.here()
    options.check()
    if printed:
        print(*commands(summary(workspace), options), sep="\n")
    elif dry:
        for cell in summary(workspace):
            print(f"{cell.key}: {'is trained, waits for dvc repro' if cell.finished else 'to train'}")
    elif launch(workspace, options):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
