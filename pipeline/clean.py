"""Remove for good, and with their models, the runs that were deleted in MLflow; or what is damaged in DVC's cache."""

import argparse

from cbml.errors import run_main
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--damaged", action="store_true", help="remove what is damaged in DVC's cache; `dvc repro` makes it again"
    )
    workspace = Workspace.here()
    if parser.parse_args().damaged:
        from cbml.stages.clean import remove_damaged

        print(f"{len(remove_damaged(workspace))} damaged files removed from DVC's cache; again: dvc repro")
    else:
        from cbml.tracking.store import Store

        Store(workspace).clean()


if __name__ == "__main__":
    run_main(main)
