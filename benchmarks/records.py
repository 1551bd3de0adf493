"""Table of records in docs/performance.md, from the files of baselines/.

PYTHONPATH=. python benchmarks/records.py --write
"""

import argparse
import json
from pathlib import Path
from typing import Any

BASELINES = Path(__file__).parent / "baselines"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
MARKS = ("<!-- records: written by benchmarks/records.py -->\n", "<!-- end of records -->\n")


def training_results(folder: Path = BASELINES) -> list[dict[str, Any]]:
    """Completed training steps of megatron_vita, by model, length and date; no peer's."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    complete = [result for result in found if result.get("status") == "complete"]
    steps = [result for result in complete if not result["options"]["peer"]]
    return sorted(steps, key=lambda result: (result["model"], result["tokens"], result["date"]))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table of results, a row a case, each with a link to its file."""
    lines = [
        "| case | date | commit | GPUs | tokens | documents | layout | s a step | tokens/s/GPU "
        "| TFLOP/s/GPU | peak GiB |",
        "|---" * 11 + "|",
    ]
    return "\n".join(lines + [_row(result) for result in results]) + "\n"


def _row(result: dict[str, Any]) -> str:
    name = result["case"]
    cells = [
        f"[{name}](../benchmarks/baselines/{name}.json)",
        result["date"][:10],
        result["commit"],
        f"{result['gpus']} x {result['device'].removeprefix('NVIDIA ')}",
        f"{result['tokens']:,}",
        str(result["documents"]),
        result["layout"],
        f"{result['step_seconds']:.2f}",
        f"{result['tokens_per_second_per_gpu']:,.0f}",
        f"{result['tflops_per_gpu']:.0f}",
        f"{result['peak_gib']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def with_table(page: str, records: str, *, marks: tuple[str, str] = MARKS) -> str:
    """Replace what is between two marks of a page."""
    start, end = marks
    for mark in marks:
        if mark not in page:
            raise ValueError(f"the page has no line {mark.strip()!r}")
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{records}\n{end}{after}"


def main() -> None:
    """Print the table or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write it into {PAGE.name}")
    options = parser.parse_args()
    records = table(training_results())
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(), records))
    else:
        print(records)  # noqa: T201


if __name__ == "__main__":
    main()
