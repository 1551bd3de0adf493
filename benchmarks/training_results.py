"""Results of the training benchmark: one JSON file a case, comparison with a baseline, a table."""

import datetime
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "complete", "out of memory", "failed", "timed out"]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)


def read_result(path: Path) -> dict[str, Any]:
    """Read a result; empty if there is none."""
    if path.exists():
        return json.loads(path.read_text())
    return {}


def stamp() -> dict[str, str]:
    """Commit and time of a result."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The working folder's commit, from git or, where it was copied without, from VITA_COMMIT."""
    if commit := os.environ.get("VITA_COMMIT"):
        return commit
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout.strip()
    return "unknown"


def regressions(result: dict[str, Any], baseline: dict[str, Any], *, threshold: float) -> list[str]:
    """Regressions by more than the fraction `threshold`: tokens/s, peak memory, or a missing
    result. Results of another device are not compared."""
    name = result["case"]
    if baseline["status"] != "complete":
        return []
    if result["status"] != "complete":
        return [f"{name}: {result['status']}, where the baseline is complete"]
    if result["device"] != baseline["device"]:
        return []
    found = []
    for key, sign in (("tokens_per_second_per_gpu", -1), ("peak_gib", 1)):
        then = baseline[key]
        now = result[key]
        if sign * (now - then) > threshold * then:
            found.append(f"{name}: {key} {now:g}, {abs(now / then - 1):.1%} worse than {then:g}")
    return found


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "status": lambda r: r["status"],
    "step, s": lambda r: f"{r['step_seconds']:.3f}",
    "tokens/s/GPU": lambda r: f"{r['tokens_per_second_per_gpu']:,.0f}",
    "TFLOP/s/GPU": lambda r: f"{r['tflops_per_gpu']:.0f}",
    "peak GiB": lambda r: f"{r['peak_gib']:.1f}",
    "estimated GiB": lambda r: f"{r['estimated_gib']:.1f}",
    "host GiB": lambda r: f"{r['host_gib']:.1f}",
    "loss": lambda r: f"{r['loss']:.4f}",
    "gradient norm": lambda r: f"{r['grad_norm']:.4f}",
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table; missing values are left empty."""
    lines = ["| case | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for result in results:
        cells = [_cell(show, result) for show in COLUMNS.values()]
        lines.append(f"| {result['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(show: Callable[[dict[str, Any]], str], result: dict[str, Any]) -> str:
    try:
        return show(result)
    except (KeyError, TypeError):
        return ""
