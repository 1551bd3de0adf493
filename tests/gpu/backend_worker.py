"""Run by torchrun on GPUs: Transformer Engine's backend against the torch backend, with the same weights in bf16.

Arguments: folder, file for what was found, backend to compare with `torch`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "functional"))
from document_checks import only_document, with_noise
from synthetic import make_pack, share_of

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import DataConfig, LanguageConfig, ModelConfig, ParallelConfig, Recipe, TrainingConfig
from megatron_vita.config import VisionConfig as Vision
from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.build import build_model
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups

LAYOUTS = {
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "cp2": {"context_parallel_size": 2},
}
LENGTH = 2048
DOCUMENTS = [(301, 4), (1, 0), (645, 9), (97, 0), (800, 20)]  # odd lengths, a single token, and a tail


def make_recipe(layout: dict, backend: str) -> Recipe:
    """A small model with head sizes that fused kernels take."""
    return Recipe(
        model=ModelConfig(
            vision=Vision(image_size=16, patch_size=4, num_layers=2, hidden_size=64, ffn_hidden_size=128,
                          num_attention_heads=4, layer_scale_init=1.0, init_method_std=0.1),
            language=LanguageConfig(num_layers=4, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=8,
                                    num_query_groups=2, kv_channels=64, vocab_size=96, init_method_std=0.05),
        ),
        data=DataConfig(seq_length=LENGTH),
        parallel=ParallelConfig(**layout, attention_backend=backend),
        training=TrainingConfig(bf16=True),
    )  # fmt: skip


def losses_by_position(model: VitaModel, batch: Batch) -> torch.Tensor:
    """Loss of every position of the pack that has one, 0 elsewhere, of this context-parallel rank: [T] fp32."""
    layout = groups.rank_layout()
    pack = slice_pack(
        batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, placements=batch.placements,
        rows_per_tile=4, layout=layout,
    )  # fmt: skip
    tiles = share_of(batch, layout, first_stage=True).tiles.to(platform.device())
    losses = model(normalize(tiles, "imagenet").bfloat16(), pack.to(platform.device()))
    rows = pack.positions[pack.loss_rows].to(losses.device)
    return torch.zeros(LENGTH, device=losses.device).index_copy(0, rows, losses)


def whole(losses: torch.Tensor) -> torch.Tensor:
    """Losses of all context-parallel ranks."""
    total = losses.detach().clone()
    dist.all_reduce(total, group=groups.context_group())
    return total


def gradients(model: VitaModel, batch: Batch) -> torch.Tensor:
    """All gradients of the summed loss, flat, in fp32."""
    model.zero_grad()
    losses_by_position(model, batch).sum().backward()
    by_name = {canonical(name): p.grad.float().flatten() for name, p in model.named_parameters()}
    return torch.cat([by_name[name] for name in sorted(by_name)])


def canonical(name: str) -> str:
    """One name for the norm weights that Transformer Engine holds inside its linear layers."""
    return name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight").replace(
        "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
    )


def check_layout(name: str, folder: Path, backend: str) -> dict[str, float]:
    """Differences between the backends, and what noise in other documents changes."""
    reference_recipe = make_recipe(LAYOUTS[name], "torch")
    groups.initialize_groups(reference_recipe.parallel)
    reference = build_model(reference_recipe)
    state = {"model": store.model_state([reference])}
    path = store.save_checkpoint(folder / name, step=0, state=state, manifest={}, keep=1)
    model = build_model(make_recipe(LAYOUTS[name], backend))
    store.load_weights([model], path)
    batch = make_pack(DOCUMENTS, seed=5, length=LENGTH)
    expected, actual = whole(losses_by_position(reference, batch)), whole(losses_by_position(model, batch))
    one, other = gradients(reference, batch), gradients(model, batch)
    alone = only_document(batch, 2)
    before = whole(losses_by_position(model, alone))
    after = whole(losses_by_position(model, with_noise(alone, 2, seed=7)))
    rows = (batch.labels != -100).sum().item()
    return {
        "mean loss": expected.sum().item() / rows,
        "mean loss difference": abs(expected.sum() - actual.sum()).item() / rows,
        "largest loss difference": (expected - actual).abs().max().item(),
        "gradient cosine": torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0).item(),
        "change by noise elsewhere": (before - after).abs().max().item(),
    }


def main() -> None:
    """Checks every layout."""
    folder, found, backend = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    platform.initialize_process()
    results = {name: check_layout(name, folder, backend) for name in LAYOUTS}
    if dist.get_rank() == 0:
        found.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
