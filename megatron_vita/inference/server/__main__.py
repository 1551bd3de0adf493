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

from megatron_vita.commands import describe_missing
from megatron_vita.errors import PlatformError, VitaError
from megatron_vita.inference.server.limits import Limits

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
        "checkpoint", help="a checkpoint, or a folder of checkpoints, whose newest is taken"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--model-name", help="what clients call the model (default: the checkpoint's name)"
    )
    parser.add_argument(
        "--tokenizer", help="where the tokenizer is, if not where the checkpoint says"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file of API keys, one a line"
    )
    parser.add_argument(
        "--media-root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder that requests may name",
    )
    parser.add_argument(
        "--allow-remote-media",
        action="store_true",
        help="fetch media from public http(s) addresses",
    )
    _add_engine_arguments(parser.add_argument_group("engine"))
    limits = parser.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        name = f"--{field.name.replace('_', '-')}"
        kind = type(field.default)
        doc = field.metadata["doc"]
        limits.add_argument(
            name, type=kind, default=field.default, help=f"{doc} (default: %(default)s)"
        )
    return parser.parse_args(arguments)


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    """Those of EngineOptions, whose defaults hold for what is not given; to import it takes
    seconds."""
    group.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help="ranks that share each weight matrix",
    )
    group.add_argument(
        "--context-parallel-size", type=int, help="ranks that share a prompt (default: all others)"
    )
    group.add_argument(
        "--chunk-tokens",
        type=int,
        help="tokens of prompts in one forward pass (default: 32768; more is faster for very long ones)",
    )
    group.add_argument(
        "--cache-tokens", type=int, help="room of the key-value cache (default: what memory leaves)"
    )
    group.add_argument(
        "--cache-dtype",
        choices=("model", "fp8"),
        help="type of the key-value cache (default: model)",
    )
    group.add_argument(
        "--max-running", type=int, help="answers that are decoded at a time (default: 64)"
    )
    group.add_argument(
        "--media-seconds", type=float, help="seconds to decode an image or 64 frames (default: 60)"
    )
    group.add_argument(
        "--max-context",
        type=int,
        help="tokens of a prompt and its answer (default: as in training)",
    )


def limits_of(arguments: argparse.Namespace) -> Limits:
    """The limits on the command line."""
    return Limits(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Limits)}
    )


def load_engine(arguments: argparse.Namespace) -> "Engine":
    """Load the engine of a checkpoint on all processes that torchrun has started."""
    from megatron_vita.config import ParallelConfig
    from megatron_vita.inference.engine.engine import Engine
    from megatron_vita.inference.engine.options import EngineOptions

    tp = arguments.tensor_model_parallel_size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cp = arguments.context_parallel_size or max(1, world // tp)
    names = [field.name for field in dataclasses.fields(EngineOptions)]
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return Engine.from_checkpoint(
        arguments.checkpoint,
        tokenizer=arguments.tokenizer,
        parallel=ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp),
        options=EngineOptions(**given),
    )


def run(arguments: argparse.Namespace) -> int:
    """Load the model and serve it.

    Returns:
        The exit code.
    """
    from megatron_vita import platform
    from megatron_vita.inference.server.access import read_keys
    from megatron_vita.inference.vision import decode_pool

    rank = int(os.environ.get("RANK", "0"))
    platform.set_up_logging(rank)
    limits = limits_of(arguments)
    keys = read_keys(arguments.api_key_file)
    if not keys and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("no API key is set: whoever reaches %s can use this server", arguments.host)
    engine = load_engine(arguments)
    try:
        code = work(engine) if rank != 0 else _serve(engine, arguments, limits=limits, keys=keys)
    finally:
        decode_pool.stop()
    if code == 0:
        platform.leave_process()
    return code


def _serve(
    engine: "Engine", arguments: argparse.Namespace, *, limits: Limits, keys: list[str]
) -> int:
    from megatron_vita.inference.server.app import ServerOptions
    from megatron_vita.inference.server.remote import RemoteFetcher
    from megatron_vita.inference.server.sampling import defaults_of
    from megatron_vita.inference.server.server import serve

    remote = RemoteFetcher(seconds=limits.fetch_seconds) if arguments.allow_remote_media else None
    options = ServerOptions(
        model_name=arguments.model_name or Path(arguments.checkpoint).resolve().name,
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
