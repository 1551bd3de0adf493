"""Dependencies: declared in pyproject.toml as ranges, pinned in requirements.txt."""

import ast
import importlib.metadata
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_vita.commands import EXTRAS
from tests.environment import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"ray", "transformer_engine", "flash_attn", "lmms_eval", "vlmeval"}
"""Imported where they are present; the features without them say what to install."""
THROUGH = {"triton": "torch", "starlette": "fastapi", "pydantic_core": "pydantic"}
"""Parts of declared packages that are packages of their own."""
PACKAGES = ("megatron_vita", "data_tools")


def declared(*extras: str) -> dict[str, Requirement]:
    """Requirements of the package and of the extras, by name."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): each for each in found}


def pins(name: str) -> dict[str, Requirement]:
    """Requirements of a file, by name."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(each.name): each for each in found}


def imported() -> set[str]:
    """Names of the packages that the wheel's files import."""
    names = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            # Modelling files run where an export is opened, with transformers and its needs.
            if path.parent.name == "exported":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


def test_what_the_package_imports_is_declared() -> None:
    extras = [name for name in PROJECT["optional-dependencies"] if name not in ("dev", "gpu")]
    known = set(declared(*extras))
    distributions = importlib.metadata.packages_distributions()
    for module in sorted(imported() - OPTIONAL):
        owners = distributions.get(THROUGH.get(module, module), [])
        assert known & set(map(canonicalize_name, owners)), f"{module} is imported, not declared"


def test_every_declared_dependency_has_a_pin_inside_its_range() -> None:
    pinned = pins("requirements.txt") | pins("requirements-gpu.txt")
    for name, requirement in declared(*PROJECT["optional-dependencies"]).items():
        if name == canonicalize_name(PROJECT["name"]):
            continue
        (pin,) = pinned[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version, prereleases=True), name
        assert requirement.extras == pinned[name].extras


@pytest.mark.parametrize("extra", ["server", "eval", "wandb", "mlflow"])
def test_an_error_names_the_extra_of_each_module_that_it_brings(extra: str) -> None:
    distributions = importlib.metadata.packages_distributions()
    brought = {
        canonicalize_name(owner)
        for module, named in EXTRAS.items()
        if named == extra
        for owner in distributions[THROUGH.get(module, module)]
    }
    assert set(declared(extra)) - set(declared()) <= brought


def test_every_pin_is_declared() -> None:
    known = set(declared(*PROJECT["optional-dependencies"]))
    assert set(pins("requirements.txt")) <= known
