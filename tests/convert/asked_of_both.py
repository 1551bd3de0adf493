"""Questions asked of our engine and of transformers: prompt ids, pixels, greedy answers."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_vita.convert.importing import import_weights
from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import PreparedPrompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.media.normalization import NORMALIZATION
from megatron_vita.media.normalize import normalize
from tests.convert.answers_of_transformers import generated
from tests.convert.asked_of_transformers import Inputs, Question
from tests.convert.published import TILE, tiny_preprocessor
from tests.convert.published_models import ROWS
from tests.text.internvl_processor import WithoutTorchvision, internvl_processor

OPTIONS = EngineOptions(
    chunk_tokens=64, busy_chunk_tokens=16, page_tokens=16, cache_tokens=4096, cuda_graphs=False
)
TOKENS = 8
Reference = Callable[[Question], Inputs]


def engine_of(*folders: Path, to: Path) -> Engine:
    import_weights(folders, to, projector="internvl")
    return Engine.from_checkpoint(to, options=OPTIONS)


def pixels_of(engine: Engine, prepared: PreparedPrompt) -> Tensor:
    """Input of our tower."""
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


def processor_of_tower(tokenizer: object, tower: str) -> WithoutTorchvision:
    """InternVL's processor with the normalization of another tower."""
    mean, deviation = NORMALIZATION[{"internvit": "imagenet"}.get(tower, tower)]
    return internvl_processor(tokenizer, tile=TILE, rows=ROWS, image_mean=mean, image_std=deviation)


def put_projector(model: nn.Module, engine: Engine) -> None:
    """Give transformers' InternVL the engine's projector."""
    theirs = model.model.multi_modal_projector
    for ours, part in (("norm", "layer_norm"), ("fc1", "linear_1"), ("fc2", "linear_2")):
        layer = getattr(engine.model.projector, ours)
        getattr(theirs, part).load_state_dict(layer.state_dict())
