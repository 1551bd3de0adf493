"""Hooks of mkdocs: the README is the first page, fields of recipes and results of benchmarks are
pages of the site.

In the checkout these files lie beside docs/, and pages link to them there. The links are rewritten
for the site, with their anchors; those to other files of the project lead nowhere in it and become
plain text.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_vita.config.help import describe_fields

ROOT = Path(__file__).parent.parent
COPIED = ("benchmarks/results/*.md", "benchmarks/baselines/*.json")
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
"""Files of the project's folder, by their names in the site."""
LINK = re.compile(
    r"\[(?P<text>(?:[^\[\]]|\[[^\]]*\](?:\([^)]*\))?)*)\]"  # which may hold an image
    r"\((?![a-z]+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)"
)
"""A link to a file of the project."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that do not lie in docs/."""
    for name, moved in MOVED.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, moved, content=text))
    files.append(File.generated(config, "fields.md", content="\n".join(fields_page())))
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def fields_page() -> Iterator[str]:
    """Yield the lines of a page with all fields, as `vita train --help` prints them."""
    yield "# Recipe fields\n"
    yield "Each with its type or choices, its default and bounds; `vita train --help` prints the same.\n"
    for entry in describe_fields():
        head, _, documentation = entry.strip().partition("\n")
        if not documentation:
            group, _, words = head.partition(": ")
            yield f"\n## {group}\n\n{words}\n"
            continue
        yield f"* `{head}`<br>{documentation.strip()}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files beside docs/, and those of pages that lie beside it."""
    name = page.file.src_uri
    if name.startswith("benchmarks/"):
        return markdown  # relative to each other already

    def is_known(target: str) -> bool:
        return files.get_file_from_path(target) is not None

    return rewritten(markdown, is_beside=name in MOVED.values(), is_known=is_known)


def rewritten(markdown: str, *, is_beside: bool, is_known: Callable[[str], bool]) -> str:
    """Rewrite the links of a page.

    Args:
        markdown: the page.
        is_beside: the page lies beside docs/ in the checkout, and not in it.
        is_known: tells whether the site has a file of a name.
    """

    def rewrite(link: re.Match[str]) -> str:
        target = link["target"]
        if is_beside:
            place = target.removeprefix("docs/")
        elif target.startswith("../"):
            place = target.removeprefix("../")
        else:
            return link[0]  # to a page of the same folder
        place = MOVED.get(place, place)
        if is_known(place):
            return f"[{link['text']}]({place}{link['anchor'] or ''})"
        return link["text"]

    return LINK.sub(rewrite, markdown)
