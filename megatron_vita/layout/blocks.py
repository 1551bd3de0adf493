"""Where the keys and values of a sequence lie: pages of tokens, dealt in turn over the CP ranks.

A block is one page on each CP rank, under the same number on all of them. Block `i` of a sequence
holds its positions from `i * block_tokens`; the first page of them lies on CP rank 0, the next on
rank 1, ...
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCRATCH_BLOCK = 0
"""The block that padding writes to; it belongs to no sequence."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Tokens of a page, and the CP rank whose pages are meant."""

    page_tokens: int
    cp_size: int = 1
    cp_rank: int = 0

    @property
    def block_tokens(self) -> int:
        """Tokens of a block, over all CP ranks."""
        return self.page_tokens * self.cp_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-tokens // self.block_tokens)

    def held(self, tokens: int) -> int:
        """How many of a sequence's first `tokens` tokens lie on this rank: the first rows of its
        pages, in order."""
        blocks, rest = divmod(tokens, self.block_tokens)
        return blocks * self.page_tokens + min(
            max(rest - self.cp_rank * self.page_tokens, 0), self.page_tokens
        )

    def slot(self, position: int, blocks: Tensor) -> int | None:
        """The slot of one position, or None where another rank has it."""
        block, rest = divmod(position, self.block_tokens)
        if rest // self.page_tokens != self.cp_rank:
            return None
        return int(blocks[block]) * self.page_tokens + rest % self.page_tokens

    def slots(self, positions: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `positions` [n] of a sequence lie here, as a mask [n], and the slots of those.

        A slot is block * page_tokens + row of the page; `blocks` are the numbers of the sequence's
        blocks.
        """
        block = positions // self.block_tokens
        rest = positions % self.block_tokens
        here = rest // self.page_tokens == self.cp_rank
        return here, blocks[block[here]] * self.page_tokens + rest[here] % self.page_tokens


def consecutive(blocks: Tensor) -> bool:
    """Whether blocks follow one another in memory."""
    return len(blocks) < 2 or bool((blocks.diff() == 1).all())


def pad_to(length: int, multiple: int) -> int:
    """The next multiple at or above a length."""
    return -(-length // multiple) * multiple


def bounds_of(lengths: list[int]) -> Tensor:
    """Where documents of these lengths begin and end when they follow one another: int32 [D+1]."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
