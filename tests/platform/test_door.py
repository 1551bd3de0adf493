"""The CPU adaptation is complete, undone whole, and never active on CUDA; the unrelated apex is
refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_vita.platform as platform
from megatron_vita.errors import PlatformError
from megatron_vita.platform import cpu, packages
from tests.environment import environment_with

OWNERS = (torch, torch.cuda, torch.Tensor, torch.nn.Module)


def snapshot() -> dict[tuple[str, str], object]:
    return {
        (repr(o), n): getattr(o, n)
        for o in OWNERS
        for n in dir(o)
        if not n.startswith("__") and n != "_C"
    }


def test_adaptation_is_undone_whole() -> None:
    before = snapshot()
    undo = cpu.adapt_to_cpu()
    assert snapshot() != before
    undo()
    after = snapshot()
    assert [
        name for name in before if before[name] is not after[name] and before[name] != after[name]
    ] == []


def test_adaptation_refuses_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AssertionError, match="never on a machine with CUDA"):
        cpu.adapt_to_cpu()


def test_cuda_requests_land_on_the_cpu_and_cuda_stays_unavailable() -> None:
    assert not torch.cuda.is_available()
    assert platform.device() == torch.device("cpu")
    for tensor in (torch.zeros(2, device="cuda"), torch.ones(2).cuda(), torch.ones(2).to("cuda:0")):
        assert tensor.device.type == "cpu"


def test_type_names_are_changed_for_megatron_core_alone() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_the_unrelated_apex_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlatformError, match="not NVIDIA Apex"):
        packages.refuse_unrelated_apex()
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.startswith("apex")]:
        monkeypatch.delitem(sys.modules, name)
    packages.refuse_unrelated_apex()


def test_importing_config_media_and_text_does_not_import_megatron_core() -> None:
    code = (
        "import sys, megatron_vita.config, megatron_vita.media.tiling, megatron_vita.text.template;"
        "sys.exit('megatron.core' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


def test_importing_the_loop_imports_neither_the_compiler_nor_writers_of_metrics() -> None:
    code = (
        "import sys, torch; compile_ = torch.compile; import megatron_vita.training.loop;"
        "assert torch.compile is compile_;"
        "heavy = {'torch._dynamo', 'torch._inductor', 'tensorboard', 'wandb'};"
        "sys.exit(str(heavy & set(sys.modules) or ''))"
    )
    environment = environment_with()
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert ended.stderr.strip() == ""


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_one_of_many_processes_that_were_told_no_rank_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "8")
    with pytest.raises(
        PlatformError, match=rf"one of 8 processes \({name}\), but RANK is not set.*torchrun"
    ):
        platform.initialize_process()


def test_no_module_of_the_platform_hides_what_the_door_gives() -> None:
    """Importing a submodule sets an attribute of its name, in the place of a function of that name."""
    folder = Path(platform.__file__).parent
    assert {path.stem for path in folder.glob("*.py")}.isdisjoint(platform.__all__)
