"""Stage `build_lists`: a dataset's lists into lists/<dataset>; every image is hashed, and decoded, once."""

import argparse

from cbml.errors import run_main
from cbml.stages.build_lists import build_lists
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    print(build_lists(Workspace.here(), parser.parse_args().dataset))


if __name__ == "__main__":
    run_main(main)
