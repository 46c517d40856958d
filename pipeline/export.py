"""A trained cell as a folder for use elsewhere: safetensors, configuration, ONNX, and a model card."""

import argparse
from pathlib import Path

from cbml.errors import run_main
from cbml.stages.export import export_model
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="runs/<dataset>/<cell>, an MLflow run's id or a cell's key")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    options = parser.parse_args()
    print(export_model(options.model, options.out, Workspace.here()))


if __name__ == "__main__":
    run_main(main)
