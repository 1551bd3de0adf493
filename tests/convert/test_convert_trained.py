"""Published families after a step of training: our checkpoint, and what is exported of it, answer
greedily as transformers' `generate` does.

Long-VITA's class is code of its folder, and transformers has none for a CLIP or SigLIP beside a
language model: their exported parts are put into transformers' InternVL.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoTokenizer, Qwen2ForCausalLM

from megatron_vita.config import load_recipe
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.training.loop import train
from tests.convert.asked_of_both import (
    OPTIONS,
    Reference,
    assert_answers_are_transformers,
    processor_of,
    processor_of_tower,
    put_projector,
)
from tests.convert.asked_of_transformers import (
    TEXTS,
    WIDE,
    WITH_MEDIA,
    Inputs,
    Question,
    of_long_vita,
    of_processor,
    of_text,
)
from tests.convert.exported_code import of_export, opened_with_code
from tests.convert.published_models import (
    CHAT,
    TEXT,
    TOWERS,
    Published,
    internvl_chat,
    internvl_hf,
    long_vita,
    long_vita_tensors,
    opened,
    text_model,
    tower_beside_language,
)
from tests.convert.toy_folders import tensors_of
from tests.functional.launch import run_ranks
from tests.functional.toy_run import data_tools
from tests.media.picture_files import file_of, photograph
from tests.media.video_files import clip
from tests.text.published import save_family

full_run = pytest.mark.full("seconds for each family")

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


def test_internvl_trained_one_step_answers_alike_in_transformers(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    hf = internvl_hf(tmp_path / "theirs")

    def reference(question: Question) -> Inputs:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
        return of_processor(processor_of(tokenizer), question)

    assert_trained_and_exported_answers_alike(hf, tmp_path, WITH_MEDIA, reference)


@pytest.mark.parametrize("projector", ["long_vita", pytest.param("internvl", marks=full_run)])
def test_a_model_from_parts_trained_one_step_answers_alike_in_transformers(
    projector: str, tmp_path: Path
) -> None:
    """The first with the modelling files of its export."""
    tower_beside_language(tmp_path, "internvit")
    ours = tmp_path / "ours"
    import_weights([tmp_path / "llm", tmp_path / "tower"], ours, projector=projector)
    run = trained_one_step(ours, tmp_path, text_only=False)
    export_checkpoint(ours, tmp_path / "before")
    export_checkpoint(run, tmp_path / "back")
    before = tensors_of(tmp_path / "before")
    moved = [n for n, t in tensors_of(tmp_path / "back").items() if not torch.equal(t, before[n])]
    assert len(moved) > len(before) // 2
    engine = Engine.from_checkpoint(run, options=OPTIONS)
    model, reference = opened_export(tmp_path / "back", projector, videos=tmp_path)
    assert_answers_are_transformers(engine, model, WITH_MEDIA, reference)


AT_TP2_PP2 = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.pipeline_model_parallel_size=2",
)


def train_at(recipe: str, save: str) -> None:
    """Run in each rank: the run of a recipe file at TP2, PP2."""
    train(load_recipe(recipe, [*AT_TP2_PP2, f"checkpoint.save={save}"]))


@pytest.mark.full("four processes")
def test_a_run_at_tp2_pp2_is_exported_as_that_of_one_process(tmp_path: Path) -> None:
    tower_beside_language(tmp_path, "internvit")
    ours = tmp_path / "ours"
    import_weights([tmp_path / "llm", tmp_path / "tower"], ours, projector="long_vita")
    one = trained_one_step(ours, tmp_path, text_only=False)
    run_ranks(train_at, 4, str(tmp_path / "recipe.yaml"), str(tmp_path / "sharded"))
    export_checkpoint(one, tmp_path / "one")
    export_checkpoint(tmp_path / "sharded", tmp_path / "other")
    before = tensors_of(tmp_path / "one")
    after = tensors_of(tmp_path / "other")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=2e-5, rtol=0, msg=name)
    for file in (tmp_path / "one").iterdir():
        exported = tmp_path / "other" / file.name
        # of the same number of bytes, and equal but for the last digits of weights
        assert exported.stat().st_size == file.stat().st_size, file.name
        if file.suffix != ".safetensors":
            assert exported.read_bytes() == file.read_bytes(), file.name


def opened_export(folder: Path, projector: str, *, videos: Path) -> tuple[nn.Module, Reference]:
    """Model of an export, and what its processor makes of a question."""
    if projector == "long_vita":
        model, own = opened_with_code(folder)
        return model, lambda question: of_export(own, question, videos=videos)
    processor = processor_of(AutoTokenizer.from_pretrained(folder))
    return opened(folder), lambda question: of_processor(processor, question)


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


def put_parts(model: nn.Module, run: Path, *, tower_format: str, to: Path) -> None:
    """Give transformers' InternVL the exported language model and vision tower of a run."""
    export_checkpoint(run, to / "language", folder_format="causal")
    export_checkpoint(run, to / "tower", folder_format=tower_format)
    causal = Qwen2ForCausalLM.from_pretrained(to / "language", dtype=torch.float32)
    tower = type(model.model.vision_tower).from_pretrained(to / "tower", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.language_model.load_state_dict(causal.model.state_dict())
    model.lm_head.load_state_dict(causal.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    after = model.state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert len(moved) > len(before) // 2


@full_run
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_trained_one_step_answers_alike_in_transformers(tower: str, tmp_path: Path) -> None:
    model, tokenizer = tower_beside_language(tmp_path, tower)
    import_weights([tmp_path / "llm", tmp_path / "tower"], tmp_path / "ours", projector="internvl")
    run = trained_one_step(tmp_path / "ours", tmp_path, text_only=False)
    engine = Engine.from_checkpoint(run, options=OPTIONS)
    tower_format = {"internvit": "internvit-hf"}.get(tower, tower)
    put_parts(model, run, tower_format=tower_format, to=tmp_path / "back")
    put_projector(model, engine)
    processor = processor_of_tower(tokenizer, tower)
    assert_answers_are_transformers(engine, model, WITH_MEDIA, lambda q: of_processor(processor, q))


@full_run
def test_long_vita_trained_one_step_answers_alike_around_transformers_tower(
    tmp_path: Path,
) -> None:
    (tmp_path / "theirs").mkdir()
    published = long_vita(tmp_path / "theirs")
    model = published.model
    import_weights([published.folder], tmp_path / "ours", projector="long_vita")
    run = trained_one_step(tmp_path / "ours", tmp_path, text_only=False)
    export_checkpoint(run, tmp_path / "whole")
    exported = tensors_of(tmp_path / "whole")
    put_parts(model, run, tower_format="internvit-hf", to=tmp_path / "back")
    beginning = "model.vision_projection."
    projector = {
        name.removeprefix(beginning): tensor
        for name, tensor in exported.items()
        if name.startswith(beginning)
    }
    model.model.multi_modal_projector.load_state_dict(projector)
    expected = long_vita_tensors(model)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    engine = Engine.from_checkpoint(run, options=OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    tokenizer.chat_template = published.tokenizer.chat_template
    processor = processor_of(save_family(tmp_path, "internvl-hf"))
    ids = tokenizer.convert_tokens_to_ids
    contexts = {ids(f"<{kind}_CONTEXT>"): ids("<IMG_CONTEXT>") for kind in ("PATCH", "VID")}
    assert_answers_are_transformers(
        engine,
        model,
        WITH_MEDIA,
        lambda q: of_long_vita(tokenizer, processor, q),
        contexts=contexts,
    )
