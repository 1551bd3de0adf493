"""The stages run dry at their real sizes, and as miniatures one after another; launchers start them
anywhere."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.environment import environment_with
from tests.forked import run_program
from tests.functional.launch import torchrun
from tests.scale import scaled

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "long_vita").glob("*b/stage*.yaml"))
# Those in YAML have tests of their own: test_launch_files.py.
LAUNCHERS = sorted(
    path for path in (ROOT / "examples" / "launch").iterdir() if path.suffix != ".yaml"
)
SIZES = scaled(["14b"], full=["7b", "14b", "72b"])
WORLDS: dict[str, list[int]] = scaled(
    {"7b": [32], "14b": [64], "72b": [512]},
    full={"7b": [32, 256], "14b": [64, 512], "72b": [256, 512]},
)
STAGES = range(1, scaled(3, full=5))
ENVIRONMENT = environment_with()


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("dry")
    worker = Path(__file__).parent / "dry_run_worker.py"
    run_program(str(worker), str(folder), json.dumps(WORLDS)).check_returncode()
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_each_recipe_passes_a_dry_run_at_its_real_size(dry: dict[str, dict], recipe: Path) -> None:
    runs = {
        key: run
        for key, run in dry.items()
        if key.startswith(f"{recipe.parent.name} {recipe.stem} ")
    }
    assert len(runs) == len(WORLDS[recipe.parent.name])
    for run in runs.values():
        assert run["seconds"] < 60
        assert run["gib"] < 79  # an 80 GB device has 79.6 GiB
        assert (
            max(run["tokens"])
            > 0.5 * {"1": 32768, "2": 16384, "3": 131072, "4": 1048576}[recipe.stem[-1]]
        )
        assert all(most - least <= 1 for least, most in run["tiles"])
        assert min(run["loss_tokens"]) > 0


def test_a_dry_run_shows_who_sits_where_and_what_each_rank_holds(dry: dict[str, dict]) -> None:
    text = dry["72b stage2 512"]["text"]
    for line in (
        "layout of 512 ranks: TP 8 x CP 1 x DP 16 x PP 4, sequence parallel, distributed optimizer",
        "stage 3 of replica 0: ranks 384 to 391",
        "TP groups lie inside a node, with 8 ranks a node",
        "parameters of the model: 73.02 B",
        "weights | gradients | optimizer | activations | vision | temporary | peak | device | highest in",
        "training takes about",
        "its time is predicted for --device H100, H200",
        # 2.667 B trained on a rank of stage 0: a 16th of 14 bytes each
        "writing a checkpoint takes about 17.4 GiB of a node's own memory, with 8 ranks a node",
        "next packs, least to most over the ranks that share them:",
        "stages would be loaded more evenly with parallel.num_layers_in_first_pipeline_stage=",
    ):
        assert line in text


def entry(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return run_program(str(ROOT / "pretrain_vita.py"), *arguments, cwd=cwd)


def test_the_command_line_runs_dry_in_less_than_a_minute_and_refuses_what_would_not_run(
    tmp_path: Path,
) -> None:
    recipe = str(ROOT / "examples/long_vita/14b/stage4.yaml")
    start = time.perf_counter()
    shown = entry(recipe, "--dry-run", "--world-size", "64", "--without-data", "--device", "H100")
    assert time.perf_counter() - start < 60
    assert shown.returncode == 0, shown.stderr
    assert "packs: not read" in shown.stdout
    assert re.search(
        r"is predicted to take \d+\.\d+ s: \d+ tokens/s/GPU, \d+ TFLOP/s/GPU", shown.stdout
    )
    suggested = entry(recipe, "--suggest", "--gpus", "64", "--device", "H100")
    assert suggested.returncode == 0, suggested.stderr
    assert re.search(r"the first: parallel\.\w+=\d+ .*training\.\w+=", suggested.stdout)
    for arguments, message in (
        (["--suggest", "--gpus", "1", "--device", "H100"], "no layout of 1 devices fits"),
        (["--world-size", "96", "--without-data"], "96 ranks are not a multiple of 64"),
        (
            ["--without-data", "--device-memory-gib", "16"],
            "needs about .* the most is for activations .*: try more devices",
        ),
        (
            [
                "--without-data",
                "--device-memory-gib",
                "27",
                "parallel.use_distributed_optimizer=false",
                "parallel.overlap_param_gather=false",
            ],
            "for optimizer .*: try parallel.use_distributed_optimizer=true training",
        ),
        ([], "tokenizers/qwen2.5"),
        (
            ["parallel.cp_comm_type=a2a", "--without-data"],
            "splits model.language.num_attention_heads over 8 ranks",
        ),
    ):
        refused = entry(recipe, "--dry-run", *arguments, cwd=tmp_path)
        assert refused.returncode == 1
        assert re.search(message, refused.stderr), refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("size", SIZES)
def test_miniatures_run_on_two_processes_stage_after_stage(tmp_path: Path, size: str) -> None:
    """Each takes up the weights of the last; the same files as the real runs."""
    logs = []
    for stage in STAGES:
        recipe = str(ROOT / f"examples/long_vita/{size}/stage{stage}.yaml")
        arguments = (recipe, "--scale", "tiny")
        done = torchrun(ROOT / "pretrain_vita.py", *arguments, processes=2, folder=tmp_path)
        logs.append(done.stderr)
    assert "starts from initial weights" in logs[0]
    for stage, log in enumerate(logs, start=1):
        assert "step 4/4 | loss" in log
        assert (
            stage == 1
            or f"weights from runs/long_vita_{size}/stage{stage - 1}-tiny/step_00000004" in log
        )
    assert not (tmp_path / "runs" / f"long_vita_{size}" / "stage1").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_hold_no_path_and_no_address(launcher: Path) -> None:
    text = launcher.read_text()
    subprocess.run(["bash", "-n", str(launcher)], check=True)
    assert os.access(launcher, os.X_OK)
    assert not re.search(r"\d+\.\d+\.\d+\.\d+", text)
    assert not re.search(r"(?<![\w.}$])/(?!usr/bin/env|dev/null)\w+/", text)


@pytest.mark.full("makes network namespaces")
@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/usr/sbin/ip").exists(), reason="needs root and iproute2"
)
def test_two_nodes_train_over_a_network(tmp_path: Path) -> None:
    """Two network namespaces joined by a pair of virtual devices, a torchrun in each."""
    names = [f"vita{os.getpid()}n{i}" for i in range(2)]
    addresses = ["10.77.0.1", "10.77.0.2"]
    devices = [f"ve{os.getpid() % 100000}n{i}" for i in range(2)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        pair = ["ip", "link", "add", devices[0], "netns", names[0], "type", "veth"]
        subprocess.run([*pair, "peer", "name", devices[1], "netns", names[1]], check=True)
        for name, device, address in zip(names, devices, addresses, strict=True):
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", device], check=True)
            for link in (device, "lo"):
                subprocess.run([*inside, "link", "set", link, "up"], check=True)
        nodes = [
            _start_node(i, name=names[i], device=devices[i], folder=tmp_path) for i in range(2)
        ]
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
        assert "step 4/4 | loss" in outputs[0]
        assert "step" not in outputs[1]  # rank 0 alone logs
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _start_node(rank: int, *, name: str, device: str, folder: Path) -> subprocess.Popen:
    settings = {
        "NODES": "2",
        "NODE_RANK": str(rank),
        "HEAD": "10.77.0.1",
        "RANKS": "1",
        "PYTHON": sys.executable,
    }
    environment = ENVIRONMENT | settings | {"GLOO_SOCKET_IFNAME": device}
    launcher = str(ROOT / "examples/launch/many_nodes.sh")
    recipe = str(ROOT / "examples/long_vita/14b/stage2.yaml")
    places = [
        f"checkpoint.save={folder / 'save'}",
        "checkpoint.load=''",
        f"data.plan={folder / 'plan'}",
    ]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, launcher, recipe, "--scale", "tiny", *places],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
