"""Remove for good, and with their models, the runs that were deleted in MLflow."""

import argparse

from cbml.errors import run_main
from cbml.tracking.store import Store
from cbml.workspace import Workspace


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    Store(Workspace.here()).clean()


if __name__ == "__main__":
    run_main(main)
