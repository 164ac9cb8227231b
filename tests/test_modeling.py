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
"""What transformers expects of a model: files, Auto classes, initialisation, training features, compilation."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    VARIANTS,
    all_gradients,
    close,
    gradients_close,
    random_tokens,
    relative_error,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

import transformers_ddl
from transformers_ddl import (
    DDLForCausalLM,
    DDLForQuestionAnswering,
    DDLForSequenceClassification,
    DDLForTokenClassification,
    DDLModel,
)


variants = pytest.mark.parametrize("variant", VARIANTS)
GATES = [(variant, None) for variant in VARIANTS]
GATES += [(variant, 64) for variant in VARIANTS if tiny_config(variant).has_gates]
gates = pytest.mark.parametrize(("variant", "gate_hidden_size"), GATES)


def loss_and_gradients(model, tokens, **kwargs):
    loss = model(tokens, labels=tokens, **kwargs).loss
    return loss.detach(), all_gradients(loss, model)


# Files and Auto classes


AUTO_CLASSES = {
    AutoModel: DDLModel,
    AutoModelForCausalLM: DDLForCausalLM,
    AutoModelForSequenceClassification: DDLForSequenceClassification,
    AutoModelForTokenClassification: DDLForTokenClassification,
    AutoModelForQuestionAnswering: DDLForQuestionAnswering,
}


@variants
@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda auto_class: auto_class.__name__)
def test_save_and_load(variant, auto_class, tmp_path):
    tokens, model_class = random_tokens(2, 7), AUTO_CLASSES[auto_class]
    model = tiny_model(variant, model_class, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not loaded.training
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert type(auto_class.from_config(model.config)) is model_class


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once(tied, tmp_path):
    model = tiny_model("tc", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in saved) is not tied
    loaded = DDLForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


@variants
def test_base_model_from_a_causal_checkpoint(variant, tmp_path):
    model, tokens = tiny_model(variant), random_tokens(2, 7)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state
        assert torch.equal(loaded, model.model(tokens).last_hidden_state)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files(variant, dtype, tmp_path):
    """All weights but those of gates and targets are rounded; the bound is that of `test_reference.py`."""
    model, tokens = tiny_model(variant), random_tokens(2, 7)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in half.named_parameters():
        is_kept = model.config.has_gates and "_residual." in name
        assert parameter.dtype == (torch.float32 if is_kept else dtype), name
    with torch.no_grad():
        logits, expected = half(tokens).logits, model(tokens).logits
    assert logits.dtype == dtype
    assert (logits - expected).norm() / expected.norm() < {torch.bfloat16: 7e-2, torch.float16: 1e-2}[dtype]

    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize("gate_hidden_size", [None, 64])
def test_gate_is_not_rounded_to_half_precision(gate_hidden_size):
    """Near 0 and 2, bfloat16 would leave a gate few values; from its context on, it is as exact as fp32 is."""
    model = tiny_model("cc", gate_hidden_size=gate_hidden_size)
    residual = model.model.layers[0].attn_residual.bfloat16()
    residual.beta_proj.float()
    context = torch.randn(4, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden = context if gate_hidden_size is None else torch.tanh(residual.beta_hidden_proj(context))
    weight, bias = residual.beta_proj.weight.double(), residual.beta_proj.bias.double()
    expected = 2 * torch.sigmoid(hidden.double() @ weight.T + bias)
    torch.testing.assert_close(residual.gate(context).double(), expected, rtol=1e-6, atol=0)


@variants
def test_autocast(variant):
    """The gate's logits stay in fp32; the bound is that of `test_reference.py`."""
    model, tokens, gate_dtypes = tiny_model(variant), random_tokens(2, 7), []
    for name, module in model.named_modules():
        if name.endswith("beta_proj"):
            module.register_forward_hook(lambda module, args, output: gate_dtypes.append(output.dtype))
    expected, expected_gradients = loss_and_gradients(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, tokens)
    assert set(gate_dtypes) <= {torch.float32}
    torch.testing.assert_close(loss, expected, rtol=7e-2, atol=0)
    error = torch.cat([(gradients[name] - expected_gradients[name]).flatten() for name in gradients]).norm()
    assert error / torch.cat([gradient.flatten() for gradient in expected_gradients.values()]).norm() < 0.2


@variants
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_to_another_dtype_than_that_of_the_weights(variant, stored):
    """Autocast promotes no mix of half-precision dtypes."""
    model, tokens = tiny_model(variant).to(stored), random_tokens(2, 7)
    with torch.autocast("cpu", torch.bfloat16 if stored == torch.float16 else torch.float16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Heads


def test_sequence_classification_reads_the_last_token():
    model = tiny_model("tc", DDLForSequenceClassification, pad_token_id=0, num_labels=3)
    document = random_tokens(1, 5)
    with torch.no_grad():
        expected = model.score(model.model(document).last_hidden_state[:, -1])
        for padding in ((4, 0), (0, 4)):
            tokens = torch.nn.functional.pad(document, padding)
            close(model(tokens, attention_mask=tokens.ne(0)).logits, expected)


def test_losses_of_the_heads():
    tokens = random_tokens(2, 7)
    cross_entropy = torch.nn.functional.cross_entropy

    model = tiny_model("cc", DDLForTokenClassification, num_labels=3).eval()
    labels = random_tokens(2, 7, seed=1) % 3
    output = model(tokens, labels=labels)
    close(output.logits, model.score(model.model(tokens).last_hidden_state))
    close(output.loss, cross_entropy(output.logits.flatten(0, 1), labels.flatten()))

    model = tiny_model("cc", DDLForSequenceClassification, num_labels=3, pad_token_id=0)
    output = model(tokens, labels=torch.tensor([2, 0]))
    close(output.loss, cross_entropy(output.logits, torch.tensor([2, 0])))

    model = tiny_model("cc", DDLForQuestionAnswering)
    starts, ends = torch.tensor([1, 0]), torch.tensor([3, 6])
    output = model(tokens, start_positions=starts, end_positions=ends)
    close(output.loss, (cross_entropy(output.start_logits, starts) + cross_entropy(output.end_logits, ends)) / 2)


# Initialisation


def wide_model(variant, **overrides):
    """As initialised, and wide enough for its statistics to be precise."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 128, "vocab_size": 500, "num_hidden_layers": 4, "head_dim": 24}
    return DDLForCausalLM(tiny_config(variant, **{**sizes, **overrides}))


def assert_normal(parameter, std, name):
    """Within four standard errors of the mean and the standard deviation of N(0, std²)."""
    count = parameter.numel()
    assert abs(parameter.mean().item()) < 4 * std / math.sqrt(count), name
    assert abs(parameter.std().item() / std - 1) < 4 / math.sqrt(2 * count), name


# The weights of hyper-connections start as they do whatever the scheme
HYPER_CONNECTIONS = ("static", "dynamic", "residual.fn")


def assert_starting_point(model):
    """Gates at β₀, unit norms, no biases, read vectors at the mean, ...: the same in both schemes."""
    config = model.config
    for name, parameter in model.named_parameters():
        if name.endswith("beta_proj.bias"):
            expected = torch.full((config.num_delta_steps,), config.gate_init)
            torch.testing.assert_close(2 * parameter.sigmoid(), expected, rtol=1e-6, atol=0)
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("read"):
            assert (parameter == 1 / config.num_value_channels).all(), name
        elif "embedding_conv" in name:
            assert (parameter[..., -1] == 1).all() and not parameter[..., :-1].any(), name
        elif name.endswith("amplitude"):
            assert (parameter == 1).all(), name
        elif name.endswith("dynamic"):
            assert not parameter.any(), name


@gates
@pytest.mark.parametrize("gate_init", [0.2, 1.7])
def test_default_initialisation(variant, gate_hidden_size, gate_init):
    options = {"gate_init": gate_init, "gate_hidden_size": gate_hidden_size, "initializer_range": 0.03}
    model = wide_model(variant, attention_bias=True, mlp_bias=True, **options)
    assert_starting_point(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.endswith((*HYPER_CONNECTIONS, "compressor.weight", "readout.weight")):
            assert_normal(parameter, 0.03, name)


@variants
def test_default_initialisation_reads_the_token_embedding(variant):
    """Expansion by repetition and compression by the mean: the first layer starts with what Llama's starts with."""
    model, tokens = wide_model(variant), random_tokens(2, 7)
    hidden_states = model(tokens, output_hidden_states=True).hidden_states
    embeddings = model.get_input_embeddings()(tokens)
    # The weights of mHC depend on the streams from the start, a little
    bound = 1e-2 if variant == "mhc" else 1e-6
    assert relative_error(hidden_states[0], embeddings) < bound


@pytest.mark.parametrize("variant", ["expanded-additive", "hc", "mhc"])
def test_controls_start_as_additive_models(variant):
    """With the same weights of attention, MLP and embedding, as all channels are still alike."""
    tokens, model = random_tokens(2, 7), wide_model(variant)
    additive = wide_model("additive")
    additive.load_state_dict(model.state_dict(), strict=False)
    bound = 1e-2 if variant == "mhc" else 1e-5
    assert relative_error(model(tokens).logits, additive(tokens).logits) < bound


@gates
def test_authors_initialisation(variant, gate_hidden_size):
    """Embeddings N(0, 0.02), other matrices N(0, 0.5/√d), output projections N(0, 0.5/√d/√L)."""
    model = wide_model(variant, init_scheme="authors", gate_hidden_size=gate_hidden_size, gate_init=1.0)
    assert_starting_point(model)
    std = 0.5 / math.sqrt(model.config.hidden_size)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            assert_normal(parameter, 0.02, name)
        elif "o_proj" in name or "down_proj" in name:
            assert_normal(parameter, std / math.sqrt(model.config.num_hidden_layers), name)
        elif parameter.dim() >= 2 and not name.endswith((*HYPER_CONNECTIONS, "embedding_conv.weight")):
            assert_normal(parameter, std, name)


@variants
@pytest.mark.parametrize("init_scheme", ["default", "authors"])
def test_missing_keys_are_initialised(variant, init_scheme, tmp_path):
    """And those that are there are not touched, whatever they were set to."""
    model = tiny_model(variant, init_scheme=init_scheme)
    missing = {
        name
        for name, parameter in model.named_parameters()
        if "layers.1" in name or "readout" in name or "embedding_conv" in name or name == "model.norm.weight"
    }
    present = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
    model.save_pretrained(tmp_path, state_dict=dict(present))
    torch.manual_seed(1)
    loaded, info = DDLForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing

    torch.manual_seed(0)
    starts = [DDLForCausalLM(model.config) for _ in range(2)]
    assert_starting_point(starts[0])
    for name, parameter in loaded.named_parameters():
        start, other_start = (model.get_parameter(name) for model in starts)
        if name not in missing:
            assert torch.equal(parameter, present[name]), name
        elif torch.equal(start, other_start):
            assert torch.equal(parameter, start), name
        else:
            assert 0.4 < parameter.std() / start.std() < 2.5, name


@variants
def test_meta_device(variant):
    with torch.device("meta"):
        model = DDLForCausalLM(tiny_config(variant))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.zeros(2, 7, dtype=torch.int64, device="meta")).logits.shape == (2, 7, model.config.vocab_size)


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied, tmp_path):
    model, tokens = tiny_model("cc", tie_word_embeddings=tied), random_tokens(2, 7)
    with torch.no_grad():
        expected = model(tokens).logits
        model.resize_token_embeddings(50)
        resized = model(tokens).logits
    assert resized.shape[-1] == model.config.vocab_size == 50
    close(resized[..., :37], expected)
    model.save_pretrained(tmp_path)
    loaded = DDLForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    new_tokens = torch.full((1, 3), 49)
    with torch.no_grad():
        assert torch.equal(loaded(new_tokens).logits, model(new_tokens).logits)


# Outputs


@variants
def test_output_hidden_states(variant):
    """What each layer reads from the state, and the final output."""
    model, tokens, read = tiny_model(variant), random_tokens(2, 7), []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        expected = model(tokens).logits
        read.clear()
        output = model.model(tokens, output_hidden_states=True)
        close(model.lm_head(output.last_hidden_state), expected)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for actual, expected in zip(output.hidden_states, [*read, output.last_hidden_state]):
        assert torch.equal(actual, expected)
    assert not torch.equal(output.hidden_states[0], output.hidden_states[1])


@variants
def test_output_attentions(variant):
    model, tokens = tiny_model(variant, attention="eager"), random_tokens(2, 7)
    with torch.no_grad():
        output = model(tokens, output_attentions=True)
        close(output.logits, tiny_model(variant, attention="sdpa")(tokens).logits)
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights in output.attentions:
        assert weights.shape == (2, model.config.num_attention_heads, 7, 7)
        close(weights.sum(-1), torch.ones(2, model.config.num_attention_heads, 7))
        assert not weights.triu(1).any()
    assert not torch.equal(output.attentions[0], output.attentions[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_is_for_training(attention):
    model = tiny_model("cc", attention=attention, attention_dropout=0.5)
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        close(model(tokens).logits, tiny_model("cc", attention=attention)(tokens).logits)
        model.train()
        assert not torch.allclose(model(tokens).logits, model(tokens).logits)


# Training


@variants
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(variant, use_reentrant):
    """Also with padding and with packed documents, which the layers must be told about again in the backward pass."""
    model, tokens = tiny_model(variant).train(), random_tokens(2, 7)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 0, 1]])
    for kwargs in ({}, {"attention_mask": mask}, {"position_ids": packed}):
        model.gradient_checkpointing_disable()
        expected_loss, expected_gradients = loss_and_gradients(model, tokens, **kwargs)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls = []
        hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        # `torch.autograd.grad` does not work with reentrant checkpoints
        loss = model(tokens, labels=tokens, **kwargs).loss
        loss.backward()
        hook.remove()
        assert len(calls) == 2, "nothing was recomputed"
        close(loss, expected_loss)
        gradients_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected_gradients)
        model.zero_grad()


@variants
def test_micro_batches_equal_one_batch(variant):
    """With different numbers of labels in each: the loss is the mean over all labels, not a mean of means."""
    model, tokens = tiny_model(variant).train(), random_tokens(8, 9)
    labels = tokens.clone()
    for row in range(8):
        labels[row, : row + 1] = -100
    num_items = (labels[:, 1:] != -100).sum()
    loss = model(tokens, labels=labels).loss
    expected = all_gradients(loss, model)

    micro_losses = []
    for row in range(8):
        output = model(tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=num_items)
        output.loss.backward()
        micro_losses.append(output.loss.detach())
    close(sum(micro_losses), loss.detach())
    gradients_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@variants
def test_loss_is_the_mean_of_shifted_labels(variant):
    model, tokens = tiny_model(variant), random_tokens(2, 7)
    output = model(tokens, labels=tokens)
    expected = -output.logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    close(output.loss, expected)


def test_skipped_logits():
    model, tokens = tiny_model(), random_tokens(2, 9)
    for model in (model.train(), model.eval()):
        with_logits, without = (model(tokens, labels=tokens, skip_logits=skip) for skip in (None, True))
        assert with_logits.logits is not None and without.logits is None
        assert torch.equal(without.loss, with_logits.loss)
        assert model(tokens, skip_logits=True).logits is not None, "without labels there is nothing else"


@variants
@pytest.mark.parametrize("init_scheme", ["default", "authors"])
def test_overfits_one_batch(variant, init_scheme):
    torch.manual_seed(0)
    model, tokens = DDLForCausalLM(tiny_config(variant, init_scheme=init_scheme)).train(), random_tokens(4, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0)
    for step in range(30):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        if step == 0:
            assert loss > 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


@variants
def test_future_tokens_have_no_influence(variant):
    model = tiny_model(variant)
    embeddings = torch.randn(1, 9, model.config.hidden_size).requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    for position in (0, 3, 8):
        gradient = torch.autograd.grad(logits[0, position].sum(), embeddings, retain_graph=True)[0][0]
        influence = gradient.abs().amax(-1)
        assert (influence[: position + 1] > 0).all()
        assert not influence[position + 1 :].any()


class NoSynchronisation(TorchDispatchMode):
    """Refuses operations that wait for the device to tell a value."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in self.FORBIDDEN:
            raise AssertionError(f"{func} reads a value from the device")
        return func(*args, **(kwargs or {}))


@variants
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_forward_does_not_wait_for_the_device(variant, training):
    model, tokens = tiny_model(variant).train(training), random_tokens(2, 7)
    with pytest.raises(AssertionError, match="reads a value"), NoSynchronisation():
        tokens.max().item()
    with NoSynchronisation():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    cache = DynamicCache(config=model.config)
    with NoSynchronisation(), torch.no_grad():
        model(tokens, past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "variant, backend, checkpointing",
    [
        *[(variant, "aot_eager", False) for variant in VARIANTS],
        ("cc", "aot_eager", True),
        ("tc", "aot_eager", True),
        # The default backend takes half a minute for two layers; "aot_eager" traces and differentiates the same graph
        ("cc", "inductor", False),
    ],
)
def test_compiled_training(variant, backend, checkpointing):
    torch.compiler.reset()
    model = tiny_model(variant, num_hidden_layers=1 if backend == "inductor" else 2).train()
    tokens = random_tokens(2, 7)
    expected_loss, expected_gradients = loss_and_gradients(model, tokens, use_cache=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step():
        loss = compiled(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    loss, programs = run_and_get_code(step)
    # Rotary angles, of which otherwise each layer would take cosine and sine for itself
    assert [program.count("sin(") for program in programs] == [1, 1] * (backend == "inductor")
    close(loss, expected_loss)
    gradients_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected_gradients)


@pytest.mark.parametrize("variant", ["cc", "tc"])
def test_compiled_forward_with_other_inputs(variant):
    """Lengths that differ, down to less than the convolutions' kernels, padding and packed documents."""
    torch.compiler.reset()
    model = tiny_model(variant)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 0, 1]])
    with torch.no_grad():
        for length in (9, 3, 1):
            tokens = random_tokens(2, length)
            close(compiled(tokens).logits, model(tokens).logits)
        tokens = random_tokens(2, 9)
        close(compiled(tokens, position_ids=packed).logits, model(tokens, position_ids=packed).logits)
        expected = model(tokens, attention_mask=mask).logits[mask.bool()]
        close(compiled(tokens, attention_mask=mask).logits[mask.bool()], expected)


# Rotary embeddings


ROPE_TYPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rope_scaling(rope_type, tmp_path):
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE_TYPES[rope_type]}
    model, tokens = tiny_model("tc", rope_parameters=parameters), random_tokens(2, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(tokens).logits
        cached = [model(chunk, past_key_values=cache).logits for chunk in tokens.split([5, 1, 4, 2], dim=1)]
        close(torch.cat(cached, dim=1), logits)
        if rope_type != "dynamic":
            assert not torch.allclose(logits, tiny_model("tc")(tokens).logits, atol=1e-3)
        # Beyond the context of training
        longer = random_tokens(1, 90)
        assert model(longer).logits.isfinite().all()
        assert not torch.allclose(model(longer).logits, tiny_model("tc")(longer).logits, atol=1e-3)
        model.save_pretrained(tmp_path)
        loaded = DDLForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens).logits, tiny_model("tc", rope_parameters=parameters)(tokens).logits)


# Import


def run_python(code):
    """In a fresh process that finds the package wherever this one found it."""
    source = Path(transformers_ddl.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(source)!r}); {code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_does_not_import_optional_packages():
    """Beyond what Llama's model imports, to which the attention of some versions adds triton."""
    optional = {"triton", "datasets", "evaluate", "matplotlib", "peft", "trl"}
    code = (
        "import transformers.models.llama.modeling_llama; before = set(sys.modules); "
        "import transformers_ddl; print(*set(sys.modules) - before)"
    )
    imported = set(run_python(code).split())
    assert "transformers_ddl" in imported
    assert not optional & imported


def test_works_without_triton():
    code = (
        "sys.modules['triton'] = None; import torch; from transformers_ddl import DDLConfig, DDLForCausalLM; "
        "model = DDLForCausalLM(DDLConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)); "
        "tokens = torch.arange(5)[None]; model(tokens, labels=tokens).loss.backward(); "
        "print(all(parameter.grad is not None for parameter in model.parameters()))"
    )
    assert run_python(code).strip() == "True"
