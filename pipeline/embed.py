"""Embeddings of any images by a trained cell, and which of them are nearest to each other."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.stages.embed import embed_images, load_model, nearest
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="runs/<dataset>/<cell>, an exported folder, an MLflow run's id or a cell's key")
    parser.add_argument("images", nargs="+", type=Path, help="files, and folders that are searched for them")
    parser.add_argument("--out", type=Path, default=Path("embeddings.npz"), help="with arrays `paths`, `embeddings`")
    parser.add_argument("--neighbours", type=int, default=0, metavar="K", help="show the K most similar of each, too")
    options = parser.parse_args()
    if options.neighbours < 0:
        parser.error(f"--neighbours: {options.neighbours} is below 0")
    files, embeddings = embed_images(load_model(options.model, Workspace.here()), options.images, options.out)
    print(f"{options.out}: {len(files)} embeddings of {embeddings.shape[1]}")
    if options.neighbours:
        print(nearest(files, embeddings, options.neighbours))


if __name__ == "__main__":
    run_main(main)
