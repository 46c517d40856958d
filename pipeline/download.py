"""Stage `download`: a dataset's images into data/<dataset>, in the layout of CUB-200-2011."""

import argparse
from pathlib import Path

from cbml import tracking
from cbml.config import load_params
from cbml.errors import run_main
from cbml.training import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    name = parser.parse_args().dataset
    params = load_params()
    dataset = params.option("dataset", name)
    # Before the long work that starts here: what each backbone and loss will need later.
    for cell in {(cell.backbone, cell.loss): cell for cell in params.cells(name)}.values():
        build(cell, num_classes=2, root=tracking.root())
    dataset.download(Path("data", name))


if __name__ == "__main__":
    run_main(main)
