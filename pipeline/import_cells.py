"""Cells that another checkout has evaluated, into this one and its MLflow store; then `tabulate --all` shows them."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.importing import import_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the other checkout, or a copy of its lists/ and evaluations/")
    print(f"{len(import_cells(parser.parse_args().source))} cells imported")


if __name__ == "__main__":
    run_main(main)
