"""BN-Inception: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv 1502.03167, figure 5), as published for Caffe."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbml.models.stages import Staged

# block: widths of 1x1 | 3x3_reduce, 3x3 | double_3x3_reduce, double_3x3_1 = double_3x3_2 | pool_proj, its pooling.
# Blocks without 1x1 halve the feature map and pass their pooled input through.
BLOCKS = {
    "3a": (64, 64, 64, 64, 96, 32, "avg"),
    "3b": (64, 64, 96, 64, 96, 64, "avg"),
    "3c": (0, 128, 160, 64, 96, 0, "max"),
    "4a": (224, 64, 96, 96, 128, 128, "avg"),
    "4b": (192, 96, 128, 96, 128, 128, "avg"),
    "4c": (160, 128, 160, 128, 160, 128, "avg"),
    "4d": (96, 128, 192, 160, 192, 128, "avg"),
    "4e": (0, 128, 192, 192, 256, 0, "max"),
    "5a": (352, 192, 320, 160, 224, 128, "avg"),
    "5b": (352, 192, 320, 192, 224, 128, "max"),
}


class BNInception(Staged):
    """The trunk of BN-Inception: images (B, 3, H, W) → feature map (B, 1024, h, w), 7 × 7 for 224 and for 227 pixels.

    Its layers are named as in `bn_inception-52deb4733.pth`, whose input is BGR, 0–255.
    """

    def __init__(self):
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        channels = 192
        for block, (one, reduce, three, double_reduce, double, proj, _) in BLOCKS.items():
            name, stride = f"inception_{block}", 1 if one else 2
            if one:
                self._add(f"{name}_1x1", channels, one, 1)
                self._add(f"{name}_pool_proj", channels, proj, 1)
            self._add(f"{name}_3x3_reduce", channels, reduce, 1)
            self._add(f"{name}_3x3", reduce, three, 3, stride)
            self._add(f"{name}_double_3x3_reduce", channels, double_reduce, 1)
            self._add(f"{name}_double_3x3_1", double_reduce, double, 3)
            self._add(f"{name}_double_3x3_2", double, double, 3, stride)
            channels = one + three + double + (proj or channels)
        self.num_features = channels

    def _add(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))

    def _apply_layers(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = F.relu(getattr(self, f"{name}_bn")(getattr(self, name)(x)))
        return x

    def _block(self, x: Tensor, block: str) -> Tensor:
        one, *_, pooling = BLOCKS[block]
        name = f"inception_{block}"
        branches = [
            self._apply_layers(x, f"{name}_3x3_reduce", f"{name}_3x3"),
            self._apply_layers(x, f"{name}_double_3x3_reduce", f"{name}_double_3x3_1", f"{name}_double_3x3_2"),
        ]
        if not one:
            # as many rows and columns as the strided convolutions give; zeros change no maximum after a ReLU
            x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
            return torch.cat([*branches, F.max_pool2d(x, 3, 2, ceil_mode=True)], 1)
        pooled = F.max_pool2d(x, 3, 1, padding=1) if pooling == "max" else F.avg_pool2d(x, 3, 1, padding=1)
        branches = [self._apply_layers(x, f"{name}_1x1"), *branches, self._apply_layers(pooled, f"{name}_pool_proj")]
        return torch.cat(branches, 1)

    def _stem(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self._apply_layers(x, "conv1_7x7_s2"), 3, 2, ceil_mode=True)
        return F.max_pool2d(self._apply_layers(x, "conv2_3x3_reduce", "conv2_3x3"), 3, 2, ceil_mode=True)

    def steps(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        blocks = [(f"inception_{block}", partial(self._block, block=block)) for block in BLOCKS]
        return [("stem", self._stem), *blocks]
