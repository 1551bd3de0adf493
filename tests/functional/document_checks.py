"""What must hold of documents at CP1 (in pytest) and CP2 (under torchrun): isolation, and the exact rows trained."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from synthetic import IGNORED, VOCAB, make_pack, share_of, tiny_recipe

from megatron_vita import platform
from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.build import build_model
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups

LENGTHS = [(31, 2), (1, 0), (45, 4), (7, 0)]  # odd lengths and a tail
NOISE_SEEDS = (11, 12)


def losses_by_position(model: VitaModel, batch: Batch) -> torch.Tensor:
    """Loss of every position of the pack that has one, 0 elsewhere: [T], summed over context-parallel ranks."""
    pack = slice_pack(
        batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, placements=batch.placements,
        rows_per_tile=4, layout=groups.rank_layout(),
    )  # fmt: skip
    mine = share_of(batch, groups.rank_layout(), first_stage=True)
    losses = model(normalize(mine.tiles, "imagenet"), pack)
    return torch.zeros(len(batch.input_ids)).index_copy(0, pack.positions[pack.loss_rows], losses)


def gradients(model: VitaModel, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the sum of `losses`, summed over context-parallel ranks."""
    model.zero_grad()
    losses.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    return grads


def only_document(batch: Batch, document: int) -> Batch:
    """The batch with loss on one document alone."""
    start, stop = batch.document_starts[document : document + 2].tolist()
    labels = torch.full_like(batch.labels, IGNORED)
    labels[start:stop] = batch.labels[start:stop]
    return replace(batch, labels=labels)


def with_noise(batch: Batch, keep: int, *, seed: int) -> Batch:
    """The batch with every token and pixel outside document `keep` replaced by noise."""
    generator = torch.Generator().manual_seed(seed)
    start, stop = batch.document_starts[keep : keep + 2].tolist()
    ids = torch.randint(0, VOCAB, batch.input_ids.shape, generator=generator)
    ids[start:stop] = batch.input_ids[start:stop]
    tiles = torch.randint(0, 256, batch.tiles.shape, generator=generator, dtype=torch.uint8)
    own = (batch.placements >= start) & (batch.placements < stop)
    tiles[own] = batch.tiles[own]
    return replace(batch, input_ids=ids, tiles=tiles)


def isolation(model: VitaModel) -> dict[str, float]:
    """Largest change of a document's losses and gradients when all others become noise."""
    batch = make_pack(LENGTHS, seed=3)
    worst = {"loss": 0.0, "gradient": 0.0}
    for document in (0, 2, 3):
        alone = only_document(batch, document)
        losses = losses_by_position(model, alone)
        grads = gradients(model, losses)
        for seed in NOISE_SEEDS:
            noisy = losses_by_position(model, with_noise(alone, document, seed=seed))
            worst["loss"] = max(worst["loss"], (noisy - losses).abs().max().item())
            after = gradients(model, noisy)
            total = torch.stack([g.norm() for g in grads.values()]).norm()
            change = max((after[name] - grads[name]).norm() / total for name in grads)
            worst["gradient"] = max(worst["gradient"], change.item())
    return worst


def several_turns() -> tuple[Batch, list[list[int]], list[list[int]]]:
    """A pack of two conversations of one-token answers; also each document's ids and its scored token indices."""
    generator = torch.Generator().manual_seed(9)
    documents, scored = [], []
    for turns in (3, 4):
        ids, answers = [], []
        for _ in range(turns):
            question = torch.randint(
                5, VOCAB, (int(torch.randint(2, 6, (1,), generator=generator)),), generator=generator
            )
            ids += [1, *question.tolist(), 2]  # header, question
            answers += [len(ids), len(ids) + 1]  # one-token answer and end of turn
            ids += [int(torch.randint(5, VOCAB, (1,), generator=generator)), 3]
        documents.append(ids)
        scored.append(answers)
    batch = make_pack([(len(ids), 0) for ids in documents], seed=1)
    labels = torch.full_like(batch.labels, IGNORED)
    for start, ids, answers in zip(batch.document_starts.tolist(), documents, scored, strict=False):
        batch.input_ids[start : start + len(ids)] = torch.tensor(ids)
        for index in answers:
            labels[start + index - 1] = ids[index]
    return replace(batch, labels=labels), documents, scored


def plain_logits(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Qwen2 in plain PyTorch on one document, every position's logits: an independent computation [len(ids), V]."""
    shape = tiny_recipe().model.language
    heads, kv_heads, width = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels
    x = weights["embedding.word_embeddings.weight"][torch.tensor(ids)]
    angle = torch.arange(len(ids))[:, None] / shape.rotary_base ** (torch.arange(0, width, 2) / width)
    cos, sin = angle.cos()[:, None].repeat(1, 1, 2), angle.sin()[:, None].repeat(1, 1, 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + shape.layernorm_epsilon).sqrt() * weights[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin

    for i in range(shape.num_layers):
        layer = f"decoder.layers.{i}."
        qkv = norm(x, f"{layer}input_layernorm.weight") @ weights[f"{layer}self_attention.linear_qkv.weight"].T
        qkv = (qkv + weights[f"{layer}self_attention.linear_qkv.bias"]).view(len(ids), kv_heads, -1, width)
        q, k, v = rotate(qkv[:, :, :-2].flatten(1, 2)), rotate(qkv[:, :, -2]), qkv[:, :, -1]
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        future = torch.ones(len(ids), len(ids)).triu(1).bool()
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v).flatten(1)
        x = x + mixed @ weights[f"{layer}self_attention.linear_proj.weight"].T
        gate, up = (norm(x, f"{layer}pre_mlp_layernorm.weight") @ weights[f"{layer}mlp.linear_fc1.weight"].T).chunk(
            2, -1
        )
        x = x + (F.silu(gate) * up) @ weights[f"{layer}mlp.linear_fc2.weight"].T
    return norm(x, "decoder.final_layernorm.weight") @ weights["output_layer.weight"].T


def exact_rows(model: VitaModel) -> dict[str, float]:
    """Our mean loss on several turns with one-token answers, and that of plain PyTorch on full logits."""
    batch, documents, scored = several_turns()
    with torch.no_grad():
        total = losses_by_position(model, batch).sum()
        dist.all_reduce(total)
        weights = {n.removeprefix("language_model."): p for n, p in model.named_parameters()}
        plain = 0.0
        for ids, answers in zip(documents, scored, strict=True):
            log_p = plain_logits(weights, ids).log_softmax(-1)
            plain -= sum(log_p[index - 1, ids[index]].item() for index in answers)
    rows = sum(len(answers) for answers in scored)
    return {"ours": total.item() / rows, "plain": plain / rows}


def run_checks(context_parallel_size: int) -> dict[str, dict[str, float]]:
    """All checks at a context-parallel size that fills the world."""
    platform.initialize_process()
    recipe = tiny_recipe(context_parallel_size=context_parallel_size)
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    return {"isolation": isolation(model), "exact_rows": exact_rows(model)}


if __name__ == "__main__":
    found = run_checks(2)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
