"""Stage `draw`: pictures and page of an evaluated cell, evaluations/<dataset>/<cell>, into pages/<dataset>/<cell>."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.stages.draw import draw_cell
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluation", type=Path, help="folder that the stage `evaluate` wrote")
    draw_cell(parser.parse_args().evaluation, Workspace.here())


if __name__ == "__main__":
    run_main(main)
