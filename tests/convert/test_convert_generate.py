"""Published families come in and answer greedily as transformers' `generate` does: texts, images of
one and several tiles, two images, a video, several turns; again after a step of training and an
export.

Prompt ids and pixels are transformers' own, but for two formats whose classes are code of their
folders: those are written by hand here, and the weights are those of transformers' InternVL.
AutoProcessor needs torchvision, so that its parts are put together in `internvl_processor`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, Qwen2ForCausalLM

from megatron_vita.config import load_recipe
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.prompt import PreparedPrompt
from megatron_vita.inference.requests import SamplingParams
from megatron_vita.media.normalization import NORMALIZATION
from megatron_vita.media.normalize import normalize
from megatron_vita.training.loop import train
from tests.convert.answers_of_transformers import generated
from tests.convert.asked_of_transformers import (
    TEXTS,
    WIDE,
    WITH_MEDIA,
    Inputs,
    Question,
    of_chat_format,
    of_long_vita,
    of_processor,
    of_text,
)
from tests.convert.published import TILE, change, tiny, tiny_preprocessor
from tests.convert.published_models import (
    CHAT,
    ROWS,
    TEXT,
    TOWERS,
    Published,
    described,
    internvl_chat,
    internvl_hf,
    internvl_of,
    long_vita,
    opened,
    text_model,
    write_fields,
)
from tests.functional.toy_run import data_tools
from tests.media.picture_files import file_of, photograph
from tests.media.video_files import clip
from tests.text.internvl_processor import WithoutTorchvision, internvl_processor
from tests.text.published import save_family

full_run = pytest.mark.full("seconds for each family")
OPTIONS = EngineOptions(
    chunk_tokens=64, busy_chunk_tokens=16, page_tokens=16, cache_tokens=4096, cuda_graphs=False
)
TOKENS = 8
Reference = Callable[[Question], Inputs]


def engine_of(*folders: Path, to: Path) -> Engine:
    import_weights(folders, to, projector="internvl")
    return Engine.from_checkpoint(to, options=OPTIONS)


def pixels_of(engine: Engine, prepared: PreparedPrompt) -> Tensor:
    """What our tower is shown."""
    tiles = [
        decode_tiles(
            medium,
            file.data,
            name=file.name,
            tiles=range(medium.num_tiles),
            tile_format=engine.encoder.tile_format,
        )
        for medium, file in zip(prepared.document.media, prepared.files, strict=True)
    ]
    mine = torch.cat([torch.from_numpy(each) for each in tiles])
    return normalize(mine, engine.recipe.media.normalization)


def assert_answers_are_transformers(
    engine: Engine,
    model: torch.nn.Module,
    questions: dict[str, Question],
    reference: Reference,
    *,
    contexts: dict[int, int] | None = None,
) -> None:
    """Prompt ids, pixels (1 of 255), and greedy answers with their log-probabilities. `contexts`:
    ids for which the model is given another."""
    penalty = engine.recipe.generation.repetition_penalty or 1.0
    sampling = SamplingParams(max_new_tokens=TOKENS, logprobs=0, repetition_penalty=penalty)
    prompts = {name: question.prompt() for name, question in questions.items()}
    answers = engine.generate(list(prompts.values()), sampling=sampling)
    said = set()
    for (name, question), answer in zip(questions.items(), answers, strict=True):
        inputs = reference(question)
        prepared = engine.prepare(prompts[name])
        assert prepared.document.input_ids.tolist() == inputs.ids, name
        if inputs.pixels is not None:
            deviation = 1 / 255 / torch.tensor([0.224, 0.224, 0.224])[:, None, None]
            apart = (pixels_of(engine, prepared) - inputs.pixels).abs()
            assert bool((apart <= 1.01 * deviation).all()), f"{name}: {apart.max()}"
        theirs, logprobs = generated(
            model,
            [(contexts or {}).get(index, index) for index in inputs.ids],
            max_new_tokens=TOKENS,
            tokens=engine.tokenizer.vocab_size,
            **inputs.media,
        )
        assert answer.token_ids == theirs, name
        ours = [score.chosen.logprob for score in answer.scores[: len(theirs)]]
        torch.testing.assert_close(
            torch.tensor(ours), torch.tensor(logprobs), atol=0.02 if inputs.media else 1e-4, rtol=0
        )
        said.add(tuple(theirs))
    assert len(said - {()}) >= len(questions) // 2, "answers do not depend on questions"


def processor_of(tokenizer: object, name: str = "internvl3-1b-hf") -> WithoutTorchvision:
    """The image processor of a published folder."""
    said = tiny_preprocessor(name)
    colors = {field: said[field] for field in ("image_mean", "image_std")}
    return internvl_processor(tokenizer, tile=TILE, rows=ROWS, **colors)


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


def test_internvl_answers_as_transformers_does(hf: Published, tmp_path: Path) -> None:
    engine = engine_of(hf.folder, to=tmp_path / "ours")
    processor = processor_of(hf.tokenizer)
    assert_answers_are_transformers(
        engine, hf.model, WITH_MEDIA, lambda q: of_processor(processor, q)
    )


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
    (tmp_path / "llm").mkdir()
    tokenizer = save_family(tmp_path / "llm", "internvl-hf")
    language = described(tiny("qwen2-7b"), tokenizer, rows=len(tokenizer))
    model = internvl_of(tokenizer, language, tower=tower)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    if tower == "internvit":  # whose authors' processor crops images
        processor_fields = tiny_preprocessor("internvit-300m")
        change(tmp_path / "tower", "preprocessor_config.json", **processor_fields)
    whole = model.state_dict()
    names = {name: name.replace("model.language_model.", "model.") for name in whole}
    causal = Qwen2ForCausalLM(model.config.text_config)
    causal.load_state_dict(
        {n: whole[name] for name, n in names.items() if n in causal.state_dict()}
    )
    causal.save_pretrained(tmp_path / "llm")
    write_fields(tmp_path / "llm", language)
    engine = engine_of(tmp_path / "llm", tmp_path / "tower", to=tmp_path / "ours")
    projector = engine.model.projector
    theirs = model.model.multi_modal_projector
    for ours, part in (("norm", "layer_norm"), ("fc1", "linear_1"), ("fc2", "linear_2")):
        getattr(theirs, part).load_state_dict(getattr(projector, ours).state_dict())
    mean, deviation = NORMALIZATION[{"internvit": "imagenet"}.get(tower, tower)]
    processor = internvl_processor(
        tokenizer, tile=TILE, rows=ROWS, image_mean=mean, image_std=deviation
    )
    assert_answers_are_transformers(engine, model, WITH_MEDIA, lambda q: of_processor(processor, q))
    if tower == "internvit":
        export_checkpoint(tmp_path / "ours", tmp_path / "whole", folder_format="internvl-hf")
        assert_answers_are_transformers(
            engine, opened(tmp_path / "whole"), WITH_MEDIA, lambda q: of_processor(processor, q)
        )


# After a step of training, exported


SAMPLES = [
    {
        "messages": [
            {"role": "user", "content": "<image>\nWhat is this? <video>\nand that?"},
            {"role": "assistant", "content": "A cat on the mat."},
        ],
        "images": ["wide.png"],
        "videos": ["clip.mp4"],
    },
    {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello world, what is this?"},
        ]
    },
]


def trained_one_step(ours: Path, folder: Path, *, text_only: bool) -> Path:
    """A run from a converted checkpoint over one pack; gives its folder of checkpoints."""
    (folder / "wide.png").write_bytes(file_of(photograph(WIDE), "PNG"))
    (folder / "clip.mp4").write_bytes(clip(frames=50))
    samples = SAMPLES[1:] if text_only else SAMPLES
    (folder / "x.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    recipe = folder / "recipe.yaml"
    fields = {
        "base": [str(ours / "model.yaml")],
        "data": {"train": [{"name": "x", "shards": str(folder / "shards/*.tar")}],
                 "plan": str(folder / "plan"), "seq_length": 256, "num_workers": 0},
        "optimizer": {"lr": 0.002, "lr_warmup_fraction": 0.0},
        "training": {"train_iters": 1, "global_batch_size": 1, "bf16": False, "eval_interval": 0},
        "checkpoint": {"load": str(ours), "save": str(folder / "run")},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(fields))
    shards = str(folder / "shards")
    data_tools("shard", folder / "x.jsonl", "--out", shards, "--media", folder, "--workers", "0")
    data_tools("index", recipe, "--workers", "0")
    data_tools("plan", recipe)
    train(load_recipe(recipe))
    return folder / "run"


def assert_trained_and_exported_answers_alike(
    published: Published,
    folder: Path,
    questions: dict[str, Question],
    reference: Reference,
    *,
    folder_format: str = "",
) -> None:
    """After a step, our checkpoint and what is exported of it."""
    import_weights([published.folder], folder / "ours", projector="internvl")
    run = trained_one_step(folder / "ours", folder, text_only=questions is TEXTS)
    export_checkpoint(run, folder / "back", folder_format=folder_format)
    exported = opened(folder / "back")
    before = published.model.state_dict()
    moved = [name for name, t in exported.state_dict().items() if not torch.equal(t, before[name])]
    assert len(moved) > len(before) // 2
    engine = Engine.from_checkpoint(run, options=OPTIONS)
    assert_answers_are_transformers(engine, exported, questions, reference)


def test_internvl_trained_one_step_answers_alike_in_transformers(
    hf: Published, tmp_path: Path
) -> None:
    def reference(question: Question) -> Inputs:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
        return of_processor(processor_of(tokenizer), question)

    assert_trained_and_exported_answers_alike(hf, tmp_path, WITH_MEDIA, reference)


@full_run
@pytest.mark.parametrize("name", CHAT)
def test_internvl_of_opengvlab_trained_one_step_answers_alike_in_the_other_format(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    published = internvl_chat(tmp_path / "theirs", name)

    def reference(question: Question) -> Inputs:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
        return of_processor(processor_of(tokenizer, name), question)

    assert_trained_and_exported_answers_alike(
        published, tmp_path, WITH_MEDIA, reference, folder_format="internvl-hf"
    )


@full_run
@pytest.mark.parametrize("family", [f for f in TEXT if f != "llama3.2"])  # which writes the day
def test_a_language_model_trained_one_step_answers_alike_in_transformers(
    family: str, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    published = text_model(tmp_path / "theirs", family)

    def reference(question: Question) -> Inputs:
        return of_text(AutoTokenizer.from_pretrained(tmp_path / "back"), question)

    assert_trained_and_exported_answers_alike(published, tmp_path, TEXTS, reference)
