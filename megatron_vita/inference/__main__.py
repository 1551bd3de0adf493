"""Command-line client: ask a checkpoint or a server about images and videos."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Annotated

import typer

from megatron_vita import platform
from megatron_vita.commands import run_command, takes_options
from megatron_vita.errors import ConfigError, DataError, LogitsError, VitaError
from megatron_vita.inference.client.client import KEY_VARIABLES, ChatServer, TextDelta, TokenText
from megatron_vita.inference.client.conversation import Conversation
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import ADVISED, SamplingParams, ScoredToken, advised
from megatron_vita.text.tokenizer_base import Tokenizer

HELP = f"""Ask a checkpoint, or a running server (--server URL), about images and videos.

Without a QUESTION this is a conversation: questions are read from the terminal, one per line, and earlier turns are
kept. /image FILE and /video FILE add a file to the next question, /reset clears the conversation, /exit ends it. Ctrl-C
stops an answer. Temperature, top-k, top-p and repetition penalty that are not given are the checkpoint's recipe's
(`generation`), or the server's. With --server give no CHECKPOINT; the API key is read from the environment variable
{" or ".join(KEY_VARIABLES)}.
"""

Stream = Callable[[Prompt], Iterator[TextDelta]]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
@takes_options(SamplingParams, into="sampling")
def ask(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="A checkpoint, or a folder of checkpoints (the newest is used)."),
    ] = None,
    question: Annotated[str | None, typer.Argument(help="The question.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="An image file (repeatable).")] = None,
    video: Annotated[list[str] | None, typer.Option(help="A video file (repeatable).")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer to use in place of the checkpoint's.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Base URL of a server, such as http://localhost:8000/v1.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model of the server (default: the first that it lists).")
    ] = None,
    *,
    sampling: SamplingParams,
) -> int:
    """Ask one question, or hold a conversation."""
    unset = _unset_options(context, sampling)
    conversation = Conversation(next_images=_read(image), next_videos=_read(video))
    if server is None:
        stream = _local_stream(checkpoint, tokenizer=tokenizer, sampling=sampling, unset=unset)
    elif question is not None or tokenizer is not None:
        raise ConfigError(
            f"--server {server}: it has its checkpoint and its tokenizer, so give the question alone"
        )
    else:
        question = checkpoint
        stream = partial(ChatServer(server, model=model).stream, sampling=sampling, unset=unset)
    if question is None:
        converse(stream, conversation, _lines())
        return 0
    # as of a program that SIGINT ends
    if answer(stream, conversation, question):
        return 0
    return 130


def _unset_options(context: typer.Context, sampling: SamplingParams) -> list[str]:
    """Names of the options not given for which a recipe or a server may have defaults. A beam search
    has none: it ranks by the model's own probabilities."""
    if sampling.num_beams > 1:
        return []
    sources = {name: context.get_parameter_source(name) for name in ADVISED}
    return [name for name, source in sources.items() if source and source.name == "DEFAULT"]


def converse(stream: Stream, conversation: Conversation, lines: Iterable[str]) -> None:
    """Answer questions line by line until /exit or the end of the input. An error is printed, and
    the line skipped."""
    for line in lines:
        command, _, file = line.partition(" ")
        try:
            if command == "/exit":
                return
            elif command == "/reset":
                conversation = Conversation()
            elif command == "/image":
                conversation.next_images.append(MediaFile.read(file.strip()))
            elif command == "/video":
                conversation.next_videos.append(MediaFile.read(file.strip()))
            elif line:
                answer(stream, conversation, line)
        except VitaError as error:
            typer.echo(f"error: {error}", err=True)


def answer(stream: Stream, conversation: Conversation, question: str) -> bool:
    """Print an answer as it is generated, and add it to the conversation.

    Returns:
        False if Ctrl-C stopped the answer; the text so far is kept.
    """
    prompt = conversation.ask(question)
    pieces = list[TextDelta]()
    finished = True
    several = False
    try:
        for piece in stream(prompt):
            pieces.append(piece)
            several = several or piece.choice > 0
            if piece.choice == 0:
                _write(piece.text)
    except KeyboardInterrupt:
        finished = False
    _write("\n")
    # Only the first choice is streamed: the others would be mixed into its text.
    for choice in range(1, 1 + max((piece.choice for piece in pieces), default=0)):
        _write(f"[{choice + 1}] {_text_of(pieces, choice)}\n")
    for token in (token for piece in pieces if piece.choice == 0 for token in piece.tokens):
        likeliest = "".join(f"  {text!r} {logprob:.3f}" for text, logprob in token.likeliest)
        _write(f"{token.logprob:9.3f} {token.text!r}{'  of' if likeliest else ''}{likeliest}\n")
    conversation.keep(prompt, _text_of(pieces, 0))
    return finished


def _local_stream(
    checkpoint: str | None,
    *,
    tokenizer: str | None,
    sampling: SamplingParams,
    unset: Collection[str],
) -> Stream:
    """Load a checkpoint into this process and stream answers from it; its recipe's defaults replace
    `unset` options."""
    if checkpoint is None:
        raise ConfigError("neither a checkpoint nor a --server is given: one of them must answer")
    # Imported late: it loads megatron-core, which asking a server does not need.
    from megatron_vita.inference.engine.engine import Engine

    engine = Engine.from_checkpoint(checkpoint, tokenizer=tokenizer)
    sampling = advised(sampling, engine.recipe.generation, fields=unset)

    def stream(prompt: Prompt) -> Iterator[TextDelta]:
        for piece in engine.stream(prompt, sampling=sampling):
            if piece.error:
                raise (DataError if piece.finish == "error" else LogitsError)(piece.error)
            tokens = tuple(_named(score, engine.tokenizer) for score in piece.scores)
            yield TextDelta(choice=piece.choice, text=piece.text, tokens=tokens)

    return stream


def _named(score: ScoredToken, tokenizer: Tokenizer) -> TokenText:
    """Decode the ids of a scored token."""
    likeliest = tuple((tokenizer.decode([one.token_id]), one.logprob) for one in score.likeliest)
    return TokenText(
        text=tokenizer.decode([score.chosen.token_id]),
        logprob=score.chosen.logprob,
        likeliest=likeliest,
    )


def _lines() -> Iterator[str]:
    """Yield lines of standard input; a terminal gets a prompt and line editing."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    import readline  # noqa: F401  its import gives `input` a history

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            _write("\n")
        except EOFError:
            return


def _read(paths: list[str] | None) -> list[MediaFile]:
    return [MediaFile.read(path) for path in paths or ()]


def _text_of(pieces: list[TextDelta], choice: int) -> str:
    return "".join(piece.text for piece in pieces if piece.choice == choice)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(arguments: list[str], *, name: str = "python -m megatron_vita.inference") -> int:
    """Run the client; print a user's error as one line.

    Returns:
        The exit code.
    """
    platform.set_up_logging(rank=1)  # warnings only: the answer alone belongs on the terminal
    code = run_command(app, arguments, name=name)
    platform.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
