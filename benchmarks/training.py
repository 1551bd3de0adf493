r"""Training steps of any layout, length and levers: time, rates, memory.

    PYTHONPATH=. python benchmarks/training.py --model 7b --tokens 131072 --documents 1 --tp 2 \
        training.recompute_granularity=full
    PYTHONPATH=. python benchmarks/training.py --cases cases.yaml --out results
    PYTHONPATH=. python benchmarks/training.py --cases cases.yaml --out results --compare benchmarks/baselines

Real shapes with random weights on packs of random tokens, of which 60 % are image tokens; a step
includes the optimizer's. Positional arguments are overrides of the recipe. Neighbouring cases of one
layout share processes (but with --apart); one that runs out of memory, fails or hangs takes its
processes with it, spoils no other and is a row of the table. Results are JSON files named for their
cases and are written after every step: one whose status is "running" was killed. A file of cases is
a YAML list of mappings, whose keys are these options' names (and `case`, a name; `levers`, a list of
overrides).

With --compare, results are held against the files of the same names in another folder, on the same
device: exit code 1 if tokens/s fall or peak memory rises by more than --threshold, or a case no
longer completes.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training_cases import MODELS, Case, case_from_dict, read_cases
from training_launch import run_cases
from training_results import read_result, regressions, table

from megatron_vita.errors import ConfigError

BASELINES = Path(__file__).parent / "baselines"
OPTIONS = {
    "tokens": "tokens of a pack",
    "documents": "documents of a pack, of equal length",
    "tiles": "tiles of a pack; 0: such that 60 %% are image tokens",
    "packs": "packs of a replica in a step",
    "layers": "layers of the language model in the place of its own",
    "tp": "ranks of tensor parallelism",
    "cp": "ranks of context parallelism",
    "pp": "pipeline stages",
    "dp": "replicas",
    "warm_up": "steps that are not counted",
    "warm_up_tokens": "tokens of the packs of those steps; 0: the same packs",
    "steps": "steps that are counted",
    "device_gib": "GiB of each device that may be used, as if it were a smaller one; 0: all",
}


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[Case]]:
    """Options, and the cases that they describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plain = Case()
    parser.add_argument("levers", nargs="*", help="overrides of the recipe: group.field=value")
    parser.add_argument("--cases", type=Path, help="a file of cases; other options are defaults")
    parser.add_argument("--case", default="", help="name of the case; made from the rest if empty")
    parser.add_argument("--model", choices=MODELS, default=plain.model)
    for name, text in OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        default = getattr(plain, name)
        parser.add_argument(option, type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--no-sp", dest="sp", action="store_false", help="no sequence parallelism")
    parser.add_argument("--backend", default=plain.backend, help="parallel.attention_backend")
    parser.add_argument("--peer", choices=["transformers"], default="", help="measure it instead")
    parser.add_argument("--profile", action="store_true", help="one more step, by kinds of kernels")
    parser.add_argument("--apart", action="store_true", help="processes of its own for each case")
    parser.add_argument("--out", type=Path, default=BASELINES, help="folder of results")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of a case")
    parser.add_argument("--compare", type=Path, help="folder of baselines to hold results against")
    parser.add_argument("--threshold", type=float, default=0.03, help="share that may be lost")
    options = parser.parse_args(arguments)
    values = {name: getattr(options, name) for name in asdict(plain)}
    if options.compare and options.compare.resolve() == options.out.resolve():
        parser.error("--compare and --out are the same folder: the baselines would be overwritten")
    try:
        cases = read_cases(options.cases, values) if options.cases else [case_from_dict(values)]
        for case in cases:
            case.recipe()
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    return options, cases


def compare(results: list[dict[str, Any]], baselines: Path, *, threshold: float) -> list[str]:
    """All regressions; a case without a baseline is none."""
    found = []
    for result in results:
        if baseline := read_result(baselines / f"{result['case']}.json"):
            found += regressions(result, baseline, threshold=threshold)
    return found


def main() -> None:
    """Runs all cases, prints the table and the regressions."""
    options, cases = parse()
    results = []
    for result in run_cases(cases, options.out, timeout=options.timeout, apart=options.apart):
        results.append(result)
        print(table(results[-1:]), flush=True)  # noqa: T201
    if len(results) > 1:
        print(table(results))  # noqa: T201
    if options.compare:
        found = compare(results, options.compare, threshold=options.threshold)
        print("\n".join(found) or "no regression")  # noqa: T201
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
