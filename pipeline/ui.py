"""MLflow's UI on the tracking store, with links to the cells of each dataset and their charts."""

import argparse

from cbml.errors import run_main
from cbml.tracking.ui import serve
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=5000)
    serve(Workspace.here(), parser.parse_args().port)


if __name__ == "__main__":
    run_main(main)
