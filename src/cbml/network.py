"""The network of a cell: built on its starting weights, or loaded with trained ones."""

from pathlib import Path
from typing import Any

from cbml.errors import UserError
from cbml.files import read_tensors
from cbml.losses.base import Loss, Sizes, build_loss, needs
from cbml.models.embedding_model import EmbeddingModel, create_model
from cbml.models.weights import Unavailable, read_state
from cbml.spec.cell import Cell


def build(cell: Cell, *, num_classes: int, root: Path) -> tuple[EmbeddingModel, Loss]:
    """The untrained network of a cell, on its weights, and its loss.

    Args:
        num_classes: of the batches' labels.
        root: what a path of weights is relative to.

    Raises:
        UserError: the weights cannot be had or do not fit; the loss's parameters do not fit together.
    """
    try:
        network = create_model(cell.backbone_config, root=root, **_shape(cell))
    except Unavailable as error:
        hint = f"offline? pass a local file: -S backbone.{cell.backbone}.weights=PATH"
        raise UserError(f"{error}; {hint}") from error
    network.freeze_bn = cell.recipe.freeze_bn
    if cell.recipe.train == "head":
        found = {
            "streams with attentions": cell.loss_config.trunk,
            "heads at stages of the trunk": network.taps,
            "no head to train": not cell.embedding_dim,
        }
        for what in (name for name, there in found.items() if there):
            raise UserError(f"{cell.name}: has {what}, and recipe.train is head; allowed with it: recipe.train=all")
    return network, build_criterion(cell, network, num_classes=num_classes)


def build_criterion(cell: Cell, network: EmbeddingModel, *, num_classes: int) -> Loss:
    """The loss of a cell for a network of it; see `build`."""
    features = network.num_features
    sizes = Sizes(network.embedding_dim, num_classes, feature_dim=features, parts=tuple(network.parts))
    criterion = build_loss(cell.loss_config, sizes)
    if "map" in needs(criterion) and cell.recipe.train == "head":
        raise UserError(f"loss {cell.loss}: needs the last feature map; allowed with it: recipe.train=all")
    if "map" in needs(criterion) and network.pooling is None:
        raise UserError(f"loss {cell.loss}: needs the last feature map, which backbone {cell.backbone} does not give")
    if "teacher" in needs(criterion) and cell.loss_config.teacher is None:
        raise UserError(f"loss {cell.loss}: needs a teacher; its momentum is to be set: loss.{cell.loss}.teacher=0.999")
    return criterion


def load(cell: Cell, weights: Path) -> EmbeddingModel:
    """The trained network of a cell, in eval mode, on the CPU, computing in float32.

    Args:
        weights: its state dict, `.pt` or `.safetensors`.

    Raises:
        UserError: `weights` is missing or damaged, or of another network.
    """
    network = create_model(cell.backbone_config, root=Path(), load_weights=False, **_shape(cell))
    state = read_state(weights) if weights.suffix == ".safetensors" else read_tensors(weights, "train")
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:  # other names or shapes; no state dict at all
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights}: not the weights of {cell.name}; run the stage train again ({reason})") from None
    return network.eval()


def _shape(cell: Cell) -> dict[str, Any]:
    method = cell.loss_config
    shape = {"embedding_dim": cell.embedding_dim, "crop": cell.recipe.crop}
    return shape | {"streams": method.trunk, "head": method.head}
