"""Trunk → global pooling → linear head → L2 normalisation."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbml.backbones.entries import BackboneConfig, InputConvention
from cbml.backbones.trunks import build_trunk, input_convention

POOLING: dict[str, Callable[..., Tensor]] = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}


class Normalize(nn.Module):
    """RGB images (B, 3, H, W) with values 0–255 → the float32 values that a trunk expects."""

    mean: Tensor
    std: Tensor

    def __init__(self, input: InputConvention):
        super().__init__()
        self.input = input
        # On the network's device, where making them anew would make the host wait; not among its weights.
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(input, name)).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.input.channels == "BGR":
            images = images.flip(1)
        if self.input.range == 1:
            images = images / 255
        return (images - self.mean) / self.std


class EmbeddingModel(nn.Module):
    """Embeddings from raw images: the backbone's own normalisation is part of the model.

    Args:
        trunk: normalised images → features (B, C, h, w), or (B, C) if `pooling` is None; has `num_features`.
        input: the pixels that the trunk expects.
        pooling: "avg", "max", or None for a trunk that pools by itself.
        embedding_dim: D of the linear head, or 0 for no head: D is C then.
        freeze_bn: keep the trunk's BN layers in eval mode, their affine parameters trained, also in `train()`. A later
            change takes effect at the next `train()`.
    """

    def __init__(
        self, trunk: nn.Module, input: InputConvention, pooling: str | None, embedding_dim: int, freeze_bn: bool = True
    ):
        super().__init__()
        self.normalize = Normalize(input)
        self.trunk = trunk
        self.pooling = pooling
        self.freeze_bn = freeze_bn
        self.head: nn.Module = nn.Identity()
        features = cast(int, trunk.num_features)
        if embedding_dim:
            self.head = head = nn.Linear(features, embedding_dim)
            nn.init.kaiming_normal_(head.weight, mode="fan_out")
            nn.init.zeros_(head.bias)
        self.embedding_dim = embedding_dim or features
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W), uint8 or float with values 0–255 → float32 embeddings (B, D) of unit length."""
        features = self.trunk(self.normalize(images))
        if self.pooling:
            features = POOLING[self.pooling](features, 1).flatten(1)
        return F.normalize(self.head(features).float(), dim=1)

    def train(self, mode: bool = True) -> "EmbeddingModel":
        super().train(mode)
        if self.freeze_bn:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def create_model(
    config: BackboneConfig, *, embedding_dim: int, root: Path, load_weights: bool = True
) -> EmbeddingModel:
    """Build a backbone with its weights (unless `load_weights` is off: for a checkpoint to follow) and a new head.

    Raises:
        UserError: as `build_trunk`.
    """
    if not load_weights:
        config = config.model_copy(update={"weights": None})
    return EmbeddingModel(build_trunk(config, root), input_convention(config), config.pooling, embedding_dim)
