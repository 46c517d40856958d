"""Backbones: trunks with pretrained weights, the pixels that they expect, and the embedding head on top."""

from cbml.models.config import BackboneConfig, InputConvention, PublishedWeights
from cbml.models.embedding_model import EmbeddingModel, Outputs, create_model
from cbml.models.trunks import build_trunk, input_convention, weights_content

__all__ = [
    "BackboneConfig",
    "EmbeddingModel",
    "InputConvention",
    "Outputs",
    "PublishedWeights",
    "build_trunk",
    "create_model",
    "input_convention",
    "weights_content",
]
