"""InternViT: a plain vision transformer with LayerScale, a class token and no final norm.

Shapes and order of operations follow InternViT-300M-448px (long form: the InternVL 2.5 model card). Parameters are
replicated over tensor-parallel ranks; the work is shared by dealing tiles, so plain torch modules are used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vita.config import VisionConfig


class VisionEmbeddings(nn.Module):
    """Patches, class token and learned absolute positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(1, config.patches + 1, config.hidden_size))

    def forward(self, tiles: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, 1 + patches, H], the class token first."""
        patches = self.patch_embedding(tiles).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(tiles), -1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding


class VisionAttention(nn.Module):
    """Bidirectional attention over the patches of one tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[n, s, H] -> [n, s, H]."""
        n, s, width = x.shape
        q, k, v = self.qkv(x).view(n, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v) if n else v  # on CUDA it gives None for no tiles
        return self.projection(attended.transpose(1, 2).reshape(n, s, width))


class VisionMLP(nn.Module):
    """Plain MLP with exact GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[n, s, H] -> [n, s, H]."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm layer; LayerScale multiplies each branch, its bias included."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = VisionAttention(config)
        self.scale1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = VisionMLP(config)
        self.scale2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[n, s, H] -> [n, s, H]."""
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Tiles to features, four patches joined into each feature row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.recompute = False  # keep only the inputs of layers for the backward pass

    def initialize(self, generator: torch.Generator) -> None:
        """First weights for training from scratch, the same on every rank for the same generator.

        The patch embedding sees pixels of unit deviation, whatever the patch's size: its deviation is 1 / sqrt(fan in).
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("scale1", "scale2")):
                nn.init.constant_(parameter, self.config.layer_scale_init)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                fan_in = parameter[0].numel()
                std = fan_in**-0.5 if name == "embeddings.patch_embedding.weight" else self.config.init_method_std
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tiles: Tensor) -> Tensor:
        """Normalised tiles [n, 3, S, S] -> features [n, patches / 4, 4 * H]; the class token is dropped."""
        x = self.embeddings(tiles)
        for layer in self.layers:
            # Not re-entrant: megatron-core counts how often each parameter's gradient arrives.
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and self.training else layer(x)
        return pixel_shuffle(x[:, 1:])


def pixel_shuffle(patches: Tensor) -> Tensor:
    """Joins patches two by two: [n, side * side, C] -> [n, side * side / 4, 4 * C], both row-major.

    A cell holds, in this order, its upper left, upper right, lower left and lower right patch, as InternVL's second
    version of pixel shuffle with a scale of 0.5 does.
    """
    n, count, channels = patches.shape
    side = int(count**0.5)
    cells = patches.view(n, side // 2, 2, side // 2, 2, channels).transpose(2, 3)
    return cells.reshape(n, count // 4, 4 * channels)
