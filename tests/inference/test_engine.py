"""Answers with the cache are those of whole forward passes, whatever else is in the batch."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vita import platform
from megatron_vita.config import DataConfig, LanguageConfig, ModelConfig, Recipe, TextConfig, VisionConfig
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.prompt import MediaFile, Prompt, lay_out_prompt, prompt_tiles
from megatron_vita.inference.requests import Sampling
from megatron_vita.inference.sampling import next_tokens
from megatron_vita.text.train import train_sentencepiece

WORDS = [
    "what",
    "color",
    "is",
    "the",
    "shape",
    "in",
    "this",
    "picture",
    "a",
    "red",
    "circle",
    "blue",
    "square",
    "yes",
    "no",
    "there",
    "two",
    "images",
    "of",
    "cats",
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    platform.initialize_process()
    model = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_sentencepiece([" ".join(WORDS)] * 50, model, vocab_size=320)
    recipe = Recipe(
        model=ModelConfig(
            vision=VisionConfig(
                image_size=16, patch_size=4, num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
                layer_scale_init=1.0, init_method_std=0.2,
            ),
            language=LanguageConfig(
                num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
                kv_channels=8, vocab_size=384, init_method_std=0.4,
            ),
        ),
        text=TextConfig(tokenizer=str(model)),
        data=DataConfig(seq_length=256),
    )  # fmt: skip
    return Engine(recipe)


def picture(seed: int, size: tuple[int, int] = (40, 20)) -> MediaFile:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return MediaFile(name=f"picture-{seed}.png", data=data.getvalue())


def prompts() -> list[Prompt]:
    return [
        Prompt.ask("what color is the shape", images=[picture(1)]),
        Prompt.ask("is there a red circle"),
        Prompt.ask("two images of cats", images=[picture(2), picture(1, (16, 16))]),
    ]


def whole_forward_logits(engine: Engine, prompt: Prompt, said: list[int]) -> torch.Tensor:
    """Logits after the prompt and what was said, from one ordinary forward pass without a cache: [V]."""
    document = lay_out_prompt(prompt, form=engine.form)
    ids = torch.cat([torch.from_numpy(document.input_ids), torch.tensor(said, dtype=torch.int64)])
    tiles = torch.from_numpy(prompt_tiles(prompt, document, form=engine.form))
    pack = engine._pack(ids, torch.tensor([len(ids)]), [document])
    with torch.no_grad():
        features = engine._encode_tiles(tiles)
        logits = engine.model(torch.empty(0), pack, features=features, wanted_rows=torch.tensor([len(ids) - 1]))
    return logits[0, : engine.tokenizer.vocab_size]


def test_greedy_answers_equal_whole_forward_passes_in_a_mixed_batch(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=12)
    for prompt, answer in zip(prompts(), engine.generate(prompts(), sampling=sampling), strict=True):
        said: list[int] = []
        for token in answer.token_ids:
            assert whole_forward_logits(engine, prompt, said).argmax().item() == token
            said.append(token)
        assert answer.finished or len(said) == 12


def test_an_answer_does_not_depend_on_the_batch(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=8)
    together = engine.generate(prompts(), sampling=sampling)
    alone = [engine.generate([prompt], sampling=sampling)[0] for prompt in prompts()]
    assert together == alone


def test_the_same_seed_draws_the_same_and_another_differs(engine: Engine) -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(max_new_tokens=16, temperature=1.5, seed=seed)
        return engine.generate(prompts()[:1], sampling=sampling)[0].token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_images_change_the_answer_distribution(engine: Engine) -> None:
    one, other = (Prompt.ask("what color", images=[picture(seed)]) for seed in (1, 2))
    assert not torch.allclose(whole_forward_logits(engine, one, []), whole_forward_logits(engine, other, []))


def test_a_literal_tag_in_a_question_is_text(engine: Engine) -> None:
    document = lay_out_prompt(Prompt.ask("is <image> a red circle"), form=engine.form)
    assert len(document.placements) == 0
    special = {engine.tokenizer.special_id(name) for name in ("<image>", "<img>", "<IMG_CONTEXT>")}
    assert not special & set(document.input_ids.tolist())


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0, top_k=2), {1, 2}),
        (Sampling(temperature=1.0, top_p=0.6), {1}),
        (Sampling(temperature=1.0, top_p=0.9), {1, 2}),
        (Sampling(temperature=0.0), {1}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(sampling: Sampling, kept: set[int]) -> None:
    logits = torch.tensor([[0.01, 0.64, 0.3, 0.05]]).log().expand(500, 4)
    drawn = next_tokens(logits, sampling=sampling, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == kept


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_wrong_sampling_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_damaged_image_is_refused_by_name(engine: Engine) -> None:
    whole = picture(3).data
    broken = MediaFile(name="broken.png", data=whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"broken\.png"):
        engine.generate([Prompt.ask("what color", images=[broken])], sampling=Sampling())
    with pytest.raises(DataError, match=r"missing\.png"):
        MediaFile.read(Path("missing.png"))
