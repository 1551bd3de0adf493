"""Checks of documents at every layout: isolation, positions, and the exact rows that are trained.

Run in pytest for one process, and under torchrun for more. Arguments: a file for the results, and
JSON of {name: fields of the recipe}.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import PackSlice, slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.build import build_model
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from tests.functional.synthetic import IGNORED, VOCAB, make_pack, share_of, tiny_recipe

# Tokens and tiles of documents, by pack length: odd, prime, a single token; and a tail.
LENGTHS = {
    128: [(31, 2), (1, 0), (45, 4), (7, 0)],
    2048: [(301, 4), (1, 0), (645, 9), (97, 0), (800, 20)],
}


@dataclass
class Outcome:
    """Losses and input gradients of one pack on every rank, with the rows of the whole pack."""

    losses: torch.Tensor  # [T], 0 where nothing is scored
    input_gradients: torch.Tensor  # [T, H] of the first layer's input

    def change(self, other: "Outcome", rows: slice) -> dict[str, float]:
        """Largest difference in `rows`."""
        pairs = ((self.losses, other.losses), (self.input_gradients, other.input_gradients))
        loss, gradient = ((a[rows] - b[rows]).abs().max().item() for a, b in pairs)
        return {"loss": loss, "gradient": gradient}


def run_pack(model: VitaModel, batch: Batch) -> Outcome:
    """Run a pack forward and backward, with the sum of its losses."""
    layout = groups.rank_layout()
    pack = slice_pack(
        batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, placements=batch.placements,
        frames=batch.frames, rows_per_tile=4, layout=layout,
    ).to(platform.device())  # fmt: skip
    tiles = share_of(batch, layout, first_stage=True).tiles.to(platform.device())
    inputs: list[torch.Tensor] = []

    def keep_input(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs["hidden_states"].retain_grad()
        inputs.append(kwargs["hidden_states"])

    hook = model.language_model.decoder.register_forward_pre_hook(keep_input, with_kwargs=True)
    losses = model(normalize(tiles, "imagenet", dtype=model.config.params_dtype), pack)
    hook.remove()
    model.zero_grad()
    losses.sum().backward()
    scored = losses.new_zeros(len(batch.input_ids))
    scored[pack.positions[pack.loss_rows].to(losses.device)] = losses.detach()
    return Outcome(
        _whole(scored, over=groups.context_group()), _input_gradients(inputs[0], pack, model)
    )


def _input_gradients(hidden: torch.Tensor, pack: PackSlice, model: VitaModel) -> torch.Tensor:
    """Gradients [T, H] from this rank's rows of the pack, or of its sequence shard."""
    layout = groups.rank_layout()
    shared = model.config.sequence_parallel
    rows = pack.positions.chunk(layout.tp_size)[layout.tp_rank] if shared else pack.positions
    assert hidden.grad is not None
    whole = torch.zeros(int(pack.cu_seqlens[-1]), hidden.shape[-1], device=hidden.device)
    whole[rows.to(hidden.device)] = hidden.grad.squeeze(1).float()
    return _whole(whole, over=groups.tile_group() if shared else groups.context_group())


def _whole(rows: torch.Tensor, *, over: dist.ProcessGroup) -> torch.Tensor:
    """Sum rows over ranks; each holds zeros for the rows of the others, so that the sum is exact."""
    dist.all_reduce(rows, group=over)
    return rows.cpu()


def with_noise(batch: Batch, document: int, *, seed: int) -> Batch:
    """Replace every token and pixel of one document by noise."""
    generator = torch.Generator().manual_seed(seed)
    start, stop = batch.document_starts[document : document + 2].tolist()
    ids = batch.input_ids.clone()
    tiles = batch.tiles.clone()
    ids[start:stop] = torch.randint(0, VOCAB, (stop - start,), generator=generator)
    own = (batch.placements >= start) & (batch.placements < stop)
    tiles[own] = torch.randint(0, 256, tiles[own].shape, generator=generator, dtype=torch.uint8)
    return replace(batch, input_ids=ids, tiles=tiles)


def poison(model: VitaModel, batch: Batch) -> dict[str, dict[str, float]]:
    """Replace one document after the other by noise; return the largest changes of the documents
    before it, after it, and of itself."""
    clean = run_pack(model, batch)
    bounds = batch.document_starts.tolist()
    worst = {place: {"loss": 0.0, "gradient": 0.0} for place in ("before", "after", "itself")}
    for poisoned in range(len(bounds) - 1):
        noisy = run_pack(model, with_noise(batch, poisoned, seed=poisoned))
        for document in range(len(bounds) - 1):
            if document == poisoned:
                place = "itself"
            else:
                place = "before" if document < poisoned else "after"
            change = clean.change(noisy, slice(bounds[document], bounds[document + 1]))
            worst[place] = {what: max(worst[place][what], change[what]) for what in change}
    return worst


def position_of_documents(model: VitaModel, *, length: int, joined: bool) -> float:
    """Difference between a document's losses as the second and as the first of its pack."""
    documents = [[(45, 4), (31, 0)], [(31, 0), (45, 4)]]
    outcomes = []
    for lengths in documents:
        batch = make_pack(lengths, seed=6, length=length, joined=joined)
        text = make_pack([(31, 0)], seed=7, length=length)
        start = 0 if lengths[0][0] == 31 else int(batch.document_starts[1])
        batch.input_ids[start : start + 31] = text.input_ids[:31]
        batch.labels[start : start + 31] = text.labels[:31]
        outcomes.append(run_pack(model, batch).losses[start : start + 31])
    return (outcomes[0] - outcomes[1]).abs().max().item()


def several_turns(*, joined: bool) -> tuple[Batch, list[list[int]], list[list[int]]]:
    """A pack of two conversations with one-token answers, each document's ids, and its scored token
    indices."""
    generator = torch.Generator().manual_seed(9)
    documents = []
    scored = []
    for turns in (3, 4):
        ids = []
        answers = []
        for _ in range(turns):
            question = torch.randint(
                5,
                VOCAB,
                (int(torch.randint(2, 6, (1,), generator=generator)),),
                generator=generator,
            )
            ids += [1, *question.tolist(), 2]  # header, question
            answers += [len(ids), len(ids) + 1]  # one-token answer and end of turn
            ids += [int(torch.randint(5, VOCAB, (1,), generator=generator)), 3]
        documents.append(ids)
        scored.append(answers)
    batch = make_pack([(len(ids), 0) for ids in documents], seed=1, joined=joined)
    labels = torch.full_like(batch.labels, IGNORED)
    for start, ids, answers in zip(batch.document_starts.tolist(), documents, scored, strict=False):
        batch.input_ids[start : start + len(ids)] = torch.tensor(ids)
        for index in answers:
            labels[start + index - 1] = ids[index]
    return replace(batch, labels=labels), documents, scored


def plain_logits(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), V] of one document by Qwen2 in plain PyTorch, as an independent
    computation."""
    shape = tiny_recipe().model.language
    heads = shape.num_attention_heads
    kv_heads = shape.num_query_groups
    width = shape.kv_channels
    x = weights["embedding.word_embeddings.weight"][torch.tensor(ids)]
    angle = torch.arange(len(ids))[:, None] / shape.rotary_base ** (
        torch.arange(0, width, 2) / width
    )
    cos = angle.cos()[:, None].repeat(1, 1, 2)
    sin = angle.sin()[:, None].repeat(1, 1, 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + shape.layernorm_epsilon).sqrt() * weights[name]
        )

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin

    for i in range(shape.num_layers):
        layer = f"decoder.layers.{i}."
        qkv = (
            norm(x, f"{layer}input_layernorm.weight")
            @ weights[f"{layer}self_attention.linear_qkv.weight"].T
        )
        qkv = (qkv + weights[f"{layer}self_attention.linear_qkv.bias"]).view(
            len(ids), kv_heads, -1, width
        )
        q = rotate(qkv[:, :, :-2].flatten(1, 2))
        k = rotate(qkv[:, :, -2])
        v = qkv[:, :, -1]
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        future = torch.ones(len(ids), len(ids)).triu(1).bool()
        mixed = torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v
        ).flatten(1)
        x = x + mixed @ weights[f"{layer}self_attention.linear_proj.weight"].T
        gate, up = (
            norm(x, f"{layer}pre_mlp_layernorm.weight") @ weights[f"{layer}mlp.linear_fc1.weight"].T
        ).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ weights[f"{layer}mlp.linear_fc2.weight"].T
    return norm(x, "decoder.final_layernorm.weight") @ weights["output_layer.weight"].T


def exact_rows(model: VitaModel, *, joined: bool) -> dict[str, float]:
    """Mean loss of several turns with one-token answers: ours, and that of plain PyTorch on full
    logits."""
    batch, documents, scored = several_turns(joined=joined)
    total = run_pack(model, batch).losses.sum().item()
    weights = {n.removeprefix("language_model."): p.detach() for n, p in model.named_parameters()}
    if joined:
        starts = batch.document_starts.tolist()
        scored = [
            [
                start + index
                for start, answers in zip(starts, scored, strict=False)
                for index in answers
            ]
        ]
        documents = [[token for ids in documents for token in ids]]
    plain = 0.0
    for ids, answers in zip(documents, scored, strict=True):
        log_p = plain_logits(weights, ids).log_softmax(-1)
        plain -= sum(log_p[index - 1, ids[index]].item() for index in answers)
    rows = sum(len(answers) for answers in scored)
    return {"ours": total / rows, "plain": plain / rows}


def run_checks(recipe: Recipe) -> dict[str, Any]:
    """Run all checks at a layout that fills the world."""
    platform.initialize_process()
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    joined = not recipe.data.isolate_documents
    length = recipe.data.seq_length
    found: dict[str, Any] = {
        "poison": poison(model, make_pack(LENGTHS[length], seed=3, length=length, joined=joined)),
        "position": position_of_documents(model, length=length, joined=joined),
    }
    # plain PyTorch, whole weights
    if recipe.parallel.tensor_model_parallel_size == 1 and not recipe.training.bf16:
        found["exact_rows"] = exact_rows(model, joined=joined)
    return found


def main() -> None:
    """Arguments: file, JSON of fields by name."""
    found = {
        name: run_checks(tiny_recipe(**fields)) for name, fields in json.loads(sys.argv[2]).items()
    }
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
