"""From logits to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 always takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (right, wanted) in checks.items():
            if not right:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {wanted}")


def next_tokens(logits: Tensor, *, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each row: logits [B, V] -> [B], drawn in fp32 on the CPU, so that any device draws the same."""
    logits = logits.float().cpu()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    ordered, tokens = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the likeliest token always stays
    left_out = before >= sampling.top_p
    if sampling.top_k:
        left_out[:, sampling.top_k :] = True
    chosen = torch.multinomial(probabilities.masked_fill(left_out, 0.0), 1, generator=generator)
    return tokens.gather(1, chosen).squeeze(1)
