"""Encoding of samples to documents: token ids, labels, and positions of tiles."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from megatron_vita.data.samples.encoding import Medium, SampleEncoder
from megatron_vita.data.samples.records import Kind, encode_record, weight_of
from megatron_vita.data.samples.rows import SampleRow
from megatron_vita.data.samples.truncation import Piece, Truncated, untruncated
from megatron_vita.errors import DataError
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.text.media_tokens import MediaTokens
from megatron_vita.text.pieces import EncodedTurn, MediaPiece


@dataclass(frozen=True, kw_only=True)
class Document:
    """An encoded sample, ready to be packed.

    `input_ids` and `labels` are int64 [L]; a label is the next token if that one carries loss, else
    IGNORED_LABEL. `placements` int64 [N] holds the position of each tile's first placeholder;
    `media` has N tiles in the same order. A pair is one document: the chosen conversation, padded,
    and from `rejected_start` on the rejected one, which does not see it.
    """

    key: str
    input_ids: np.ndarray
    labels: np.ndarray
    placements: np.ndarray
    media: list[Medium]
    weight: float = 1.0
    rejected_start: int = 0  # 0: no pair

    def __len__(self) -> int:
        return len(self.input_ids)

    def cut(self, tokens: int) -> "Document":
        """Cut to the first `tokens` tokens, with the media that are complete in them."""
        if tokens >= len(self):
            return self
        # The last token would predict one that is cut off.
        labels = self.labels[:tokens].copy()
        labels[-1] = IGNORED_LABEL
        # A medium stays only with all of its tiles.
        tiles = np.cumsum([0, *(medium.num_tiles for medium in self.media)])
        held = int(np.searchsorted(self.placements, tokens))
        media = [medium for medium, end in zip(self.media, tiles[1:], strict=True) if end <= held]
        placements = self.placements[: sum(medium.num_tiles for medium in media)]
        return replace(
            self,
            input_ids=self.input_ids[:tokens],
            labels=labels,
            placements=placements,
            media=media,
        )

    def part(self, start: int, stop: int) -> "Document":
        """Slice raw text from token `start` to `stop`; its last token predicts the one after."""
        assert not self.media, "raw text has no media"
        return replace(self, input_ids=self.input_ids[start:stop], labels=self.labels[start:stop])


def build_document(record: dict[str, Any], row: SampleRow, *, encoder: SampleEncoder) -> Document:
    """Encode a sample, truncated if it is longer than a pack.

    Args:
        record: JSON of the sample.
        row: its row of the index.
        encoder: encoder of its dataset.

    Raises:
        DataError: the tags do not match the media.
    """
    left = _truncate_row(row, encoder)
    conversations = encode_record(record, encoder.chat)
    # The index has the sizes of media in the order of their tags; the record has their names. Both
    # conversations of a pair show them.
    copies = len(conversations)
    names = {
        Kind.IMAGE: iter(record["images"] * copies),
        Kind.VIDEO: iter(record["videos"] * copies),
    }
    media: dict[str, list[Medium | None]] = {"image": [], "video": []}
    for kind, medium in _kept_media(row, left, encoder):
        name = next(names[kind])
        media[kind.name.lower()].append(medium and medium._replace(member=name))
    coming = {kind: iter(files) for kind, files in media.items()}
    documents = [
        assemble_document(
            turns, key=row.key, media=coming, encoder=encoder, weight=weight_of(record)
        )
        for turns in conversations
    ]
    if len(documents) > 1:
        return _paired(*documents, encoder=encoder)
    # Raw text is split over packs instead.
    if row.is_text:
        return documents[0]
    return documents[0].cut(left.tokens)


def _paired(chosen: Document, rejected: Document, *, encoder: SampleEncoder) -> Document:
    """Join the conversations of a pair, each on an aligned position."""
    padding = encoder.boundary(len(chosen))
    start = len(chosen) + padding
    pads = np.full(padding, encoder.tokenizer.pad_id, dtype=np.int64)
    ignored = np.full(padding, IGNORED_LABEL, dtype=np.int64)
    return replace(
        chosen,
        input_ids=np.concatenate([chosen.input_ids, pads, rejected.input_ids]),
        labels=np.concatenate([chosen.labels, ignored, rejected.labels]),
        placements=np.concatenate([chosen.placements, start + rejected.placements]),
        media=[*chosen.media, *rejected.media],
        rejected_start=start,
    )


def blank_document(row: SampleRow, *, tokens: int, tiles: int, encoder: SampleEncoder) -> Document:
    """Substitute for a sample that cannot be read: its planned tokens and tiles, without loss."""
    media = [
        medium
        for _, medium in _kept_media(row, _truncate_row(row, encoder), encoder)
        if medium is not None
    ]
    ends = np.cumsum([medium.num_tiles for medium in media])
    # Attention has the same bounds on ranks that can read the sample.
    rejected_start = 0
    if row.is_pair:
        pieces = _measured(row, encoder)
        boundary = [piece.kind for piece in pieces].index(Kind.BOUNDARY)
        rejected_start = sum(piece.tokens for piece in pieces[: boundary + 1])
    return Document(
        key=row.key,
        input_ids=np.full(tokens, encoder.tokenizer.pad_id, dtype=np.int64),
        labels=np.full(tokens, IGNORED_LABEL, dtype=np.int64),
        placements=blank_placements(tiles, encoder.vision.image_token_length),
        media=media[: int(np.searchsorted(ends, tiles, side="right"))],
        rejected_start=rejected_start,
    )


def blank_placements(tiles: int, rows_per_tile: int) -> np.ndarray:
    """Positions of the tiles of a blank document: adjacent, from its first token, [N]."""
    return np.arange(tiles, dtype=np.int64) * rows_per_tile


def _kept_media(
    row: SampleRow, left: Truncated, encoder: SampleEncoder
) -> Iterator[tuple[Kind, Medium | None]]:
    """Yield the media of a sample in order, without names; None for those left out."""
    kept = iter(left.kept)
    images = iter(row.image_sizes)
    videos = iter(row.videos)
    for kind, _ in row.pieces:
        if kind == Kind.IMAGE:
            yield kind, encoder.image("", next(images), tiles=next(kept))
        elif kind == Kind.VIDEO:
            yield kind, encoder.video("", next(videos), frames=next(kept))


def _measured(row: SampleRow, encoder: SampleEncoder) -> list[Piece]:
    """Measure the pieces of a sample by its metadata."""
    images = iter(row.image_sizes)
    videos = iter(row.videos)
    pieces: list[Piece] = []
    for kind, tokens in row.pieces:
        if kind == Kind.IMAGE:
            pieces.append(Piece(kind, *encoder.measure_image(next(images))))
        elif kind == Kind.VIDEO:
            pieces.append(Piece(kind, *encoder.measure_video(next(videos))))
        elif kind == Kind.BOUNDARY:
            before = sum(piece.tokens for piece in pieces)
            pieces.append(Piece(kind, encoder.boundary(before)))
        else:
            pieces.append(Piece(kind, tokens))
    return pieces


def _truncate_row(row: SampleRow, encoder: SampleEncoder) -> Truncated:
    """Truncation of a sample by its metadata; none if it fits, or if nothing would remain."""
    pieces = _measured(row, encoder)
    everything = untruncated(pieces)
    is_whole = row.is_text or row.is_pair or not encoder.limit
    if is_whole or everything.tokens <= encoder.limit:
        return everything
    return encoder.truncate(pieces) or everything


def assemble_document(
    turns: Iterable[EncodedTurn],
    *,
    key: str,
    media: Mapping[str, Iterable[Medium | None]],
    encoder: SampleEncoder,
    weight: float = 1.0,
) -> Document:
    """Concatenate the tokens of turns, with placeholder tokens in the positions of media.

    Media of None are left out.

    Args:
        turns: encoded turns.
        key: key of the sample.
        media: media by kind ("image", "video"), in order.
        encoder: encoder of the dataset.
        weight: factor on the losses of the sample.

    Raises:
        DataError: there are media, but the model is text-only.
    """
    coming = {kind: iter(files) for kind, files in media.items()}
    ids: list[int] = []
    loss: list[bool] = []
    used: list[Medium] = []
    placements: list[int] = []
    for piece in chain.from_iterable(turns):
        if not isinstance(piece, MediaPiece):
            ids += piece.ids
            loss += [piece.loss] * len(piece.ids)
            continue
        medium = next(coming[piece.kind])
        if medium is None:
            continue
        if encoder.text_only:
            raise DataError(
                f"{medium.member}: the model takes no {piece.kind}s, since model.text_only is true"
            )
        used.append(medium)
        sequence = _placeholders(medium, encoder)
        placements += [len(ids) + offset for offset in sequence.offsets]
        ids += sequence.ids
        loss += [False] * len(sequence.ids)
    input_ids = np.array(ids, dtype=np.int64)
    return Document(
        key=key,
        input_ids=input_ids,
        labels=_shifted_labels(input_ids, np.array(loss, dtype=bool)),
        placements=np.array(placements, dtype=np.int64),
        media=used,
        weight=weight,
    )


def _placeholders(medium: Medium, encoder: SampleEncoder) -> MediaTokens:
    if medium.grid is not None:
        return encoder.placeholders.image(medium.grid)
    return encoder.placeholders.video(medium.num_tiles)


def _shifted_labels(input_ids: np.ndarray, loss: np.ndarray) -> np.ndarray:
    # Shifted here, inside the document: no label reaches over its end, however it is packed.
    labels = np.full_like(input_ids, IGNORED_LABEL)
    labels[:-1] = np.where(loss[1:], input_ids[1:], IGNORED_LABEL)
    return labels


def check_length(document: Document, *, name: str, tokens: int, tiles: int) -> None:
    """Raise DataError if a document does not have the planned numbers of tokens and tiles."""
    found = (len(document), len(document.placements))
    if found != (tokens, tiles):
        raise DataError(
            f"{name}: the sample has {found[0]} tokens and {found[1]} tiles, the plan counted "
            f"{tokens} and {tiles}: the index does not describe this shard; make index and plan "
            "again"
        )
