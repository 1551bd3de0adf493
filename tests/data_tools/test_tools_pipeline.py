"""From JSONL to a plan and a picture of a pack, by the commands alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.viewing import contact_sheet
from megatron_vita.data.planning.plan import read_plan
from tests.data_tools.toy_jsonl import sample, train_tokenizer, write_shards, write_world

TILES = contact_sheet.TILES_LEFT


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(tmp_path)
    train_tokenizer(tmp_path)
    write_shards(tmp_path)
    assert main(["index", str(tmp_path / "recipe.yaml")]) == 0
    return tmp_path


def test_indexes_are_made_again_only_where_the_shard_is_newer(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(world / "recipe.yaml")
    capsys.readouterr()
    main(["index", recipe])
    assert capsys.readouterr().out == "0 indexes written, 1 was current\n"
    (world / "toy/toy-000000.tar").touch()
    main(["index", recipe])
    assert capsys.readouterr().out == "1 index written, 0 were current\n"
    main(["index", recipe, "text.template=plain"])
    assert capsys.readouterr().out == "1 index written, 0 were current\n"


def test_a_plan_names_samples_longer_than_a_pack(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(world / "recipe.yaml")
    assert main(["plan", recipe, "data.seq_length=80"]) == 0
    assert "6 samples that cannot be used" in capsys.readouterr().out
    entries = [
        json.loads(line) for line in (world / "plan/rejected.jsonl").read_text().splitlines()
    ]
    assert len(entries) == 6
    assert entries[0]["key"] == "toy-00000001"
    assert main(["plan", recipe, "data.seq_length=80", "--strict"]) == 1
    assert "toy-000000.tar sample toy-00000001: " in capsys.readouterr().err
    assert main(["plan", recipe]) == 0
    assert (world / "plan/rejected.jsonl").read_text() == ""


def test_a_plan_that_cannot_be_made_leaves_the_one_that_is_there(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(world / "recipe.yaml")
    plan = world / "plan/train.arrow"
    assert main(["plan", recipe]) == 0
    before = plan.read_bytes()
    few = f"[{{name: toy, shards: '{world}/toy/*.tar', ratio: 0.01}}]"
    assert main(["plan", recipe, f"data.train={few}"]) == 1
    assert "error: dataset toy: ratio 0.01 of its 12 samples" in capsys.readouterr().err
    assert main(["plan", recipe, f"data.validation={few}"]) == 1
    assert "error: dataset toy: ratio 0.01 of its 12 samples" in capsys.readouterr().err
    assert plan.read_bytes() == before


def test_inspect_shows_text_loss_and_tiles_of_a_pack(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(world / "recipe.yaml")]) == 0
    png = world / "sheets/pack.png"
    assert main(["inspect", str(world / "recipe.yaml"), "--pack", "1", "--png", str(png)]) == 0
    text = capsys.readouterr().out
    assert "train pack 1: " in text
    assert "from toy: tokens 1 to " in text
    assert r"|im_start|>user\n[tile 1]" in text
    assert "  loss| It is number " in text
    assert r"<|im_end|>\n" in text
    assert Image.open(png).width == contact_sheet.WIDTH


def test_a_sheet_shows_tiles_in_order_beside_the_text(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = f"{world}/toy/toy-000000.tar:toy-00000002"
    png = world / "sample.png"
    assert main(["inspect", str(world / "recipe.yaml"), "--sample", sample, "--png", str(png)]) == 0
    assert r"[tile 1]\n[tile 2][tile 3]\nWhich" in capsys.readouterr().out
    sheet = Image.open(png)
    colors = [color for _, color in sheet.getcolors(maxcolors=1 << 20)]
    assert (20, 90, 160) in colors
    row = [sheet.getpixel((x, 200)) == (20, 90, 160) for x in range(sheet.width)]
    assert sum(row) == 3 * contact_sheet.THUMBNAIL


def test_a_sheet_lays_an_images_cells_as_they_lie_in_it_and_its_thumbnail_apart(
    world: Path,
) -> None:
    """Four quarters of different colours, in an image of 2 x 2 tiles."""
    quarters = {(0, 0): (200, 0, 0), (1, 0): (0, 200, 0), (0, 1): (0, 0, 200), (1, 1): (9, 9, 9)}
    image = Image.new("RGB", (56, 56))
    for (col, row), color in quarters.items():
        image.paste(color, (28 * col, 28 * row, 28 * col + 28, 28 * row + 28))
    image.save(world / "media/0.png")
    shard = ["shard", f"{world}/toy.jsonl", "--media", f"{world}/media", "--out", f"{world}/four"]
    recipe = [
        str(world / "recipe.yaml"),
        f"data.train=[{{name: four, shards: {world}/four/*.tar}}]",
    ]
    assert main(shard) == main(["index", *recipe]) == 0
    sample = f"{world}/four/four-000000.tar:toy-00000001"
    png = world / "sample.png"
    assert main(["inspect", *recipe, "--sample", sample, "--png", str(png)]) == 0
    sheet = Image.open(png)
    side = contact_sheet.THUMBNAIL
    top = next(y for y in range(sheet.height) if sheet.getpixel((TILES, y)) == quarters[0, 0])
    for (col, row), color in quarters.items():
        place = (TILES + col * (side + 1) + side // 2, top + row * (side + 1) + side // 2)
        assert sheet.getpixel(place) == color
    thumbnail = [sheet.getpixel((x, top + 10)) for x in range(TILES + 2 * side + 12, sheet.width)]
    assert {quarters[0, 0], quarters[1, 0]} <= set(thumbnail)


def test_an_image_of_internvls_form_is_shown_with_its_tiles_in_one_tag(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(world / "recipe.yaml")
    internvl = "text.media_format=internvl"
    arguments = [
        "inspect",
        recipe,
        "--sample",
        f"{world}/toy/toy-000000.tar:toy-00000002",
        internvl,
    ]
    assert main(arguments) == 1
    assert "the shard has no index for this tokenizer and template" in capsys.readouterr().err
    assert main(["index", recipe, internvl]) == 0
    assert main([*arguments, "--png", str(world / "sample.png")]) == 0
    shown = capsys.readouterr().out
    assert r"|im_start|>user\n[tile 1][tile 2][tile 3]\nWhich" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pack", "1"], "there is no plan"),
        (["--split", "test"], "--split is 'test'; known: train, validation"),
        (["--sample", "nonsense"], "SHARD.tar:KEY is needed"),
        (["--sample", "{world}/toy/toy-000000.tar:none"], "no sample 'none' among 12"),
    ],
)
def test_inspect_refuses_what_is_not_there(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = [argument.replace("{world}", str(world)) for argument in arguments]
    assert main(["inspect", str(world / "recipe.yaml"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_pack_past_the_last_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(world / "recipe.yaml")]) == 0
    assert main(["inspect", str(world / "recipe.yaml"), "--pack", "99"]) == 1
    assert "--pack is 99; the train plan has packs 1 to" in capsys.readouterr().err


def test_a_tokenizer_too_large_for_its_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path)
    assert (
        main(["tokenizer", str(path), "--out", str(tmp_path / "x.model"), "--vocab-size", "9000"])
        == 1
    )
    assert "at most" in capsys.readouterr().err
    assert main(["tokenizer", str(path), "--out", str(tmp_path / "x.txt")]) == 1
    assert "must end in .model" in capsys.readouterr().err


def test_a_bad_line_is_named_when_a_tokenizer_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('\n{"messages": []}\n')
    assert main(["tokenizer", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "x.model")]) == 1
    assert f"error: {tmp_path}/bad.jsonl:2: messages is an empty list" in capsys.readouterr().err


def test_bad_lines_cost_a_tokenizer_themselves_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path, count=60)
    good = path.read_text()
    command = ["tokenizer", str(path), "--out", str(tmp_path / "x.model"), "--vocab-size", "320"]
    assert main(command) == 0
    expected = (tmp_path / "x.model").read_bytes()
    path.write_text('{"messages": [\n' + good + '{"messages": null}\n{"images": 3, "text": "a"}\n')
    capsys.readouterr()
    assert main(command) == 0
    assert "from 120 texts; 3 lines rejected" in capsys.readouterr().out
    assert (tmp_path / "x.model").read_bytes() == expected
    listed = [json.loads(line) for line in (tmp_path / "x.rejected.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"][:12]) for entry in listed] == [
        (1, "not JSON: Ex"),
        (62, "no text amon"),
        (63, "images is 3:"),
    ]


def test_a_plan_is_continued_with_another_mix(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(world / "recipe.yaml")
    assert main(["plan", recipe, "data.epochs=2"]) == 0
    before = read_plan(world / "plan" / "train.arrow")
    assert main(["plan", recipe, "data.epochs=1", "--continue-from", "2"]) == 0
    after = read_plan(world / "plan" / "train.arrow")
    assert after.history == [{"packs": 2, "stamp": before.stamp}]
    assert [after.pack(pack) for pack in range(2)] == [before.pack(pack) for pack in range(2)]
    assert main(["plan", recipe, "--continue-from", "99"]) == 1
    assert "--continue-from is 99: the plan has " in capsys.readouterr().err


def test_frames_are_shown_with_their_times_in_a_colour_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path, count=2)
    (tmp_path / "media/film").mkdir()
    for i in range(8):
        Image.new("RGB", (28, 28), (30 * i, 0, 0)).save(tmp_path / f"media/film/{i}.png")
    (tmp_path / "media/film/fps.txt").write_text("2")
    turns = sample(0)["messages"]
    film = {"messages": [turns[0] | {"content": "<video>\nHm?"}, turns[1]], "videos": ["film"]}
    path.write_text(path.read_text() + json.dumps(film) + "\n")
    train_tokenizer(tmp_path)
    write_shards(tmp_path)
    for command in ("index", "plan"):
        assert main([command, str(tmp_path / "recipe.yaml")]) == 0
    capsys.readouterr()
    png = tmp_path / "pack.png"
    arguments = [
        "inspect",
        str(tmp_path / "recipe.yaml"),
        "--sample",
        f"{tmp_path}/toy/toy-000000.tar:toy-00000003",
    ]
    assert main([*arguments, "--png", str(png)]) == 0
    assert "[tile 1, 0.5 s][tile 2, 1.5 s][tile 3, 2.5 s][tile 4, 3.5 s]" in capsys.readouterr().out
    colors = {color for _, color in Image.open(png).getcolors(maxcolors=1 << 20)}
    # of frame runs; of the frames at 0.5 and 1.5 s
    assert {(201, 184, 230), (30, 0, 0), (90, 0, 0)} <= colors
