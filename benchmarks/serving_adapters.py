"""Decoding of a batch whose requests have different adapters, beside the base alone.

    torchrun --nproc_per_node 1 benchmarks/serving_adapters.py --shape qwen2.5-7b --out results

A batch of prompts of text is decoded by an engine without adapters, by one with them where no
request uses any, and where requests use all of them in turn. Weights and adapters are random.
Tokens/s are those of steps in which the whole batch is decoded; medians.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from serving import film, recipe_of
from serving_shapes import SHAPES
from training_results import stamp, write_result

from megatron_vita import platform
from megatron_vita.config import AdaptedMap, Recipe
from megatron_vita.convert.adapters import write_adapters
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.model.lora import row_owners
from megatron_vita.rounding import round_up

FROZEN = {
    f"training.freeze_{part}": True for part in ("vision_model", "projector", "language_model")
}


def random_adapter(folder: Path, recipe: Recipe, *, seed: int) -> Path:
    """Write a checkpoint of random adapters of every linear map of the language model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(adapted: AdaptedMap) -> tuple[torch.Tensor, torch.Tensor]:
        rank = recipe.lora.rank
        owners = row_owners(adapted.linear)
        a = torch.randn(len(adapted.chosen) * rank, adapted.linear.inputs, generator=generator)
        b = torch.randn(*owners.shape, rank, generator=generator)
        return a * 0.01, b * 0.01

    write_adapters(folder, recipe, base={"path": "", "stamp": ""}, matrices=draw)
    return folder


def open_engine(options: argparse.Namespace, folders: dict[str, Path]) -> Engine:
    """An engine with these adapters, and a cache for the batch."""
    length = round_up(options.prompt_tokens + options.tokens + 1, 128)
    return Engine(
        recipe_of(options.shape, tp=options.tp, cp=1, longest=length),
        options=EngineOptions(cache_tokens=options.batch * length, max_running=options.batch),
        adapters=folders,
    )


def decode_rate(engine: Engine, options: argparse.Namespace, *, names: list[str]) -> float:
    """Tokens/s of the batch, whose requests use adapters `names` in turn."""
    params = SamplingParams(max_new_tokens=options.tokens, ignore_eos=True)
    numbers = []
    for request in range(options.batch):
        prompt = film(options.prompt_tokens, seed=request)
        prompt = dataclasses.replace(prompt, adapter=names[request % len(names)])
        numbers.append(engine.add(prompt, params))
    times = []
    while engine.has_work:
        begin = time.perf_counter()
        outputs = engine.step()
        if sum(len(output.token_ids) for output in outputs) == options.batch:
            times.append(time.perf_counter() - begin)
    for number in numbers:
        engine.forget(number)
    # The first steps of a batch record graphs.
    return options.batch / statistics.median(times[len(times) // 4 :])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Tokens/s by kind of batch. Collective; the values are those of rank 0."""
    recipe = recipe_of(options.shape, tp=options.tp, cp=1, longest=4096)
    recipe = recipe.replaced(FROZEN | {"lora.rank": options.rank})
    names = [f"adapter-{number}" for number in range(1, options.adapters + 1)]
    folders = {name: folder / name for name in names}
    if dist.get_rank() == 0:
        for seed, path in enumerate(folders.values()):
            random_adapter(path, recipe, seed=seed)
    dist.barrier()
    rates = {}
    kinds = {"base": ({}, [""]), "unused": (folders, [""]), "mixed": (folders, names)}
    for kind, (served, chosen) in kinds.items():
        engine = open_engine(options, served)
        if dist.get_rank():
            engine.serve_as_worker()
        else:
            decode_rate(engine, options, names=chosen)
            rates[kind] = decode_rate(engine, options, names=chosen)
            engine.close()
        del engine
        gc.collect()
    return rates


def report(options: argparse.Namespace, rates: dict[str, float]) -> None:
    """Print the table, and write the result into the folder that is named."""
    device = torch.cuda.get_device_name() if platform.on_cuda() else "CPU"
    print(f"| {options.shape}, batch {options.batch} | tokens/s | of the base |\n|---|---|---|")  # noqa: T201
    for kind, rate in rates.items():
        print(f"| {kind} | {rate:.0f} | {rate / rates['base']:.3f} |")  # noqa: T201
    if options.out is None:
        return
    name = f"serving-{options.shape}-{options.adapters}-adapters"
    result = {
        "case": name,
        "device": device,
        "gpus": options.tp,
        "model": options.shape,
        "layout": f"tp{options.tp}" if options.tp > 1 else "1",
        **{key: getattr(options, key) for key in ("adapters", "rank", "batch", "prompt_tokens")},
        "tokens_per_second": {kind: round(rate, 1) for kind, rate in rates.items()},
        "share_of_base": round(rates["mixed"] / rates["base"], 4),
        **stamp(),
    }
    write_result(options.out / f"{name}.json", result)


def main() -> None:
    """Run all ranks; rank 0 prints the table and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32, help="requests decoded together")
    parser.add_argument("--prompt-tokens", type=int, default=250, help="below a frame: text alone")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--out", type=Path, help="folder of results")
    options = parser.parse_args()
    platform.initialize_process()
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        rates = measure(options, Path(shared[0]))
    if dist.get_rank() == 0:
        report(options, rates)
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
