"""Records as other makers lay them out, made of one truth: what a reader must find in them, or the
name of what it must refuse.

Field names are those of LLaVA, ShareGPT4V, InternVL, ms-swift, LLaMA-Factory, axolotl, OpenAI,
Qwen-VL, FineVision, M3IT, and of webdatasets turned into Parquet.
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from tests.data_tools.imports import picture

WORDS = ("the", "cat", "sat", "on", "red", "mat", "two", "birds", "near", "old", "trees")
COLORS = ("red", "green", "blue", "white")
Record = dict[str, Any]


PICTURES = {f"photos/{color}.png": picture(color) for color in COLORS}
FILMS = {f"clips/{color}.mp4": b"\0\0\0\x18ftypisom" + color.encode() for color in COLORS}
FILES = {**PICTURES, **FILMS}


@dataclass
class Truth:
    """Content of a record: rounds of (question, answer, answer is trained), the media of each
    question, and a flag for media tags in the text."""

    rounds: list[tuple[str, str, bool]]
    images: list[list[str]]
    videos: list[list[str]]
    system: str = ""
    tagged: bool = True

    def question(self, place: int, *, image: str = "<image>", video: str = "<video>") -> str:
        """A question with the tags of its media."""
        if not self.tagged:
            return self.rounds[place][0]
        tags = [image] * len(self.images[place]) + [video] * len(self.videos[place])
        return "".join(f"{tag}\n" for tag in tags) + self.rounds[place][0]

    @property
    def all_images(self) -> list[str]:
        return [name for names in self.images for name in names]

    @property
    def all_videos(self) -> list[str]:
        return [name for names in self.videos for name in names]


class Layout(NamedTuple):
    """A maker's layout: the format of `import` that reads it, how a truth is written, and what it
    can say."""

    name: str
    form: str
    write: Callable[[Truth, Random], Record]
    rounds: int = 3
    images: int = 2
    videos: int = 0
    spread: bool = False  # media in later questions too
    has_system: bool = False
    has_marks: bool = False
    may_lack_tags: bool = True


def words(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))


def make_truth(layout: Layout, rng: Random) -> Truth:
    count = rng.randint(1, layout.rounds)
    marks = [not (layout.has_marks and rng.random() < 0.4) for _ in range(count)]
    if not any(marks):
        marks[0] = True
    rounds = [(words(rng) + "?", words(rng).capitalize() + ".", mark) for mark in marks]
    truth = Truth(rounds, [[] for _ in rounds], [[] for _ in rounds])
    truth.images[0] = rng.sample(sorted(PICTURES), rng.randint(0, layout.images))
    if layout.videos and not truth.images[0]:
        truth.videos[0] = rng.sample(sorted(FILMS), rng.randint(0, layout.videos))
    if layout.spread and count > 1 and rng.random() < 0.5:
        truth.images[-1] = rng.sample(sorted(PICTURES), 1)
    truth.system = words(rng) if layout.has_system and rng.random() < 0.5 else ""
    is_spread = any(truth.images[1:])
    truth.tagged = not layout.may_lack_tags or is_spread or rng.random() < 0.6
    return truth


def turns(
    truth: Truth, rng: Random, *, role: str, content: str, asker: str, answerer: str, mark: str = ""
) -> list[Record]:
    """Turns of two fields each; `mark` is the field that says whether an answer is trained."""
    said: list[Record] = []
    for place, (_, answer, trained) in enumerate(truth.rounds):
        said.append({role: asker, content: truth.question(place)})
        said.append({role: answerer, content: answer})
        if mark and (not trained or rng.random() < 0.5):
            said[-1][mark] = rng.choice([bool(trained), int(trained)])
        elif mark and rng.random() < 0.5:
            said[-1][mark] = None
    return said


def human_gpt(truth: Truth, rng: Random, *, mark: str = "") -> list[Record]:
    return turns(truth, rng, role="from", content="value", asker="human", answerer="gpt", mark=mark)


def user_assistant(truth: Truth, rng: Random, *, mark: str = "") -> list[Record]:
    said = turns(
        truth, rng, role="role", content="content", asker="user", answerer="assistant", mark=mark
    )
    if truth.system:
        return [{"role": "system", "content": truth.system}, *said]
    return said


def alone(names: list[str], rng: Random) -> Any:
    """A single path as itself, or as a list."""
    if len(names) == 1 and rng.random() < 0.7:
        return names[0]
    return names


def llava(truth: Truth, rng: Random) -> Record:
    record: Record = {"id": f"{rng.random()}", "conversations": human_gpt(truth, rng)}
    if truth.all_images:
        record["image"] = alone(truth.all_images, rng)
    if truth.all_videos:
        record["video"] = alone(truth.all_videos, rng)
        record["conversations"][0]["value"] = truth.question(0, video="<image>")
    return record


def internvl(truth: Truth, rng: Random) -> Record:
    record = llava(truth, rng)
    count = len(truth.all_images)
    if count > 1:
        record |= {"width_list": [12] * count, "height_list": [8] * count}
    elif count:
        record |= {"width": 12, "height": 8}
    return record


def sharegpt4v(truth: Truth, rng: Random) -> Record:
    return {name: value for name, value in llava(truth, rng).items() if name != "id"}


def swift_messages(truth: Truth, rng: Random) -> Record:
    record: Record = {"messages": user_assistant(truth, rng, mark="loss")}
    record |= {"images": truth.all_images} if truth.all_images or rng.random() < 0.5 else {}
    return record | ({"videos": truth.all_videos} if truth.all_videos else {})


def swift_query(truth: Truth, rng: Random) -> Record:
    *earlier, _ = range(len(truth.rounds))
    record: Record = {
        "query": truth.question(len(earlier)),
        "response": truth.rounds[-1][1],
        "history": [[truth.question(i), truth.rounds[i][1]] for i in earlier],
        "images": truth.all_images,
    }
    return record | ({"system": truth.system} if truth.system else {})


def swift_pairs(truth: Truth, rng: Random) -> Record:
    pairs = [
        {"human": truth.question(i), "assistant": answer}
        for i, (_, answer, _) in enumerate(truth.rounds)
    ]
    record: Record = {"conversation": pairs, "images": truth.all_images}
    return record | ({"system": truth.system} if truth.system else {})


def factory_alpaca(truth: Truth, rng: Random) -> Record:
    *earlier, last = range(len(truth.rounds))
    record: Record = {
        "instruction": truth.question(last),
        "input": "",
        "output": truth.rounds[last][1],
        "history": [[truth.question(i), truth.rounds[i][1]] for i in earlier],
        "images": truth.all_images or None,
        "videos": truth.all_videos,
        "system": truth.system,
    }
    if rng.random() < 0.4:
        asked, _, given = truth.rounds[last][0].rpartition(" ")
        truth.rounds[last] = (f"{asked}\n{given}", *truth.rounds[last][1:])
        instruction, _, given = truth.question(last).rpartition("\n")
        record |= {"instruction": instruction, "input": given}
    return record


def factory_sharegpt(truth: Truth, rng: Random) -> Record:
    return {
        "conversations": human_gpt(truth, rng),
        rng.choice(["system", "system_message"]): truth.system,
        "tools": rng.choice(["", "[]", None]),
        "images": truth.all_images,
        "videos": truth.all_videos,
    }


def openai(truth: Truth, rng: Random) -> Record:
    """Content as parts, with data URLs or paths; answers with OpenAI's weight."""
    said = user_assistant(truth, rng, mark="weight")
    users = [turn for turn in said if turn["role"] == "user"]
    for place, turn in enumerate(users):
        parts = [{"type": "image_url", "image_url": {"url": name}} for name in truth.images[place]]
        turn["content"] = [*parts, {"type": "text", "text": truth.rounds[place][0]}]
    return {"messages": said}


def qwen_parts(truth: Truth, rng: Random) -> Record:
    said = user_assistant(truth, rng)
    users = [turn for turn in said if turn["role"] == "user"]
    for place, turn in enumerate(users):
        parts = [{"type": "image", "image": name} for name in truth.images[place]]
        parts += [{"type": "video", "video": name} for name in truth.videos[place]]
        turn["content"] = [*parts, {"type": "text", "text": truth.rounds[place][0]}]
    return {"messages": said}


def qwen_tags(truth: Truth, rng: Random) -> Record:
    said = human_gpt(truth, rng)
    for place, turn in enumerate(said[::2]):
        named = "".join(f"<img>{name}</img>\n" for name in truth.images[place])
        turn["value"] = named + truth.rounds[place][0]
    return {"conversations": said}


def axolotl(truth: Truth, rng: Random) -> Record:
    said = human_gpt(truth, rng, mark="train")
    if truth.system:
        said = [{"from": "system", "value": truth.system, "train": False}, *said]
    return {"conversations": said} | ({"image_path": truth.all_images} if truth.all_images else {})


def inline(truth: Truth, rng: Random) -> Record:
    """M3IT's strings of base64, or data URLs."""
    texts = [base64.b64encode(FILES[name] + bytes(80)).decode() for name in truth.all_images]
    if rng.random() < 0.5:
        texts = [f"data:image/png;base64,{text}" for text in texts]
    return {"conversations": human_gpt(truth, rng), "image_base64_str": texts}


def turn_images(truth: Truth, rng: Random) -> Record:
    said = user_assistant(truth, rng)
    users = [turn for turn in said if turn["role"] == "user"]
    for turn, names in zip(users, truth.images, strict=True):
        turn |= {"images": names} if names else {}
    return {"messages": said}


def struct(name: str, rng: Random) -> Any:
    """Bytes, {bytes, path}, or a path in one."""
    data = FILES[name]
    return rng.choice([{"bytes": data, "path": None}, {"bytes": data, "path": name}])


def finevision(truth: Truth, rng: Random) -> Record:
    texts = [
        {"user": truth.question(i), "assistant": answer}
        for i, (_, answer, _) in enumerate(truth.rounds)
    ]
    return {"images": [struct(name, rng) for name in truth.all_images], "texts": texts}


def json_column(truth: Truth, rng: Random) -> Record:
    """A conversation kept as the text of its JSON."""
    record: Record = {"conversations": json.dumps(human_gpt(truth, rng))}
    return record | {f"image_{i}": FILES[name] for i, name in enumerate(truth.all_images)}


def born_of_webdataset(truth: Truth, rng: Random) -> Record:
    """A caption in `txt`, or in the fields of `json`."""
    _, answer, _ = truth.rounds[0]
    truth.rounds[0] = ("Describe it.", answer, True)
    truth.tagged = False
    record: Record = {"__key__": "000001", "__url__": "https://x/00000.tar"}
    if truth.all_images:
        record["jpg"] = FILES[truth.all_images[0]]
    if rng.random() < 0.5:
        return record | {"txt": answer}
    fields = {"caption": answer, "width": 12}
    return record | {"json": fields | ({"url": "https://x/y.jpg"} if truth.all_images else {})}


def visual_question(truth: Truth, rng: Random) -> Record:
    _, answer, _ = truth.rounds[0]
    image = struct(truth.all_images[0], rng) if truth.all_images else None
    return {"image": image, "question": truth.question(0), "answer": answer, "answer_type": "other"}


LAYOUTS = [
    Layout("llava", "llava", llava, videos=1),
    Layout("internvl", "llava", internvl, images=3, videos=1),
    Layout("sharegpt4v", "sharegpt", sharegpt4v, images=1),
    Layout("ms-swift messages", "sharegpt", swift_messages, videos=1, spread=True, has_system=True, has_marks=True),
    Layout("ms-swift query", "sharegpt", swift_query, spread=True, has_system=True),
    Layout("ms-swift pairs", "sharegpt", swift_pairs, has_system=True),
    Layout("LLaMA-Factory alpaca", "sharegpt", factory_alpaca, videos=1, has_system=True),
    Layout("LLaMA-Factory sharegpt", "sharegpt", factory_sharegpt, videos=1, spread=True, has_system=True),
    Layout("OpenAI", "sharegpt", openai, spread=True, has_system=True, has_marks=True, may_lack_tags=False),
    Layout("Qwen parts", "llava", qwen_parts, videos=1, spread=True, has_system=True, may_lack_tags=False),
    Layout("Qwen tags", "sharegpt", qwen_tags, spread=True, may_lack_tags=False),
    Layout("axolotl", "sharegpt", axolotl, has_system=True, has_marks=True),
    Layout("base64", "llava", inline),
    Layout("images of turns", "sharegpt", turn_images, spread=True, has_system=True),
    Layout("FineVision", "hf", finevision, spread=True),
    Layout("conversation as text", "hf", json_column),
    Layout("webdataset in Parquet", "hf", born_of_webdataset, rounds=1, images=1),
    Layout("visual question", "hf", visual_question, rounds=1, images=1),
]  # fmt: skip
