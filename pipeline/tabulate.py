"""Stage `tabulate`: the tables of a dataset's cells into reports/<dataset>."""

import argparse

from cbml.config import load_params
from cbml.errors import run_main
from cbml.reporting.tableset import INDEX, write_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument(
        "--all", action="store_true", help="tabulate every cell ever evaluated here, not only those of params.yaml"
    )
    options = parser.parse_args()
    print(write_tables(load_params(), options.dataset, all_cells=options.all))
    print(f"The page: {INDEX.resolve().as_uri()}")


if __name__ == "__main__":
    run_main(main)
