"""Harnesses prompt a server as Long-VITA was prompted. Stand-ins replace their base classes, with
the parts in use."""

import importlib
import io
import subprocess
import sys
import types
import zipfile
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vita.evaluation.adapters.prompt_rules import Part, clean_answer, long_vita_parts
from megatron_vita.media.video import probe_video
from tests.evaluation.chat_server import APIError, FakeChatServer, serving, texts_of

ROOT = Path(__file__).parents[2]
SELECT = "Please select the correct answer from the options above."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."


def asked(text: str, benchmark: str | None, kind: str | None) -> str:
    """The text after an image."""
    image, said = long_vita_parts(
        [Part("image", "i"), Part("text", text)], benchmark=benchmark, kind=kind
    )
    assert image == Part("image", "i")
    return said.value


@pytest.mark.parametrize(
    ("benchmark", "kind", "text", "told"),
    [
        ("OCRBench", "VQA", "what?", "\nwhat?\nAnswer this question using the text in the image directly without any "
         "other context."),
        ("MMMU_DEV_VAL", "MCQ", f"what?\nA. x\n{SELECT} ", f"\nwhat?\nA. x{LETTER}"),
        ("MMMU_TEST", "MCQ", "what?", f"\nwhat?{LETTER}"),
        ("MMStar", "MCQ", "what?", f"\nwhat?{LETTER}"),
        ("MVBench", "Video-MCQ", "what?\nOnly give the best option.Best option:(", "\nwhat?\nAnswer with the letter."),
        ("MMVet", "VQA", "what? ", "\nwhat? "),
        ("MathVista_MINI", "VQA", "what?", f"\nwhat?\n{PHRASE}"),
        ("POPE", "Y/N", "so? Answer the question with Yes or No.", "\nso?\nAnswer yes or no."),
        ("AI2D_TEST", "MCQ", f"what?\n{SELECT}", "\nwhat?\nAnswer with the letter."),
        ("TextVQA_VAL", "VQA", "what?", "\nwhat?"),
        ("LongVideoBench", "Video-MCQ", "what?\n", "\nwhat?\nOffer a very short reply."),
        ("COCO_VAL", "Caption", f"what?\n{PHRASE}", f"\nwhat?\n{PHRASE}"),
        (None, None, "what?", f"\nwhat?\n{PHRASE}"),
    ],
)  # fmt: skip
def test_each_benchmark_is_asked_in_its_words(
    benchmark: str | None, kind: str | None, text: str, told: str
) -> None:
    assert asked(text, benchmark, kind) == told


def test_an_image_is_followed_by_a_newline_and_a_video_is_not() -> None:
    parts = [
        Part("text", "one "),
        Part("image", 1),
        Part("text", "two "),
        Part("video", 2),
        Part("text", "three"),
    ]
    assert long_vita_parts(parts, benchmark="MMVet", kind="VQA") == [
        Part("text", "one "), Part("image", 1), Part("text", "\ntwo "), Part("video", 2), Part("text", "three"),
    ]  # fmt: skip


def test_frames_of_video_mme_are_videos_of_one_frame() -> None:
    parts = [Part("image", 1), Part("image", 2), Part("text", "what?\nAnswer: ")]
    assert long_vita_parts(parts, benchmark="Video-MME", kind="Video-MCQ") == [
        Part("video", 1), Part("video", 2), Part("text", "what?\nOffer a very short reply."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "clean"), [("Answer: B ", "B"), (" Answer:B", "B"), ("The Answer: B", "The Answer: B")]
)
def test_the_word_answer_before_an_answer_is_taken_off(text: str, clean: str) -> None:
    assert clean_answer(text) == clean


def module(name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


@pytest.fixture
def harnesses(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the parts of lmms-eval 0.7.3 and VLMEvalKit (ms-vlmeval 0.0.20) that the
    adapters use."""
    manifests: dict[str, Any] = {}

    class Lmms:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    class Registry:
        def register_manifest(self, manifest: dict[str, Any], *, overwrite: bool) -> None:
            manifests[manifest["model_id"]] = manifest

    class BaseAPI:
        def __init__(self, retry: int = 10, system_prompt: str | None = None, **_: Any) -> None:
            self.system_prompt = system_prompt

    kinds = {"MMBench_DEV_EN": "MCQ", "Video-MME": "Video-MCQ"}
    for made in (
        module("lmms_eval"),
        module("lmms_eval.api"),
        module("lmms_eval.api.model", lmms=Lmms),
        module("lmms_eval.models", MODEL_REGISTRY_V2=Registry()),
        module("lmms_eval.models.registry_v2", ModelManifest=dict),
        module("vlmeval"),
        module("vlmeval.api"),
        module("vlmeval.api.base", BaseAPI=BaseAPI),
        module("vlmeval.dataset", DATASET_TYPE=kinds.__getitem__),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    for name in ("lmms_eval_model", "vlmevalkit_model"):
        monkeypatch.delitem(sys.modules, f"megatron_vita.evaluation.adapters.{name}", raising=False)
    return manifests


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    def reply(request: dict[str, Any]) -> str:
        if "long" in texts_of(request)[-1]:
            raise APIError(400, "too long")
        return "Answer: B"

    with serving(reply) as running:
        yield running


class Request:
    """A request of lmms-eval: context, doc_to_messages, options, document, task, split."""

    def __init__(self, number: int, task: str) -> None:
        self.args = ("", self._messages, {"max_new_tokens": 16}, number, task, "test")

    @staticmethod
    def _messages(question: str) -> list[dict[str, Any]]:
        picture = {"type": "image", "url": Image.new("RGB", (8, 8))}
        return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def test_lmms_eval_gets_answers_in_order_by_the_rules_of_its_tasks(
    harnesses: dict[str, Any], server: FakeChatServer
) -> None:
    adapter = importlib.import_module("megatron_vita.evaluation.adapters.lmms_eval_model")
    path, name = harnesses["vita"]["chat_class_path"].rsplit(".", 1)
    model = getattr(importlib.import_module(path), name)(
        server.url, max_frames=64, batch_size=1, device=None
    )
    model.task_dict = {task: {"test": ["which?", "long?"]} for task in ("mmstar", "unknown_task")}
    requests = [Request(0, "mmstar"), Request(1, "mmstar"), Request(0, "unknown_task")]
    assert model.generate_until(requests) == ["B", "", "B"]
    texts = {texts_of(request)[0] for request in server.requests}
    assert texts == {f"\nwhich?{LETTER}", f"\nlong?{LETTER}", "which?"}
    assert {(r["max_tokens"], r["temperature"], r["max_frames"]) for r in server.requests} == {
        (1024, 0.0, 64)
    }
    with pytest.raises(NotImplementedError):
        model.loglikelihood([])
    assert not adapter.VitaChat.is_simple


@pytest.mark.parametrize(
    ("task", "benchmark"),
    [
        ("mme", "MME"),
        ("mmerealworld_lite", "MME-RealWorld"),
        ("mmmu_val", "MMMU_DEV_VAL"),
        ("mvbench_action_count", "MVBench"),
        ("videomme_w_subtitle", "Video-MME"),
        ("longvideobench_val_v", "LongVideoBench"),
        ("gsm8k", None),
    ],
)
def test_a_task_is_known_by_the_longest_fitting_name(
    harnesses: dict, task: str, benchmark: str | None
) -> None:
    adapter = importlib.import_module("megatron_vita.evaluation.adapters.lmms_eval_model")
    found = adapter.benchmark_of(task)
    assert (found[0] if found else None) == benchmark


def test_vlmevalkit_gets_answers_by_the_rules_of_its_datasets(
    harnesses: dict, server: FakeChatServer, tmp_path: Path
) -> None:
    adapter = importlib.import_module("megatron_vita.evaluation.adapters.vlmevalkit_model")
    Image.new("RGB", (8, 8)).save(tmp_path / "frame.png")
    model = adapter.VitaAPI(server.url, retry=1, system_prompt="be brief")
    picture = {"type": "image", "value": str(tmp_path / "frame.png")}
    message = [picture, {"type": "text", "value": f"which?\n{SELECT}"}]
    assert model.generate_inner(message, dataset="MMBench_DEV_EN") == (0, "B", "")
    assert model.generate_inner(message, dataset="Video-MME")[:2] == (0, "B")
    images, frames = server.requests
    assert texts_of(images) == ["be brief", "\nwhich?\nAnswer with the letter."]
    assert images["messages"][1]["content"][0]["type"] == "image_url"
    video = b64decode(frames["messages"][1]["content"][0]["video_url"]["url"].split(",")[1])
    assert probe_video(video, "frame").frames == 1
    assert (
        zipfile.ZipFile(io.BytesIO(video)).read("frame.png")
        == (tmp_path / "frame.png").read_bytes()
    )


def test_adapters_need_neither_torch_nor_the_rest_of_the_package() -> None:
    program = (
        "import sys; import megatron_vita.evaluation.adapters.asking; "
        "sys.exit(bool({'torch', 'megatron', 'transformers', 'megatron_vita.platform'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
