"""Batched answers: one prefill of packed prompts, then a token for each at a time, over a key-value cache."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import ParallelConfig, Recipe, recipe_from_dict
from megatron_vita.data.documents import Document
from megatron_vita.data.split import document_format
from megatron_vita.inference.cache import CachingBackend, KeyValueCache
from megatron_vita.inference.prompt import Prompt, lay_out_prompt, prompt_tiles
from megatron_vita.inference.requests import Sampling
from megatron_vita.inference.sampling import next_tokens
from megatron_vita.layout.slicing import PackSlice, slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.build import build_model
from megatron_vita.parallel import groups
from megatron_vita.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said; `finished` is false where max_new_tokens cut it."""

    text: str
    token_ids: list[int]
    finished: bool


class Engine:
    """A model of one process with its tokenizer."""

    def __init__(self, recipe: Recipe) -> None:
        """First weights; see `from_checkpoint`. The process group must exist."""
        groups.initialize_groups(recipe.parallel)
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.text.tokenizer)
        self.backend = CachingBackend()
        self.model = build_model(recipe, backend=self.backend).eval()
        self.form = document_format(recipe, self.tokenizer)

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, tokenizer: str | None = None) -> "Engine":
        """The model of a checkpoint of any layout; `tokenizer` replaces the recorded place."""
        platform.initialize_process()
        checkpoint = store.find_checkpoint(path)
        recipe = recipe_from_dict(store.read_manifest(checkpoint)["recipe"])
        recipe.parallel = ParallelConfig()
        if tokenizer is not None:
            recipe.text.tokenizer = tokenizer
        elif (inside := checkpoint / recipe.text.tokenizer).exists():  # converted weights bring theirs
            recipe.text.tokenizer = str(inside)
        engine = cls(recipe)
        store.load_weights([engine.model], checkpoint)
        logger.info("weights from %s", checkpoint)
        return engine

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[Answer]:
        """Answers to prompts that share one batch. DataError for a prompt that is wrong."""
        if not prompts:
            return []
        documents = [lay_out_prompt(prompt, form=self.form) for prompt in prompts]
        generator = torch.Generator().manual_seed(sampling.seed)
        said: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        try:
            for tokens in self._decode(prompts, documents, sampling=sampling, generator=generator):
                for i, token in enumerate(tokens.tolist()):
                    if not finished[i]:
                        finished[i] = token in self._stops
                        said[i] += [] if finished[i] else [token]
                if all(finished):
                    break
        finally:
            self.backend.cache = None
        return [
            Answer(text=self.tokenizer.decode(ids), token_ids=ids, finished=done)
            for ids, done in zip(said, finished, strict=True)
        ]

    @property
    def _stops(self) -> set[int]:
        return {self.tokenizer.end_of_turn_id, self.tokenizer.special_id("<|endoftext|>")}

    def _decode(
        self, prompts: Sequence[Prompt], documents: list[Document], *, sampling: Sampling, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Yields the next token of every prompt [B], `max_new_tokens` times."""
        lengths = torch.tensor([len(document) for document in documents])
        pack = self._pack(torch.cat([torch.from_numpy(d.input_ids) for d in documents]), lengths, documents)
        cache = KeyValueCache(lengths.to(platform.device()), int(lengths.max()) + sampling.max_new_tokens)
        self.backend.cache = cache
        logits = self.model(
            torch.empty(0), pack, features=self._encode(prompts, documents), wanted_rows=lengths.cumsum(0) - 1
        )
        yield (tokens := self._draw(logits, sampling, generator))
        ones = torch.ones_like(lengths)
        no_features = logits.new_zeros(0, self.form.vision.image_token_length, self.recipe.model.language.hidden_size)
        for _ in range(sampling.max_new_tokens - 1):
            pack = self._pack(tokens, ones, [])
            rows = torch.arange(len(tokens))
            logits = self.model(torch.empty(0), pack, features=no_features, wanted_rows=rows)
            cache.lengths = cache.lengths + 1
            yield (tokens := self._draw(logits, sampling, generator))

    def _draw(self, logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """Next tokens [B] from logits [B, V]; rows of the matrix that are no token of the tokenizer are left out."""
        return next_tokens(logits[:, : self.tokenizer.vocab_size], sampling=sampling, generator=generator)

    def _pack(self, ids: Tensor, lengths: Tensor, documents: list[Document]) -> PackSlice:
        """Documents one after another, without padding: ids [t], lengths [B]."""
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        placements = [torch.from_numpy(d.placements) + s for d, s in zip(documents, bounds.tolist(), strict=False)]
        pack = slice_pack(
            ids,
            labels=torch.full_like(ids, -100),
            cu_seqlens=bounds.int(),
            placements=torch.cat([torch.zeros(0, dtype=torch.int64), *placements]),
            frames=torch.zeros(sum(len(d.placements) for d in documents), dtype=torch.bool),
            rows_per_tile=self.form.vision.image_token_length,
            layout=groups.rank_layout(),
        )
        return pack.to(platform.device())

    def _encode(self, prompts: Sequence[Prompt], documents: list[Document]) -> Tensor:
        """Features of all tiles [N, rows, H]; media that prompts share are encoded once."""
        encoded: dict[tuple[bytes, ...], Tensor] = {}
        parts = []
        for prompt, document in zip(prompts, documents, strict=True):
            media = tuple(file.data for file in (*prompt.images, *prompt.videos))
            if media not in encoded:
                encoded[media] = self._encode_tiles(torch.from_numpy(prompt_tiles(prompt, document, form=self.form)))
            parts.append(encoded[media])
        return torch.cat(parts)

    def _encode_tiles(self, tiles: Tensor) -> Tensor:
        dtype = self.model.config.params_dtype
        if not self.model.encodes:
            return torch.empty(0, dtype=dtype)
        return self.model.encode(normalize(tiles.to(platform.device()), self.recipe.media.normalization, dtype=dtype))
