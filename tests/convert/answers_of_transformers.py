"""Greedy answers of a transformers model, token by token, beside those of our engine."""

from typing import Any

import torch
from torch import Tensor

from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams


def assert_same_answer(
    engine: Engine,
    model: Any,
    question: str,
    *,
    max_new_tokens: int,
    ignore_eos: bool = False,
) -> str:
    """Assert that tokens and log-probabilities of the engine's greedy answer are those of `model`
    within 1e-5, and return it. `ignore_eos` is for random models, which may end at once."""
    prompt = Prompt.ask(question)
    (answer,) = engine.generate(
        [prompt],
        sampling=SamplingParams(max_new_tokens=max_new_tokens, logprobs=1, ignore_eos=ignore_eos),
    )
    ids = engine.prepare(prompt).document.input_ids.tolist()
    said: list[int] = []
    logprobs: list[float] = []
    while len(said) < max_new_tokens:
        scores = _next_token(model, ids + said, tokens=engine.tokenizer.vocab_size)
        token = int(scores.argmax())
        if token in engine.end_ids and not ignore_eos:
            break
        said.append(token)
        logprobs.append(float(scores[token]))
    assert answer.token_ids == said
    assert len(said) > 0
    ours = [score.chosen.logprob for score in answer.scores[: len(said)]]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(logprobs), atol=1e-5, rtol=0)
    return answer.text


@torch.no_grad()
def _next_token(model: Any, ids: list[int], *, tokens: int) -> Tensor:
    """Log-probabilities [tokens] after `ids`, from a whole forward pass; padding rows are cut off."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1, :tokens].double().log_softmax(-1)


def generated(
    model: Any, ids: list[int], *, max_new_tokens: int, tokens: int, **inputs: Tensor
) -> tuple[list[int], list[float]]:
    """Token ids that `generate` decodes greedily after `ids`, without its end, and the log-probabilities of it
    among the first `tokens` of the vocabulary, before penalties."""
    given = torch.tensor([ids])
    with torch.no_grad():
        found = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
            do_sample=False, return_dict_in_generate=True, output_logits=True, **inputs,
        )  # fmt: skip
    said = found.sequences[0, len(ids) :].tolist()
    logprobs = [
        float(logits[0, :tokens].double().log_softmax(-1)[token])
        for logits, token in zip(found.logits, said, strict=True)
    ]
    ends = model.generation_config.eos_token_id
    if said[-1] in (ends if isinstance(ends, list) else [ends]):
        return said[:-1], logprobs[:-1]
    return said, logprobs
