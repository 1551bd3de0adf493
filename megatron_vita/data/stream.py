"""`PackStream`: from a pack's number to its Batch, reading only that pack and decoding only this rank's tiles."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_vita.config import DataConfig
from megatron_vita.data.batch import Batch, collate, mark_frames
from megatron_vita.data.documents import Document, build_document, check_length, decode_tiles
from megatron_vita.data.form import DocumentFormat
from megatron_vita.data.index import SampleIndex, SampleRow, index_path, read_index, text_stamp
from megatron_vita.data.plan import DocumentEntry, PackPlan
from megatron_vita.data.records import parse_record
from megatron_vita.data.shards import ShardReader
from megatron_vita.errors import DataError, VitaError
from megatron_vita.layout.dealing import deal_tiles

OPEN_INDEXES = 64


class PackStream(Dataset):
    """Packs of a plan as a map-style dataset: `stream[pack_id]` is a Batch.

    `shards[dataset][shard]` are the files that the plan's entries count in, and `forms[dataset]` what their samples
    become. `tile_share` is (rank, ranks) of the ranks
    that share a pack's tiles; None decodes no tile, for ranks that hold no vision tower.
    """

    def __init__(
        self,
        plan: PackPlan,
        *,
        shards: Sequence[Sequence[Path]],
        data: DataConfig,
        forms: Sequence[DocumentFormat],
        tile_share: tuple[int, int] | None,
    ) -> None:
        self.plan = plan
        self.forms = list(forms)
        self._shards = shards
        self._data = data
        self._tile_share = tile_share
        self._text = text_stamp(forms[0].tokenizer, forms[0].template)
        self._open_caches()

    def __len__(self) -> int:
        return self.plan.num_packs

    def __getitem__(self, pack_id: int) -> Batch:
        """Reads one pack. DataError naming shard and key of a sample that cannot be read."""
        entries = self.plan.pack(pack_id)
        rows = [self._index(self._shard(entry)).row(entry.row) for entry in entries]
        documents = [self._document(entry, row) for entry, row in zip(entries, rows, strict=True)]
        tile_ids = self._dealt(mark_frames(documents))
        return collate(
            documents,
            pack_id=pack_id,
            sources=[entry.dataset for entry in entries],
            data=self._data,
            pad_id=self.forms[0].tokenizer.pad_id,
            tiles=self._tiles(entries, rows, documents, tile_ids.numpy()),
            tile_ids=tile_ids,
        )

    def _dealt(self, frames: torch.Tensor) -> torch.Tensor:
        """The tiles of a pack that this rank decodes."""
        if self._tile_share is None:
            return torch.zeros(0, dtype=torch.int64)
        rank, ranks = self._tile_share
        return deal_tiles(frames, ranks)[rank]

    def _document(self, entry: DocumentEntry, row: SampleRow) -> Document:
        name = f"{self._shard(entry)} sample {row.key}"
        record = parse_record(row.record.encode() or self._read(entry, row, f"{row.key}.json"), name)
        try:
            document = build_document(record, row, form=self.forms[entry.dataset])
        except VitaError as error:
            raise DataError(f"{name}: {error}") from error
        if row.is_text and (entry.start or entry.tokens < len(document)):
            document = document.part(entry.start, entry.start + entry.tokens)
        check_length(document, name=name, tokens=entry.tokens, tiles=entry.tiles)
        return document

    def _tiles(
        self,
        entries: list[DocumentEntry],
        rows: list[SampleRow],
        documents: list[Document],
        wanted: np.ndarray,
    ) -> torch.Tensor:
        side = self.forms[0].vision.image_size
        decoded = [np.zeros((0, 3, side, side), dtype=np.uint8)]
        first = 0
        for entry, row, document in zip(entries, rows, documents, strict=True):
            for medium in document.media:
                start, stop = np.searchsorted(wanted, (first, first + medium.num_tiles))
                mine = wanted[start:stop] - first  # contiguous: a rank's tiles of one kind are
                first += medium.num_tiles
                if not len(mine):
                    continue
                data = self._read(entry, row, medium.member)
                name = f"{self._shard(entry)} {medium.member}"
                tiles, form = range(mine[0], mine[-1] + 1), self.forms[entry.dataset]
                decoded.append(decode_tiles(medium, data, name=name, tiles=tiles, form=form))
        return torch.from_numpy(np.concatenate(decoded))

    def _read(self, entry: DocumentEntry, row: SampleRow, member: str) -> bytes:
        shard = self._shard(entry)
        if member not in row.members:
            raise DataError(f"{shard} sample {row.key}: the index has no member {member}")
        size = self._index(shard).header.shard_size
        try:
            return self._reader.read(shard, member=row.members[member], shard_size=size)
        except OSError as error:
            raise DataError(f"{shard} sample {row.key}: cannot read {member}: {error.strerror}") from error

    def _shard(self, entry: DocumentEntry) -> Path:
        return self._shards[entry.dataset][entry.shard]

    def _open_caches(self) -> None:
        self._reader = ShardReader()
        self._index = lru_cache(maxsize=OPEN_INDEXES)(self._read_index)

    def _read_index(self, shard: Path) -> SampleIndex:
        return read_index(index_path(shard), self._text)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_reader", "_index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()
