"""Host buffers for offloaded activations, from a recipe."""

from collections import Counter

from megatron_vita.config import LayerMemory, Recipe, layer_memory
from megatron_vita.costs.memory.layer_memory import value_bytes
from megatron_vita.costs.memory.schedule import most_kept


def offload_buffers(recipe: Recipe, stage: int, *, data_parallel: int) -> Counter[int]:
    """Count the host buffers that a rank of pipeline stage `stage` needs at once, by size in bytes.

    They hold layers' inputs, and attention's outputs of the layers that keep it.
    """
    parallel = recipe.parallel
    language = recipe.model.language
    rows = recipe.data.seq_length // parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size
    size = value_bytes(recipe)
    rows_of_rank = rows
    if parallel.sequence_parallel:
        rows_of_rank = rows // tp
    chunks = parallel.virtual_pipeline_model_parallel_size
    layers = parallel.layers_of_stages(language.num_layers)[stage] // chunks
    offloaded = [memory for memory in layer_memory(recipe, layers) if memory.offload]

    def count(kept: list[LayerMemory]) -> int:
        return most_kept(recipe, stage, data_parallel=data_parallel, chunks=[len(kept)] * chunks)

    buffers = Counter({rows_of_rank * language.hidden_size * size: count(offloaded)})
    heads = language.num_attention_heads // tp * language.kv_channels
    # Added: both may have the same size, and then share buffers.
    buffers[rows * heads * size] += count([m for m in offloaded if m.keep_attention])
    return +buffers
