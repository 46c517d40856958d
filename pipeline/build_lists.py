"""Stage `build_lists`: the training and test lists of a dataset into lists/<dataset>."""

import argparse
from pathlib import Path

from cbml.config import load_params
from cbml.datasets.lists import build_lists
from cbml.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    name = parser.parse_args().dataset
    params = load_params()
    params.option("dataset", name)
    print(build_lists(Path("data", name), Path("lists", name), validation_classes=params.validation_classes))


if __name__ == "__main__":
    run_main(main)
