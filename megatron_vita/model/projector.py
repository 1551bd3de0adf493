"""Projection of vision features to the width of the language model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vita.config import ModelConfig


class Projector(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear.

    Kind `long_vita`: the hidden layer has the vision tower's width and there are no biases
    (Long-VITA's `pre_proj_layernorm` and MLP). Kind `internvl`: it has the language model's width,
    with biases (InternVL's `mlp1`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.projector
        joined = 4 * config.vision.hidden_size
        biased = config.projector.has_bias
        hidden = config.projector_hidden_size
        self.norm = nn.LayerNorm(joined, eps=1e-5)
        self.fc1 = nn.Linear(joined, hidden, bias=biased)
        self.fc2 = nn.Linear(hidden, config.language.hidden_size, bias=biased)

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize the weights, the same on every rank for the same generator."""
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=self.config.init_method_std, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project [n, rows, 4 * vision width] -> [n, rows, LLM width]."""
        return self.fc2(F.gelu(self.fc1(self.norm(features))))
