"""Reference counts of the cache's blocks, and the prefix cache.

A full block is cached under the hash of everything that precedes its end: tokens, and the images
behind placeholders. Cached blocks without a user stay until their room is needed; the least
recently freed is evicted first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from megatron_vita.layout.blocks import SCRATCH_BLOCK


class BlockPool:
    """Counts the users of each block; never touches the cache itself."""

    def __init__(self, count: int) -> None:
        """`count` blocks, of which one is the scratch block."""
        self.count = count
        self._free = list(range(count - 1, SCRATCH_BLOCK, -1))  # popped from its end, lowest first
        self._users = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # cached blocks without a user, least recently freed first
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Number of blocks that can be allocated."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> int:
        """Number of blocks that sequences hold."""
        return self.count - 1 - self.available

    def allocate(self, number: int) -> list[int]:
        """Take blocks for a sequence. The caller has checked `available`."""
        assert number <= self.available, f"{number} blocks of {self.available}"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(number)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to each of these blocks."""
        for block in blocks:
            self._users[block] += 1
            self._evictable.pop(block, None)

    def free(self, blocks: Sequence[int]) -> None:
        """Remove a user from each of a sequence's blocks."""
        # A block is found only through those before it, so the last must be evicted first.
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was freed twice"
            if self._users[block] == 0:
                if block in self._key_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def cache_block(self, block: int, key: bytes) -> None:
        """Let a full block be found by its key, unless another block already is."""
        # Two equal prompts that were computed at the same time have equal blocks under one key.
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def invalidate(self, blocks: Sequence[int]) -> None:
        """Remove blocks with wrong contents from the prefix cache."""
        for block in blocks:
            if block in self._key_of:
                del self._block_of[self._key_of.pop(block)]
                if block in self._evictable:
                    del self._evictable[block]
                    self._free.append(block)

    def match_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Cached blocks of the longest cached prefix of `keys`."""
        found = []
        for key in keys:
            # A key covers everything before its block, so the first miss ends the prefix.
            if key not in self._block_of:
                break
            found.append(self._block_of[key])
        return found

    def available_beside(self, blocks: Sequence[int]) -> int:
        """Number of blocks that can be allocated once `blocks` are shared."""
        # Sharing an evictable block takes it out of what can be allocated.
        return self.available - sum(block in self._evictable for block in blocks)

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
