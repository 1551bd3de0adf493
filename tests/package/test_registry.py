"""Names that other packages add: found, refused and loaded by one rule for every kind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vita import registry
from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.families.folder_formats import FOLDER_FORMATS, format_of
from megatron_vita.errors import ConfigError
from megatron_vita.registry import Registry, register
from tests.environment import ROOT, environment_with


@pytest.fixture
def metrics() -> Iterator[Registry[int]]:
    """A registry of metrics; what a test adds goes after it."""
    before = dict(registry._added["metric"])
    yield Registry("metric", {"own": 1})
    registry._added["metric"] = before


def test_what_is_registered_stands_beside_the_packages_own(metrics: Registry[int]) -> None:
    register("metric", "mine", 2)
    assert metrics["own"] == 1
    assert metrics["mine"] == 2
    assert "mine" in metrics
    assert "yours" not in metrics


def test_a_decorator_gives_back_what_it_registers(metrics: Registry[int]) -> None:
    @register("metric", "mine")
    def mine() -> None: ...

    assert metrics["mine"] is mine


def test_the_same_name_again_replaces(metrics: Registry[int]) -> None:
    register("metric", "mine", 2)
    register("metric", "mine", 3)
    assert metrics["mine"] == 3


def test_a_name_of_the_package_is_refused(metrics: Registry[int]) -> None:
    register("metric", "own", 2)
    with pytest.raises(ConfigError, match="metric 'own' is the package's own"):
        list(metrics)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind is 'metrics'; known: data_format, "):
        register("metrics", "mine", 1)  # type: ignore[call-overload]


def test_a_folder_format_is_found_by_its_model_type() -> None:
    before = dict(registry._added["folder_format"])
    mine = replace(FOLDER_FORMATS["internvit"], name="mine", model_types=("my_vit",))
    register("folder_format", "mine", mine)
    try:
        assert format_of(Config({"model_type": "my_vit"}, "config.json")) is mine
    finally:
        registry._added["folder_format"] = before


def run_with_plugin(folder: Path, text: str) -> subprocess.CompletedProcess:
    """List metrics in a process for which `folder` holds an installed package with a plugin."""
    (folder / "my_plugin.py").write_text(text)
    info = folder / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megatron_vita.plugins]\nmine = my_plugin\n")
    code = "from megatron_vita.evaluation.grading import METRICS; print(*METRICS)"
    command = [sys.executable, "-c", code]
    environment = environment_with(PYTHONPATH=os.pathsep.join([str(ROOT), str(folder)]))
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.sep)


def test_an_installed_package_adds_by_its_entry_point(tmp_path: Path) -> None:
    text = "from megatron_vita import register\nregister('metric', 'mine', len)\n"
    ran = run_with_plugin(tmp_path, text)
    assert ran.stdout == "exact contains letter mine\n", ran.stderr


def test_a_plugin_that_fails_is_named(tmp_path: Path) -> None:
    ran = run_with_plugin(tmp_path, "import no_such_module\n")
    assert ran.returncode == 1
    assert (
        "plugin mine (my_plugin) cannot be imported: "
        "ModuleNotFoundError: No module named 'no_such_module'" in ran.stderr
    )
