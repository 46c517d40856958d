"""A trained cell as an MLflow model: pictures in, embeddings out. MLflow keeps this file with the model."""

import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch

from cbml import network
from cbml.config import load_cell
from cbml.datasets.images import PackedImages, load_image
from cbml.evaluation.embedding import embed


class Embedder(mlflow.pyfunc.PythonModel):
    """Pictures → embeddings, with the resize, crop and input convention that the network was evaluated with."""

    def load_context(self, context: Any) -> None:
        self.cell = load_cell(Path(context.artifacts["cell"]))
        self.network = network.load(self.cell, Path(context.artifacts["weights"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """(N, D) float32 of unit norm, for a table with a column `image` (encoded bytes) or `path`."""
        recipe = self.cell.recipe
        sources = map(io.BytesIO, model_input["image"]) if "image" in model_input else map(Path, model_input["path"])
        size = {"resize": recipe.resize, "interpolation": recipe.interpolation}
        images = PackedImages.of([load_image(source, **size) for source in sources])
        where = {"crop": recipe.crop, "device": torch.device("cpu")}
        return embed(self.network, images, interpolation=recipe.interpolation, **where).numpy()


mlflow.models.set_model(Embedder())
