"""Low-rank adapters: their size, and the linear maps that have them, chosen by name."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

from megatron_vita.config.groups.model import ModelConfig
from megatron_vita.config.parsing.fields import check_fields, described, require

Part = Literal["vision_model", "projector", "language_model"]

BaseQuantization = Literal["none", "nf4"]
SCALES_AT_ONCE = 256
"""Scales of 4-bit blocks that share a second scale, with double quantization by bitsandbytes."""

LANGUAGE_MAPS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]

Split = Literal["column", "row"]
_SPLITS: dict[str, Split] = {
    "linear_qkv": "column",
    "linear_proj": "row",
    "linear_fc1": "column",
    "linear_fc2": "row",
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA) beside frozen linear maps: W x + scale * B A x."""

    rank: int = described(0, "Rank of the adapters; 0: no adapters.", ge=0)
    alpha: float = described(
        32.0, "Numerator of the adapters' scale, alpha / rank; see rslora.", gt=0, needs=("rank",)
    )
    rslora: bool = described(
        False,
        "Scale by alpha / sqrt(rank), which keeps updates of large ranks from vanishing.",
        needs=("rank",),
    )
    dora: bool = described(
        False,
        "Train the norm of each row of an adapted map beside its direction (DoRA).",
        needs=("rank",),
    )
    targets: list[str] = described(
        LANGUAGE_MAPS,
        "Names of linear maps that have adapters, Megatron's or Hugging Face's, with * for any text: linear_qkv "
        "(q_proj, k_proj, v_proj), linear_proj (o_proj), linear_fc1 (gate_proj, up_proj), linear_fc2 (down_proj), "
        "vision_model.*, projector.*. A name is matched whole or from a dot on. Parts with adapters must be frozen.",
        min_length=1,
        needs=("rank",),
    )
    dropout: float = described(
        0.0,
        "Probability of dropping an element of an adapter's input in training.",
        ge=0,
        lt=1,
        needs=("rank",),
    )
    lr: float = described(
        0.0, "Peak learning rate of the adapters; 0: optimizer.lr.", ge=0, needs=("rank",)
    )
    load: str = described(
        "", "Checkpoint of adapters to start from; empty: new adapters.", needs=("rank",)
    )
    quantize_base: BaseQuantization = described(
        "none",
        "Keep the frozen linear maps of the language model in 4 bits (QLoRA), by bitsandbytes: nf4; "
        "none: in the type of all weights.",
        needs=("rank",),
    )
    quantize_block_size: int = described(
        64,
        "Elements of a row that share a scale, a power of two.",
        ge=32,
        le=4096,
        needs=("quantize_base=nf4",),
    )
    double_quant: bool = described(
        False,
        "Keep the scales of the 4-bit blocks in 8 bits, which saves 0.37 bits a parameter with "
        "blocks of 64.",
        needs=("quantize_base=nf4",),
    )

    def __post_init__(self) -> None:
        check_fields(self, "lora.")
        size = self.quantize_block_size
        require(
            size.bit_count() == 1,
            f"lora.quantize_block_size is {size}: it must be a power of two, from 32 to 4096",
        )
        require(
            not (self.dora and self.dropout),
            f"lora.dropout is {self.dropout:g}, but must be 0 with lora.dora, whose norms belong to "
            "the whole input",
        )

    @property
    def quantizes(self) -> bool:
        """True if the base's linear maps are kept in 4 bits."""
        return self.quantize_base != "none"

    @property
    def scale(self) -> float:
        """Factor of the adapters' outputs."""
        if self.rslora:
            return float(self.alpha / self.rank**0.5)
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class MapPiece:
    """A linear map as Hugging Face's models have it: rows of one of ours."""

    name: str
    outputs: int


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """A linear map of the model that can have adapters."""

    name: str  # of its module; layers are numbered through the whole model
    inputs: int
    pieces: tuple[MapPiece, ...]  # maps that it joins, each with an adapter of its own
    # Groups of rows, in each of which the pieces follow one another; 0: each piece is split over
    # ranks by itself.
    groups: int = 0

    @property
    def part(self) -> Part:
        """Part of the model that it is in."""
        return cast(Part, self.name.partition(".")[0])

    @property
    def kind(self) -> str:
        """Last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def split(self) -> Split | None:
        """Split of its weight over TP; None in tower and projector, whose maps are whole."""
        return _SPLITS.get(self.kind)

    @property
    def layer(self) -> int | None:
        """Number of its layer of the language model; None in other parts."""
        if self.part != "language_model":
            return None
        return int(self.name.split(".")[3])

    @property
    def outputs(self) -> int:
        """Rows of the joint weight."""
        return sum(piece.outputs for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class AdaptedMap:
    """A linear map, and which of its pieces have an adapter."""

    linear: LinearMap
    chosen: tuple[int, ...]  # numbers of pieces, ascending; at least one


def linear_maps(model: ModelConfig) -> Iterator[LinearMap]:
    """Yield all linear maps that can have adapters, in the order of the forward pass."""
    if not model.text_only:
        yield from _tower_maps(model)
        yield from _projector_maps(model)
    yield from _language_maps(model)


def _tower_maps(model: ModelConfig) -> Iterator[LinearMap]:
    vision = model.vision
    width = vision.hidden_size
    ffn = vision.ffn_hidden_size
    for i in range(vision.num_layers):
        prefix = f"vision_model.layers.{i}."
        joint = tuple(
            MapPiece(name=f"{prefix}attention.{name}", outputs=width)
            for name in ("query", "key", "value")
        )
        yield LinearMap(name=f"{prefix}attention.qkv", inputs=width, pieces=joint)
        yield _single(f"{prefix}attention.projection", width, width)
        yield _single(f"{prefix}mlp.fc1", width, ffn)
        yield _single(f"{prefix}mlp.fc2", ffn, width)


def _projector_maps(model: ModelConfig) -> Iterator[LinearMap]:
    hidden = model.projector_hidden_size
    yield _single("projector.fc1", 4 * model.vision.hidden_size, hidden)
    yield _single("projector.fc2", hidden, model.language.hidden_size)


def _language_maps(model: ModelConfig) -> Iterator[LinearMap]:
    language = model.language
    width = language.hidden_size
    ffn = language.ffn_hidden_size
    queries = language.num_attention_heads * language.kv_channels
    keys = language.num_query_groups * language.kv_channels
    for i in range(language.num_layers):
        ours = f"language_model.decoder.layers.{i}."
        theirs = f"model.layers.{i}."
        yield LinearMap(
            name=f"{ours}self_attention.linear_qkv",
            inputs=width,
            pieces=(
                MapPiece(name=f"{theirs}self_attn.q_proj", outputs=queries),
                MapPiece(name=f"{theirs}self_attn.k_proj", outputs=keys),
                MapPiece(name=f"{theirs}self_attn.v_proj", outputs=keys),
            ),
            groups=language.num_query_groups,
        )
        yield _single(
            f"{ours}self_attention.linear_proj", queries, width, theirs=f"{theirs}self_attn.o_proj"
        )
        gate_and_up = tuple(
            MapPiece(name=f"{theirs}mlp.{name}", outputs=ffn) for name in ("gate_proj", "up_proj")
        )
        yield LinearMap(name=f"{ours}mlp.linear_fc1", inputs=width, pieces=gate_and_up)
        yield _single(f"{ours}mlp.linear_fc2", ffn, width, theirs=f"{theirs}mlp.down_proj")


def _single(name: str, inputs: int, outputs: int, *, theirs: str = "") -> LinearMap:
    piece = MapPiece(name=theirs or name, outputs=outputs)
    return LinearMap(name=name, inputs=inputs, pieces=(piece,))


def adapted_maps(model: ModelConfig, lora: LoraConfig) -> list[AdaptedMap]:
    """List the maps that have adapters; none without a rank.

    Raises:
        ConfigError: a pattern of `lora.targets` matches nothing.
    """
    if not lora.rank:
        return []
    return list(_chosen_maps(model, tuple(lora.targets)))


# Recipes are checked by the thousand where levers that fit are looked for.
@lru_cache(maxsize=16)
def _chosen_maps(model: ModelConfig, targets: tuple[str, ...]) -> tuple[AdaptedMap, ...]:
    maps = list(linear_maps(model))
    for pattern in targets:
        require(
            any(_pieces_named(linear, pattern) for linear in maps),
            f"lora.targets: {pattern!r} matches no linear map of the model; known: {_known(maps)}",
        )
    adapted = []
    for linear in maps:
        chosen = {i for pattern in targets for i in _pieces_named(linear, pattern)}
        if chosen:
            adapted.append(AdaptedMap(linear=linear, chosen=tuple(sorted(chosen))))
    return tuple(adapted)


def _pieces_named(linear: LinearMap, pattern: str) -> list[int]:
    """Return the numbers of a map's pieces that a pattern matches."""
    if _matches(linear.name, pattern):
        return list(range(len(linear.pieces)))
    return [i for i, piece in enumerate(linear.pieces) if _matches(piece.name, pattern)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")


def _known(maps: list[LinearMap]) -> str:
    """List the last names of all maps and their pieces, once each."""
    names = [name for linear in maps for name in (linear.name, *(p.name for p in linear.pieces))]
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
