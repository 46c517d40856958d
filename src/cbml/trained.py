"""A trained cell as something that turns pictures into embeddings. It needs neither DVC nor MLflow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from cbml import network
from cbml.data.crops import center_boxes
from cbml.data.images import load_image
from cbml.data.loading import WORKERS, prefetch
from cbml.errors import UserError
from cbml.evaluation.embedding import batch_size
from cbml.files import atomic_write
from cbml.models import EmbeddingModel
from cbml.progress import message, progress
from cbml.spec.cell import Cell
from cbml.spec.params import cell_from, load_cell

WEIGHTS = ("model.safetensors", "final.pt")  # of an exported cell, and of a run


@dataclass(frozen=True)
class Trained:
    """A cell and its trained network, in eval mode: pictures in, embeddings out."""

    cell: Cell
    network: EmbeddingModel

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def embed(self, pictures: Sequence[str | Path | BinaryIO]) -> np.ndarray:
        """(N, D) float32 embeddings of unit norm, with the resize and the crop that the cell was evaluated with.

        A few batches of decoded pictures are in memory at a time.

        Raises:
            UserError: there is no picture, or one cannot be read.
        """
        if not len(pictures):
            raise UserError("pictures: none are given; at least one is needed")
        size = batch_size(self.cell.recipe.crop, self.device)
        batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        crops = prefetch(lambda batch: torch.stack([self._crop(each) for each in batch]), batches, WORKERS)
        shown = progress(crops, "embed", "images", total=len(batches), scale=size)
        return torch.cat([self.network(batch.to(self.device)).cpu() for batch in shown]).numpy()

    def _crop(self, picture: str | Path | BinaryIO) -> Tensor:
        """The centre of a picture, (3, crop, crop) uint8."""
        recipe = self.cell.recipe
        source = Path(picture) if isinstance(picture, str) else picture
        image = load_image(source, resize=recipe.resize, interpolation=recipe.interpolation)
        ((top, left, height, width),) = center_boxes(torch.tensor([image.shape[:2]]), recipe.crop).tolist()
        return torch.tensor(image[top : top + height, left : left + width]).permute(2, 0, 1)

    @property
    def embedding_dim(self) -> int:
        """The size of an embedding."""
        return self.network.embedding_dim

    def export(self, folder: Path, card: str | None = None) -> Path:
        """Write the cell as a folder for use elsewhere: weights, configuration, and an ONNX model; nothing in it names
        a path of this machine.

        `model.safetensors` and `cell.yaml` are what `load` takes. `model.onnx` takes `images`, (B, 3, crop, crop) RGB
        with values 0–255 as float32, and gives `embeddings`, (B, D) of unit norm. `card` is kept as README.md.

        Raises:
            UserError: ONNX's packages are missing, it cannot express the network, or `folder` exists.
        """
        if folder.exists():
            raise UserError(f"{folder}: exists; name a folder that does not")
        crop = self.cell.recipe.crop
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
            (temporary / WEIGHTS[0]).write_bytes(safetensors.torch.save(state))  # save_file's is the owner's alone
            (temporary / "cell.yaml").write_text(portable(self.cell).to_yaml(), encoding="utf-8")
            if card:
                (temporary / "README.md").write_text(card, encoding="utf-8")
            message(f"{folder}: tracing the network for ONNX, which takes up to a minute")
            try:
                program = torch.onnx.export(
                    self.network,
                    (torch.zeros(2, 3, crop, crop, device=self.device),),
                    input_names=["images"],
                    output_names=["embeddings"],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    dynamo=True,
                    verbose=False,
                )
            except ModuleNotFoundError as error:
                raise UserError(f"ONNX: {error}; pip install 'cbml[onnx]'") from None
            except torch.onnx.OnnxExporterError as error:
                reason = str(error).strip().partition("\n")[0]
                told = f"cannot be expressed in it by torch {torch.__version__}"
                raise UserError(f"ONNX: {self.cell.name} {told} ({reason})") from error
            assert program  # with `dynamo`
            for node in program.model.graph:
                node.metadata_props.clear()  # among them paths of this machine
            program.save(temporary / "model.onnx", external_data=False)
        return folder


def portable(cell: Cell) -> Cell:
    """The cell with names of files in place of paths of this machine, on which no embedding depends."""
    return cell_from(_names_alone(cell.to_dict()))


def _names_alone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _names_alone(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_names_alone(inner) for inner in value]
    if isinstance(value, str) and value.startswith("file:"):
        return f"file://elsewhere/{Path(value).name}"
    absolute = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return (Path(value).name or "root") if absolute else value


def load(folder: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The cell of a run folder, or of one that `Trained.export` wrote.

    Raises:
        UserError: it has no cell.yaml or no weights, or they are damaged.
    """
    folder = Path(folder)
    cell = load_cell(folder / "cell.yaml")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[-1])
    return Trained(cell, network.load(cell, weights).to(device))
