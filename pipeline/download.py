"""Stage `download`: a dataset's images into data/<dataset>, in the layout of CUB-200-2011."""

import sys
from pathlib import Path

from cbml.config import load_params
from cbml.errors import run_main


def main() -> None:
    name = sys.argv[1]
    load_params().dataset[name].download(Path("data", name))


if __name__ == "__main__":
    run_main(main)
