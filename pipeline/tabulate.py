"""Stage `tabulate`: the tables of a dataset's cells into reports/<dataset>."""

import argparse

from cbml.errors import run_main
from cbml.stages.tabulate import tabulate
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument(
        "--all", action="store_true", help="every finished cell in the tracking store, not only those of params.yaml"
    )
    options = parser.parse_args()
    workspace = Workspace.here()
    print(tabulate(workspace, options.dataset, all_cells=options.all))
    print(f"The page: {workspace.index.resolve().as_uri()}")


if __name__ == "__main__":
    run_main(main)
