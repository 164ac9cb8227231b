# Copyright 2026 The transformers_ddl team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What Transformers offers for any model beyond training and `generate`: pipelines, export, quantisation, offloading."""

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from conftest import CONV_VARIANTS, VARIANTS, close, random_tokens, tiny_config, tiny_model
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TextStreamer, TorchAoConfig, Trainer, TrainingArguments, pipeline
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.import_utils import is_triton_available

from transformers_ddl import DDLForCausalLM, DDLForSequenceClassification, DDLModel
from transformers_ddl.tokenization import train_tokenizer


variants = pytest.mark.parametrize("variant", ["scalar", "cc", "tc", "additive"])
TEXTS = ["the cat sat on the mat", "a dog"]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


@torch.no_grad()
def logits_of(model, *args, **kwargs) -> torch.Tensor:
    return model(*args, **kwargs).logits


# ---- Text ----


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer([*TEXTS, "user: hello\nassistant: "], vocab_size=290)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def saved(variant, tokenizer, tmp_path):
    """A model, and the folder it is saved to, with its tokenizer."""
    model = tiny_model(variant, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=None)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return model, tmp_path


GENERATE = {"max_new_tokens": 6, "do_sample": False}


def continuation(model, tokenizer, input_ids: list[int]) -> str:
    """The greedy one of each step's full forward pass."""
    tokens = torch.tensor([input_ids])
    for _ in range(GENERATE["max_new_tokens"]):
        tokens = torch.cat((tokens, logits_of(model, tokens, use_cache=False)[:, -1:].argmax(-1)), dim=1)
    return tokenizer.decode(tokens[0, len(input_ids) :], skip_special_tokens=True)


@variants
def test_pipeline(saved, tokenizer, monkeypatch):
    """One by one, and in a batch, where the shorter text is padded."""
    model, folder = saved
    monkeypatch.setattr("transformers.pipelines.base.logger.error", pytest.fail)  # that the model is not supported
    expected = [continuation(model, tokenizer, tokenizer(text).input_ids) for text in TEXTS]
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    for batch_size in (1, 2):
        outputs = generator(TEXTS, batch_size=batch_size, return_full_text=False, **GENERATE)
        assert [output["generated_text"] for (output,) in outputs] == expected


@variants
def test_chat_template(saved, tokenizer):
    """It is saved with the tokenizer and used by the pipeline, which appends the answer to the messages."""
    model, folder = saved
    messages = [{"role": "user", "content": "hello"}]
    prompt = "user: hello\nassistant: "
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    (output,) = generator(messages, **GENERATE)
    answer = continuation(model, tokenizer, tokenizer(prompt, add_special_tokens=False).input_ids)
    assert output["generated_text"] == [*messages, {"role": "assistant", "content": answer}]


@variants
def test_streaming(saved, tokenizer, capsys):
    model, _ = saved
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **GENERATE)
    assert capsys.readouterr().out == continuation(model, tokenizer, inputs.input_ids[0].tolist()) + "\n"


# ---- Trainer ----


def test_label_smoothing(tmp_path):
    """`Trainer` computes this loss itself, and shifts the labels of models that it takes for causal ones."""
    model, tokens = tiny_model(), random_tokens(2, 9)
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    )
    expected = cross_entropy(logits_of(model, tokens)[:, :-1].mT, tokens[:, 1:], label_smoothing=0.1)
    close(trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens}), expected)


# ---- torch.export ----


@pytest.mark.parametrize(
    ("variant", "kernels"), [*((variant, "0") for variant in VARIANTS), ("scalar", "1"), ("cc", "1"), ("tc", "1")]
)
def test_export(variant, kernels, monkeypatch):
    """A program of a prefill with padding, for batches and lengths other than those it was made from; without kernels."""
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", kernels)
    model, tokens = tiny_model(variant), random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    batch, sequence = torch.export.Dim("batch", max=16), torch.export.Dim("sequence", min=2, max=64)
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens, "attention_mask": mask, "use_cache": False},
        dynamic_shapes={
            "input_ids": {0: batch, 1: sequence},
            "attention_mask": {0: batch, 1: sequence},
            "use_cache": None,
        },
        strict=False,
    )
    assert not any("transformers_ddl" in str(node.target) for node in program.graph.nodes)
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "0")
    tokens = random_tokens(3, 12, seed=1)
    mask = torch.ones_like(tokens)
    mask[1, :5] = mask[2, -3:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    close(program.module()(**inputs).logits[mask.bool()], logits_of(model, **inputs)[mask.bool()])


def export_with_static_cache(model):
    """By transformers' own means, a program for one token at a time that has the cache in it."""
    model.generation_config.update(cache_implementation="static", use_cache=True)
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16, device="cpu")
    return exportable.export(input_ids=torch.zeros(1, 1, dtype=torch.long), cache_position=torch.arange(1)).module()


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in CONV_VARIANTS])
def test_export_with_static_cache(variant):
    model, tokens = tiny_model(variant), random_tokens(1, 7)
    program = export_with_static_cache(model)
    logits = [program(input_ids=tokens[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(7)]
    close(torch.cat(logits, dim=1), logits_of(model, tokens))


@pytest.mark.parametrize("variant", CONV_VARIANTS)
def test_export_with_static_cache_refuses_convolutions(variant):
    """Such a program keeps keys and values only: convolutions would read zeros in place of the past. Dynamo wraps the error."""
    with pytest.raises((ValueError, Unsupported), match="would lose the inputs of convolutions"):
        export_with_static_cache(tiny_model(variant))


# ---- Quantisation ----


def spared(name: str) -> bool:
    """Whether a linear layer must not be quantised: gates, targets and heads."""
    return "_residual." in name or name.startswith(("lm_head", "score"))


def saved_for_quantisation(tmp_path, variant, **options):
    """Int8 needs sizes that are multiples of 16."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    if tiny_config(variant).has_gates:
        options["gate_hidden_size"] = 16
    model = tiny_model(variant, **sizes, **options)
    model.save_pretrained(tmp_path)
    return model


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao(variant, dtype, tmp_path):
    """Int8 weights of attention and MLP: the others stay as they are, which saving and loading keeps."""
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.utils import TorchAOBaseTensor

    model, tokens = saved_for_quantisation(tmp_path, variant), random_tokens(2, 9)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    for name, module in quantised.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            converted = isinstance(module, nn.Linear) and parameter_name == "weight" and not spared(name)
            assert isinstance(parameter.data, TorchAOBaseTensor) == converted, (name, parameter_name)
            if "_residual." in name:
                assert parameter.dtype == torch.float32
    logits, expected = logits_of(quantised, tokens), logits_of(model, tokens)
    # A weight is rounded by at most 1/254 of the largest of its row; bfloat16 has a relative precision of 1/256
    assert 1e-4 < (logits - expected).norm() / expected.norm() < 0.07
    quantised.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert torch.equal(logits_of(again, tokens), logits)
    assert torch.equal(again.generate(tokens, **GENERATE), quantised.generate(tokens, **GENERATE))


@variants
@pytest.mark.parametrize("model_class", [DDLForCausalLM, DDLModel, DDLForSequenceClassification])
@pytest.mark.parametrize("skip_modules", [None, ["model.layers.1.mlp", "layers.1.mlp"]], ids=["default", "own"])
def test_which_modules_are_quantised(variant, model_class, skip_modules):
    """
    What decides it in all of Transformers' quantisers, bitsandbytes' among them. They match names of modules or, in
    torchao's case, of parameters. A list of one's own replaces the default one of heads, not that of gates and targets.
    """
    options = {"gate_hidden_size": 16} if tiny_config(variant).has_gates else {}
    model = model_class(tiny_config(variant, **options))
    patterns = HfQuantizer.get_modules_to_not_convert(model, skip_modules, model._keep_in_fp32_modules)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    for suffix in ("", ".weight"):
        converted = {name for name in linears if should_convert_module(name + suffix, patterns)}
        if skip_modules is None:
            assert converted == {name for name in linears if not spared(name)}
        else:
            heads = {name for name in linears if name in ("lm_head", "score")}
            assert converted == {name for name in linears if not spared(name) and "layers.1.mlp" not in name} | heads


# ---- Big models ----


@pytest.fixture(params=["0", "1"], ids=["plain", "kernels"])
def kernels(request, variant, monkeypatch):
    """Also with kernels, in Triton's interpreter: they must leave weights to PyTorch that are not in memory."""
    if request.param == "1" and not is_triton_available():
        pytest.skip("needs Triton")
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", request.param)


@variants
def test_automatic_device_map(variant, tmp_path):
    model, tokens = tiny_model(variant), random_tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    torch.testing.assert_close(
        logits_of(loaded, tokens.to(loaded.device)).cpu(), logits_of(model, tokens), rtol=1e-4, atol=1e-4
    )


@variants
def test_layers_are_not_split_between_devices(variant):
    model = tiny_model(variant, num_hidden_layers=6)
    layer_size = max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in model.model.layers)
    memory = {0: 4 * layer_size, 1: 4 * layer_size, "cpu": "1GB"}
    devices = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
    assert {0, 1} <= set(devices.values())
    assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in devices), devices


@variants
def test_disk_offload(variant, kernels, tmp_path):
    """Of a layer, the embedding convolution and the readout: their weights are read when they are needed."""
    model, tokens = tiny_model(variant), random_tokens(1, 5)
    model.save_pretrained(tmp_path)
    devices = dict.fromkeys([name for name, _ in model.model.named_children() if name != "layers"], "cpu")
    devices = {f"model.{name}": device for name, device in devices.items()} | {"lm_head": "cpu"}
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.readout": "disk"}
    if "model.embedding_conv" in devices:
        devices["model.embedding_conv"] = "disk"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=devices, offload_folder=tmp_path / "offload")
    assert all(parameter.is_meta for parameter in loaded.model.layers[1].parameters())
    torch.testing.assert_close(logits_of(loaded, tokens), logits_of(model, tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.generate(tokens, **GENERATE), model.generate(tokens, **GENERATE))


@variants
def test_cpu_offload(variant, kernels):
    model, tokens = tiny_model(variant), random_tokens(1, 5)
    expected = logits_of(model, tokens)
    generated = model.generate(tokens, **GENERATE)
    cpu_offload(model, execution_device="cpu", state_dict=dict(model.state_dict()))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(tokens, **GENERATE), generated)
