"""Tokenization of a rendered template: text between special tokens and media is encoded at once."""

from megatron_vita.text.marks import Marks
from megatron_vita.text.pieces import EncodedTurn, MediaPiece, append_ids
from megatron_vita.text.tokenizer_base import Tokenizer


class Assembly:
    """Builder of encoded pieces from parts of a rendering.

    Each part is added with the index of the turn whose trained answer it belongs to, or None;
    tokens of answers carry loss.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Marks, *, video_opening: str) -> None:
        self.pieces: EncodedTurn = []
        self.media: list[str] = []  # kinds, in order
        self._tokenizer = tokenizer
        self._marks = marks
        self._video_opening = video_opening
        self._run: list[tuple[str, int | None]] = []  # text since the last special token or medium
        self._strips = False  # the last special token strips the white space after it
        self._shared: int | None = None  # a turn whose answer shares a token with its neighbour

    def add_text(self, text: str, turn: int | None) -> None:
        """Add ordinary text."""
        text = self._marks.plain(text)
        if self._strips:
            text = text.lstrip()
        if not text:
            return
        self._strips = False
        if self._run and self._run[-1][1] == turn:
            text = self._run.pop()[0] + text
        self._run.append((text, turn))

    def add_special(self, name: str, turn: int | None) -> None:
        """Add a special token, which may strip the white space around it."""
        # The text before is encoded here, since tokens never span a special token.
        strips_left, strips_right = self._tokenizer.stripping.get(name, (False, False))
        self._end_run(strips=strips_left)
        append_ids(self.pieces, [self._tokenizer.special_id(name)], loss=turn is not None)
        self._strips = strips_right

    def add_medium(self, kind: str, turn: int | None) -> None:
        """Add the placeholder of an image or a video."""
        if kind == "video":
            self.add_text(self._video_opening, turn)
        self._end_run()
        self._strips = False
        self.media.append(kind)
        self.pieces.append(MediaPiece(kind))

    def end(self) -> int | None:
        """Encode the remaining text.

        Returns:
            A turn whose answer shares a token with the text around it; None if there is none.
        """
        self._end_run()
        return self._shared

    def _end_run(self, *, strips: bool = False) -> None:
        if strips:
            self._strip_end()
        ids: list[int] = []
        for text, turn in self._run:
            encoded = self._tokenizer.encode(text)
            append_ids(self.pieces, encoded, loss=turn is not None)
            ids += encoded
        # transformers encodes the run at once. If that gives other tokens, one of them spans the
        # border of an answer, and it is undefined whether it carries loss.
        if len(self._run) > 1 and ids != self._tokenizer.encode("".join(t for t, _ in self._run)):
            self._shared = next(turn for _, turn in self._run if turn is not None)
        self._run.clear()

    def _strip_end(self) -> None:
        while self._run:
            text, turn = self._run.pop()
            if kept := text.rstrip():
                self._run.append((kept, turn))
                return
