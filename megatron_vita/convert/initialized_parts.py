"""Parts that a model combined from several sources needs beyond them: a projector, and rows for new
tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.config import ModelConfig
from megatron_vita.convert.families.mapping import Reshape, Rule
from megatron_vita.convert.formats.tensors import TensorInfo
from megatron_vita.model.projector import Projector

SEED = 0


class InitializedProjector:
    """A randomly initialized projector, as a tensor source under our names."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype) -> None:
        projector = Projector(model)
        projector.initialize(torch.Generator().manual_seed(SEED))
        self._tensors = {
            f"projector.{name}": value.to(dtype) for name, value in projector.state_dict().items()
        }
        self.rules = [Rule((name,), name) for name in self._tensors]
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(file=Path("fresh projector"), dtype=dtype, shape=tuple(value.shape))
            for name, value in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """See TensorSource."""
        return self._tensors[name]

    def release(self, name: str) -> None:
        """See TensorSource."""


@dataclass(frozen=True)
class ResizeVocab(Reshape):
    """Matrix with rows appended for new tokens, each the mean of the given rows."""

    rows: int
    given: int

    def join(self, parts: list[Tensor]) -> Tensor:
        """Append rows: [given, H] to [rows, H]."""
        # A mean row gives a new token average logits; zeros would make it the likeliest where all
        # other logits are negative.
        mean = parts[0].float().mean(0, keepdim=True).to(parts[0].dtype)
        return torch.cat([parts[0], mean.expand(self.rows - self.given, -1)])

    def split(self, whole: Tensor) -> list[Tensor]:
        """Drop the appended rows: [rows, H] to [given, H]."""
        return [whole[: self.given]]
