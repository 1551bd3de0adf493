"""The command `vita`: one name for every command line of the package.

`vita COMMAND ...` is `python -m megatron_vita COMMAND ...`. A command's module is imported once it
is asked for: help and spelling mistakes cost no import of torch.
"""

import difflib
import pkgutil
import sys
from typing import NamedTuple

import megatron_vita
from megatron_vita.errors import VitaError


class Command(NamedTuple):
    """A command: `main(arguments, *, name)` as `module:function`, which returns an exit code, and
    a line of help."""

    main: str
    help: str


COMMANDS = {
    "train": Command("megatron_vita.cli.train:main", "train a recipe"),
    "plan": Command(
        "megatron_vita.cli.train:dry_run",
        "show layout, memory and time of a recipe's run, or suggest layouts; trains nothing",
    ),
    "data": Command(
        "data_tools.cli:main",
        "from samples to shards, indexes and packs, and a look at them (import, shard, plan ...)",
    ),
    "report": Command(
        "megatron_vita.report.__main__:main",
        "show runs side by side as one HTML page: loss, speed, memory, data, restarts",
    ),
    "replay": Command(
        "megatron_vita.cli.replay:main",
        "train up to a logged step again, and compare with the log bit for bit",
    ),
    "convert": Command(
        "megatron_vita.convert.__main__:main",
        "weights from Hugging Face, GGUF and Megatron, and back",
    ),
    "chat": Command(
        "megatron_vita.inference.__main__:main",
        "ask a checkpoint or a server about images and videos",
    ),
    "serve": Command(
        "megatron_vita.inference.server.__main__:main",
        "serve a checkpoint over OpenAI's protocol, with a page to chat on",
    ),
    "evaluate": Command(
        "megatron_vita.evaluation.__main__:main",
        "find needles in haystacks of pages, and answer held-out questions",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command, by default that of the process's command line, and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        _write(_help())
        return 0
    if given[0] == "--version":
        _write(f"megatron_vita {megatron_vita.__version__}\n")
        return 0
    name = given[0]
    if name not in COMMANDS:
        sys.stderr.write(f"error: {_unknown(name)}\n")
        return 1
    try:
        run = pkgutil.resolve_name(COMMANDS[name].main)
    except VitaError as error:  # of a plugin
        sys.stderr.write(f"error: {error}\n")
        return 1
    return run(given[1:], name=f"vita {name}")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
    return f"vita has no command {name!r}; {hint}"


def _help() -> str:
    lines = [f"  {name:<10}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vita [--version] COMMAND ...",
            "",
            "Train and serve vision-language models over contexts of up to a million tokens.",
            "",
            "commands:",
            *lines,
            "",
            "`vita COMMAND --help` explains one. On several GPUs:",
            "  torchrun --standalone --nproc_per_node GPUS -m megatron_vita train RECIPE.yaml",
            "",
        ]
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
