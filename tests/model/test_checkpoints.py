from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedTokenizerFast, T5Config

from cir.model.checkpoints import load_model, saved_weights, weights_of
from cir.model.finding import find_stack
from tests.tiny import tiny_llama, word_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model and its tokenizer."""
    tiny_llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_model_is_loaded_as_it_was_saved(folder):
    model, tokenizer = load_model(folder, device="cpu")
    assert not model.training
    assert len(tokenizer) == len(word_tokenizer())
    for was, now in zip(tiny_llama().parameters(), model.parameters(), strict=True):
        assert torch.equal(was, now)
    nbytes, dtype = weights_of(folder)
    assert (nbytes, dtype) == (sum(p.nbytes for p in model.parameters()), torch.float32)
    assert weights_of(folder, "bfloat16") == (nbytes // 2, torch.bfloat16)
    assert load_model(folder, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_of_a_quantized_model_the_bytes_in_its_folder_count(folder):
    about = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**about, "quantization_config": quantization}))
    save_file({"packed": torch.zeros(1000, dtype=torch.uint8)}, folder / "model.safetensors")
    assert weights_of(folder)[0] == (folder / "model.safetensors").stat().st_size < 1200


def without_weights(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def without_a_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_a_larger_tokenizer(folder):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"new{number}" for number in range(999)])
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(folder)


def with_its_own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran')")


def an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def of_another_kind(folder):
    T5Config(d_model=8, num_layers=1, num_heads=1, d_ff=8).save_pretrained(folder)


def broken(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_weights, r"expected all weights, got none for .*layers\.1\.mlp\.down_proj\.weight \(1 in all\)"),
        (without_a_tokenizer, "expected a tokenizer beside the model, got"),
        (with_a_larger_tokenizer, r"expected a tokenizer with ids below \d+, the rows of the model's embedding, got"),
        (with_its_own_code, "expected a causal language model that transformers has the code of, got"),
        (an_adapter, r"expected a model, got an adapter; .* merge_and_unload\(\) gives"),
        (of_another_kind, "expected a causal language model that transformers has the code of, got"),
        (lambda folder: (folder / "config.json").unlink(), r"expected a folder with config\.json, got none"),
        (broken, "expected whole weights"),
    ],
)
def test_what_is_no_whole_model_is_refused_in_one_line(folder, change, said, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    change(folder)
    with pytest.raises(ValueError, match=said) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bf16"}, "expected a dtype out of auto, float32, bfloat16, float16, got 'bf16'"),
        ({"device": "gpu"}, "expected a device that is there, got 'gpu'"),
        ({"device": "cuda:99"}, "expected a device that is there, got 'cuda:99'"),
    ],
)
def test_devices_and_types_that_are_not_there_are_named(folder, options, said):
    with pytest.raises(ValueError, match=said):
        load_model(folder, **options)


def test_files_that_are_no_model_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"expected a GGUF file, got .*, which does not exist"):
        load_model(folder / "model.GGUF")
    with pytest.raises(ValueError, match="expected a hub id, a folder or a GGUF file, got the file"):
        load_model(folder / "config.json")
    with pytest.raises(FileNotFoundError, match=r"expected a hub id, .*, got .*gone, which does not exist"):
        load_model(folder / "gone")


def test_a_name_that_neither_a_folder_nor_the_hub_has_is_told(monkeypatch):
    def nothing(name, **_):
        raise OSError("no such model\nand many lines of advice")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", nothing)
    with pytest.raises(OSError, match=r"got some/one: no such folder is here, .* could be had: no such model$"):
        load_model("some/one")


def test_weights_saved_under_other_names_are_read_back(tmp_path):
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    targets = find_stack(model).targets(0)
    found = dict(saved_weights(tmp_path, targets, torch.float32))
    assert f"{targets[0].name}.weight" not in load_file(tmp_path / "model.safetensors")
    for target in targets:
        assert torch.equal(found[target.name], target.linear.weight)
