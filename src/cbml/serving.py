"""A trained cell as an MLflow model. MLflow keeps this file with the model."""

import io
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel

from cbml import trained
from cbml.errors import UserError


class Embedder(PythonModel):
    """Pictures → embeddings."""

    def load_context(self, context: Any) -> None:
        self.trained = trained.load(Path(context.artifacts["cell"]).parent)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """(N, D) float32 of unit norm, for a table with a column `image` (encoded bytes) or `path`.

        Raises:
            UserError: it has neither, or a picture cannot be read.
        """
        if "image" in model_input:
            return self.trained.embed([io.BytesIO(each) for each in model_input["image"]])
        if "path" not in model_input:
            raise UserError("no column `image` (bytes of an encoded picture) or `path` (of its file): one is needed")
        return self.trained.embed(model_input["path"].tolist())


mlflow.models.set_model(Embedder())
