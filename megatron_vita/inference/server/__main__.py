"""OpenAI-compatible chat completions over HTTP, with a page to try them.

Under torchrun the model is distributed over all processes, and the first one serves. API keys are
read from a file or from the environment variable VITA_API_KEY, never from the command line, where
everybody on the machine can see them.
"""

import argparse
import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_vita.commands import add_options, describe_missing, from_arguments
from megatron_vita.errors import ConfigError, PlatformError, VitaError
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.server.protocol.limits import Limits

if TYPE_CHECKING:
    from megatron_vita.inference.engine.engine import Engine

logger = logging.getLogger(__name__)


MODULE = "python -m megatron_vita.inference.server"


def parse_arguments(
    arguments: list[str] | None = None, *, name: str = MODULE
) -> argparse.Namespace:
    """Parse the command line; `name` is what help calls the program."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", help="a checkpoint, or a folder of checkpoints (the newest is used)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--model-name", help="name of the model for clients (default: the checkpoint's name)"
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="checkpoint of adapters (LoRA) to serve beside the model; requests choose it by NAME "
        "as their model (repeatable)",
    )
    parser.add_argument("--tokenizer", help="tokenizer to use in place of the checkpoint's")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file of API keys, one per line"
    )
    parser.add_argument(
        "--media-root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder from which requests may name files (repeatable)",
    )
    parser.add_argument(
        "--allow-remote-media",
        action="store_true",
        help="download media that requests name by public http(s) URLs",
    )
    _add_engine_options(parser)
    add_options(parser.add_argument_group("limits"), Limits)
    return parser.parse_args(arguments)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help="ranks that share each weight matrix (default: %(default)s)",
    )
    engine.add_argument(
        "--context-parallel-size",
        type=int,
        help="ranks that share the tokens of a sequence (default: all remaining ranks)",
    )
    add_options(engine, EngineOptions)


def load_engine(arguments: argparse.Namespace) -> "Engine":
    """Load the engine of a checkpoint on all processes that torchrun has started."""
    from megatron_vita.config import ParallelConfig
    from megatron_vita.inference.engine.engine import Engine

    tp = arguments.tensor_model_parallel_size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # Ranks that tensor parallelism leaves over share the sequences.
    cp = arguments.context_parallel_size or max(1, world // tp)
    return Engine.from_checkpoint(
        arguments.checkpoint,
        tokenizer=arguments.tokenizer,
        parallel=ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp),
        options=from_arguments(EngineOptions, arguments),
        adapters=named_adapters(arguments.lora, model=model_name_of(arguments)),
    )


def model_name_of(arguments: argparse.Namespace) -> str:
    """Return the name of the base model for clients."""
    return arguments.model_name or Path(arguments.checkpoint).resolve().name


def named_adapters(given: list[str], *, model: str) -> dict[str, Path]:
    """Parse options of the form NAME=FOLDER.

    Args:
        given: the options.
        model: name of the base model, which no adapter may have.

    Raises:
        ConfigError: another form, or a name that is given twice.
    """
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--lora is {text!r}: NAME=FOLDER is needed")
        if name in adapters or name == model:
            raise ConfigError(f"--lora is {text!r}: another model is named {name!r}")
        adapters[name] = Path(folder)
    return adapters


def run(arguments: argparse.Namespace) -> int:
    """Load the model and serve it.

    Returns:
        The exit code.
    """
    # Imported late: --help and a wrong argument need not wait for torch.
    from megatron_vita import platform
    from megatron_vita.inference.server.access import read_keys
    from megatron_vita.inference.vision import decode_pool

    rank = int(os.environ.get("RANK", "0"))
    platform.set_up_logging(rank)
    limits = from_arguments(Limits, arguments)
    keys = read_keys(arguments.api_key_file)
    if not keys and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning(
            "no API key is set: anybody who can reach %s can use this server", arguments.host
        )
    engine = load_engine(arguments)
    try:
        code = work(engine) if rank != 0 else _serve(engine, arguments, limits=limits, keys=keys)
    finally:
        decode_pool.stop()
    if code == 0:
        platform.destroy_process_group()
    return code


def _serve(
    engine: "Engine", arguments: argparse.Namespace, *, limits: Limits, keys: list[str]
) -> int:
    from megatron_vita.inference.server.app import ServerOptions
    from megatron_vita.inference.server.protocol.remote import RemoteFetcher
    from megatron_vita.inference.server.protocol.sampling import defaults_of
    from megatron_vita.inference.server.server import serve

    remote = RemoteFetcher(seconds=limits.fetch_seconds) if arguments.allow_remote_media else None
    options = ServerOptions(
        model_name=model_name_of(arguments),
        adapters=list(named_adapters(arguments.lora, model=model_name_of(arguments))),
        limits=dataclasses.replace(
            limits, prompt_tokens=min(limits.prompt_tokens, engine.max_context)
        ),
        defaults=defaults_of(engine.recipe.generation),
        keys=keys,
        media_roots=arguments.media_root,
        remote=remote,
    )
    return serve(engine, options, host=arguments.host, port=arguments.port)


def work(engine: "Engine") -> int:
    """Run a worker rank until rank 0 closes the engine.

    Signals are ignored: a worker that stopped at once would break the answers that rank 0 finishes.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # Launchers signal all ranks at once, and rank 0 still has outputs to finish.
        signal.signal(number, signal.SIG_IGN)
    engine.serve_as_worker()
    return 0


def main(arguments: list[str], *, name: str = MODULE) -> NoReturn:
    """Run the server. A user's error is logged as one line, any other with its traceback; both exit
    with 1."""
    try:
        code = _run_installed(parse_arguments(arguments, name=name))
    except VitaError as error:
        logging.getLogger("megatron_vita").error("%s", error)
        code = 1
    except Exception:
        logging.getLogger("megatron_vita").critical(
            "a fault of this program ends it", exc_info=True
        )
        code = 1
    leave(code)


def _run_installed(arguments: argparse.Namespace) -> int:
    try:
        return run(arguments)
    except ModuleNotFoundError as error:
        raise PlatformError(describe_missing(error)) from error


def leave(code: int) -> NoReturn:
    """End the process immediately, without the interpreter's shutdown.

    That would take seconds to free modules, and would wait for threads and peers after a failure.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
