"""Paged KV cache layout: pages of tokens, assigned to the CP ranks in round-robin order.

A block is one page on each CP rank, under the same number on all of them. Block `i` of a sequence
holds its positions from `i * block_tokens`; the first page of them lies on CP rank 0, the next on
rank 1, ...
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.rounding import ceil_div

SCRATCH_BLOCK = 0
"""The block that padding writes to; it belongs to no sequence."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Page size, and the CP rank whose pages are addressed."""

    page_tokens: int
    cp_size: int = 1
    cp_rank: int = 0

    @property
    def block_tokens(self) -> int:
        """Tokens of a block, over all CP ranks."""
        return self.page_tokens * self.cp_size

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks needed for `tokens` tokens of one sequence."""
        return ceil_div(tokens, self.block_tokens)

    def local_tokens(self, tokens: int) -> int:
        """Number of a sequence's first `tokens` tokens that lie on this rank.

        They are the first rows of its pages, in order.
        """
        blocks, rest = divmod(tokens, self.block_tokens)
        # The last block fills rank by rank: earlier ranks have full pages, later ones none.
        in_last = min(max(rest - self.cp_rank * self.page_tokens, 0), self.page_tokens)
        return blocks * self.page_tokens + in_last

    def slot(self, position: int, blocks: Tensor) -> int | None:
        """Slot of one position, or None if another rank holds it."""
        block, rest = divmod(position, self.block_tokens)
        if rest // self.page_tokens != self.cp_rank:
            return None
        return int(blocks[block]) * self.page_tokens + rest % self.page_tokens

    def slots(self, positions: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of the positions of a sequence that this rank holds.

        Args:
            positions: positions in the sequence [n].
            blocks: numbers of the sequence's blocks, in order.

        Returns:
            mask: bool [n], true for the positions on this rank.
            slots: slot of each of those: block * page_tokens + row in the page.
        """
        block = positions // self.block_tokens
        rest = positions % self.block_tokens
        here = rest // self.page_tokens == self.cp_rank
        return here, blocks[block[here]] * self.page_tokens + rest[here] % self.page_tokens


def consecutive(blocks: Tensor) -> bool:
    """Return true if block numbers ascend by one, so that the blocks are contiguous in memory."""
    return len(blocks) < 2 or bool((blocks.diff() == 1).all())


def cumulative_lengths(lengths: list[int]) -> Tensor:
    """Bounds of documents laid end to end, as `cu_seqlens` of attention kernels: int32 [D+1]."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
