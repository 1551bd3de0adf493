"""Incremental detokenization: text that was given out is never taken back."""

from collections.abc import Sequence

from megatron_vita.text.tokenizer_base import Tokenizer

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WINDOW = 8
"""Tokens with which a window begins anew."""
_LONGEST_TAIL = 16
"""Tokens that may wait for the rest of a character or of a run of bytes."""
_CHARACTER_BYTES = 4


class TextStream:
    """Text of one answer, up to the first stop string.

    All that `push` and `finish` return, joined, is `tokenizer.decode` of all ids up to the stop
    string that is complete first. Only runs of more than 16 byte-fallback tokens that are not text
    may decode differently.

    Each token decodes a window of a few tokens: those that are held back, preceded by the last ones
    given out, so that the decoder does not treat the held ones as the text's beginning.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop string came
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text was given
        self._known_length = 0  # characters of that text, as the window begins with it
        self._held = ""  # may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Text that this token certainly adds."""
        # Special tokens have no text of their own.
        if self.stopped or (token_id in self._tokenizer.special_ids and not self._keeps_apart()):
            return ""
        self._window.append(token_id)
        return self._until_stop(self._decode_window())

    def finish(self) -> str:
        """Text held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._until_stop(self._tokenizer.decode(self._window)[self._known_length :])
        rest = self._held
        self._held = ""
        self._window = []
        self._known = 0
        self._known_length = 0
        return text + rest

    def _keeps_apart(self) -> bool:
        """True if a special token after the window may change how the following tokens decode."""
        if not self._window:
            return False
        last = self._window[-1]
        return last not in self._tokenizer.special_ids and last not in self._tokenizer.byte_ids

    def _decode_window(self) -> str:
        text = self._tokenizer.decode(self._window)
        # The next token may complete the character, or change how a run of bytes decodes.
        if text.endswith(_UNDECODABLE) or self._window[-1] in self._tokenizer.byte_ids:
            if len(self._window) - self._known >= _LONGEST_TAIL:
                return self._shorten_window(text)
            return ""
        new = text[self._known_length :]
        if new:
            if len(self._window) >= _LONGEST_WINDOW and self._known:
                self._window = self._window[self._known :]
                text = self._tokenizer.decode(self._window)
            self._known = len(self._window)
            self._known_length = len(text)
        return new

    def _shorten_window(self, text: str) -> str:
        """Give out the part of a long tail that further bytes cannot change."""
        cut = self._cut(text)
        new = self._tokenizer.decode(self._window[:cut])[self._known_length :]
        self._window = self._window[cut:]
        self._known = 0
        self._known_length = 0
        return new

    def _cut(self, text: str) -> int:
        """Number of tokens of the window after which its text can be cut: at a character's end, or
        else between invalid bytes.

        Invalid bytes that decode together stay together, as do the last few, which may begin a
        character.
        """
        certain = len(self._window) - _CHARACTER_BYTES
        for cut in range(len(self._window), certain, -1):
            if not self._tokenizer.decode(self._window[:cut]).endswith(_UNDECODABLE):
                return cut
        for cut in range(certain, self._known + 1, -1):
            if (
                self._tokenizer.decode(self._window[:cut])
                + self._tokenizer.decode(self._window[cut:])
                == text
            ):
                return cut
        return self._known + 1

    def _until_stop(self, new: str) -> str:
        """Part of the held text and `new` that precedes a stop string and cannot be the beginning
        of one."""
        if not self._stop or not new:
            return new
        text = self._held + new
        # The stop string that is complete first counts, as if text came character by character.
        places = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            self._held = ""
            return text[: min(places)[1]]
        held = self._beginning_of_stop(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest suffix of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
