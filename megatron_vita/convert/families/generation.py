"""Sampling defaults in generation_config.json."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_vita.config import GenerationConfig
from megatron_vita.convert.families.config_file import Config

GENERATION = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_NOTES = ("transformers_version", "max_length", "max_new_tokens", "chat_format")
# Options of transformers' implementation: caches, extra outputs, speculative decoding. None of them
# changes the tokens.
_KERNELS = (
    *("use_cache", "cache_implementation", "cache_config", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_legacy_cache", "disable_compile", "low_memory", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    *("prefill_chunk_size", "max_cache_len", "remove_invalid_values"),
)
# Values with which an option is off. Other values change outputs, and the engine lacks the option.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "renormalize_logits": False,
    "token_healing": False,
}


def read_generation(folder: Path, *, ignored: Collection[str] = ()) -> GenerationConfig:
    """Read the sampling defaults of a folder.

    Without `do_sample: true` transformers ignores temperature, top_k and top_p, and so does this
    reader.

    Raises:
        CheckpointError: the engine does not implement a default; the message names the field.
    """
    config = Config.read_if_present(folder, GENERATION)
    config.disregard((*_TOKENS, *_NOTES, *_KERNELS))
    for name, value in _NEUTRAL.items():
        if name not in ignored:
            config.must_be(name, (value,), value)
    drawn = ("temperature", "top_k", "top_p")
    # GenerationConfig itself checks that top_k is an integer; number() would turn it into a float.
    fields: dict[str, Any] = {
        name: config.number(name) if config.get(name) is not None else None
        for name in ("temperature", "top_p", "repetition_penalty")
    }
    fields["top_k"] = config.get("top_k")
    # Without do_sample the file has no opinion on sampling; do_sample false requests greedy
    # decoding.
    if config.get("do_sample") is None or not config.flag("do_sample", False):
        fields |= dict.fromkeys(drawn)
        if config.get("do_sample") is not None:
            fields["temperature"] = 0.0
    config.refuse_unread(ignored)
    with config.naming():
        return GenerationConfig(**fields)
