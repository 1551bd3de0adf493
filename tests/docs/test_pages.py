"""Pages link to files and headings that exist, name fields and options that exist, and are in the
site's menu."""

import functools
import re
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_options_that_pages_name_exist(page: Path) -> None:
    for option in set(OPTION.findall(page.read_text(encoding="utf-8"))) - NOT_OURS:
        # Declared as it is, or derived from the name of a field: --max-context from max_context.
        name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        assert {option, name} & declared_options(), f"{page.name}: {option}"


def test_every_page_is_in_the_menu_once() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = re.findall(r"[\w-]+\.md", str(menu))
    made = {"index.md", "fields.md"}
    assert sorted(pages) == sorted({path.name for path in ROOT.glob("docs/*.md")} | made)
