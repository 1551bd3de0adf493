"""What comes in answers as transformers does, through our inference, wherever the checkpoint lies."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy_folders import model_of, save

from megatron_vita.convert.importing import import_weights
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.prompt import Prompt
from megatron_vita.inference.requests import Sampling


@pytest.mark.parametrize("family", ["qwen2", "qwen3-yarn", "llama-llama3"])
def test_greedy_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = model_of(family).eval()
    import_weights([save(model, tmp_path / "theirs")], tmp_path / "ours", projector="internvl")
    moved = (tmp_path / "ours").rename(tmp_path / "moved")
    engine = Engine.from_checkpoint(moved)
    prompt = Prompt.ask("abba ab a")
    (answer,) = engine.generate([prompt], sampling=Sampling(max_new_tokens=12))
    ids = engine.prepare(prompt).document.input_ids.tolist()
    assert len(ids) > 8
    said: list[int] = []
    while len(said) < 12:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + said])).logits[0, -1]
        token = int(logits[: engine.tokenizer.vocab_size].argmax())
        if token in engine.end_ids:
            break
        said.append(token)
    assert answer.token_ids == said
    assert len(said) > 0
