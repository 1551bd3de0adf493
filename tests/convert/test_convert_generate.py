"""Published families come in and answer greedily as transformers' `generate` does: texts, images of
one and several tiles, two images, a video, several turns.

Prompt ids and pixels are transformers' own, but for two formats whose classes are code of their
folders: those are written by hand here, and the weights are those of transformers' InternVL.
The processor's parts are put together in `internvl_processor`; what AutoProcessor gives itself is
recorded in `processor_facts`.
"""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor

from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.inference.engine.engine import Engine
from tests.convert import processor_facts
from tests.convert.asked_of_both import (
    assert_answers_are_transformers,
    engine_of,
    processor_of,
    processor_of_tower,
    put_projector,
)
from tests.convert.asked_of_transformers import (
    TEXTS,
    WITH_MEDIA,
    of_chat_format,
    of_long_vita,
    of_processor,
    of_text,
)
from tests.convert.published_models import (
    CHAT,
    TEXT,
    TOWERS,
    Published,
    internvl_chat,
    internvl_hf,
    long_vita,
    opened,
    text_model,
    tower_beside_language,
)
from tests.text.published import save_family

full_run = pytest.mark.full("seconds for each family")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("qwen3", "llama3.2") else full_run) for f in TEXT]
)
def test_a_language_model_answers_as_transformers_does(family: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    published = text_model(tmp_path / "theirs", family)
    engine = engine_of(published.folder, to=tmp_path / "ours")
    assert_answers_are_transformers(
        engine, published.model, TEXTS, lambda q: of_text(published.tokenizer, q)
    )


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return internvl_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def engine(hf: Published, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(hf.folder, to=tmp_path_factory.mktemp("engine") / "ours")


def test_internvl_answers_as_transformers_does(hf: Published, engine: Engine) -> None:
    processor = processor_of(hf.tokenizer)
    assert_answers_are_transformers(
        engine, hf.model, WITH_MEDIA, lambda q: of_processor(processor, q)
    )


@pytest.mark.parametrize("name", WITH_MEDIA)
def test_prompts_and_pixels_are_those_recorded_of_autoprocessor(
    hf: Published, engine: Engine, name: str
) -> None:
    seen = processor_facts.recorded()[name]
    ids, pixels = processor_facts.by_engine(engine, WITH_MEDIA[name])
    assert ids == hf.tokenizer(seen.text, add_special_tokens=False)["input_ids"]
    assert pixels.shape == seen.pixels.shape
    assert np.abs(pixels.astype(int) - seen.pixels.astype(int)).max(initial=0) <= 1


def test_autoprocessor_gives_what_is_recorded_of_it(hf: Published) -> None:
    processor = AutoProcessor.from_pretrained(hf.folder)
    for name, seen in processor_facts.recorded().items():
        found = processor_facts.by_processor(processor, WITH_MEDIA[name])
        assert found.text == seen.text, name
        assert np.array_equal(found.pixels, seen.pixels), name


@full_run
def test_autoprocessor_reads_what_is_exported_of_parts(tmp_path: Path) -> None:
    tower_beside_language(tmp_path, "internvit")
    engine = engine_of(tmp_path / "llm", tmp_path / "tower", to=tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "whole", folder_format="internvl-hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "whole")
    for name, question in WITH_MEDIA.items():
        found = processor_facts.by_processor(processor, question)
        ids, pixels = processor_facts.by_engine(engine, question)
        assert engine.tokenizer.decode(ids, skip_special=False) == found.text, name
        assert np.abs(pixels.astype(int) - found.pixels.astype(int)).max(initial=0) <= 1, name


@full_run
@pytest.mark.parametrize("name", CHAT)
def test_internvl_of_opengvlab_answers_as_its_weights_do_in_transformers(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    published = internvl_chat(tmp_path / "theirs", name)
    engine = engine_of(published.folder, to=tmp_path / "ours")
    named = save_family(tmp_path, "internvl-hf")
    processor = processor_of(named, name)
    assert_answers_are_transformers(
        engine,
        published.model,
        WITH_MEDIA,
        lambda q: of_chat_format(published.tokenizer, processor, q),
    )


@full_run
def test_long_vita_answers_as_its_weights_do_around_transformers_tower(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    published = long_vita(tmp_path / "theirs")
    engine = engine_of(published.folder, to=tmp_path / "ours")
    processor = processor_of(save_family(tmp_path, "internvl-hf"))
    ids = published.tokenizer.convert_tokens_to_ids
    contexts = {ids(f"<{kind}_CONTEXT>"): ids("<IMG_CONTEXT>") for kind in ("PATCH", "VID")}
    assert_answers_are_transformers(
        engine,
        published.model,
        WITH_MEDIA,
        lambda q: of_long_vita(published.tokenizer, processor, q),
        contexts=contexts,
    )


@full_run
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_beside_a_language_model_answers_as_both_do_in_transformers(
    tower: str, tmp_path: Path
) -> None:
    """The projector is fresh, and given to transformers' InternVL."""
    model, tokenizer = tower_beside_language(tmp_path, tower)
    engine = engine_of(tmp_path / "llm", tmp_path / "tower", to=tmp_path / "ours")
    put_projector(model, engine)
    processor = processor_of_tower(tokenizer, tower)
    assert_answers_are_transformers(engine, model, WITH_MEDIA, lambda q: of_processor(processor, q))
    if tower == "internvit":
        export_checkpoint(tmp_path / "ours", tmp_path / "whole", folder_format="internvl-hf")
        assert_answers_are_transformers(
            engine, opened(tmp_path / "whole"), WITH_MEDIA, lambda q: of_processor(processor, q)
        )
