"""Stage `train`: one cell, from its checkpoint if an earlier run was cut off, into runs/<dataset>/<cell>."""

import argparse

from cbml.errors import run_main
from cbml.stages.train import train_cell
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for axis, kind in (("dataset", str), ("backbone", str), ("loss", str), ("embedding-dim", int), ("seed", int)):
        parser.add_argument(f"--{axis}", type=kind, required=True)
    workspace = Workspace.here()
    train_cell(workspace.cell(**vars(parser.parse_args())), workspace)


if __name__ == "__main__":
    run_main(main)
