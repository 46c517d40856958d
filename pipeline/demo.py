"""A trained model in a browser: the nearest neighbours of any image in a gallery, by one model or two side by side."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.stages.demo import serve
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="runs/<dataset>/<cell>, an exported folder, an MLflow run's id or a cell's key")
    parser.add_argument("--gallery", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--second", metavar="MODEL", help="beside the first")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860)
    options = vars(parser.parse_args())
    serve(options.pop("model"), options.pop("gallery"), Workspace.here(), **options)


if __name__ == "__main__":
    run_main(main)
