"""Stage `train`: one cell, from its checkpoint if an earlier run was cut off, into runs/<dataset>/<cell>."""

import argparse

from cbml import tracking
from cbml.config import load_params
from cbml.errors import run_main
from cbml.training import run_cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for axis, kind in (("dataset", str), ("backbone", str), ("loss", str), ("embedding-dim", int), ("seed", int)):
        parser.add_argument(f"--{axis}", type=kind, required=True)
    run_cell(load_params().cell(**vars(parser.parse_args())), state=tracking.root())


if __name__ == "__main__":
    run_main(main)
