"""Evaluated cells of another checkout, or of this one, into the tracking store; then `tabulate --all` shows them."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.stages.import_cells import import_cells
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a checkout, or a copy of its evaluations/")
    print(f"{len(import_cells(parser.parse_args().source, Workspace.here()))} cells imported")


if __name__ == "__main__":
    run_main(main)
