"""Commands. An error that a user can cause is one line on stderr, `error: ...`, and exit code 1."""

from pathlib import Path
from typing import Annotated

import typer

from data_tools.formats import FORMATS
from data_tools.formats.base import Setting
from data_tools.importing import ImportJob, import_samples, rejected_path
from data_tools.planning import index_shards, write_plans
from data_tools.reencode import Reencode
from data_tools.sharding import MEGABYTE, REJECTED, find_jobs, make_shards
from data_tools.validation import find_targets, validate_shards
from data_tools.vocabulary import rejected_path as rejected_lines_path
from data_tools.vocabulary import train_tokenizer
from data_tools.workers.pool import WorkerOptions
from megatron_vita.commands import run_command, takes_options
from megatron_vita.config import load_recipe
from megatron_vita.data.samples.foreign import DEFAULT_PROMPT
from megatron_vita.data.shards.quarantine import Entry
from megatron_vita.errors import DataError
from megatron_vita.sizes import counted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preprocess JSONL files of conversations to shards, their indexes and a pack plan.",
)

MOST_SHOWN = 50  # damaged samples printed by `validate`; all are in the quarantine files
Jsonl = Annotated[list[Path], typer.Argument(help="JSONL files, one sample a line.")]
RecipePath = Annotated[Path, typer.Argument(help="Recipe (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, such as data.seq_length=8192.")
]


def main(arguments: list[str], *, name: str = "python -m data_tools") -> int:
    """Run one command and return its exit code; `name` is what help calls the program."""
    return run_command(app, arguments, name=name)


@app.command()
def tokenizer(
    files: Jsonl,
    out: Annotated[Path, typer.Option(help="Model to write, NAME.model.")],
    vocab_size: Annotated[
        int, typer.Option(help="Size of the vocabulary with special tokens.")
    ] = 8192,
) -> None:
    """Train a SentencePiece tokenizer on the text of samples; invalid lines are listed."""
    count = train_tokenizer(files, out=out, vocab_size=vocab_size)
    listed = rejected_lines_path(out)
    left_out = ""
    if count.rejected:
        left_out = f"; {counted(count.rejected, 'line')} rejected, listed in {listed}"
    typer.echo(f"{out}: {vocab_size} pieces from {counted(count.texts, 'text')}{left_out}")


@app.command("import")
@takes_options(WorkerOptions, into="options")
def import_(
    format: Annotated[str, typer.Argument(help=f"Format of the sources: {', '.join(FORMATS)}.")],
    sources: Annotated[list[Path], typer.Argument(help="Files or folders.")],
    out: Annotated[Path, typer.Option(help="File to write, NAME.jsonl.")],
    media: Annotated[
        Path, typer.Option(help="Folder to which image and video paths are relative.")
    ] = Path(),
    media_out: Annotated[
        Path | None, typer.Option(help="Folder for media found inside the sources.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="User's question for samples with only a caption; default: that of members.yaml, "
            f"or {DEFAULT_PROMPT!r}"
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Field, column, or suffix of tar members to ignore; may be given several times."
        ),
    ] = None,
    max_rejected: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of the samples that may be rejected; more are an error."
        ),
    ] = 1.0,
    *,
    options: WorkerOptions,
) -> int:
    """Convert samples of other formats to chat JSONL; run again to finish an interrupted run.

    A record with media, turns or marks in unknown fields is rejected by their names; see
    docs/data-tools.md.
    """
    job = ImportJob(
        format=format,
        paths=sources,
        out=out,
        setting=Setting(
            media=media, media_out=media_out, prompt=prompt, ignore=tuple(ignore or ())
        ),
    )
    count = import_samples(job, options=options)
    code = _report(out, count["samples"], count["rejected"], rejected_path(out))
    _check_share(count["rejected"], sum(count.values()), most=max_rejected)
    return code


def _check_share(rejected: int, all_samples: int, *, most: float) -> None:
    """DataError if more than a share of the samples is rejected. What was written stays."""
    if rejected > most * all_samples:
        raise DataError(
            f"{rejected} of {counted(all_samples, 'sample')} ({rejected / all_samples:.2%}) rejected, more than "
            f"--max-rejected {most:g} allows"
        )


@app.command()
@takes_options(WorkerOptions, into="options")
@takes_options(Reencode, into="reencode")
def shard(
    files: Annotated[
        list[Path], typer.Argument(help="JSONL files, or one recipe whose datasets name theirs.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the dataset: shards, progress, rejections.")
    ] = None,
    media: Annotated[
        Path | None, typer.Option(help="Folder to which image and video paths are relative.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Lines per shard.")] = 1000,
    max_shard_mb: Annotated[
        int,
        typer.Option(help="Size in MB above which a shard continues in another tar; 0: no limit."),
    ] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad sample.")] = False,
    *,
    reencode: Reencode,
    options: WorkerOptions,
) -> int:
    """Check samples and write them to shards; run again to finish an interrupted run."""
    fields = {"samples_per_shard": samples_per_shard, "strict": strict, "reencode": reencode}
    code = 0
    for job in find_jobs(files, out=out, media=media, max_bytes=max_shard_mb * MEGABYTE, **fields):
        count = make_shards(job, options=options)
        code = _report(job.out, count.samples, len(count.rejected), job.out / REJECTED) or code
    return code


def _report(out: Path, samples: int, rejected: int, listed: Path) -> int:
    """Print the counts of a result; returns the exit code, 1 if all was rejected."""
    line = f"{out}: {counted(samples, 'sample')}"
    if rejected:
        line += f"; {rejected} rejected, listed in {listed}"
    typer.echo(line)
    if rejected and not samples:
        return 1
    return 0


@app.command()
@takes_options(WorkerOptions, into="options")
def index(
    recipe: RecipePath,
    overrides: Overrides = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a sample that cannot be read.")
    ] = False,
    *,
    options: WorkerOptions,
) -> None:
    """Write the index beside each shard of a recipe's datasets, unless there is a current one."""
    count = index_shards(load_recipe(recipe, overrides or []), options=options, strict=strict)
    left_out = ""
    if count.left_out:
        left_out = f"; {counted(count.left_out, 'sample')} left out, listed beside the shards"
    written = counted(count.written, "index", "indexes")
    were = "was" if count.current == 1 else "were"
    typer.echo(f"{written} written, {count.current} {were} current{left_out}")
    for line in count.members:
        typer.echo(line)


@app.command()
@takes_options(WorkerOptions, into="options")
def validate(
    targets: Annotated[
        list[str], typer.Argument(help="A recipe (YAML) and dotted overrides, or shards (.tar).")
    ],
    *,
    options: WorkerOptions,
) -> int:
    """Decode all media of shards; damage is listed beside them, and the exit code is then 1."""
    tasks = find_targets(targets)
    found = validate_shards(tasks, options=options)
    _list_entries(found.usable)
    _list_entries(found.bad)
    usable = ""
    if found.usable:
        usable = f"{len(found.usable)} with frames in place of damaged ones, "
    typer.echo(
        f"{counted(found.samples, 'sample')} in {counted(len(tasks), 'shard')}; {usable}{len(found.bad)} bad, "
        "listed beside the shards"
    )
    if found.bad:
        return 1
    return 0


def _list_entries(entries: list[tuple[Path, Entry]]) -> None:
    for shard, entry in entries[:MOST_SHOWN]:
        line = entry.reason
        if not line.startswith(str(shard)):
            line = f"{shard} {entry.key or 'the rest'}: {line}"
        typer.echo(line)
    if len(entries) > MOST_SHOWN:
        typer.echo(f"... and {len(entries) - MOST_SHOWN} more")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a sample that cannot be used.")
    ] = False,
    continue_from: Annotated[
        int,
        typer.Option(
            help="Keep this many packs of the existing training plan, and plan the rest for the present mix."
        ),
    ] = 0,
) -> None:
    """Plan the packs of a recipe's training and validation data."""
    for line in write_plans(
        load_recipe(recipe, overrides or []), strict=strict, continue_from=continue_from
    ):
        typer.echo(line)


@app.command()
def stats(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("stats.html"),
    samples: Annotated[int, typer.Option(help="Samples to show of each dataset.")] = 6,
) -> None:
    """Report on a recipe's data as an HTML page: counts, lengths, tiles, loss, fill of packs,
    samples."""
    from data_tools.report import write_report  # imports torch, as the tiles that it shows need

    loaded = load_recipe(recipe, overrides or [])
    found = write_report(loaded, title=recipe.stem, out=out, samples=samples)
    datasets = counted(len(found.datasets), "dataset")
    typer.echo(f"{out}: {datasets}, {counted(len(found.plans), 'plan')}")


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    pack: Annotated[int, typer.Option(help="Number of the pack in the plan, from 1.")] = 1,
    sample: Annotated[
        str, typer.Option(help="Show this sample, SHARD.tar:KEY, without a plan.")
    ] = "",
    fault: Annotated[
        Path | None,
        typer.Option(
            help="Show this report of a step that a rule of numerics refused (stop, skip or "
            "rollback), RUN/faults/step_N_pack_P.json, and its worst pack; RECIPE is "
            "RUN/recipe.yaml."
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a contact sheet to this file.")] = None,
) -> None:
    """Show a pack or a sample as the model sees it: text, loss, tiles."""
    # imports torch, for its tiles
    from data_tools.viewing.inspection import inspect_fault, inspect_pack, inspect_sample

    loaded = load_recipe(recipe, overrides or [])
    if fault is not None:
        text = inspect_fault(loaded, fault, png=png)
    elif sample:
        text = inspect_sample(loaded, sample, png=png)
    else:
        text = inspect_pack(loaded, split, pack, png=png)
    typer.echo(text)
