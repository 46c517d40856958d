"""Write the files of a new loss, method, sampler, dataset or backbone: the examples of docs/extend.md, renamed."""

import argparse

from cbml.errors import run_main
from cbml.stages.new import KINDS, new
from cbml.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name", help="of the option and its module: small letters, digits and _")
    options = parser.parse_args()
    print("\n".join(new(options.kind, options.name, Workspace.here().root)))


if __name__ == "__main__":
    run_main(main)
