"""Links of pages lead to the same places on the site as in the checkout, anchors included."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MKDOCS = ("mkdocs", "mkdocs.config", "mkdocs.config.defaults", "mkdocs.structure",
          "mkdocs.structure.files", "mkdocs.structure.pages")  # fmt: skip
SITE = {"index.md", "recipes.md", "CHANGELOG.md", "benchmarks/results/a.md", "demo.png"}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """The hooks, without mkdocs, which `make docs` alone installs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in MKDOCS:
            patch.setitem(sys.modules, name, MagicMock())
        spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../CHANGELOG.md)", "[a](CHANGELOG.md)"),
        ("[a](../benchmarks/results/a.md#the-end)", "[a](benchmarks/results/a.md#the-end)"),
        ("[a](../README.md#start)", "[a](index.md#start)"),
        ("[a `b` c](../examples/x.yaml)", "a `b` c"),
        ("[a](../examples/x.py#L3) and [b](../CHANGELOG.md)", "a and [b](CHANGELOG.md)"),
        ("[![a](../demo.png)](../CHANGELOG.md#new)", "[![a](../demo.png)](CHANGELOG.md#new)"),
        ("[[a]](../CHANGELOG.md)", "[[a]](CHANGELOG.md)"),
        ("[a](recipes.md#stopping)", "[a](recipes.md#stopping)"),
        ("[a](https://x.org/../y) [b](#here)", "[a](https://x.org/../y) [b](#here)"),
    ],
)
def test_links_to_files_beside_docs_keep_their_anchors(
    hooks: ModuleType, link: str, expected: str
) -> None:
    assert hooks.rewritten(link, is_beside=False, is_known=SITE.__contains__) == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](docs/recipes.md#stopping)", "[a](recipes.md#stopping)"),
        ("![a](docs/demo.png)", "![a](demo.png)"),
        ("[a](CHANGELOG.md#new)", "[a](CHANGELOG.md#new)"),
        ("[a](examples/easy_vqa)", "a"),
        ("[a](mailto:x@y.org)", "[a](mailto:x@y.org)"),
    ],
)
def test_links_of_the_readme_lead_to_pages_of_the_site(
    hooks: ModuleType, link: str, expected: str
) -> None:
    assert hooks.rewritten(link, is_beside=True, is_known=SITE.__contains__) == expected


def test_the_site_is_built_in_ci_with_broken_links_as_errors() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step.get("run", "") for step in jobs["docs"]["steps"]]
    assert any(step.startswith("make docs") for step in steps)
    assert "mkdocs build --strict" in (ROOT / "Makefile").read_text()
    links = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["validation"]["links"]
    assert set(links.values()) == {"warn"}
    assert {"not_found", "anchors"} <= links.keys()
