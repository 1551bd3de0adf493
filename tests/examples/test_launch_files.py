"""Launchers and images: what can be shown without a cluster.

Scripts and Dockerfiles pass their linters, manifests the schemas of Kubernetes; Slurm is played by
stubs on the path.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import kubernetes_validate
import pytest
import yaml

from examples.docker.native_libraries import document

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch")])
KUBERNETES = "1.32"


def lint(tool: str, *arguments: str | Path, text: str | None = None) -> str:
    """Complaints of a tool that is installed beside Python."""
    command = [Path(sys.executable).parent / tool, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def test_scripts_pass_shellcheck() -> None:
    assert lint("shellcheck", *SCRIPTS) == ""


def test_dockerfiles_pass_hadolint() -> None:
    files = sorted(ROOT.glob("examples/docker/*.Dockerfile"))
    assert len(files) == 2
    assert lint("hadolint", *files) == ""


def test_manifests_meet_the_schemas_of_kubernetes() -> None:
    for manifest in manifests("serve.k8s.yaml"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    (jobs,) = manifests("jobset.yaml")[0]["spec"]["replicatedJobs"]
    metadata = {"name": jobs["name"]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **jobs["template"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_jobset_s_first_pod_is_the_head_and_nodes_are_counted_once() -> None:
    (jobset,) = manifests("jobset.yaml")
    (jobs,) = jobset["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    name = jobset["metadata"]["name"]
    assert environment["HEAD"] == f"{name}-{jobs['name']}-0-0.{name}"
    assert int(environment["NODES"]) == job["parallelism"] == job["completions"]
    assert environment["RANKS"] == container["resources"]["limits"]["nvidia.com/gpu"]


def test_skypilot_s_scripts_pass_shellcheck() -> None:
    (task,) = manifests("skypilot.yaml")
    for part in ("setup", "run"):
        assert lint("shellcheck", "-", text=f"#!/usr/bin/env bash\n{task[part]}") == ""


def test_the_list_of_native_libraries_has_each_file_and_ffmpeg_s_release() -> None:
    folder = Path(av.__file__).parent.parent / "av.libs"
    found = {
        component["bom-ref"]: component["version"]
        for component in document()["components"]
        if component["bom-ref"].startswith("av/")
    }
    assert set(found) == {f"av/{path.name}" for path in folder.iterdir()}
    releases = {version for name, version in found.items() if name.startswith("av/libavcodec")}
    assert releases == {av.ffmpeg_version_info}


STUBS = {
    "scontrol": """
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" >> scontrol.txt; fi""",
    # Two nodes; a signal for srun goes to both tasks, as Slurm's does.
    "srun": """
echo "$@" > srun.txt
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & one=$!
SLURM_NODEID=1 "$@" & two=$!
trap 'kill -USR1 $one $two; pkill -USR1 -P $one,$two' USR1
worst=0
for pid in $one $two; do
    while kill -0 $pid 2>/dev/null; do wait $pid; code=$?; done
    wait $pid; code=$?
    [ $code -gt $worst ] && worst=$code
done
exit $worst""",
    "nvidia-smi": "exit 1",
    # The launcher: tells what it got and ends as the test wants.
    "python": """
echo "$@" >> launcher_$NODE_RANK.txt
trap 'exit 1' USR1
if [ -n "${WAIT:-}" ]; then touch ready_$NODE_RANK; while :; do sleep 0.05; done; fi
[ "$NODE_RANK" = 0 ] && exit "${CODE_0:-0}"
exit "${CODE_1:-0}" """,
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A folder with Slurm's commands and the environment of a job of two nodes."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STUBS.items():
        script = commands / name
        script.write_text(f"#!/usr/bin/env bash\n{text}\n")
        script.chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "20042"}
    path = f"{commands}:{os.environ['PATH']}"
    return {**os.environ, **job, "PATH": path, "SLURM_GPUS_ON_NODE": "8", "PROJECT": str(ROOT)}


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "recipe.yaml", "training.bf16=true"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(job: subprocess.Popen) -> tuple[int, str]:
    output, _ = job.communicate(timeout=30)
    return job.returncode, output.decode()


def requeued(folder: Path) -> bool:
    notes = folder / "scontrol.txt"
    return notes.exists() and notes.read_text() == "requeue 20042\n"


@pytest.mark.parametrize(("settings", "ranks"), [({}, 8), ({"RANKS": "4"}, 4)])
def test_slurm_starts_the_launcher_on_each_node(
    tmp_path: Path, slurm: dict[str, str], settings: dict[str, str], ranks: int
) -> None:
    assert finish(start(tmp_path, {**slurm, **settings})) == (0, "")
    for rank in range(2):
        (line,) = (tmp_path / f"launcher_{rank}.txt").read_text().splitlines()
        assert f"--nnodes 2 --node_rank {rank} --master_addr node1 --master_port 20042" in line
        assert f"--nproc_per_node {ranks} " in line
        assert line.endswith("pretrain_vita.py recipe.yaml training.bf16=true")
    assert not requeued(tmp_path)


@pytest.mark.parametrize("codes", [("75", "0"), ("1", "75"), ("137", "75")])
def test_a_failure_that_may_pass_is_queued_again_on_whichever_node(
    tmp_path: Path, slurm: dict[str, str], codes: tuple[str, str]
) -> None:
    code, _ = finish(start(tmp_path, {**slurm, "CODE_0": codes[0], "CODE_1": codes[1]}))
    assert code == max(int(code) for code in codes)
    assert requeued(tmp_path)
    assert not list(tmp_path.glob(".passing*"))


def test_a_user_s_mistake_is_not_queued_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    code, _ = finish(start(tmp_path, {**slurm, "CODE_0": "1", "CODE_1": "1"}))
    assert (code, requeued(tmp_path)) == (1, False)


def test_a_job_is_not_queued_again_for_ever(tmp_path: Path, slurm: dict[str, str]) -> None:
    limits = {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}
    code, output = finish(start(tmp_path, {**slurm, **limits, "CODE_0": "75"}))
    assert (code, requeued(tmp_path)) == (75, False)
    assert "not queued again: it was 3 times already" in output


def test_before_its_time_is_up_a_job_stops_and_is_queued_again(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    job = start(tmp_path, {**slurm, "WAIT": "yes"})
    give_up = time.monotonic() + 30
    while len(list(tmp_path.glob("ready_*"))) < 2 and time.monotonic() < give_up:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert finish(job)[0] == 1
    assert requeued(tmp_path)


def test_containers_wrap_what_runs_on_the_nodes(tmp_path: Path, slurm: dict[str, str]) -> None:
    assert finish(start(tmp_path, {**slurm, "CONTAINER": "pyxis", "IMAGE": "vita"}))[0] == 0
    options = (tmp_path / "srun.txt").read_text()
    mounts = f"--container-mounts={tmp_path}:{tmp_path} --container-workdir={tmp_path}"
    assert f"--container-image=vita {mounts}" in options
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.write_text('#!/usr/bin/env bash\necho "$@" > apptainer.txt\n')
    apptainer.chmod(0o755)
    assert finish(start(tmp_path, {**slurm, "CONTAINER": "apptainer", "IMAGE": "v.sif"}))[0] == 0
    words = (tmp_path / "apptainer.txt").read_text()
    assert words.startswith(f"exec --nv --bind {tmp_path}:{tmp_path} --pwd {tmp_path} v.sif {ROOT}")
    code, output = finish(start(tmp_path, {**slurm, "CONTAINER": "docker"}))
    assert (code, output) == (2, "CONTAINER is 'docker': pyxis, apptainer or nothing\n")
