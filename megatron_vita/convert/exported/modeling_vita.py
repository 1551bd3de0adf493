"""Vision-language model that megatron_vita has exported: InternViT, a projector, a language model.

Feature rows of tiles (parts of images, frames of videos) replace the placeholder tokens in the
prompt, in order. Shapes in comments: B prompts, T tokens, N tiles, S pixels of a side, P patches of
a tile, R feature rows of a tile, C width of the tower, H width of the language model.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_vita import VitaConfig

TILES_AT_ONCE = 32


def _norm(visual: dict[str, Any]) -> nn.Module:
    kind = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[visual["norm_type"]]
    return kind(visual["hidden_size"], eps=visual["layer_norm_eps"])


class VitaVisionEmbeddings(nn.Module):
    """Patches of a tile after a class token, with learned positions."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width = visual["hidden_size"]
        patch = visual["patch_size"]
        tokens = (visual["image_size"] // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, tokens, width))

    def forward(self, tiles: Tensor) -> Tensor:
        """Embed [N, 3, S, S] -> [N, 1 + P, C]."""
        patches = self.patch_embedding(tiles).flatten(2).transpose(1, 2)
        begin = self.class_embedding.expand(len(tiles), -1, -1)
        return torch.cat([begin, patches], dim=1) + self.position_embedding


class VitaVisionAttention(nn.Module):
    """Attention among all tokens of a tile."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width = visual["hidden_size"]
        self.heads = visual["num_attention_heads"]
        self.qkv = nn.Linear(width, 3 * width, bias=visual["qkv_bias"])
        self.proj = nn.Linear(width, width)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if visual["qk_normalization"]:
            self.q_norm = nn.RMSNorm(width, eps=visual["layer_norm_eps"])
            self.k_norm = nn.RMSNorm(width, eps=visual["layer_norm_eps"])

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [N, 1 + P, C] -> [N, 1 + P, C]."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query = self._by_head(self.q_norm(query))
        key = self._by_head(self.k_norm(key))
        attended = F.scaled_dot_product_attention(query, key, self._by_head(value))
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class VitaVisionMLP(nn.Module):
    """MLP with exact GELU."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(visual["hidden_size"], visual["intermediate_size"])
        self.fc2 = nn.Linear(visual["intermediate_size"], visual["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP: [N, 1 + P, C] -> [N, 1 + P, C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class VitaVisionLayer(nn.Module):
    """Transformer layer with norms before each branch and a learned scale after it."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        self.norm1 = _norm(visual)
        self.attn = VitaVisionAttention(visual)
        self.ls1 = nn.Parameter(torch.ones(visual["hidden_size"]))
        self.norm2 = _norm(visual)
        self.mlp = VitaVisionMLP(visual)
        self.ls2 = nn.Parameter(torch.ones(visual["hidden_size"]))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer: [N, 1 + P, C] -> [N, 1 + P, C]."""
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class VitaVisionEncoder(nn.Module):
    """Layers of the vision tower."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        layers = range(visual["num_hidden_layers"])
        self.layers = nn.ModuleList(VitaVisionLayer(visual) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run all layers: [N, 1 + P, C] -> [N, 1 + P, C]."""
        for layer in self.layers:
            x = layer(x)
        return x


class VitaVisionTower(nn.Module):
    """InternViT, whose patches are joined two by two."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        self.rows = (visual["image_size"] // visual["patch_size"] // 2) ** 2  # of a tile
        self.embeddings = VitaVisionEmbeddings(visual)
        self.encoder = VitaVisionEncoder(visual)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode [N, 3, S, S] -> [N, R, 4 * C]."""
        return join_patches(self.encoder(self.embeddings(tiles))[:, 1:])


def join_patches(patches: Tensor) -> Tensor:
    """Join squares of four patches: [N, P, C] -> [N, P / 4, 4 * C], both row by row.

    A square holds its upper left, upper right, lower left and lower right patch, in this order.
    """
    tiles, count, width = patches.shape
    half = math.isqrt(count) // 2
    squares = patches.reshape(tiles, half, 2, half, 2, width).transpose(2, 3)
    return squares.reshape(tiles, half * half, 4 * width)


class VitaProjector(nn.Module):
    """Norm and MLP that map feature rows to the width of the language model."""

    def __init__(self, config: VitaConfig) -> None:
        super().__init__()
        width = config.visual["hidden_size"]
        self.pre_proj_layernorm = nn.LayerNorm(4 * width)
        self.mlp = nn.Sequential(
            nn.Linear(4 * width, width, bias=False),
            nn.GELU(),
            nn.Linear(width, config.text_config.hidden_size, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project [N, R, 4 * C] -> [N, R, H]."""
        return self.mlp(self.pre_proj_layernorm(features))


class VitaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model, with the output layer of the language model."""

    config_class = VitaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VitaVisionLayer", "VitaProjector"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VitaConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = AutoModel.from_config(text)
        # Tensors of tower and projector have names beside those of the language model's layers.
        self.model.vision_model = VitaVisionTower(config.visual)
        self.model.vision_projection = VitaProjector(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode and project tiles: [N, 3, S, S] -> [N, R, H]."""
        tiles = pixel_values.to(self.lm_head.weight.dtype)
        tower = self.model.vision_model
        projector = self.model.vision_projection
        # Some at a time: a long video has thousands.
        return torch.cat([projector(tower(part)) for part in tiles.split(TILES_AT_ONCE)])

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [B, T, vocabulary], and the loss if `labels` are given.

        Args:
            input_ids: prompts [B, T].
            pixel_values: tiles [N, 3, S, S] of all prompts, in the order of their placeholders.
            attention_mask: 0 for padding, of the prompts and of the tokens in the cache.
            position_ids: positions [B, T] of the tokens.
            past_key_values: cache of the tokens before.
            inputs_embeds: embeddings [B, T, H] instead of prompts.
            labels: ids [B, T] to predict, each at its own position; -100 for none.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or their
                indices.
            num_items_in_batch: number to divide the sum of losses by (transformers' Trainer gives
                the labels of all accumulation steps); None: the labels given.
            options: passed on to the language model (`use_cache`, ...).

        Raises:
            ValueError: prompts and tiles do not go together.
        """
        _check_inputs(input_ids, pixel_values, inputs_embeds)
        if input_ids is not None:
            inputs_embeds = self._embedded(input_ids, pixel_values, past_key_values)
        found = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )
        # -0 keeps all.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def _embedded(
        self, input_ids: Tensor, pixel_values: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        """Embed prompts, with feature rows in the place of placeholders: [B, T] -> [B, T, H]."""
        words = self.get_input_embeddings()(input_ids)
        places = self._places(input_ids)
        prefill = past_key_values is None or int(past_key_values.get_seq_length()) == 0
        # After its prompt a model may write a placeholder itself, and pixels may come again.
        if not prefill and (pixel_values is None or not places.any()):
            return words
        number = 0 if pixel_values is None else len(pixel_values)
        self._tiles_of_prompts(places, number)
        if pixel_values is None or number == 0:
            return words
        features = self.get_image_features(pixel_values).to(words)
        return words.masked_scatter(places[..., None].expand_as(words), features)

    def _places(self, input_ids: Tensor) -> Tensor:
        """Mark placeholders: [B, T] -> bool [B, T]."""
        ids = torch.tensor(self.config.media_token_ids, device=input_ids.device)
        return torch.isin(input_ids, ids)

    def _tiles_of_prompts(self, places: Tensor, number: int) -> list[int]:
        """Divide a number of tiles among B prompts, by their placeholders [B, T].

        Raises:
            ValueError: the placeholders are not those of as many whole tiles.
        """
        rows = self.model.vision_model.rows
        counts = places.sum(dim=1).tolist()
        if sum(counts) != number * rows:
            raise ValueError(
                f"the prompts have {sum(counts)} placeholders and the {number} tiles "
                f"{rows} feature rows each: one placeholder for each row is needed"
            )
        if any(count % rows for count in counts):
            raise ValueError(
                f"the prompts have {counts} placeholders: each needs a multiple of {rows}, the "
                "feature rows of a tile"
            )
        return [count // rows for count in counts]

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat each prompt with all of its tiles, once for every beam or sample of it."""
        # transformers would repeat tile by tile, as if the first dimension were that of prompts.
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None and input_ids is not None and expand_size > 1:
            tiles = self._tiles_of_prompts(self._places(input_ids), len(pixels))
            parts = pixels.split(tiles)
            pixels = torch.cat([part for part in parts for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        return input_ids, model_kwargs


def _check_inputs(
    input_ids: Tensor | None, pixel_values: Tensor | None, inputs_embeds: Tensor | None
) -> None:
    """Check that either prompts or their embeddings are given, and tiles with prompts alone.

    Raises:
        ValueError: they are not.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("one of input_ids and inputs_embeds is needed, and not both")
    if pixel_values is not None and input_ids is None:
        raise ValueError("pixel_values need input_ids, which say where their features belong")
