"""A folder's generation_config.json becomes a server's defaults, or is refused by field."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from megatron_vita.checkpoint.store import read_manifest
from megatron_vita.config import GenerationConfig, load_recipe, recipe_from_dict
from megatron_vita.convert.families.generation import read_generation
from megatron_vita.convert.importing import import_weights
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.protocol import ChatRequest
from megatron_vita.inference.server.protocol.sampling import defaults_of, sampling_of
from tests.convert.published import GENERATION, change
from tests.convert.toy_folders import model_of, save

FILE = "generation_config.json"
EXPECTED = {
    "qwen2-7b": GenerationConfig(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05),
    "qwen2.5-0.5b": GenerationConfig(temperature=0.0),
    "qwen3-0.6b": GenerationConfig(temperature=0.6, top_k=20, top_p=0.95),
    "llama3.1-8b": GenerationConfig(temperature=0.6, top_p=0.9),
    "smollm2-135m": GenerationConfig(),
    "internvl3-1b-chat": GenerationConfig(),
}


@pytest.mark.parametrize("name", GENERATION)
def test_published_defaults_are_read_whole(name: str, tmp_path: Path) -> None:
    change(tmp_path, FILE, **GENERATION[name])
    assert read_generation(tmp_path) == EXPECTED[name]


def test_a_folder_without_the_file_advises_nothing(tmp_path: Path) -> None:
    assert read_generation(tmp_path) == GenerationConfig()


@pytest.mark.parametrize("sampled", [None, False])
def test_what_belongs_to_drawing_counts_only_where_the_folder_draws(
    sampled: bool | None, tmp_path: Path
) -> None:
    """As in transformers, where a repetition penalty counts in any case."""
    fields = {"temperature": 0.6, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.2}
    change(tmp_path, FILE, do_sample=sampled, **fields)
    found = read_generation(tmp_path)
    assert (found.top_p, found.top_k, found.repetition_penalty) == (None, None, 1.2)
    assert found.temperature == (None if sampled is None else 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 0.1},
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"do_sample": "yes"},
        {"do_sample": True, "temperature": -1.0},
        {"do_sample": True, "top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"sequence_bias": [[[1], -10.0]]},
        {"bad_words_ids": [[3]]},
        {"suppress_tokens": [7]},
    ],
)
def test_a_default_that_the_engine_cannot_follow_is_refused_by_field(
    fields: dict, tmp_path: Path
) -> None:
    change(tmp_path, FILE, **fields)
    with pytest.raises(CheckpointError, match=f"{FILE}.*{list(fields)[-1]}"):
        read_generation(tmp_path)


def test_defaults_travel_from_the_folder_to_the_recipe_and_to_requests(tmp_path: Path) -> None:
    folder = save(model_of("qwen2"), tmp_path / "theirs")
    ends = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 6}  # of the toy tokenizer
    change(folder, FILE, **(GENERATION["qwen2-7b"] | ends))
    import_weights([folder], tmp_path / "ours", projector="internvl")
    recipe = recipe_from_dict(read_manifest(tmp_path / "ours")["recipe"])
    assert recipe.generation == load_recipe(tmp_path / "ours/model.yaml").generation
    assert recipe.data.seq_length == 64, "prompts are as long as the model was trained at"
    defaults = defaults_of(recipe.generation)
    asked = {"messages": [{"role": "user", "content": "a"}], "model": "m"}
    plain = sampling_of(
        ChatRequest.model_validate(asked), limits=Limits(), default_seed=1, defaults=defaults
    )
    assert dataclasses.asdict(plain).items() >= dataclasses.asdict(EXPECTED["qwen2-7b"]).items()
    own = ChatRequest.model_validate(asked | {"temperature": 0, "top_k": -1})
    told = sampling_of(own, limits=Limits(), default_seed=1, defaults=defaults)
    assert (told.temperature, told.top_k, told.top_p) == (0, 0, 0.8)


def test_a_recipe_that_advises_nothing_has_openais_defaults() -> None:
    assert defaults_of(GenerationConfig()).temperature == 1.0


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_p", 0.0), ("repetition_penalty", 0)]
)
def test_a_recipe_refuses_advice_that_is_out_of_range(
    field: str, value: float, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"generation": {field: value}}))
    with pytest.raises(ConfigError, match=f"generation.{field} is"):
        load_recipe(tmp_path / "r.yaml")
