"""Command line: python -m megatron_vita.evaluation, with needles in haystacks and held-out
questions."""

import hashlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_vita import platform
from megatron_vita.commands import run_command
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.answering import Answerer, EngineAnswerer, ServerAnswerer
from megatron_vita.inference.client.client import ChatServer

if TYPE_CHECKING:
    from megatron_vita.evaluation.needle_run import NeedleGrid
    from megatron_vita.evaluation.needles import Haystack

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Evaluate a checkpoint, or a model behind --server URL. An interrupted run continues with the "
        "same command."
    ),
)

Checkpoint = Annotated[
    Path | None, typer.Argument(help="A checkpoint, or a folder of checkpoints (the newest).")
]
Server = Annotated[str | None, typer.Option(help="Base URL of a server, instead of a checkpoint.")]
Model = Annotated[str | None, typer.Option(help="Model of the server; default: its first.")]
Out = Annotated[
    Path, typer.Option(help="Folder of results; those of an earlier run there are kept.")
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
    seed: Annotated[int, typer.Option(help="Seed of codes, names and positions.")] = 0,
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
    font_size: Annotated[int, typer.Option(min=4, help="Font size in pixels.")] = 16,
    shared: Annotated[
        bool, typer.Option("--shared", help="Needles of all depths in one haystack.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 1,
) -> None:
    """Hide codes on pages of text, ask for them, and draw a heat map of the codes found."""
    # Imported here: they load matplotlib, which --help and the other command do not need.
    from megatron_vita.evaluation.needle_run import run_needles
    from megatron_vita.evaluation.needles import Haystack
    from megatron_vita.evaluation.pages import Book, PageStyle, read_text

    style = PageStyle(size=page_size, font=font, font_size=font_size)
    book = Book(read_text(text or ()), style=style)
    haystack = Haystack(book=book, seed=seed, media=media, shared=shared)
    counts, tokens = _haystack_lengths(pages, lengths, server=server)
    answerer, name = _answerer(checkpoint, server=server, model=model, at_once=at_once)
    grid = _grid(
        answerer, haystack=haystack, counts=counts, tokens=tokens, depths=depths, needles=needles
    )
    report = run_needles(answerer, haystack=haystack, grid=grid, folder=out, model=name)
    typer.echo(
        f"{report['right']} of {report['asked']} codes found; {out / 'report.md'}, "
        f"{out / 'heat_map.png'}"
    )


def _haystack_lengths(
    pages: str, lengths: str, *, server: str | None
) -> tuple[list[int], list[int]]:
    """Parse --pages and --lengths, of which exactly one must be given."""
    counts = [_number(word, "pages") for word in pages.split(",") if word]
    tokens = [_number(word, "lengths") for word in lengths.split(",") if word]
    if bool(counts) == bool(tokens):
        raise ConfigError("either --pages or --lengths must give the lengths of the haystacks")
    if tokens and server is not None:
        raise ConfigError(
            "--lengths needs a checkpoint, whose recipe gives the tokens of a page: use --pages"
        )
    return counts, tokens


def _grid(
    answerer: Answerer,
    *,
    haystack: "Haystack",
    counts: list[int],
    tokens: list[int],
    depths: int,
    needles: int,
) -> "NeedleGrid":
    """Build the grid of questions, for haystacks of `counts` pages or of at most `tokens`."""
    from megatron_vita.evaluation.needle_run import NeedleGrid
    from megatron_vita.evaluation.needles import count_tokens, pages_within

    known: dict[int, int] = {}
    # A server does not say how it encodes pages, so their tokens are known for an engine alone.
    if isinstance(answerer, EngineAnswerer):
        encoder = answerer.engine.encoder  # type: ignore[attr-defined]
        style = haystack.book.style
        media = haystack.media
        for length in tokens:
            counts.append(pages_within(length, encoder=encoder, style=style, media=media))
        for count in counts:
            known[count] = count_tokens(count, encoder=encoder, style=style, media=media)
    places = [0.5]
    if depths > 1:
        places = [index / (depths - 1) for index in range(depths)]
    return NeedleGrid(pages=sorted(set(counts)), depths=places, needles=needles, tokens=known)


@app.command()
def questions(
    samples: Annotated[
        Path, typer.Argument(help="Chat JSONL; the last assistant turns are the references.")
    ],
    out: Out,
    checkpoint: Checkpoint = None,
    server: Server = None,
    model: Model = None,
    metric: Annotated[
        str, typer.Option(help="exact, contains (both normalized) or letter (of an option).")
    ] = "exact",
    group: Annotated[
        str | None, typer.Option(help="Field of the samples to group scores by.")
    ] = None,
    media: Annotated[
        Path | None,
        typer.Option(help="Folder of relative media paths; default: the JSONL's folder."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 16,
) -> None:
    """Answer held-out questions and grade the answers."""
    from megatron_vita.evaluation.questions import read_questions, run_questions

    # Questions first: a wrong sample must not cost the loading of a model.
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
    """Return the engine or server that answers, and its name in results."""
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
    """Parse a whole number; k means 1024 and m 1024 x 1024."""
    found = re.fullmatch(r"([1-9]\d*)([km]?)", word.strip().lower())
    if found is None:
        raise ConfigError(
            f"--{option} has {word!r}: whole numbers from 1 are needed, as 512 or 32k or 1m"
        )
    return int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2]]


def main(arguments: list[str], *, name: str = "python -m megatron_vita.evaluation") -> int:
    """Run the command and return its exit code; a user's error is one line and 1."""
    # Warnings only, as of other ranks: the progress bar has the terminal.
    platform.set_up_logging(rank=1)
    code = run_command(app, arguments, name=name)
    platform.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
