"""python -m megatron_vita.evaluation: needles in haystacks of pages, and held-out questions."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_vita import platform
from megatron_vita.commands import run_command
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.answering import Answerer, EngineAnswerer, ServerAnswerer
from megatron_vita.inference.client.client import ChatServer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure what a checkpoint, or a model behind --server URL, can do. A run that was cut short goes on.",
)

Checkpoint = Annotated[
    Path | None, typer.Argument(help="A checkpoint, or a folder of checkpoints: its newest.")
]
Server = Annotated[str | None, typer.Option(help="Base URL of a server, instead of a checkpoint.")]
Model = Annotated[str | None, typer.Option(help="Which of the server's models; its first.")]
Out = Annotated[
    Path, typer.Option(help="Folder of results, and of those of an earlier run that is taken up.")
]


@app.command()
def needle(
    out: Out,
    checkpoint: Checkpoint = None,
    server: Server = None,
    model: Model = None,
    pages: Annotated[str, typer.Option(help="Lengths of haystacks in pages, as 1,8,64.")] = "",
    lengths: Annotated[
        str, typer.Option(help="Lengths in tokens, as 4k,32k,1m (of 1024); checkpoints only.")
    ] = "",
    depths: Annotated[
        int, typer.Option(min=1, help="Depths, evenly from the first page to the last.")
    ] = 11,
    needles: Annotated[int, typer.Option(min=1, help="Questions of each length and depth.")] = 3,
    seed: Annotated[int, typer.Option(help="Of codes, names, and places.")] = 0,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text of the haystack (may be repeated).")
    ] = None,
    media: Annotated[
        str, typer.Option(help="Pages as images, or as frames of one video.")
    ] = "images",
    page_size: Annotated[int, typer.Option(help="Width and height of a page in pixels.")] = 448,
    font: Annotated[
        str, typer.Option(help="Font of even width: a family, or a file.")
    ] = "DejaVu Sans Mono",
    font_size: Annotated[int, typer.Option(min=4, help="Pixels.")] = 16,
    shared: Annotated[
        bool, typer.Option("--shared", help="Needles of all depths in one haystack.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts under way at a time.")] = 1,
) -> None:
    """Hide codes on pages of text, ask for them, and draw a heat map of what was found."""
    from megatron_vita.evaluation.needle_run import Grid, run_needles
    from megatron_vita.evaluation.needles import Haystack, count_tokens, pages_within
    from megatron_vita.evaluation.pages import Book, PageStyle, read_text

    style = PageStyle(size=page_size, font=font, font_size=font_size)
    haystack = Haystack(
        book=Book(read_text(text or ()), style=style), seed=seed, media=media, shared=shared
    )
    counts = [_number(word, "pages") for word in pages.split(",") if word]
    tokens = [_number(word, "lengths") for word in lengths.split(",") if word]
    if bool(counts) == bool(tokens):
        raise ConfigError("either --pages or --lengths must say how long the haystacks are")
    if tokens and server is not None:
        raise ConfigError(
            "--lengths needs a checkpoint, whose recipe tells the tokens of a page: give --pages"
        )
    answerer, name = _answerer(checkpoint, server=server, model=model, at_once=at_once)
    known: dict[int, int] = {}
    if isinstance(answerer, EngineAnswerer):
        form = answerer.engine.form  # type: ignore[attr-defined]
        counts += [pages_within(length, form=form, style=style, media=media) for length in tokens]
        known = {
            count: count_tokens(count, form=form, style=style, media=media) for count in counts
        }
    places = [index / (depths - 1) for index in range(depths)] if depths > 1 else [0.5]
    grid = Grid(pages=sorted(set(counts)), depths=places, needles=needles, tokens=known)
    report = run_needles(answerer, haystack=haystack, grid=grid, folder=out, model=name)
    typer.echo(
        f"{report['right']} of {report['asked']} codes found; {out / 'report.md'}, {out / 'heat_map.png'}"
    )


@app.command()
def questions(
    samples: Annotated[
        Path, typer.Argument(help="Chat JSONL; last assistant turns are the right answers.")
    ],
    out: Out,
    checkpoint: Checkpoint = None,
    server: Server = None,
    model: Model = None,
    metric: Annotated[
        str, typer.Option(help="exact, contains (both normalised) or letter (of an option).")
    ] = "exact",
    group: Annotated[
        str | None, typer.Option(help="Field of the samples by which answers are counted apart.")
    ] = None,
    media: Annotated[
        Path | None, typer.Option(help="Where relative media paths begin; at the JSONL's folder.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts under way at a time.")] = 16,
) -> None:
    """Answer held-out questions and grade the answers."""
    from megatron_vita.evaluation.questions import read_questions, run_questions

    held_out = read_questions(samples, media=media or samples.parent, group=group)
    answerer, name = _answerer(checkpoint, server=server, model=model, at_once=at_once)
    settings = {"model": name, "samples": hashlib.sha256(samples.read_bytes()).hexdigest()[:16]}
    report = run_questions(
        answerer,
        held_out,
        metric=metric,
        folder=out,
        max_new_tokens=max_new_tokens,
        settings=settings,
    )
    left_out = f", {len(held_out.rejected)} samples rejected" if held_out.rejected else ""
    score = report["all"]
    typer.echo(f"{score['right']} of {score['asked']} right{left_out}; {out / 'report.md'}")


def _answerer(
    checkpoint: Path | None, *, server: str | None, model: str | None, at_once: int
) -> tuple[Answerer, str]:
    """Who answers, and its name in results."""
    if (checkpoint is None) == (server is None):
        raise ConfigError("either a checkpoint or a --server must answer")
    if server is not None:
        chat_server = ChatServer(server, model=model)
        return ServerAnswerer(chat_server, at_once=at_once), chat_server.model
    from megatron_vita.checkpoint.store import find_checkpoint
    from megatron_vita.inference.engine.engine import Engine

    assert checkpoint is not None
    found = find_checkpoint(checkpoint)
    return EngineAnswerer(Engine.from_checkpoint(found), at_once=at_once), str(found)


def _number(word: str, option: str) -> int:
    """A whole number, in which k stands for 1024 and m for 1024 x 1024."""
    found = re.fullmatch(r"([1-9]\d*)([km]?)", word.strip().lower())
    if found is None:
        raise ConfigError(
            f"--{option} has {word!r}: whole numbers from 1 are needed, as 512 or 32k or 1m"
        )
    return int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2]]


def main(arguments: list[str], *, name: str = "python -m megatron_vita.evaluation") -> int:
    """Run the command and return its exit code; a user's error is one line and 1."""
    platform.set_up_logging(rank=1)  # warnings only: the bar has the terminal
    code = run_command(app, arguments, name=name)
    platform.leave_process()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
