"""Commands that read no pixels start at once: torch takes longer to import than they take to run."""

import subprocess
import sys

import pytest

from tests.environment import environment_with


@pytest.mark.parametrize(
    "arguments", [["shard", "--help"], ["import", "llava", "missing.json", "--out", "out.jsonl"]]
)
def test_torch_is_not_imported_where_no_pixel_is_read(arguments: list[str]) -> None:
    code = (
        "import sys; from data_tools.cli import main; main(sys.argv[1:]);"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=environment_with(), capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
