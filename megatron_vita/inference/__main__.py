"""python -m megatron_vita.inference CHECKPOINT [--image FILE ...] [--video FILE ...] [QUESTION]

Without a question, questions are read from the terminal, one a line, about the same media.
"""

import argparse
import logging
import sys

from megatron_vita.errors import VitaError
from megatron_vita.inference.requests import Sampling


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or a folder of checkpoints, whose newest is taken")
    parser.add_argument("question", nargs="?", help="what to ask")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image (may be repeated)")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="a video (may be repeated)")
    parser.add_argument("--tokenizer", help="where the tokenizer is, if not where the checkpoint says")
    defaults = Sampling()
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    return parser.parse_intermixed_args()  # the question may follow the options


def answer(arguments: argparse.Namespace) -> None:
    """Prints the answer to each question."""
    from megatron_vita import platform
    from megatron_vita.inference.engine import Engine
    from megatron_vita.inference.prompt import MediaFile, Prompt

    platform.set_up_logging(rank=1)  # warnings only: the answer alone belongs on the terminal
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    images = [MediaFile.read(path) for path in arguments.image]
    videos = [MediaFile.read(path) for path in arguments.video]
    engine = Engine.from_checkpoint(arguments.checkpoint, tokenizer=arguments.tokenizer)
    for question in [arguments.question] if arguments.question is not None else map(str.strip, sys.stdin):
        prompt = Prompt.ask(question, images=images, videos=videos)
        sys.stdout.write(engine.generate([prompt], sampling=sampling)[0].text + "\n")
    platform.leave_process()


def main() -> None:
    """A user's error is one line and exit code 1."""
    try:
        answer(parse_arguments())
    except VitaError as error:
        logging.getLogger("megatron_vita").error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
