"""A trained cell as an MLflow model: pictures in, embeddings out. MLflow keeps this file with the model."""

import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch

from cbml.config import load_cell
from cbml.datasets.images import PackedImages, load_image
from cbml.evaluation.cell import load_network
from cbml.evaluation.embedding import embed


class Embedder(mlflow.pyfunc.PythonModel):
    """Pictures → embeddings, with the resize, crop and input convention that the network was evaluated with."""

    def load_context(self, context: Any) -> None:
        self.cell = load_cell(context.artifacts["cell"])
        self.network = load_network(self.cell, context.artifacts["weights"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """(N, D) float32 of unit norm, for a table with a column `image` (encoded bytes) or `path`."""
        sources = map(io.BytesIO, model_input["image"]) if "image" in model_input else map(Path, model_input["path"])
        size = {"resize": self.cell.recipe.resize, "interpolation": self.cell.interpolation}
        images = PackedImages.of([load_image(source, **size) for source in sources])
        where = {"crop": self.cell.recipe.crop, "device": torch.device("cpu")}
        return embed(self.network, images, interpolation=self.cell.interpolation, **where).numpy()


mlflow.models.set_model(Embedder())
