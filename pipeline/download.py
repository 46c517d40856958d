"""Stage `download`: a dataset's images into data/<dataset>, in the layout of CUB-200-2011."""

import argparse

from cbml.errors import run_main
from cbml.stages.check import check_cells
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    name = parser.parse_args().dataset
    workspace = Workspace.here()
    params = workspace.params()
    dataset = params.option("dataset", name)
    check_cells(params, name, workspace)
    dataset.download(workspace.data(name), workspace.root)


if __name__ == "__main__":
    run_main(main)
