"""VitaModel: from tiles and tokens to the losses of the scored rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_vita.config import ModelConfig
from megatron_vita.layout.slicing import PackSlice
from megatron_vita.model.backends.backends import AttentionBackend
from megatron_vita.model.initial_weights import set_initial_weights
from megatron_vita.model.language import LanguageModel
from megatron_vita.model.lora import with_adapters
from megatron_vita.model.pieces import checkpoint_pieces, split_evenly
from megatron_vita.model.projector import Projector
from megatron_vita.model.quantized import unpacked_in_turn
from megatron_vita.model.vision import build_tower
from megatron_vita.parallel import groups
from megatron_vita.parallel.collectives import exchange_rows
from megatron_vita.platform.pinned import to_device


@dataclass(frozen=True, kw_only=True)
class VisionOptions:
    """Options of encoding tiles: parallelism, tiles at a time, recomputation."""

    # The tower is split over TP; otherwise each TP rank encodes tiles of its own.
    tensor_parallel: bool = False
    tiles_at_once: int = 64
    recompute: bool = False
    recompute_method: str = "layers"


class VitaModel(MegatronModule):
    """A pipeline stage of the model; the first stage also holds vision tower and projector."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        shapes: ModelConfig,
        backend: AttentionBackend,
        vision_options: VisionOptions,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        quantized: bool = False,
    ) -> None:
        super().__init__(config=config)
        # megatron-core's pipeline schedules ask every model for it.
        self.model_type = ModelType.encoder_or_decoder
        self.shapes = shapes
        self.vp_stage = vp_stage
        self.pre_process = pre_process
        self.post_process = post_process
        self.vision_options = vision_options
        self.quantized = quantized
        self.encodes = pre_process and not shapes.text_only
        if self.encodes:
            self.vision_model = build_tower(
                shapes.vision,
                tp_group=groups.tensor_group() if vision_options.tensor_parallel else None,
            )
            self.vision_model.recompute = (
                vision_options.recompute and vision_options.recompute_method == "layers"
            )
            self.projector = Projector(shapes)
        self.language_model = LanguageModel(
            config,
            shape=shapes.language,
            output=shapes.output,
            backend=backend,
            quantized=quantized,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.share_embeddings_and_output_weights = (
            self.language_model.share_embeddings_and_output_weights
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the previous stage's output, as megatron-core's schedules pass it."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the word embedding shared by first and last stage, for megatron-core's
        reduction."""
        return self.language_model.shared_embedding_or_output_weight()

    def parts_with_partial_gradients(self) -> list[nn.Module]:
        """Return the parts whose gradients must be summed over TP.

        Each TP rank has those of its own tiles only, unless the tower is split over TP.
        """
        dealt = self.encodes and not self.vision_options.tensor_parallel
        if dealt:
            return [self.vision_model, self.projector]
        return []

    def encode(self, tiles: Tensor) -> Tensor:
        """Encode normalized tiles [n, 3, S, S] -> feature rows [n, rows per tile, H].

        At most `tiles_at_once` tiles are encoded together.
        """
        at_most = self.vision_options.tiles_at_once
        weights = [p for part in (self.vision_model, self.projector) for p in part.parameters()]
        trained = [p for p in weights if p.requires_grad]
        # A frozen tower keeps nothing for backward anyway.
        if self._keeps_pixels and trained:
            features = checkpoint_pieces(
                self._encode_batch, tiles, at_most=at_most, weights=trained
            )
        else:
            batches = split_evenly(tiles, at_most=at_most)
            features = torch.cat([self._encode_batch(batch) for batch in batches])
        # Each TP rank has all features and writes only the rows of its own part of the sequence:
        # the gradients of all of them are summed on the way back.
        if self.vision_options.tensor_parallel:
            features = copy_to_tensor_model_parallel_region(features, group=groups.tensor_group())
        return features

    @property
    def _keeps_pixels(self) -> bool:
        options = self.vision_options
        by_tiles = options.recompute and options.recompute_method == "tiles"
        return by_tiles and self.training and torch.is_grad_enabled()

    def _encode_batch(self, tiles: Tensor) -> Tensor:
        return self.projector(self.vision_model(tiles))

    def forward(
        self,
        tiles: Tensor,
        pack: PackSlice,
        *,
        features: Tensor | None = None,
        wanted_rows: Tensor | None = None,
        row_scale: float | Tensor | Callable[[Tensor], Tensor] = 1.0,
    ) -> Tensor:
        """Run one pack through this stage.

        Args:
            tiles: normalized tiles dealt to this rank [n, 3, S, S]; ignored where there is no
                tower.
            pack: this CP rank's slice of the pack.
            features: feature rows of those tiles [n, rows per tile, H], where already encoded.
            wanted_rows: rows of the slice whose logits are wanted, ascending, on the host.
            row_scale: the gradient that backward will bring to each loss (a loss scale, or weights
                [L]), or a function that computes it from the losses [L]: the output layer then
                runs twice.

        Returns:
            The hidden state [t / TP or t, 1, H] before the last stage; on it the losses [L] of
                `pack.loss_rows`, or the logits [rows, V] of `wanted_rows` where those are given.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self._embed(tiles, pack, features)
        hidden = self.language_model.decode(embeddings, cu_seqlens=pack.cu_seqlens)
        if not self.post_process:
            return hidden
        if wanted_rows is not None:
            return self.language_model.output(hidden, rows=wanted_rows)
        scored = pack.loss_rows
        labels = pack.labels[scored]
        if callable(row_scale):
            with torch.no_grad():
                losses = self.language_model.output(hidden, rows=scored, labels=labels)
            row_scale = row_scale(losses)
            if not torch.is_grad_enabled():
                return losses
        return self.language_model.output(hidden, rows=scored, labels=labels, row_scale=row_scale)

    def _embed(self, tiles: Tensor, pack: PackSlice, features: Tensor | None) -> Tensor:
        """Return this rank's part of the sequence [t / TP, H]: word embeddings and feature rows."""
        embeddings = self.language_model.embed(pack.input_ids)
        if not self.encodes:
            return embeddings
        # Also for a pack without tiles: the exchange is collective, and every parameter of the
        # tower must get a gradient.
        if features is None:
            features = self.encode(tiles)
        return self._write_features(embeddings, features, pack)

    def _write_features(self, embeddings: Tensor, features: Tensor, pack: PackSlice) -> Tensor:
        """Send features to the ranks that hold their placeholders, and overwrite those rows."""
        device = embeddings.device
        route = pack.route
        rows = features.flatten(0, 1)[to_device(route.send_order, device)]
        rows = exchange_rows(
            rows,
            send_counts=route.send_counts,
            receive_counts=route.receive_counts,
            group=groups.tile_group(),
        )
        target_rows = to_device(route.target_rows, device)
        return embeddings.index_copy(0, target_rows, rows.to(embeddings.dtype))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the sharded state of all parts, the same for every backend.

        Transformer Engine's `_extra_state` is left out: it holds scales of 8-bit formats, which are
        not used.
        """
        assert not sharded_offsets
        assert not prefix, "adapters have names of the whole model"
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        kept = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
        return with_adapters(kept, self, metadata=metadata or {})

    def set_passes(self, number: int) -> None:
        """Set the number of packs that went through the layers, which numbers dropout masks."""
        for layer in self.language_model.decoder.layers:
            layer.passes = number

    def initialize_language(self, seed: int) -> None:
        """Initialize this stage's part of the language model, the same at every layout."""
        self._draw(self._language_state(), seed=seed)
        for _ in self.initialize_quantized(seed):
            pass

    def initialize_quantized(self, seed: int) -> Iterator[dict[str, Any]]:
        """Initialize the weights that are kept in 4 bits, a layer at a time, and yield the sharded
        state of each layer's, which are packed afterwards."""
        for names in unpacked_in_turn(self):
            state = self._language_state()
            part = {name: value for name, value in state.items() if name in names}
            self._draw(part, seed=seed)
            yield part

    def _language_state(self) -> dict[str, Any]:
        replicas = groups.data_parallel_group(with_context_parallel=True)
        state: dict[str, Any] = self.language_model.sharded_state_dict(
            prefix="language_model.", metadata={"dp_cp_group": replicas}
        )
        return state

    def _draw(self, state: dict[str, Any], *, seed: int) -> None:
        set_initial_weights(
            state, config=self.config, vocab_size=self.shapes.language.vocab_size, seed=seed
        )

    def initialize_vision(self, seed: int) -> None:
        """Initialize tower and projector, the same on every rank."""
        if not self.encodes:
            return
        # One generator for both, on the host: the same numbers on every kind of device.
        generator = torch.Generator().manual_seed(seed)
        for part in (self.vision_model, self.projector):
            part.initialize(generator)
