"""Show runs as one HTML page.

python -m megatron_vita.report RUN [RUN ...] --out report.html
"""

import base64
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from megatron_vita.commands import run_command
from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.errors import VitaError
from megatron_vita.report.reading import RunRecord, read_run
from megatron_vita.report.runs import CaptionedPicture, write_report

MAX_HEIGHT = 1200
"""Pixels of a pack's picture, from which on its documents are left out."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs: training.run_dir, or else checkpoint.save."),
    ],
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("report.html"),
    packs: Annotated[
        int,
        typer.Option(min=0, help="Packs of each run to show, from its first step to its last."),
    ] = 4,
) -> None:
    """Show loss, speed, memory, data, damage, restarts and packs of runs, side by side."""
    records = [read_run(folder) for folder in runs]
    pictures = [picture for record in records for picture in _pictures(record, packs)]
    write_report(records, out, pictures=pictures)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def _pictures(record: RunRecord, count: int) -> Iterator[CaptionedPicture]:
    """Contact sheets of the first pack of steps that are spread evenly over the run."""
    if not record.recipe:
        return
    recipe = recipe_from_dict(record.recipe)
    for step in spread_evenly(max(record.steps, default=0), count):
        pack = (step - 1) * recipe.training.global_batch_size + 1
        yield _picture(record.name, recipe, pack, caption=f"step {step:,}, pack {pack:,}")


def spread_evenly(last: int, count: int) -> list[int]:
    """At most `count` numbers from 1 to `last`, both included; 1 alone if `count` is 1."""
    if min(count, last) < 2:
        return list(range(1, 1 + min(count, last)))
    places = min(count, last)
    return [1 + i * (last - 1) // (places - 1) for i in range(places)]


def _picture(run: str, recipe: Recipe, pack: int, *, caption: str) -> CaptionedPicture:
    """The contact sheet of a pack; why not, where its data cannot be read any more."""
    # heavy, and of a room above this one: only a command line may reach there
    from data_tools.viewing.inspection import inspect_pack

    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder, "pack.png")
        try:
            inspect_pack(recipe, "train", pack, png=png, max_height=MAX_HEIGHT)
        except (VitaError, OSError) as error:
            return CaptionedPicture(run=run, caption=f"{caption}: {error}", url="")
        return CaptionedPicture(run=run, caption=caption, url=_data_url(png))


def _data_url(png: Path) -> str:
    jpeg = png.with_suffix(".jpg")
    Image.open(png).convert("RGB").save(jpeg, quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.read_bytes()).decode()}"


def main(arguments: list[str], *, name: str = "python -m megatron_vita.report") -> int:
    """Run the command and return its exit code; `name` is what help calls the program."""
    return run_command(app, arguments, name=name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
