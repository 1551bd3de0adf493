"""Command line of the conversion: `python -m megatron_vita.convert`."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_vita.commands import run_command
from megatron_vita.sizes import readable_bytes

MODULE = "python -m megatron_vita.convert"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Convert weights between Hugging Face folders and distributed checkpoints, on the CPU, tensor by tensor.",
)

Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Verify every tensor in both directions, and logits if memory allows."
    ),
]


@app.command()
def from_hf(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Hugging Face folders or GGUF files: a whole model, or its parts."),
    ],
    destination: Annotated[Path, typer.Argument(help="Checkpoint to write.")],
    projector: Annotated[
        str,
        typer.Option(
            help="Kind of the projector to initialize if no source has one: long_vita, or internvl, "
            "whose exports transformers loads by itself."
        ),
    ] = "long_vita",
    ignore_field: Annotated[
        list[str] | None,
        typer.Option(help="Unknown config field that has no effect on the model (repeatable)."),
    ] = None,
    verify: Verify = False,
) -> None:
    """Convert Hugging Face folders or a GGUF file to a distributed checkpoint."""
    from megatron_vita.convert.importing import import_weights

    plan = import_weights(sources, destination, projector=projector, ignored=ignore_field or ())
    typer.echo(
        f"{destination}: {readable_bytes(sum(transfer.nbytes for transfer, _ in plan.transfers))}"
    )
    if verify:
        from megatron_vita.convert.verify import compare_logits, compare_tensors

        compare_tensors(plan.transfers, destination)
        typer.echo(
            f"all tensors are equal both ways; {compare_logits(destination, plan.language.path)}"
        )


@app.command()
def to_hf(
    source: Annotated[
        Path,
        typer.Argument(help="A checkpoint, or a folder of checkpoints (the newest is used)."),
    ],
    destination: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
    folder_format: Annotated[
        str,
        typer.Option(
            "--format",
            "--layout",  # its earlier name, which scripts have
            help="Folder format to write, possibly of one part (default: that of the origin).",
        ),
    ] = "",
    like: Annotated[
        Path | None, typer.Option(help="Hugging Face folder to take the config and tokenizer from.")
    ] = None,
    verify: Verify = False,
) -> None:
    """Convert a distributed checkpoint to a Hugging Face folder."""
    from megatron_vita.convert.exporting import export_checkpoint
    from megatron_vita.convert.settings.export_code import has_our_code

    plan = export_checkpoint(source, destination, folder_format=folder_format, like=like)
    typer.echo(
        f"{destination}: {readable_bytes(sum(transfer.nbytes for transfer in plan.transfers))}, "
        f"{plan.folder_format.name}"
    )
    if has_our_code(plan.config):
        typer.echo(
            "open it with AutoModelForImageTextToText and AutoProcessor of transformers, "
            "trust_remote_code=True"
        )
    if verify:
        from megatron_vita.convert.formats.safetensors_reader import SafetensorsSource
        from megatron_vita.convert.verify import compare_logits, compare_tensors

        written = SafetensorsSource(destination)
        compare_tensors([(transfer, written) for transfer in plan.transfers], plan.source.folder)
        whole = destination if "language_model" in plan.folder_format.parts else None
        typer.echo(f"all tensors are equal both ways; {compare_logits(plan.source.folder, whole)}")


@app.command()
def from_megatron(
    source: Annotated[
        Path, typer.Argument(help="Megatron checkpoint: iterations, ranks, or torch_dist.")
    ],
    destination: Annotated[Path, typer.Argument(help="Checkpoint to write.")],
    recipe: Annotated[Path, typer.Option(help="Recipe (YAML) with the model's shapes.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Hugging Face tokenizer folder to copy into the checkpoint.")
    ] = None,
) -> None:
    """Convert a Megatron checkpoint, of Long-VITA or of a GPTModel, to a distributed checkpoint."""
    from megatron_vita.config import load_recipe
    from megatron_vita.convert.megatron import import_megatron

    import_megatron(source, destination, recipe=load_recipe(recipe), tokenizer=tokenizer)
    typer.echo(f"{destination}: written")


@app.command()
def to_megatron(
    source: Annotated[
        Path,
        typer.Argument(help="A checkpoint, or a folder of checkpoints (the newest is used)."),
    ],
    destination: Annotated[
        Path, typer.Argument(help="megatron-core checkpoint (torch_dist) of a GPTModel to write.")
    ],
) -> None:
    """Export the language model as megatron-core's checkpoint of a GPTModel."""
    from megatron_vita.convert.megatron import export_megatron

    export_megatron(source, destination)
    typer.echo(f"{destination}: written")


@app.command()
def merge_lora(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint of adapters, or a folder of such (the newest).")
    ],
    destination: Annotated[Path, typer.Argument(help="Checkpoint of the whole model to write.")],
    base: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the base (default: where it was in training)."),
    ] = None,
) -> None:
    """Add adapters to the weights of their base."""
    from megatron_vita.convert.adapters import merge_adapters

    merge_adapters(source, destination, base=base)
    typer.echo(f"{destination}: written")


@app.command()
def to_peft(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint of adapters, or a folder of such (the newest).")
    ],
    destination: Annotated[Path, typer.Argument(help="PEFT's folder to write.")],
    folder_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Folder format of the base that they will be loaded on (default: causal, or internvl-hf where "
            "other parts have adapters).",
        ),
    ] = "",
    base: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of the weights beside DoRA's adapters (default: as recorded)."
        ),
    ] = None,
) -> None:
    """Export adapters as PEFT's folder."""
    from megatron_vita.convert.peft import export_adapters

    count = export_adapters(source, destination, folder_format=folder_format, base=base)
    typer.echo(f"{destination}: adapters of {count} maps")


@app.command()
def from_peft(
    source: Annotated[Path, typer.Argument(help="PEFT's folder.")],
    destination: Annotated[Path, typer.Argument(help="Checkpoint of adapters to write.")],
    base: Annotated[Path, typer.Option(help="Checkpoint of the model that they belong to.")],
) -> None:
    """Import adapters from PEFT's folder."""
    from megatron_vita.convert.peft import import_adapters

    count = import_adapters(source, destination, base=base)
    typer.echo(f"{destination}: adapters of {count} maps")


def run(arguments: list[str], *, name: str = MODULE) -> int:
    """Run one command and return its exit code; a user's error is one line."""
    return run_command(app, arguments, name=name)


def main(arguments: list[str], *, name: str = MODULE) -> int:
    """Run one command as this process's last work, and return its exit code."""
    from megatron_vita import platform

    logging.getLogger("megatron_vita").setLevel(logging.WARNING)
    code = run(arguments, name=name)
    platform.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
