"""A trained cell as something that turns pictures into embeddings."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from cbml import network
from cbml.backbones import EmbeddingModel
from cbml.config import Cell, load_cell
from cbml.datasets.images import PackedImages, load_image
from cbml.errors import UserError
from cbml.evaluation.embedding import embed
from cbml.files import atomic_write

WEIGHTS = ("model.safetensors", "final.pt")  # of an exported cell, and of a run
ONNX = "model.onnx"


@dataclass(frozen=True)
class Trained:
    """A cell and its trained network, in eval mode on the CPU: pictures in, embeddings out."""

    cell: Cell
    network: EmbeddingModel

    def embed(self, pictures: Sequence[str | Path | BinaryIO]) -> np.ndarray:
        """(N, D) float32 embeddings of unit norm, with the resize and the crop that the cell was evaluated with.

        Raises:
            UserError: there is no picture, or one cannot be read.
        """
        if not len(pictures):
            raise UserError("pictures: none are given; at least one is needed")
        recipe = self.cell.recipe
        size: dict[str, Any] = {"resize": recipe.resize, "interpolation": recipe.interpolation}
        sources = [Path(each) if isinstance(each, str) else each for each in pictures]
        images = PackedImages.of([load_image(source, **size) for source in sources])
        where: dict[str, Any] = {"crop": recipe.crop, "interpolation": recipe.interpolation}
        return embed(self.network, images, **where, device=torch.device("cpu")).numpy()

    def export(self, folder: Path) -> Path:
        """Write the cell as a folder that needs neither DVC nor MLflow: weights, configuration, and an ONNX model.

        `model.safetensors` and `cell.yaml` are what `load` takes. `model.onnx` takes `images`, (B, 3, crop, crop) RGB
        with values 0–255 as float32, and gives `embeddings`, (B, D) of unit norm.

        Raises:
            UserError: ONNX's packages are missing, or `folder` exists.
        """
        if folder.exists():
            raise UserError(f"{folder}: exists; name a folder that does not")
        crop = self.cell.recipe.crop
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
            safetensors.torch.save_file(state, temporary / WEIGHTS[0])
            (temporary / "cell.yaml").write_text(self.cell.to_yaml())
            try:
                with warnings.catch_warnings(action="ignore"):  # the other exporter needs more packages
                    torch.onnx.export(
                        self.network,
                        (torch.zeros(2, 3, crop, crop),),
                        str(temporary / ONNX),
                        input_names=["images"],
                        output_names=["embeddings"],
                        dynamic_axes={"images": {0: "batch"}, "embeddings": {0: "batch"}},
                        dynamo=False,
                    )
            except ModuleNotFoundError as error:
                raise UserError(f"ONNX: {error}; pip install 'cbml[onnx]'") from None
        return folder


def load(folder: str | Path) -> Trained:
    """The cell of a run folder, or of one that `Trained.export` wrote.

    Raises:
        UserError: it has no cell.yaml or no weights, or they are damaged.
    """
    folder = Path(folder)
    cell = load_cell(folder / "cell.yaml")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[-1])
    return Trained(cell, network.load(cell, weights))
