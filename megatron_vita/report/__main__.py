"""Show runs as one HTML page.

python -m megatron_vita.report RUN [RUN ...] --out report.html
"""

import base64
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from megatron_vita.commands import run_command
from megatron_vita.config import recipe_from_dict
from megatron_vita.errors import VitaError
from megatron_vita.report.reading import RunRecord, read_run
from megatron_vita.report.runs import CaptionedPicture, write_report

MOST_HEIGHT = 4000
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs: training.run_dir, or else checkpoint.save."),
    ],
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("report.html"),
    pack: Annotated[int, typer.Option(help="Pack of each run to show, from 1; 0: none.")] = 1,
) -> None:
    """Show loss, speed, memory, data, damage, restarts and a pack of runs, side by side."""
    records = [read_run(folder) for folder in runs]
    pictures = [_picture(record, pack) for record in records if pack and record.recipe]
    write_report(records, out, pictures=pictures)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def _picture(record: RunRecord, pack: int) -> CaptionedPicture:
    """The contact sheet of a pack; why not, where its data cannot be read any more."""
    # heavy, and of a room above this one: only a command line may reach there
    from data_tools.inspection import inspect_pack

    caption = f"pack {pack} of the training plan"
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder, "pack.png")
        try:
            inspect_pack(recipe_from_dict(record.recipe), "train", pack, png=png)
        except (VitaError, OSError) as error:
            return CaptionedPicture(run=record.name, caption=f"{caption}: {error}", url="")
        return CaptionedPicture(run=record.name, caption=caption, url=_data_url(png))


def _data_url(png: Path) -> str:
    picture = Image.open(png).convert("RGB")
    picture = picture.crop((0, 0, picture.width, min(picture.height, MOST_HEIGHT)))
    jpeg = png.with_suffix(".jpg")
    picture.save(jpeg, quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.read_bytes()).decode()}"


def main(arguments: list[str], *, name: str = "python -m megatron_vita.report") -> int:
    """Run the command and return its exit code; `name` is what help calls the program."""
    return run_command(app, arguments, name=name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
