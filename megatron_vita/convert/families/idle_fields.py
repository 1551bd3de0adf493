"""Fields of published config files that do not affect what a model computes, each with the reason.

Readers disregard the tables that apply to their part. Every other field is used, or refused by name
(`sources.open_source`).
"""

_NOTE = "a note about the file or the program that wrote it"
_KERNEL = "names a kernel or a memory saving of the origin's code; numbers are the same"
_TRAINING = "of the origin's training; without effect where nothing is dropped or initialized"
_GENERATION = "a default of generation, which generation_config.json has since transformers 4.26"
_TASK = "of classification and other heads, which these models do not have"
_TOKEN = "a token id, which the tokenizer and generation_config.json say"
_EXPERTS = "of mixtures of experts, which use_moe turns off"

COMMON = {
    **dict.fromkeys(
        ("architectures", "auto_map", "transformers_version", "tokenizer_class", "model_type"),
        _NOTE,
    ),
    **dict.fromkeys(("transformers.js_config", "is_llama_config", "name_or_path"), _NOTE),
    **dict.fromkeys(("unsloth_version", "unsloth_fixed", "model_name"), _NOTE),
    **dict.fromkeys(("dtype", "torch_dtype", "use_bfloat16"), "tensors say their types themselves"),
    **dict.fromkeys(("use_cache", "return_dict", "output_attentions", "output_scores"), _KERNEL),
    **dict.fromkeys(("output_hidden_states", "attn_implementation", "use_flash_attn"), _KERNEL),
    **dict.fromkeys(("chunk_size_feed_forward", "torchscript", "tf_legacy_loss"), _KERNEL),
    **dict.fromkeys(("initializer_range", "initializer_factor", "attention_dropout"), _TRAINING),
    **dict.fromkeys(("dropout", "drop_path_rate", "hidden_dropout_prob"), _TRAINING),
    **dict.fromkeys(("layer_scale_init_value", "projection_dropout"), _TRAINING),
    **dict.fromkeys(("id2label", "label2id", "problem_type", "finetuning_task"), _TASK),
    **dict.fromkeys(("task_specific_params", "prefix"), _TASK),
    **dict.fromkeys(("is_encoder_decoder", "is_decoder", "add_cross_attention"), _TASK),
    **dict.fromkeys(("tie_encoder_decoder", "cross_attention_hidden_size"), _TASK),
}
"""Fields without effect in configs of every part."""

GENERATION = dict.fromkeys(
    (
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
        *("num_beam_groups", "diversity_penalty", "top_k", "top_p", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
        *("encoder_no_repeat_ngram_size", "num_return_sequences", "return_dict_in_generate"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "max_new_tokens"),
    ),
    _GENERATION,
)
"""Fields of generation, which transformers up to 4.25 wrote into configs of language models."""

LANGUAGE = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), _TOKEN),
    **dict.fromkeys(("decoder_start_token_id", "forced_bos_token_id"), _TOKEN),
    "forced_eos_token_id": _TOKEN,
    "max_position_embeddings": "the length that data and server set; rotary positions have no end",
    "max_window_layers": "of sliding windows, which use_sliding_window turns off",
    "sliding_window": "of sliding windows, which use_sliding_window turns off",
    "pretraining_tp": "splits products of matrices, whose sum is the same",
}

VISION = {
    **dict.fromkeys(("capacity_factor", "eval_capacity_factor", "laux_allreduce"), _EXPERTS),
    **dict.fromkeys(("moe_coeff_ratio", "moe_intermediate_size", "moe_output_scale"), _EXPERTS),
    **dict.fromkeys(("noisy_gate_policy", "num_experts", "num_routed_experts"), _EXPERTS),
    **dict.fromkeys(("num_shared_experts", "shared_expert_intermediate_size"), _EXPERTS),
    **dict.fromkeys(("use_residual", "use_rts", "use_weighted_residual"), _EXPERTS),
    "projection_dim": "of CLIP's projection, which stays behind",
    "tie_word_embeddings": "a tower has no words",
    "vision_use_head": "SigLIP's head travels along unused",
    "scaling_factor": "of GLM-4V's adapter, which stays behind",
}
