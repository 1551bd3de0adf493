"""Pages link to files and headings that exist, name fields and options that exist, and are in the
site's menu."""

import argparse
import functools
import logging
import pkgutil
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
import yaml

from megatron_vita.cli.vita import COMMANDS
from megatron_vita.config import Recipe
from megatron_vita.config.help import describe_fields

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
GROUPS = (
    r"model\.(?:vision|projector|language)|parallel|data|media|text|optimizer|training|checkpoint"
    r"|generation|lora|dpo|numerics"
)
FIELD = re.compile(rf"`(({GROUPS})\.[a-z][\w.]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]+")
OURS_RUN = re.compile(
    r"(?:^ *|`|-m megatron_)vita (?P<command>[a-z]+) ?(?P<rest>[^`\n#]*)", re.MULTILINE
)
NOT_OURS = {
    "--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port",
    "--max-restarts", "--nproc-per-node", "--rdzv-backend", "--rdzv-conf", "--rdzv-endpoint",  # torchrun
    "--nodes", "--time", "--account", "--partition", "--requeue", "--signal",  # Slurm
    "--gpus", "--shm-size", "--ulimit", "--tag", "--file", "--build-arg",  # Docker
    "--env",  # SkyPilot
    "--no-build-isolation", "--force-reinstall", "--no-deps",  # pip
    "--head",  # ray
    "--model_args", "--batch_size",  # lmms-eval
}  # fmt: skip


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        there = page
        if target:
            there = (page.parent / target).resolve()
        # made while the site is built
        if there == ROOT / "docs" / "fields.md":
            continue
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor[1:] in anchors(there), f"{page.name} links to {target}{anchor}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_fields_that_pages_name_exist(page: Path) -> None:
    known = {entry.strip().partition(":")[0] for entry in describe_fields(Recipe)}
    files = {path.name for path in ROOT.glob("megatron_vita/**/*.py")}
    for name, _ in FIELD.findall(page.read_text(encoding="utf-8")):
        is_file = name.rpartition("/")[2] in files or name.endswith((".py", ".yaml", ".json"))
        in_list = name.replace(".train.", ".train[].")
        assert is_file or in_list.rstrip(".") in known or _is_module(name), f"{page.name}: {name}"


def _is_module(name: str) -> bool:
    """Tell whether a dotted name is a module of the package or begins with one."""
    path = ROOT / "megatron_vita" / name.replace(".", "/")
    return (
        path.is_dir() or path.with_suffix(".py").exists() or path.parent.with_suffix(".py").exists()
    )


@functools.cache
def declared_options() -> set[str]:
    """Options and names of fields and arguments, from which options are derived, in the code."""
    folders = ("megatron_vita", "data_tools", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(
        file.read_text(encoding="utf-8") for file in [*files, ROOT / "tests/conftest.py"]
    )
    return {*re.findall(r'"(--[\w-]+)"', code), *re.findall(r"^\s+(\w+): ", code, re.MULTILINE)}


# The page of Long-VITA's scripts names theirs.
OURS = [page for page in PAGES if page.parent.name == "docs" and page.name != "migration.md"]
OURS.append(ROOT / "README.md")


def text_of(page: Path) -> str:
    """Text of a page, with commands of several lines joined."""
    return re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_options_that_pages_name_exist(page: Path) -> None:
    # Prose speaks of launchers' options too; a command of `vita` is compared with its own below.
    for option in set(OPTION.findall(page.read_text(encoding="utf-8"))) - NOT_OURS:
        # Declared as it is, or derived from the name of a field: --max-context from max_context.
        name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        assert {option, name} & declared_options(), f"{page.name}: {option}"


class Parsed(BaseException):
    """Parser of a command that was about to read its arguments."""

    def __init__(self, parser: Any) -> None:
        super().__init__()
        self.parser = parser


@functools.cache
def parser_of(command: str) -> Any:
    """Parser of a command of `vita`, an argparse or a typer one."""

    def stop(parser: Any, *_: Any, **__: Any) -> NoReturn:
        raise Parsed(parser)

    main = pkgutil.resolve_name(COMMANDS[command].main)
    logger = logging.getLogger("megatron_vita")
    with pytest.MonkeyPatch.context() as patch:
        # Commands set it for good.
        patch.setattr(logger, "setLevel", lambda level: None)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(typer.Typer, "__call__", stop)
        with pytest.raises(Parsed) as found:
            main([], name=command)
    return found.value.parser


def options_of(command: str, rest: str) -> set[str]:
    """Options that a command of `vita`, or its subcommand that `rest` begins with, declares."""
    parser = parser_of(command)
    if isinstance(parser, argparse.ArgumentParser):
        return set(parser._option_string_actions)
    found: Any = typer.main.get_command(parser)
    if hasattr(found, "commands") and not rest.startswith("-"):
        found = found.commands[rest.split()[0]]
    names = [name for each in found.params for name in (*each.opts, *each.secondary_opts)]
    return {*names, "--help"}


def wrong_options(text: str) -> list[str]:
    """Options in the commands of a text that the command itself does not have."""
    return [
        f"vita {command} {rest.strip()}: {option}"
        for command, rest in OURS_RUN.findall(text)
        if OPTION.search(rest)
        for option in sorted(set(OPTION.findall(rest)) - options_of(command, rest))
    ]


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_commands_of_pages_have_the_options_that_they_are_given(page: Path) -> None:
    assert wrong_options(text_of(page)) == []


def test_an_option_of_another_command_is_found() -> None:
    text = """Say `vita convert to-hf A B --suggest`, or
    torchrun --standalone -m megatron_vita train recipe.yaml --media x
    vita data shard a.jsonl --out b --media c --metric exact  # or --pack
    vita convert from-hf A B --verify
    """
    assert [each.rpartition(" ")[2] for each in wrong_options(text)] == [
        "--suggest", "--media", "--metric"
    ]  # fmt: skip


def test_every_page_is_in_the_menu_once() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = re.findall(r"[\w-]+\.md", str(menu))
    made = {"index.md", "fields.md"}
    assert sorted(pages) == sorted({path.name for path in ROOT.glob("docs/*.md")} | made)
