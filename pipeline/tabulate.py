"""Stage `tabulate`: the tables of a dataset's cells into reports/<dataset>."""

import sys

from cbml.config import load_params
from cbml.errors import run_main
from cbml.reporting import write_tables


def main() -> None:
    print(write_tables(load_params(), sys.argv[1]))


if __name__ == "__main__":
    run_main(main)
