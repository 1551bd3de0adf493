"""A chat: earlier turns with their media, and media for the next question."""

from dataclasses import dataclass, field
from typing import Any

from megatron_vita.inference.requests.prompt import MediaFile, Prompt


@dataclass
class Conversation:
    """Turns so far. `images` and `videos` belong to them, `next_images` and `next_videos` to the
    next question."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[MediaFile] = field(default_factory=list)
    videos: list[MediaFile] = field(default_factory=list)
    next_images: list[MediaFile] = field(default_factory=list)
    next_videos: list[MediaFile] = field(default_factory=list)

    def ask(self, question: str) -> Prompt:
        """Prompt of the next question after all earlier turns; `keep` makes it one of them."""
        asked = Prompt.ask(question, images=self.next_images, videos=self.next_videos)
        return Prompt(
            messages=[*self.messages, *asked.messages],
            images=[*self.images, *asked.images],
            videos=[*self.videos, *asked.videos],
        )

    def keep(self, prompt: Prompt, answer: str) -> None:
        """Append a prompt of `ask` and its answer to the turns. A question without an answer is
        dropped."""
        # A turn of the user without one of the assistant would be followed by another user turn.
        if answer:
            self.messages = [*prompt.messages, {"role": "assistant", "content": answer}]
            self.images = list(prompt.images)
            self.videos = list(prompt.videos)
            self.next_images = []
            self.next_videos = []
