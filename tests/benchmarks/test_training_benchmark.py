"""The training benchmark measures, survives what a case does, and fails on regressions."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import training
import training_launch
import training_measure
import training_profile
import training_worker
from torch.autograd import DeviceType
from training_cases import Case, case_from_dict, read_cases
from training_results import read_result, regressions, table

from megatron_vita import platform
from megatron_vita.errors import ConfigError

KEYS = {
    "case", "device", "gpus", "tokens", "model", "layout", "levers", "step_seconds",
    "tokens_per_second_per_gpu", "tflops_per_gpu", "peak_gib", "commit", "date",
    "host_gib", "loss", "grad_norm", "estimated_gib", "status",
}  # fmt: skip
TINY = {"model": "tiny", "tokens": 512, "documents": 2, "warm_up": 0, "steps": 2}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    platform.initialize_process()
    levers = ["training.recompute_granularity=full"]
    case = Case(**TINY, levers=levers, profile=True)
    out = tmp_path_factory.mktemp("out")
    training_worker.measure(case, out / "tiny.json")
    return read_result(out / "tiny.json")


def test_a_case_on_the_cpu_has_all_keys_and_rates_that_follow_from_its_step(result: dict) -> None:
    assert result.keys() >= KEYS
    assert result["status"] == "complete"
    assert result["device"] == "CPU"
    assert result["backend"] == "torch"
    assert len(result["steps"]) == 2
    assert result["tokens_per_second_per_gpu"] == pytest.approx(
        512 / result["step_seconds"], rel=0.01
    )
    flops = result["tflops_per_gpu"] * 1e12 * result["step_seconds"]
    assert flops == pytest.approx(result["step_flops"], rel=0.3, abs=1e10)  # rounded to two places


def test_warm_up_packs_may_be_shorter_and_tiles_chosen(tmp_path: Path) -> None:
    case = Case(**TINY | {"warm_up": 1, "warm_up_tokens": 128, "steps": 1, "tiles": 80})
    training_worker.measure(case, tmp_path / "warm.json")
    found = read_result(tmp_path / "warm.json")
    assert found["tiles"] == 80
    assert len(found["steps"]) == 2
    assert found["step_seconds"] == found["steps"][1]


def test_the_peer_is_measured_by_the_same_keys(result: dict, tmp_path: Path) -> None:
    import training_peer

    case = Case(**TINY | {"documents": 1}, peer="transformers")
    found = training_peer.measure(case, tmp_path / "peer.json")
    assert found.keys() >= KEYS
    assert found["status"] == "complete"
    assert found["tiles"] == result["tiles"] == 76
    assert found["loss"] == pytest.approx(math.log(512), rel=0.1)


ADAPTERS = [
    "lora.rank=4",
    "training.freeze_language_model=true",
    "training.freeze_vision_model=true",
]


def test_adapters_are_measured_here_and_in_the_peer(tmp_path: Path) -> None:
    import training_peer

    few = TINY | {"documents": 1, "warm_up": 0, "steps": 1, "levers": ADAPTERS, "profile": False}
    ours = training_worker.measure(Case(**few), tmp_path / "ours.json")
    theirs = training_peer.measure(Case(**few, peer="transformers"), tmp_path / "peer.json")
    for found in (ours, theirs):
        assert found["status"] == "complete"
        assert found["loss"] == pytest.approx(math.log(512), rel=0.1)


def test_a_profile_counts_milliseconds_by_kind(result: dict) -> None:
    spent = result["profile"]["milliseconds"]
    assert {"matmul", "attention", "elementwise"} <= spent.keys()
    assert min(spent.values()) >= 0


def test_kernels_are_told_apart_by_their_names() -> None:
    entries = [
        ("ncclDevKernel_AllGather_RING_LL", 4000), ("nvjet_tst_192x192_64x4_2x1", 3000),
        ("void cutlass::device_kernel<FlashAttentionForwardSm90>", 2000), ("Memcpy DtoD", 1000),
        ("multi_tensor_apply_kernel<AdamFunctor>", 500), ("vectorized_elementwise_kernel", 250),
    ]  # fmt: skip
    averages = [
        SimpleNamespace(key=key, count=2, device_type=DeviceType.CUDA, self_device_time_total=us)
        for key, us in entries
    ]
    averages.append(
        SimpleNamespace(key="cudaStreamSynchronize", count=7, device_type=DeviceType.CPU)
    )
    found = training_profile.summarise(averages, on_device=True)
    assert found["milliseconds"] == {
        "communication": 4.0, "matmul": 3.0, "attention": 2.0, "memcpy": 1.0, "adam": 0.5, "elementwise": 0.2,
    }  # fmt: skip
    assert found["counts"] == {"launches": 12, "cudaStreamSynchronize": 7}


WORKER = """
import json, pathlib, sys, time
cases, out = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
with (out.parent / "starts").open("a") as file:
    print(*(case["case"] for case in cases), file=file)
for number, case in enumerate(cases):
    if number == 1 and case["case"] == "full":
        sys.exit(4)
    path = out / f"{case['case']}.json"
    result = {"case": case["case"], "status": "running", "step_seconds": 1.5}
    path.write_text(json.dumps(result))
    if case["case"] == "no memory":
        path.with_suffix(".oom").write_text("rank 1: no room")
        sys.exit(3)
    if case["case"] == "broken":
        sys.exit(1)
    if case["case"] == "hanging":
        time.sleep(60)
    path.write_text(json.dumps(result | {"status": "complete"}))
"""


def ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str, **options: Any
) -> dict[str, str]:
    """Statuses by name of cases with one layout, run in a worker that does what their names say."""
    (tmp_path / "training_worker.py").write_text(WORKER)
    monkeypatch.setattr(training_launch, "HERE", tmp_path)
    monkeypatch.setattr(training_launch, "launcher", lambda _: [sys.executable])
    cases = [Case(**TINY, case=name) for name in names]
    out = tmp_path / "-".join(names)
    results = list(training_launch.run_cases(cases, out, timeout=2, **options))
    assert [path.name for path in sorted(out.iterdir())] == sorted(f"{name}.json" for name in names)
    for result in results:
        assert result == read_result(out / f"{result['case']}.json")
        assert f"| {result['case']} | {result['status']} | 1.500 |" in table([result])
    return {result["case"]: result["status"] for result in results}


def test_a_case_that_does_not_end_well_is_a_row_and_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("one", "no memory", "two", "broken", "hanging", "three", "four")
    assert ended(tmp_path, monkeypatch, *names) == {
        "one": "complete", "no memory": "out of memory", "two": "complete", "broken": "failed",
        "hanging": "timed out", "three": "complete", "four": "complete",
    }  # fmt: skip
    assert len((tmp_path / "starts").read_text().splitlines()) == 4


def test_cases_share_processes_until_they_are_full_or_if_they_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(ended(tmp_path, monkeypatch, "one", "full", "two").values()) == {"complete"}
    assert (tmp_path / "starts").read_text().splitlines() == ["one full two", "full two"]
    (tmp_path / "starts").unlink()
    assert set(ended(tmp_path, monkeypatch, "one", "two", apart=True).values()) == {"complete"}
    assert (tmp_path / "starts").read_text().splitlines() == ["one", "two"]


def test_errors_of_libraries_without_memory_are_told_from_others() -> None:
    known = [
        "CUDA out of memory. Tried",
        "CUBLAS_STATUS_ALLOC_FAILED when calling",
        "Out of memory",
    ]
    assert all(training_measure.is_out_of_memory(RuntimeError(text)) for text in known)
    assert not training_measure.is_out_of_memory(
        RuntimeError("CUDA error: an illegal memory access")
    )


BASELINE = {
    "case": "a", "status": "complete", "device": "H200", "tokens_per_second_per_gpu": 1000.0, "peak_gib": 80.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens_per_second_per_gpu": 971.0, "peak_gib": 82.3}, []),
        ({"tokens_per_second_per_gpu": 1200.0, "peak_gib": 40.0}, []),
        (
            {"tokens_per_second_per_gpu": 960.0},
            ["tokens_per_second_per_gpu 960, 4.0% worse than 1000"],
        ),
        ({"peak_gib": 84.0}, ["peak_gib 84, 5.0% worse than 80"]),
        ({"status": "out of memory"}, ["out of memory, where the baseline is complete"]),
        ({"device": "H100", "tokens_per_second_per_gpu": 500.0}, []),
    ],
)
def test_slower_fuller_and_missing_results_are_regressions_beyond_the_threshold(
    change: dict, words: list[str]
) -> None:
    found = regressions(BASELINE | change, BASELINE, threshold=0.03)
    assert [line.removeprefix("a: ") for line in found] == words


def test_comparison_ends_with_exit_code_1_on_a_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "then").mkdir()
    (tmp_path / "then" / "a.json").write_text(json.dumps(BASELINE))
    now = dict(BASELINE)
    monkeypatch.setattr(training, "run_cases", lambda *_, **__: [now])
    arguments = ["training.py", "--case", "a", "--out", str(tmp_path / "now")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--compare", str(tmp_path / "then")])
    with pytest.raises(SystemExit) as ended:
        training.main()
    assert ended.value.code == 0
    now["peak_gib"] = 90.0
    with pytest.raises(SystemExit) as ended:
        training.main()
    assert ended.value.code == 1


def test_a_file_of_cases_takes_options_as_defaults_and_names_differ(tmp_path: Path) -> None:
    path = tmp_path / "cases.yaml"
    path.write_text(
        "- {tp: 2}\n- {cp: 2, backend: te, levers: [training.recompute_granularity=full]}\n- {case: mine}\n"
    )
    defaults = asdict(Case(tokens=131072, documents=1))
    cases = read_cases(path, defaults)
    assert [case.name for case in cases] == [
        "7b-128k-1-documents-tp2sp-auto",
        "7b-128k-1-documents-cp2-te-recompute_granularity-full",
        "mine",
    ]
    assert [case.gpus for case in cases] == [2, 2, 1]
    assert cases[1].recipe().training.recompute_granularity == "full"
    path.write_text("- {tp: 2}\n- {tp: 2}\n")
    with pytest.raises(ConfigError, match="two cases are named 7b-128k"):
        read_cases(path, defaults)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "7b"}, "case has no field 'size'; known: backend, case"),
        ({"model": "9b"}, "model is '9b'; known: 7b, 14b"),
        ({"peer": "transformers", "tp": 2}, "a peer takes one pack of one document on each GPU"),
        ({"documents": 3}, "tokens 32768 are not a multiple of documents 3"),
        ({"tiles": 6}, "tiles 6: a multiple of documents 4 is needed, at most 124 in 32768 tokens"),
        ({"tiles": 128}, "tiles 128: a multiple of documents 4 is needed, at most 124"),
        ({"tiles": 4, "model": "8b-text"}, "tiles 4: a peer or a text-only model takes none"),
    ],
)
def test_cases_that_cannot_be_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        case_from_dict(values)
