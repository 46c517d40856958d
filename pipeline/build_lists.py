"""Stage `build_lists`: the training and test lists of a dataset into lists/<dataset>."""

import argparse

from cbml.datasets.lists import build_lists
from cbml.errors import run_main
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    name = parser.parse_args().dataset
    workspace = Workspace.here()
    workspace.params().option("dataset", name)
    print(build_lists(workspace.data(name), workspace.lists(name)))


if __name__ == "__main__":
    run_main(main)
