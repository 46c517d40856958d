"""Trunk → global pooling → linear head → L2 normalisation."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbml.models import heads
from cbml.models.config import BackboneConfig, InputConvention
from cbml.models.stages import channels_of
from cbml.models.streams import Streams
from cbml.models.trunks import build_trunk, input_convention

POOLING: dict[str, Callable[..., Tensor]] = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}


class Normalize(nn.Module):
    """RGB images (B, 3, H, W) with values 0–255 → the float32 values that a trunk expects."""

    mean: Tensor
    std: Tensor

    def __init__(self, input: InputConvention):
        super().__init__()
        self.input = input
        # Buffers move to the network's device once; made anew for each batch they would make the host wait.
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(input, name)).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.input.channels == "BGR":
            images = images.flip(1)
        if self.input.range == 1:
            images = images / 255
        return (images - self.mean) / self.std


class Outputs(NamedTuple):
    """What a network makes of a batch of images.

    Attributes:
        embeddings: (B, D) float32, of unit length.
        raw: (B, D) float32, what the head gives, before it is normalised.
        features: (B, C) float32, the trunk's, pooled.
        map: (B, C, h, w) float32, the trunk's last feature map.
    """

    embeddings: Tensor
    raw: Tensor | None = None
    features: Tensor | None = None
    map: Tensor | None = None


class EmbeddingModel(nn.Module):
    """Embeddings from raw images: the backbone's own normalisation is part of the model.

    Args:
        trunk: normalised images → features (B, C, h, w), or (B, C) if `pooling` is None; has `num_features`.
        input: the pixels that the trunk expects.
        pooling: "avg", "max", or None for a trunk that pools by itself.
        embedding_dim: D of the head, or 0 for no head: D is C then.
        freeze_bn: keep the trunk's BN layers in eval mode, their affine parameters trained, also in `train()`. A later
            change takes effect at the next `train()`.
        head: None for one linear layer.
        taps: the stages of the trunk that the head takes.

    Attributes:
        parts: sizes of the embedding's parts.
        num_features: C.
        autocast: what trunk and head compute in where autocast allows it, in training and evaluation alike; None for
            float32. What the network gives is float32 in either case.

    Raises:
        UserError: the head does not fit `embedding_dim`, or the trunk has no such stages.
    """

    embedding_dim: int
    parts: list[int]
    autocast: torch.dtype | None = None
    num_features: int

    def __init__(
        self,
        trunk: nn.Module,
        input: InputConvention,
        pooling: str | None,
        embedding_dim: int,
        freeze_bn: bool = True,
        head: heads.Head | None = None,
        taps: tuple[str, ...] = (),
    ):
        super().__init__()
        head = head or heads.Linear()
        self.normalize = Normalize(input)
        self.trunk = trunk
        self.pooling = pooling
        self.freeze_bn = freeze_bn
        self.taps = taps
        features = self.num_features = cast(int, trunk.num_features)
        self.embedding_dim = embedding_dim or features
        self.parts = head.parts(embedding_dim) if embedding_dim or head.type != "linear" else [features]
        self.part_weights = head.part_weights(self.parts)
        self.head: nn.Module = nn.Identity()
        if embedding_dim:
            self.head = head.build(features, channels_of(trunk, taps), self.parts)
        self.train()

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        """Those that no backbone's weights hold: the head's, and what a composite trunk adds to its backbones."""
        added = getattr(self.trunk, "added", nn.Identity())
        return [*self.head.parameters(), *added.parameters()]

    def forward(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W), uint8 or float with values 0–255 → float32 embeddings (B, D) of unit length."""
        return self.outputs(images).embeddings

    def outputs(self, images: Tensor, wanted: Iterable[str] = ()) -> Outputs:
        """Embeddings, as `forward`, and those of the other `Outputs` that are wanted.

        In training the parts of an embedding have the same length; in eval mode, that of their weights.
        """
        pixels = self.normalize(images)
        with torch.autocast(pixels.device.type, self.autocast) if self.autocast else nullcontext():
            last, *maps = self.trunk(pixels, self.taps) if self.taps else (self.trunk(pixels),)
            features = POOLING[self.pooling](last, 1).flatten(1) if self.pooling else last
            raw = self.head(features, *maps).float()
        embeddings = heads.join(raw, self.parts, [1.0] * len(self.parts) if self.training else self.part_weights)
        others = {"raw": raw, "features": features, "map": last if self.pooling else None}
        found = {name: others[name] for name in wanted if name in others}
        return Outputs(embeddings, **{name: value.float() for name, value in found.items() if value is not None})

    def train(self, mode: bool = True) -> "EmbeddingModel":
        super().train(mode)
        if self.freeze_bn:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class OnFeatures(EmbeddingModel):
    """A model's head, on features (B, C) in place of images: what there is to train on a frozen trunk."""

    def __init__(self, model: EmbeddingModel):
        nn.Module.__init__(self)
        self.normalize = self.trunk = nn.Identity()  # type: ignore[assignment]
        self.pooling, self.freeze_bn, self.taps = None, model.freeze_bn, ()
        self.num_features = model.num_features
        self.embedding_dim, self.parts, self.part_weights = model.embedding_dim, model.parts, model.part_weights
        self.head = model.head
        self.train()


def create_model(
    config: BackboneConfig,
    *,
    embedding_dim: int,
    root: Path,
    crop: int | None = None,
    head: heads.Head | None = None,
    streams: Streams | None = None,
    load_weights: bool = True,
) -> EmbeddingModel:
    """Build a backbone with its weights (unless `load_weights` is off: for a checkpoint to follow) and a new head.

    Args:
        root, crop: as in `build_trunk`.
        streams: what to make of the trunk; None to leave it.

    Raises:
        UserError: as `build_trunk`, `Streams.build` and `EmbeddingModel`.
    """
    if not load_weights:
        config = config.model_copy(update={"weights": None})
    taps = head.stages(config.type) if head else ()
    trunk = build_trunk(config, root, crop)
    if streams:
        trunk = streams.build(trunk, config.type)
    return EmbeddingModel(trunk, input_convention(config), config.pooling, embedding_dim, head=head, taps=taps)
