"""Embeddings of any images by a trained cell, and which images, of a gallery or of the same, are nearest to each."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.stages.embed import embed
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="runs/<dataset>/<cell>, an exported folder, an MLflow run's id or a cell's key")
    parser.add_argument("images", nargs="+", type=Path, help="files, and folders that are searched for them")
    parser.add_argument("--out", type=Path, default=Path("embeddings.npz"), help="with arrays `paths`, `embeddings`")
    parser.add_argument("--neighbours", type=int, metavar="K", help="find the K most similar of each (of a gallery: 8)")
    parser.add_argument("--gallery", nargs="+", type=Path, metavar="PATH", help="where to search, instead of IMAGES")
    parser.add_argument("--page", type=Path, help="of the neighbours (with a gallery: neighbours.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = vars(parser.parse_args())
    if options["neighbours"] is None:
        options["neighbours"] = 8 if options["gallery"] else 0
    if options["neighbours"] < bool(options["gallery"] or options["page"]):
        parser.error(f"--neighbours: {options['neighbours']} is too few")
    if options["gallery"] and not options["page"]:
        options["page"] = Path("neighbours.html")
    print(embed(options.pop("model"), options.pop("images"), Workspace.here(), **options))


if __name__ == "__main__":
    run_main(main)
