"""YAML as users write it: keys that stand twice are errors everywhere, and a value is what its field
says, whatever YAML 1.1 would take it for."""

import ast
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.config import Recipe, load_recipe
from megatron_vita.data.samples.third_party import read_rule
from megatron_vita.errors import ConfigError

ROOT = Path(__file__).parents[2]


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml", overrides)


def value_of(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("text", "key", "line", "first"),
    [
        ("optimizer: {lr: 1}\nmedia: {}\n# later\noptimizer: {min_lr: 0}\n", "optimizer", 4, 1),
        ("optimizer:\n  lr: 1\n  min_lr: 0\n  lr: 2\n", "lr", 4, 2),
        ("data:\n  train:\n  - {name: a, shards: b,\n     name: c}\n", "name", 4, 3),
        ("optimizer: {'lr': 1, lr: 2}\n", "lr", 1, 1),
        ("base: a.yaml\nbase: b.yaml\n", "base", 2, 1),
    ],
)
def test_a_key_that_stands_twice_is_named_with_file_and_line(
    tmp_path: Path, text: str, key: str, line: int, first: int
) -> None:
    told = rf"recipe\.yaml:{line}: the key {key} occurs twice, first in line {first}"
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, text)


def test_keys_that_stand_twice_are_named_in_bases_rules_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("model: {}\nmodel: {}\n")
    with pytest.raises(ConfigError, match=r"model\.yaml:2: the key model occurs twice"):
        load(tmp_path, "base: [model.yaml]\n")
    (tmp_path / "members.yaml").write_text("prompt: a\ntext: txt\nprompt: b\n")
    with pytest.raises(ConfigError, match=r"members\.yaml:3: the key prompt occurs twice"):
        read_rule(tmp_path)
    with pytest.raises(
        ConfigError, match=r"override 'data={epochs: 1, epochs: 2}': the key epochs"
    ):
        load(tmp_path, "media: {}", "data={epochs: 1, epochs: 2}")


def test_merged_keys_may_be_replaced(tmp_path: Path) -> None:
    text = "data:\n  train:\n  - &a {name: a, shards: x}\n  - {<<: *a, name: b}\n"
    assert [dataset.name for dataset in load(tmp_path, text).data.train] == ["a", "b"]


def test_there_is_one_reader_of_yaml() -> None:
    files = [
        path
        for folder in ("megatron_vita", "data_tools", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "yaml_file.py"
    ]
    for path in files:
        nodes = ast.walk(ast.parse(path.read_text()))
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        called = {ast.unparse(node) for node in attributes}
        assert not {name for name in called if name.startswith("yaml.") and "load" in name}, path


TEXTS = [
    "@shared/tok", "%x", "2026-11-28", "20261128", "0012", "1:30", "010", "no", "Yes", "on", "off",
    "1e-4", "1_000", "a: b: c", "a: b", "a # b", "#a", "*", "*a", "&a", "!x", "!!int 3", "`x`", "|",
    ">", "- a", "?", "-", "[a", '"a', "a, b", "1.0", "true", "12:34:56", "2001-12-14t21:59:43Z", "=",
    "a=b", "s3://bucket/x", "C:\\x",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_text_is_taken_as_it_stands(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, "media: {}", f"data.plan={text}").data.plan == text


FILE_TEXTS = [
    "2026-11-28",
    "20261128",
    "0012",
    "1:30",
    "010",
    "no",
    "1e-4",
    "true",
    "0x1F",
    "12e03",
]


@pytest.mark.parametrize("text", FILE_TEXTS)
def test_text_of_a_file_needs_no_quotes(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, f"data: {{plan: {text}, train: [{{name: {text}, shards: x}}]}}\n")
    assert (recipe.data.plan, recipe.data.train[0].name) == (text, text)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.lr=.5e-3", "optimizer.lr", 5e-4),
        ("training.train_iters=1_000", "training.train_iters", 1000),
        ("training.train_iters=0x10", "training.train_iters", 16),
        ("training.bf16=yes", "training.bf16", True),
        ("training.bf16=Off", "training.bf16", False),
        ("data.plan='a b'", "data.plan", "a b"),
        ('data.plan="no"', "data.plan", "no"),
        ("data.plan=", "data.plan", ""),
        ("data={seq_length: 1024, plan: 007}", "data.plan", "007"),
        ("media.grids=[2x1, 1x2]", "media.grids", ["2x1", "1x2"]),
        ("parallel.pipeline_model_parallel_size= 1 ", "parallel.pipeline_model_parallel_size", 1),
    ],
)
def test_an_override_has_the_type_of_its_field(
    tmp_path: Path, override: str, path: str, value: Any
) -> None:
    found = value_of(load(tmp_path, "media: {}", override), path)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[{name: t", r"data\.train is '\[\{name: t': a list is needed"),
        ("data=%", "data is '%': a group of fields is needed"),
        ("training.train_iters=010", r"training\.train_iters is '010': int is needed"),
        ("training.train_iters=1:30", r"training\.train_iters is '1:30': int is needed"),
        ("training.train_iters=yes", r"training\.train_iters is 'yes': int is needed"),
        (
            "training.train_iters=2026-11-28",
            r"training\.train_iters is '2026-11-28': int is needed",
        ),
        ("training.train_iters=1.5", r"training\.train_iters is 1\.5: int is needed"),
        ("training.train_iters=", r"training\.train_iters is '': int is needed"),
        ("optimizer.lr=1:30", r"optimizer\.lr is '1:30': float is needed"),
        ("optimizer.lr=010", r"optimizer\.lr is '010': float is needed"),
        ("optimizer.lr=@x", r"optimizer\.lr is '@x': float is needed"),
        ("training.bf16=maybe", r"training\.bf16 is 'maybe': bool is needed"),
        ("data.plan=null", r"data\.plan is None: str is needed"),
        ("data.plan=[a]", r"data\.plan is \['a'\]: str is needed"),
        ("data={plan: [a]}", r"data\.plan is \['a'\]: str is needed"),
        ("data.train=[{shards: x}]", r"data\.train\[0\]\.name is missing"),
        ("media.max_tile=4", r"unknown field media\.max_tile; did you mean media\.max_tiles\?"),
        ("medias.max_tiles=4", r"unknown field medias; did you mean media\?"),
        ("media.max_tiles=0", r"media\.min_tiles is 1 and media\.max_tiles 0: "),
        ("training.train_iters=-1", r"training\.train_iters is -1: it must be at least 1"),
    ],
)
def test_an_override_that_is_wrong_is_named_in_one_line(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f": {message}") as error:
        load(tmp_path, "media: {}", "media.normalization=siglip", override)
    assert str(error.value).startswith(f"override {override!r}: ")
    assert "\n" not in str(error.value)


def test_a_wrong_value_of_the_file_is_not_blamed_on_an_override(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^\S*recipe\.yaml: data\.plan is None"):
        load(tmp_path, "data: {plan: null}", "data.seq_length=64", "media.max_tiles=4")
    with pytest.raises(ConfigError, match=r"^\S*recipe\.yaml: unknown field lr; did you mean"):
        load(tmp_path, "lr: 1", "optimizer.lr=2")


def test_bad_yaml_is_refused_in_one_line_with_its_line(tmp_path: Path) -> None:
    for text, told in (("data:\n  - [\n", "line 3"), ("x: @y", "line 1"), ("a: b: c", "line 1")):
        with pytest.raises(ConfigError, match=rf"recipe\.yaml: not YAML: {told}: ") as error:
            load(tmp_path, text)
        assert "\n" not in str(error.value)


def test_a_base_may_be_named_alone(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("optimizer: {lr: 5e-3}\n")
    assert load(tmp_path, "base: one.yaml\n").optimizer.lr == 5e-3
