"""`PackStream`: reads packs by number, decoding only this rank's tiles."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from torch.utils.data import Dataset

from megatron_vita.config import DataConfig
from megatron_vita.data.batch import Batch, collate, mark_frames
from megatron_vita.data.loading.ledger import Damage
from megatron_vita.data.planning.plan import DocumentEntry, PackPlan
from megatron_vita.data.samples.documents import (
    Document,
    blank_document,
    build_document,
    check_length,
)
from megatron_vita.data.samples.encoding import Medium, SampleEncoder
from megatron_vita.data.samples.records import parse_record
from megatron_vita.data.samples.rows import Member, SampleRow
from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.data.shards.cache import ShardCache
from megatron_vita.data.shards.index import SampleIndex, read_index, text_stamp
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.storage import Location
from megatron_vita.errors import DataError, ShardError
from megatron_vita.layout.assignment import assign_tiles

OPEN_INDEXES = 64
LONG_TEXT_BYTES = 64 << 20  # cache of texts longer than a pack: four million tokens
CACHES = ("_reader", "_index", "_long_texts")


class ReadPack(NamedTuple):
    """A pack as one rank has read it, and the damage that it met."""

    batch: Batch
    damages: list[Damage]


@dataclass(kw_only=True)
class _Pack:
    """State of a pack while it is read."""

    id: int
    entries: list[DocumentEntry]
    rows: list[SampleRow]
    skip: set[int]
    progress: Callable[[int], None]
    damages: list[Damage] = field(default_factory=list)


class PackStream(Dataset[Batch]):
    """Packs of a plan as a map-style dataset: `stream[pack_id]` is a Batch.

    Args:
        plan: the pack plan.
        shards: shards of each dataset, which the plan's entries index: `shards[dataset][shard]`.
        indexes: their indexes, in the same order.
        contents: fingerprints of the indexes when the plan was opened, in the same order.
        data: the recipe's `data`.
        encoders: encoder of the samples of each dataset.
        tile_share: (rank, ranks) among the ranks that share a pack's tiles; None decodes no tile,
            for ranks without a vision tower.
    """

    def __init__(
        self,
        plan: PackPlan,
        *,
        shards: Sequence[Sequence[Location]],
        indexes: Sequence[Sequence[Location]],
        contents: Sequence[Sequence[str]],
        data: DataConfig,
        encoders: Sequence[SampleEncoder],
        tile_share: tuple[int, int] | None,
    ) -> None:
        self.plan = plan
        self.encoders = list(encoders)
        self._shards = shards
        self._indexes = indexes
        self._contents = contents
        self._data = data
        self._tile_share = tile_share
        self._text = text_stamp(encoders[0].chat)
        self._open_caches()

    def __len__(self) -> int:
        return self.plan.num_packs

    def __getitem__(self, pack_id: int) -> Batch:
        """Read one pack.

        Raises:
            DataError: naming shard and key of a sample that cannot be read.
        """
        batch, damages = self.read(pack_id)
        if masked := [damage for damage in damages if damage.is_masked]:
            raise DataError(masked[0].reason)
        return batch

    def read(
        self,
        pack_id: int,
        *,
        skip: Collection[int] = (),
        progress: Callable[[int], None] = lambda document: None,
        allocate: Callable[[tuple[int, ...]], np.ndarray] = lambda shape: np.empty(
            shape, dtype=np.uint8
        ),
    ) -> ReadPack:
        """Read one pack, masking samples that cannot be read.

        Documents that are unreadable or skipped may differ between ranks until `mask_documents`
        blanks them everywhere.

        Args:
            pack_id: number of the pack.
            skip: indices of documents not to read.
            progress: called with the index of a document before each of its files is read.
            allocate: allocates the array of tiles by its shape.

        Raises:
            DataError: a shard or an index is missing or does not match the plan.
        """
        entries = self.plan.pack(pack_id)
        if any(entry.dataset < 0 or entry.shard < 0 for entry in entries):
            raise ShardError(
                f"pack {pack_id + 1} holds a sample of a dataset or shard that the recipe no longer has"
            )
        rows = [self._row(entry) for entry in entries]
        pack = _Pack(id=pack_id, entries=entries, rows=rows, skip=set(skip), progress=progress)
        documents = [self._document(pack, i) for i in range(len(entries))]
        tile_ids = self._assigned_tiles(mark_frames(documents))
        side = self.encoders[0].vision.image_size
        tiles = allocate((len(tile_ids), 3, side, side))
        self._decode(pack, documents, tile_ids.numpy(), tiles)
        batch = collate(
            documents,
            pack_id=pack_id,
            sources=[entry.dataset for entry in entries],
            data=self._data,
            pad_id=self.encoders[0].tokenizer.pad_id,
            tiles=torch.from_numpy(tiles),
            tile_ids=tile_ids,
        )
        return ReadPack(batch, pack.damages)

    def documents(self, pack_id: int) -> list[Document]:
        """Read the documents of a pack without their tiles.

        Raises:
            DataError: naming shard and key of a sample that cannot be read.
        """
        entries = self.plan.pack(pack_id)
        return [self._build(entry, self._row(entry)) for entry in entries]

    def damage(self, pack_id: int, document: int, reason: str) -> Damage:
        """Build the event that masks a document of a pack."""
        entry = self.plan.pack(pack_id)[document]
        shard = self._shard(entry)
        return Damage(pack_id, document, shard.name, self._row(entry).key, reason)

    def keys_of(self, pack_id: int) -> list[str]:
        """Return the keys of a pack's samples, without reading them."""
        return [self._row(entry).key for entry in self.plan.pack(pack_id)]

    def fits(self, damage: Damage) -> bool:
        """Return true if an event is of the sample that the plan has at its position.

        It may be of an earlier plan.
        """
        if not 0 <= damage.pack < len(self):
            return False
        entries = self.plan.pack(damage.pack)
        # Negative datasets and shards are those that a continued plan no longer has.
        if not 0 <= damage.document < len(entries) or min(entries[damage.document][:2]) < 0:
            return False
        known = self.damage(damage.pack, damage.document, damage.reason)
        return known._replace(frames=damage.frames) == damage

    def _assigned_tiles(self, frames: torch.Tensor) -> torch.Tensor:
        """Indices of the tiles of a pack that this rank decodes."""
        if self._tile_share is None:
            return torch.zeros(0, dtype=torch.int64)
        rank, ranks = self._tile_share
        return assign_tiles(frames, ranks)[rank]

    def _document(self, pack: "_Pack", i: int) -> Document:
        entry = pack.entries[i]
        row = pack.rows[i]
        encoder = self.encoders[entry.dataset]
        if i in pack.skip:
            document = None
        else:
            document = self._attempt(pack, i, lambda: self._build(entry, row))
        if document is None:
            return blank_document(row, tokens=entry.tokens, tiles=entry.tiles, encoder=encoder)
        # A raw text longer than a pack is planned as several documents.
        if row.is_text and (entry.start or entry.tokens < len(document)):
            document = document.part(entry.start, entry.start + entry.tokens)
        name = f"{self._shard(entry)} sample {row.key}"
        check_length(document, name=name, tokens=entry.tokens, tiles=entry.tiles)
        return document

    def _build(self, entry: DocumentEntry, row: SampleRow) -> Document:
        """Build the whole document of a sample; long texts are cached for packs with their other
        parts."""
        # Other samples are used once in an epoch: caching them would help nobody.
        if not row.is_text or entry.tokens >= sum(tokens for _, tokens in row.pieces):
            return self._build_anew(entry, row)
        sample = (entry.dataset, entry.shard, entry.row)
        if sample not in self._long_texts:
            document = self._build_anew(entry, row)
            # The cache refuses items larger than itself.
            if _bytes_of(document) > self._long_texts.maxsize:
                return document
            self._long_texts[sample] = document
        return self._long_texts[sample]

    def _build_anew(self, entry: DocumentEntry, row: SampleRow) -> Document:
        name = f"{self._shard(entry)} sample {row.key}"
        record = parse_record(
            row.record.encode() or self._read(entry, row, f"{row.key}.json"), name
        )
        return build_document(record, row, encoder=self.encoders[entry.dataset])

    def _attempt[T](self, pack: "_Pack", i: int, read: Callable[[], T]) -> T | None:
        """Return `read()`; on DataError, record the damage of document `i` and return None."""
        pack.progress(i)
        try:
            return read()
        except ShardError:
            # All samples of the shard are affected: masking them one by one would hide that.
            raise
        except DataError as error:
            shard = self._shard(pack.entries[i])
            key = pack.rows[i].key
            reason = str(error)
            if str(shard) not in reason:
                reason = f"{shard} sample {key}: {reason}"
            pack.skip.add(i)
            pack.damages.append(Damage(pack.id, i, shard.name, key, reason))
            return None

    def _decode(
        self, pack: "_Pack", documents: list[Document], wanted: np.ndarray, tiles: np.ndarray
    ) -> None:
        """Decode the tiles `wanted` of the pack into `tiles`, except of unreadable documents."""
        first = 0
        for i, document in enumerate(documents):
            for medium in document.media:
                start, stop = np.searchsorted(wanted, (first, first + medium.num_tiles))
                # A rank's tiles of one kind are contiguous, so that those of a medium are a range.
                mine = wanted[start:stop] - first
                first += medium.num_tiles
                if len(mine) and i not in pack.skip:
                    part = range(mine[0], mine[-1] + 1)
                    self._attempt(
                        pack,
                        i,
                        partial(self._decode_medium, pack, i, medium, part, tiles[start:stop]),
                    )

    def _decode_medium(
        self, pack: "_Pack", i: int, medium: Medium, part: range, out: np.ndarray
    ) -> None:
        entry = pack.entries[i]
        shard = self._shard(entry)
        member = self._member(entry, pack.rows[i], medium.member)
        name = f"{self._shard(entry)} {medium.member}"
        with self._reader.open(shard, member=member, shard_size=self._shard_size(entry)) as file:
            decode_tiles(
                medium,
                file,
                name=name,
                tiles=part,
                tile_format=self.encoders[entry.dataset].tile_format,
                out=out,
                report=partial(self._note_stand_ins, pack, i),
            )

    def _note_stand_ins(self, pack: "_Pack", i: int, frames: int, reason: str) -> None:
        pack.damages.append(self.damage(pack.id, i, reason)._replace(frames=frames))

    def _read(self, entry: DocumentEntry, row: SampleRow, name: str) -> bytes:
        shard = self._shard(entry)
        member = self._member(entry, row, name)
        return self._reader.read(shard, member=member, shard_size=self._shard_size(entry))

    def _member(self, entry: DocumentEntry, row: SampleRow, name: str) -> Member:
        if name not in row.members:
            raise DataError(
                f"{self._shard(entry)} sample {row.key}: the index has no member {name}"
            )
        return row.members[name]

    def _shard(self, entry: DocumentEntry) -> Location:
        return self._shards[entry.dataset][entry.shard]

    def _row(self, entry: DocumentEntry) -> SampleRow:
        return self._index(entry.dataset, entry.shard).row(entry.row)

    def _shard_size(self, entry: DocumentEntry) -> int:
        return self._index(entry.dataset, entry.shard).header.shard_size

    def _open_caches(self) -> None:
        data = self._data
        if data.cache:
            cache = ShardCache(Path(data.cache), limit=int(data.cache_gib * 2**30))
        else:
            cache = None
        self._reader = ShardReader(cache=cache)
        self._index = lru_cache(maxsize=OPEN_INDEXES)(self._read_index)
        self._long_texts: LRUCache[tuple[int, int, int], Document] = LRUCache(
            LONG_TEXT_BYTES, getsizeof=_bytes_of
        )

    def _read_index(self, dataset: int, shard: int) -> SampleIndex:
        path = self._indexes[dataset][shard]
        index = read_index(path, self._text)
        if index.header.fingerprint != self._contents[dataset][shard]:
            raise ShardError(
                f"{path}: the index was rebuilt after the plan was opened, and its samples are "
                "different ones: make the plan again and resume, or restore the shard and its "
                "index as they were"
            )
        return index

    def __getstate__(self) -> dict[str, Any]:
        # Open files and caches stay with their process; each loader process opens its own.
        return {name: value for name, value in vars(self).items() if name not in CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()


def _bytes_of(document: Document) -> int:
    return int(document.input_ids.nbytes + document.labels.nbytes)
