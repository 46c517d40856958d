"""Stage `build_lists`: the training and test lists of a dataset into lists/<dataset>."""

import sys
from pathlib import Path

from cbml.datasets.lists import build_lists
from cbml.errors import run_main


def main() -> None:
    name = sys.argv[1]
    print(build_lists(Path("data", name), Path("lists", name)))


if __name__ == "__main__":
    run_main(main)
