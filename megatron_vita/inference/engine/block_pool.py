"""Which blocks of the cache are whose. Blocks that several sequences begin with are held once.

A block is known by the chain of everything that came before it: tokens, and the pictures behind
placeholders. Blocks that no sequence uses any longer stay known until their room is needed, the
longest unused first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from megatron_vita.layout.blocks import SCRATCH_BLOCK


class BlockPool:
    """Counts the users of each block. Nothing here touches the cache itself."""

    def __init__(self, count: int) -> None:
        """`count` blocks, of which one is the scratch block."""
        self.count = count
        self._free = list(range(count - 1, SCRATCH_BLOCK, -1))  # taken from its end, lowest first
        self._users = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # known blocks without a user, longest unused first
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be given out."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.count - 1 - self.available

    def take(self, number: int) -> list[int]:
        """New blocks for a sequence. Room must have been looked for before."""
        assert number <= self.available, f"{number} blocks of {self.available}"
        blocks = [self._free.pop() if self._free else self._forget_oldest() for _ in range(number)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more sequence uses these blocks."""
        for block in blocks:
            self._users[block] += 1
            self._unused.pop(block, None)

    def give_back(self, blocks: Sequence[int]) -> None:
        """A sequence no longer uses these blocks."""
        # so that the end of a sequence is forgotten before its beginning
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was given back twice"
            if self._users[block] == 0:
                if block in self._key_of:
                    self._unused[block] = None
                else:
                    self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether several sequences use a block."""
        return self._users[block] > 1

    def remember(self, block: int, key: bytes) -> None:
        """From now on a full block is found by its key, unless another already is."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def forget(self, blocks: Sequence[int]) -> None:
        """What these blocks hold is wrong: no further sequence shares them."""
        for block in blocks:
            if block in self._key_of:
                del self._block_of[self._key_of.pop(block)]
                if block in self._unused:
                    del self._unused[block]
                    self._free.append(block)

    def known(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of `keys` that is known."""
        found = []
        for key in keys:
            if key not in self._block_of:
                break
            found.append(self._block_of[key])
        return found

    def available_beside(self, blocks: Sequence[int]) -> int:
        """Blocks that can be given out once `blocks` are shared."""
        return self.available - sum(block in self._unused for block in blocks)

    def _forget_oldest(self) -> int:
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
