"""Rules about fields of several groups of a recipe."""

from typing import TYPE_CHECKING, get_args

from megatron_vita.config.groups.lora import Part, adapted_maps
from megatron_vita.config.parsing.fields import require

if TYPE_CHECKING:
    from megatron_vita.config.recipe import Recipe

FP8_MULTIPLES = {"tensorwise": 16, "blockwise": 128}
"""Divisors of a matrix's rows and columns by `training.fp8_recipe`: units of the products, blocks."""


def check_recipe(recipe: "Recipe") -> None:
    """Check that the groups of a recipe fit together.

    Raises:
        ConfigError: naming the fields, their values and what would be right.
    """
    # Tensor parallelism first: the checks of context parallelism divide heads by its size.
    check_tensor_parallel(recipe)
    _check_context_parallel(recipe)
    _check_backend(recipe)
    _check_fp8(recipe)
    _check_layers(recipe)
    _check_sequence(recipe)
    _check_parts(recipe)
    _check_adapters(recipe)
    _check_adapter_dropout(recipe)
    _check_quantized_base(recipe)
    _check_preferences(recipe)
    _check_checkpoints(recipe)
    _check_schedule(recipe)
    _check_optimizer(recipe)


def check_tensor_parallel(recipe: "Recipe") -> None:
    """Check that tensor parallelism divides the model's weight matrices.

    Raises:
        ConfigError: naming the width that it does not divide.
    """
    tp = recipe.parallel.tensor_model_parallel_size
    language = recipe.model.language
    for name in ("num_attention_heads", "ffn_hidden_size"):
        value = getattr(language, name)
        require(
            value % tp == 0,
            f"model.language.{name} {value} is not a multiple of "
            f"parallel.tensor_model_parallel_size {tp}",
        )
    shared = language.num_query_groups
    # With more TP ranks than key and value heads, megatron-core splits the projection's
    # rows over the ranks and gathers its outputs, which needs rows that divide.
    require(
        shared % tp == 0 or (tp % shared == 0 and 2 * shared * language.kv_channels % tp == 0),
        f"model.language.num_query_groups {shared} is neither a multiple nor a divisor of "
        f"parallel.tensor_model_parallel_size {tp}",
    )
    width = recipe.model.vision.ffn_hidden_size
    require(
        not recipe.parallel.vision_tensor_parallel or width % tp == 0,
        f"model.vision.ffn_hidden_size {width} is not a multiple of "
        f"parallel.tensor_model_parallel_size {tp}, which parallel.vision_tensor_parallel "
        "needs",
    )


def _check_context_parallel(recipe: "Recipe") -> None:
    ranks = recipe.parallel.head_exchange_size
    tp = recipe.parallel.tensor_model_parallel_size
    if ranks == 1:
        return
    language = recipe.model.language
    of_rank = {
        "num_attention_heads": language.num_attention_heads // tp,
        "num_query_groups": language.query_groups_of_rank(tp),
    }
    for name, heads in of_rank.items():
        require(
            heads % ranks == 0,
            f"parallel.cp_comm_type {recipe.parallel.cp_comm_type} splits model.language.{name} "
            f"over {ranks} ranks, but a TP rank has {heads}; use p2p or all_gather, or a "
            "smaller tensor_model_parallel_size",
        )


def _check_sequence(recipe: "Recipe") -> None:
    tp = recipe.parallel.tensor_model_parallel_size
    cp = recipe.parallel.context_parallel_size
    length = recipe.data.seq_length
    # Zigzag cuts each attention segment into 2 x CP chunks: a document, or else the whole pack.
    segment = "pack"
    name = "seq_length"
    if recipe.data.isolate_documents:
        segment = "document"
        name = "document_alignment"
    chunked = getattr(recipe.data, name)
    require(
        cp == 1 or chunked % (2 * cp) == 0,
        f"data.{name} {chunked} is not a multiple of {2 * cp}, twice "
        f"parallel.context_parallel_size {cp}: each {segment} is split into that many chunks",
    )
    require(
        length % (tp * cp) == 0,
        f"data.seq_length {length} is not a multiple of {tp * cp}, tensor_model_parallel_size "
        f"{tp} times context_parallel_size {cp}",
    )


def _check_layers(recipe: "Recipe") -> None:
    """Check the layers of pipeline stages, and the numbers of recomputed layers."""
    # Recomputed layers are counted in each interleaved chunk, on the fullest stage.
    chunks = recipe.parallel.virtual_pipeline_model_parallel_size
    layers = max(recipe.parallel.layers_of_stages(recipe.model.language.num_layers)) // chunks
    number = recipe.training.recompute_num_layers
    require(
        number <= layers,
        f"training.recompute_num_layers is {number}, but no rank has more than {layers} "
        "layers at once",
    )
    kept = recipe.training.recompute_keep_attention_layers
    recomputed = number or layers
    require(
        kept <= recomputed,
        f"training.recompute_keep_attention_layers is {kept}, but no rank recomputes more "
        f"than {recomputed} layers at once; -1 keeps all",
    )


def _check_backend(recipe: "Recipe") -> None:
    name = recipe.parallel.attention_backend
    width = recipe.model.language.kv_channels
    if name not in ("te", "fa4"):
        return
    require(
        recipe.training.bf16,
        f"parallel.attention_backend {name} needs training.bf16: its kernels take no fp32; or "
        "use torch",
    )
    require(
        name == "fa4" or (width % 8 == 0 and width <= 128),
        f"model.language.kv_channels is {width}: Transformer Engine's fused attention takes "
        "multiples of 8 up to 128; or use parallel.attention_backend torch",
    )
    if name == "fa4":
        obstacle = recipe.fa4_obstacle()
        require(not obstacle, f"parallel.attention_backend is fa4, but {obstacle}")


def _check_fp8(recipe: "Recipe") -> None:
    name = recipe.training.fp8_recipe
    if name == "none":
        return
    require(
        recipe.parallel.attention_backend != "torch",
        f"training.fp8_recipe is {name}, but parallel.attention_backend is torch: only te and "
        "fa4 have 8-bit linear layers",
    )
    multiple = FP8_MULTIPLES[name]
    for what, size in _matrix_sizes(recipe).items():
        require(
            size % multiple == 0,
            f"{what} is {size}: training.fp8_recipe {name} needs a multiple of {multiple}",
        )
    rows = recipe.rows_of_rank(recipe.data.seq_length // recipe.parallel.context_parallel_size)
    piece = recipe.rows_of_rank(recipe.training.mlp_chunk_tokens)
    require(
        not piece or rows % piece == 0,
        f"training.mlp_chunk_tokens is {recipe.training.mlp_chunk_tokens}: training.fp8_recipe "
        f"{name} needs pieces of equal length",
    )


def _matrix_sizes(recipe: "Recipe") -> dict[str, int]:
    """Rows and columns of one rank's matrices, by the fields that they follow from."""
    language = recipe.model.language
    parallel = recipe.parallel
    tp = parallel.tensor_model_parallel_size
    joint = language.num_attention_heads // tp + 2 * language.query_groups_of_rank(tp)
    return {
        "data.seq_length over CP and SP ranks": recipe.rows_of_rank(
            recipe.data.seq_length // parallel.context_parallel_size
        ),
        "training.mlp_chunk_tokens over SP ranks": recipe.rows_of_rank(
            recipe.training.mlp_chunk_tokens
        ),
        **_row_sizes(recipe),
        "the width of queries, keys and values over TP ranks": joint * language.kv_channels,
    }


def _check_parts(recipe: "Recipe") -> None:
    training = recipe.training
    frozen = {
        "vision model": training.freeze_vision_model or recipe.model.text_only,
        "projector": training.freeze_projector or recipe.model.text_only,
        "language model": training.freeze_language_model,
    }
    require(
        not all(frozen.values()) or recipe.lora.rank > 0,
        "training freezes the vision model, the projector and the language model, or "
        "model.text_only has none of the first two: nothing is left to train",
    )


def _check_adapters(recipe: "Recipe") -> None:
    require(
        not recipe.lora.dora or recipe.training.fp8_recipe == "none",
        f"lora.dora is true, but training.fp8_recipe is {recipe.training.fp8_recipe}: norms of "
        "8-bit weights are not supported; set it to none",
    )
    for adapted in adapted_maps(recipe.model, recipe.lora):
        part = adapted.linear.part
        require(
            getattr(recipe.training, f"freeze_{part}"),
            f"lora.targets names maps of the {part}, such as {adapted.linear.name}, whose own "
            f"weights are trained: set training.freeze_{part} to true, or name maps of other parts",
        )
        require(
            part != "vision_model" or not recipe.parallel.vision_tensor_parallel,
            f"lora.targets names maps of the vision_model, such as {adapted.linear.name}: "
            "adapters of a tower that parallel.vision_tensor_parallel splits are not supported",
        )


def _check_adapter_dropout(recipe: "Recipe") -> None:
    """Check that masks can be drawn again wherever layers are computed again."""
    if not recipe.lora.dropout:
        return
    training = recipe.training
    reason = ""
    if any(a.linear.part != "language_model" for a in adapted_maps(recipe.model, recipe.lora)):
        reason = "lora.targets names maps of other parts than the language model"
    elif training.recompute_granularity == "full" and training.recompute_method == "uniform":
        reason = "training.recompute_method is uniform; use block"
    elif (
        training.recompute_granularity == "selective"
        and "mlp" in training.recompute_modules
        and not training.mlp_chunk_tokens
    ):
        reason = "training.recompute_modules has mlp without training.mlp_chunk_tokens"
    require(not reason, f"lora.dropout is {recipe.lora.dropout}, but must be 0: {reason}")


def _check_quantized_base(recipe: "Recipe") -> None:
    """Check that the 4-bit maps are frozen, and that no block of a row lies on two ranks."""
    lora = recipe.lora
    if not lora.quantizes:
        return
    field = f"lora.quantize_base is {lora.quantize_base}"
    require(
        recipe.training.freeze_language_model,
        f"{field}, but the language model is trained: set training.freeze_language_model to true",
    )
    require(
        recipe.training.fp8_recipe == "none",
        f"{field}, but training.fp8_recipe is {recipe.training.fp8_recipe}: weights of 4 bits are "
        "multiplied in the type of all weights; set it to none",
    )
    require(
        not lora.dora,
        f"{field}, but lora.dora is true: norms of 4-bit weights are not those of the base that "
        "adapters are merged into or exported for; set one of them to its default",
    )
    for what, size in _row_sizes(recipe).items():
        require(
            size % lora.quantize_block_size == 0,
            f"{what} is {size}: {field}, which needs a multiple of lora.quantize_block_size "
            f"{lora.quantize_block_size}, so that no block crosses rows or ranks",
        )


def _row_sizes(recipe: "Recipe") -> dict[str, int]:
    """Columns of one rank's matrices, by the fields that they follow from."""
    language = recipe.model.language
    tp = recipe.parallel.tensor_model_parallel_size
    heads = language.num_attention_heads // tp
    return {
        "model.language.hidden_size": language.hidden_size,
        "model.language.ffn_hidden_size over TP ranks": language.ffn_hidden_size // tp,
        "model.language.num_attention_heads x kv_channels over TP ranks": heads
        * language.kv_channels,
    }


def _check_preferences(recipe: "Recipe") -> None:
    """Check that the reference stays what it was, and that losses are log-probabilities."""
    if not recipe.dpo.beta:
        return
    beta = f"dpo.beta is {recipe.dpo.beta:g}"
    require(
        recipe.lora.rank > 0,
        f"{beta}, which needs adapters, without which the model is the reference: set lora.rank",
    )
    for part in get_args(Part):
        absent = recipe.model.text_only and part != "language_model"
        require(
            absent or getattr(recipe.training, f"freeze_{part}"),
            f"{beta}, but the {part} is trained fully, and would change the reference with it: set "
            f"training.freeze_{part} to true",
        )
    require(
        recipe.data.isolate_documents,
        f"{beta}, but data.isolate_documents is false: answers of a pair must not see each other",
    )
    for name in ("label_smoothing", "z_loss"):
        value = getattr(recipe.model.output, name)
        require(
            not value,
            f"{beta}, but model.output.{name} is {value:g}: losses of its tokens must be their "
            "log-probabilities; set it to 0",
        )


def _check_checkpoints(recipe: "Recipe") -> None:
    checkpoint = recipe.checkpoint
    require(
        not recipe.numerics.may_roll_back or checkpoint.save != "",
        "a rule of numerics is rollback, which needs checkpoint.save, a folder",
    )
    # The store would keep checkpoints of steps that are taken back, and not what is left out.
    require(
        not recipe.numerics.may_roll_back or checkpoint.mirror == "",
        f"a rule of numerics is rollback, which checkpoint.mirror {checkpoint.mirror} cannot follow: choose skip or "
        "stop, or leave checkpoint.mirror empty",
    )
    # Nothing would have a score, and nothing would be kept for it.
    require(
        not checkpoint.keep_best
        or not checkpoint.best_metric.startswith("validation/")
        or recipe.training.eval_interval > 0,
        f"checkpoint.keep_best is {checkpoint.keep_best} by {checkpoint.best_metric}, which "
        "needs training.eval_interval; or name another checkpoint.best_metric, such as train/loss",
    )


def _check_schedule(recipe: "Recipe") -> None:
    warmup, end = recipe.schedule_iters
    decay = recipe.optimizer.lr_wsd_decay_iters
    of_end = (
        "optimizer.lr_decay_iters" if recipe.optimizer.lr_decay_iters else "training.train_iters"
    )
    require(
        warmup < end,
        f"the learning rate rises for {warmup} steps (optimizer.lr_warmup_iters or "
        f"lr_warmup_fraction), but its decay ends at step {end} ({of_end}): fewer are needed",
    )
    require(
        warmup + decay <= end,
        f"optimizer.lr_wsd_decay_iters is {decay}, but between warm-up and step {end} ({of_end}) "
        f"lie {end - warmup}",
    )


def _check_optimizer(recipe: "Recipe") -> None:
    if not recipe.optimizer.use_precision_aware_optimizer:
        return
    require(
        recipe.training.bf16,
        "optimizer.use_precision_aware_optimizer needs training.bf16: fp32 weights have no "
        "others beside them",
    )
    require(
        recipe.parallel.use_distributed_optimizer,
        "optimizer.use_precision_aware_optimizer needs parallel.use_distributed_optimizer",
    )
