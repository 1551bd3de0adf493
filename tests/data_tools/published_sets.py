"""A made-up record of each layout in which the sets of docs/weights-and-data.md are published, and
what a reader must find in it."""

from typing import Any, NamedTuple

from tests.data_tools.foreign_layouts import PICTURES

Record = dict[str, Any]
RED = "photos/red.png"
BLUE = "photos/blue.png"
FILM = "clips/red.mp4"
ASKED = "What is it?"
SAID = "A cat."


class Layout(NamedTuple):
    """A layout: the format of `vita data import`, a record, and its turns and media."""

    form: str
    record: Record
    turns: list[tuple[str, str]]  # role and text, without tags
    images: int = 0
    videos: int = 0


def pair(question: str = ASKED) -> list[Record]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": SAID}]


def roles(question: str = ASKED) -> list[Record]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": SAID}]


def stored(name: str) -> Record:
    return {"bytes": PICTURES[name], "path": None}


ROUND = [("user", ASKED), ("assistant", SAID)]
TWICE = [*ROUND, ("user", "And now?"), ("assistant", "Two.")]
LAYOUTS = {
    "llava-image": Layout(
        "llava",
        {"id": "1", "image": RED, "conversations": pair(f"<image>\n{ASKED}"), "url": "https://x/1"},
        ROUND, images=1,
    ),
    "llava-text": Layout("llava", {"id": "1", "conversations": pair()}, ROUND),
    "llava-images": Layout(
        "llava",
        {"sample_id": 7, "image": [RED, BLUE], "conversations": pair(f"<image> <image>\n{ASKED}"),
         "metadata": {"dataset": "x", "split": "train", "num_sample": 3}},
        ROUND, images=2,
    ),
    "llava-video": Layout(
        "llava",
        {"id": "1", "video": FILM, "conversations": pair(f"<video>\n{ASKED}")},
        ROUND, videos=1,
    ),
    "llava-video-image-tag": Layout(
        "llava",
        {"id": "1", "data_source": "0_30_s", "video": FILM,
         "conversations": pair(f"<image>\n{ASKED}")},
        ROUND, videos=1,
    ),
    "chat": Layout(
        "llava",
        {"messages": roles(f"<image>\n<video>\n{ASKED}"), "images": [RED], "videos": [FILM]},
        ROUND, images=1, videos=1,
    ),
    "hf-conversations": Layout(
        "hf",
        {"id": "1", "image": stored(RED), "conversations": pair(f"<image>\n{ASKED}"),
         "data_source": "x"},
        ROUND, images=1,
    ),
    "hf-texts": Layout(
        "hf",
        {"images": [stored(RED), stored(BLUE)],
         "texts": [{"user": ASKED, "assistant": SAID, "source": "x"},
                   {"user": "And now?", "assistant": "Two.", "source": "x"}]},
        TWICE, images=2,
    ),
    "hf-question-answer": Layout("hf", {"question": ASKED, "answer": SAID}, ROUND),
    "sharegpt-conversations": Layout(
        "sharegpt",
        {"conversations": [{"from": "system", "value": "Be brief.", "weight": None}, *pair()],
         "source": "x", "system_prompt": None, "category": None, "idx": 3},
        [("system", "Be brief."), *ROUND],
    ),
    "texts-in-turn": Layout(
        "sharegpt", {"conversations": [ASKED, SAID, "And now?", "Two."], "source": "x"}, TWICE
    ),
    "instruction-context-response": Layout(
        "sharegpt",
        {"instruction": ASKED, "context": "It purrs.", "response": SAID, "category": "closed_qa"},
        [("user", f"{ASKED}\nIt purrs."), ("assistant", SAID)],
    ),
    "query-response": Layout(
        "sharegpt",
        {"query": ASKED, "response": SAID, "type": "GSM_Rephrased", "original_question": "What?"},
        ROUND,
    ),
    "instruction-output": Layout(
        "sharegpt", {"instruction": ASKED, "output": SAID, "source": "x/y.json"}, ROUND
    ),
    "instruction-input-output": Layout(
        "sharegpt",
        {"instruction": ASKED, "input": "1 + 1", "output": SAID, "answer": "2"},
        [("user", f"{ASKED}\n1 + 1"), ("assistant", SAID)],
    ),
    "input-output": Layout(
        "sharegpt", {"input": ASKED, "output": SAID, "source": "C4", "subset": "c4"}, ROUND
    ),
    "message-1-message-2": Layout(
        "sharegpt",
        {"role_1": "Mathematician", "topic": "x", "message_1": ASKED, "message_2": SAID},
        ROUND,
    ),
    "messages": Layout("sharegpt", {"messages": roles(), "length": 12}, ROUND),
    "chatml": Layout("sharegpt", {"chatml": roles(), "source": "x", "type": "qa"}, ROUND),
    "prompt-response": Layout("sharegpt", {"prompt": ASKED, "response": SAID}, ROUND),
    "prompt-completion": Layout("sharegpt", {"prompt": ASKED, "completion": SAID}, ROUND),
    "text": Layout("sharegpt", {"text": SAID}, [("text", SAID)]),
}  # fmt: skip
