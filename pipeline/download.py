"""Stage `download`: a dataset's images, if they are not there, and a table of them in data/<dataset>.csv."""

import argparse

from cbml.errors import run_main
from cbml.stages.download import download
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    name = parser.parse_args().dataset
    table = download(Workspace.here(), name)
    print(f"{name}: {len(table):,} images of {table.label.nunique():,} classes")


if __name__ == "__main__":
    run_main(main)
