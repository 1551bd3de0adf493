"""Vision transformers: InternViT, and by options CLIP, SigLIP and EVA2-CLIP, up to the last hidden
state.

Shapes and order of operations follow InternViT-300M-448px and InternViT-6B-448px-V2.5 (long form:
the InternVL 2.5 model cards), transformers' CLIPVisionModel and SiglipVisionModel, and GLM-4V's
EVA2CLIPModel. Every rank holds the whole tower and encodes tiles of its own, unless the tower is
split over a tensor-parallel group (`vision_parts.py`), whose ranks then encode the same tiles
together.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_vita.config import VisionConfig
from megatron_vita.errors import ConfigError
from megatron_vita.model.vision_parts import TowerSplit, VisionAttention, VisionMLP, build_norm
from megatron_vita.parallel import groups
from megatron_vita.registry import Registry
from megatron_vita.rounding import ceil_div


class VisionEmbeddings(nn.Module):
    """Patch embedding, class token and learned absolute positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if config.class_token else None
        self.position_embedding = nn.Parameter(torch.empty(1, config.tokens, width))
        self.pre_norm = build_norm(config) if config.pre_norm else None

    def forward(self, tiles: Tensor) -> Tensor:
        """Embed tiles: [n, 3, S, S] -> [n, tokens, H], the class token first."""
        x = self.patch_embedding(tiles).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(tiles), -1, -1), x], dim=1)
        x = x + self.position_embedding
        if self.pre_norm is None:
            return x
        return self.pre_norm(x)


class VisionLayer(nn.Module):
    """Transformer layer with norms before each branch or after it, and optional LayerScale.

    LayerScale multiplies the whole branch, its bias included.
    """

    def __init__(self, config: VisionConfig, split: TowerSplit) -> None:
        super().__init__()
        self.norm_after = config.norm_after
        self.norm1 = build_norm(config)
        self.attention = VisionAttention(config, split)
        self.scale1 = nn.Parameter(torch.empty(config.hidden_size)) if config.layer_scale else None
        self.norm2 = build_norm(config)
        self.mlp = VisionMLP(config, split)
        self.scale2 = nn.Parameter(torch.empty(config.hidden_size)) if config.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer: [n, s, H] -> [n, s, H]."""
        x = x + self._branch(x, self.attention, self.norm1, self.scale1)
        return x + self._branch(x, self.mlp, self.norm2, self.scale2)

    def _branch(self, x: Tensor, work: nn.Module, norm: nn.Module, scale: Tensor | None) -> Tensor:
        out = norm(work(x)) if self.norm_after else work(norm(x))
        if scale is None:
            return out
        return scale * out


class VisionTower(nn.Module):
    """Encoder of tiles into features, four patches joined into each feature row."""

    def __init__(self, config: VisionConfig, *, tp_group: ProcessGroup | None = None) -> None:
        """Build the tower.

        Args:
            config: shape of the tower.
            tp_group: ranks that the tower is split over; None where each rank holds all of it.
        """
        super().__init__()
        self.config = config
        self.split = TowerSplit(tp_group)
        self.embeddings = VisionEmbeddings(config)
        self.layers = nn.ModuleList(
            VisionLayer(config, self.split) for _ in range(config.num_layers)
        )
        self.post_norm = build_norm(config) if config.post_norm else None
        self.recompute = False  # keep only the inputs of layers for the backward pass
        # megatron-core's gradient norm counts parameters without this mark on one TP rank only.
        for name, parameter in self.named_parameters():
            parameter.tensor_model_parallel = self.split.axis_of(name) is not None  # type: ignore[attr-defined]

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize weights for training from scratch, the same on every rank and however split.

        The patch embedding sees pixels of unit deviation, whatever the patch's size: its standard
        deviation is 1 / sqrt(fan in).
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("scale1", "scale2")):
                nn.init.constant_(parameter, self.config.layer_scale_init)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                fan_in = parameter[0].numel()
                if name == "embeddings.patch_embedding.weight":
                    std = fan_in**-0.5
                else:
                    std = self.config.init_method_std
                # Every rank draws the whole matrix and takes its part, so that numbers do not
                # depend on how the tower is split.
                whole = torch.empty(self._whole_shape(name, parameter))
                nn.init.normal_(whole, std=std, generator=generator)
                with torch.no_grad():
                    parameter.copy_(self.split.shard_of(whole, name=name, size=parameter.shape))

    def _whole_shape(self, name: str, parameter: Tensor) -> list[int]:
        shape = list(parameter.shape)
        axis = self.split.axis_of(name)
        if axis is not None:
            if ".mlp." in name:
                shape[axis] = self.config.ffn_hidden_size
            else:
                shape[axis] = self.config.hidden_size
        return shape

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode normalized tiles [n, 3, S, S] -> features [n, rows, 4 * H], without the class
        token."""
        x = self.embeddings(tiles)
        for layer in self.layers:
            # Not re-entrant: megatron-core counts how often each parameter's gradient arrives, and
            # a re-entrant checkpoint delivers them in a backward pass of its own.
            if self.recompute and self.training:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        if self.post_norm is not None:
            x = self.post_norm(x)
        if self.config.class_token:
            x = x[:, 1:]
        return pixel_shuffle(x)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the sharded state, the same for a whole tower and for one split over any TP
        size."""
        assert not sharded_offsets
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: axis for name in state if (axis := self.split.axis_of(name)) is not None}
        groups_of_state = {
            "tp_group": groups.tensor_group(),
            "dp_cp_group": (metadata or {})["dp_cp_group"],
        }
        sharded = make_sharded_tensors_for_checkpoint(state, prefix, axes, **groups_of_state)
        for name in self.split.padded:
            for key in (key for key in sharded if key.endswith(name)):
                # The number of padding heads depends on the layout.
                sharded[key].allow_shape_mismatch = True
        return sharded


TOWERS: Registry[type[VisionTower]] = Registry("vision_tower", {"vit": VisionTower})
"""Modules by `model.vision.kind`; a registered one derives from VisionTower."""


def build_tower(config: VisionConfig, *, tp_group: ProcessGroup | None = None) -> VisionTower:
    """Build the tower of a config; `tp_group` is VisionTower's.

    Raises:
        ConfigError: `kind` is not known.
    """
    if config.kind not in TOWERS:
        raise ConfigError(f"model.vision.kind is {config.kind!r}; known: {', '.join(TOWERS)}")
    return TOWERS[config.kind](config, tp_group=tp_group)


def pixel_shuffle(patches: Tensor) -> Tensor:
    """Join patches two by two: [n, side * side, C] -> [n, side * side / 4, 4 * C], both row-major.

    A cell holds, in this order, its upper left, upper right, lower left and lower right patch, as
    InternVL's second version of pixel shuffle with a scale of 0.5 does. An odd grid is padded with
    a column and a row of zeros at its end.
    """
    n, count, channels = patches.shape
    side = math.isqrt(count)
    odd = side % 2
    cells = ceil_div(side, 2)
    if odd:
        patches = F.pad(patches.view(n, side, side, channels), (0, 0, 0, odd, 0, odd))
    return (
        patches.reshape(n, cells, 2, cells, 2, channels)
        .transpose(2, 3)
        .reshape(n, cells**2, 4 * channels)
    )
