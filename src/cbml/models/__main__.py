"""Print parameters, FLOPs and feature size of every entry in conf/backbone: python -m cbml.models [FOLDER]."""

import argparse
import sys
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError
from torch.utils.flop_counter import FlopCounterMode

from cbml.errors import UserError, run_main
from cbml.models import BackboneConfig, build_trunk, input_convention
from cbml.schema import first_error


def trunk_size(config: BackboneConfig, crop: int) -> tuple[int, int, int]:
    """Parameters, FLOPs for one image of `crop` × `crop` pixels (a multiply-add counts 2), and feature size."""
    with torch.device("meta"):  # shapes suffice
        trunk = build_trunk(config.model_copy(update={"weights": None}), Path(), crop).eval()
        with FlopCounterMode(display=False) as counter:
            trunk(torch.empty(1, 3, crop, crop))
    return sum(p.numel() for p in trunk.parameters()), counter.get_total_flops(), cast(int, trunk.num_features)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cbml.models", description=__doc__.partition(":")[0])
    parser.add_argument("folder", nargs="?", default="conf/backbone", type=Path)
    parser.add_argument("--crop", default=227, type=int, help="pixels, where the entry leaves it to the recipe")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.yaml"))
    if not files:
        raise UserError(f"{arguments.folder}: no *.yaml there; run this in the repository's root or name the folder")
    print(f"{'backbone':24}{'parameters':>12}{'GFLOPs':>9}{'features':>10}{'crop':>6}")
    for file in files:
        entries = OmegaConf.to_container(OmegaConf.load(file))  # as Hydra reads it
        try:
            configs = TypeAdapter(dict[str, BackboneConfig]).validate_python(entries)
        except ValidationError as error:
            raise UserError(f"{file}: {first_error(error, entries)}") from error
        for name, config in configs.items():
            try:
                crop = input_convention(config).crop or arguments.crop
                parameters, flops, features = trunk_size(config, crop)
            except UserError as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
                continue
            print(f"{name:24}{parameters:12,}{flops / 1e9:9.2f}{features:10,}{crop:6}")


if __name__ == "__main__":
    run_main(main)
