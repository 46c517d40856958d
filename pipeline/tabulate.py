"""Stage `tabulate`: the tables of a dataset's cells into reports/<dataset>."""

import argparse

from cbml.config import load_params
from cbml.errors import run_main
from cbml.reporting import write_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    print(write_tables(load_params(), parser.parse_args().dataset))


if __name__ == "__main__":
    run_main(main)
