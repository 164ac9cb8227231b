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
"""What a configuration costs, against what PyTorch counts while the model runs."""

import pytest
import torch
from conftest import VARIANTS, tiny_config
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from transformers_ddl import DDLConfig, DDLForCausalLM, DDLForSequenceClassification
from transformers_ddl.flops import (
    PARTS,
    activation_bytes,
    count_parameters,
    forward_flops_per_token,
    state_flops_per_token,
    training_flops,
    training_flops_per_token,
)
from transformers_ddl.modeling_ddl import COMPRESSORS, RESIDUALS, DDLChannelCompressor, DDLEmbeddingConvolution


BATCH, TOKENS = 2, 7
OPTIONS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "two-layer gate": {"gate_hidden_size": 5},
    "constant value": {"value_activation": "constant"},
    "value of the context": {"value_input": "context", "value_activation": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no norm of queries and keys": {"qk_norm": None},
}
OPTIONS_OF_DELTA = ("two-layer gate", "constant value", "value of the context")


def counted_by_module(counter):
    """FLOPs by name of module and in all, without those of the rotary table."""
    counted = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    rotary = counted.pop("DDLForCausalLM.model.rotary_emb", 0)  # a matrix product in some versions of transformers
    return counted, counter.get_total_flops() - rotary


GATED = [name for name in VARIANTS if tiny_config(name).has_gates]


@pytest.fixture(params=[(v, o) for v in VARIANTS for o in OPTIONS if v in GATED or o not in OPTIONS_OF_DELTA])
def config(request):
    variant, option = request.param
    config = tiny_config(variant, **OPTIONS[option])
    config._attn_implementation = "eager"  # flash attention computes the scores again in the backward pass
    return config


def test_parameters(config):
    counts = count_parameters(config)
    model = DDLForCausalLM(config)
    assert sum(counts.values()) == model.num_parameters()
    assert counts.keys() == PARTS.keys()
    d, layers = config.hidden_size, config.num_hidden_layers
    assert counts["embedding"] == config.vocab_size * d
    assert counts["head"] == (0 if config.tie_word_embeddings else config.vocab_size * d)
    outputs = config.num_delta_steps * d
    assert counts["mlp"] == layers * (28 * (2 * d + outputs) + config.mlp_bias * (2 * 28 + outputs))
    norms_of_heads = 0 if config.qk_norm is None else 2 * config.head_dim * layers
    assert counts["attention"] - norms_of_heads == layers * (
        6 * (d * (4 + 2 + 2) + 4 * outputs) + config.attention_bias * (6 * (4 + 2 + 2) + outputs)
    )


def test_forward_flops_of_each_part(config):
    model = DDLForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(BATCH, TOKENS, dtype=torch.long))
    counted, total = counted_by_module(counter)
    expected = forward_flops_per_token(config, TOKENS)
    for part, modules in PARTS.items():
        flops = sum(value for name, value in counted.items() if name.rpartition(".")[2] in modules)
        assert flops == BATCH * TOKENS * expected[part], part
    assert total == BATCH * TOKENS * sum(expected.values())


def test_training_flops(config):
    model = DDLForCausalLM(config)
    input_ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids, labels=input_ids).loss.backward()
    _, total = counted_by_module(counter)
    assert total == BATCH * TOKENS * training_flops_per_token(config, TOKENS)


def test_training_flops_of_a_classifier():
    """With its own head in the place of that over the vocabulary."""
    config = tiny_config("cc", num_labels=3, pad_token_id=0)
    config._attn_implementation = "eager"
    model = DDLForSequenceClassification(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(BATCH, TOKENS, dtype=torch.long), labels=torch.tensor([0, 2])).loss.backward()
    counted = sum(counter.get_flop_counts()["DDLForSequenceClassification"].values())
    counted -= sum(counter.get_flop_counts().get("DDLForSequenceClassification.model.rotary_emb", {}).values())
    # The loss looks at one token of a text, so that all others have no gradient in the head
    assert counted == BATCH * TOKENS * training_flops(model)(TOKENS)


def test_training_flops_with_adapters():
    """No gradients for what is not trained; before the first adapter nothing at all goes backwards."""
    config = tiny_config("scalar", num_hidden_layers=6, hidden_size=100, intermediate_size=200)
    config._attn_implementation = "eager"
    model = DDLForCausalLM(config)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    input_ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids, labels=input_ids).loss.backward()
    expected = BATCH * TOKENS * training_flops(model)(TOKENS)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert expected < 0.9 * BATCH * TOKENS * training_flops_per_token(config, TOKENS)


def elementwise_flops(function, *inputs):
    """Elements that products, sums and inverse roots put out or add up."""
    aten = torch.ops.aten

    def outputs(*args, out_shape, **kwargs):
        return out_shape.numel()

    def inputs_of_sum(shape, *args, **kwargs):
        return shape.numel()

    mapping = dict.fromkeys((aten.mul, aten.add, aten.sub, aten.rsqrt, aten.pow), outputs) | {aten.sum: inputs_of_sum}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        function(*inputs)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(counts.values()), counts.get(aten.mul, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_flops(variant):
    config = tiny_config(variant, num_hidden_layers=3)
    n, d = config.num_value_channels, config.hidden_size
    flops = state_flops_per_token(config)

    def per_token(function, *inputs):
        """Of all operations and of products, without those that do not depend on the number of tokens."""
        inputs = [value.expand(1, TOKENS, *value.shape) for value in inputs]
        totals, products = elementwise_flops(function, *inputs)
        shorter = elementwise_flops(function, *[value[:, :-1] for value in inputs])
        return totals - shorter[0], products - shorter[1]

    state, vector, ones = torch.ones(n, d), torch.ones(d), torch.ones(n)
    steps = config.num_delta_steps
    _, carry_out = RESIDUALS[config.residual_type]
    if config.has_gates:
        writes = [vector.repeat(steps), ones.repeat(steps), torch.ones(steps)]
    elif config.reads_by_residual:
        writes = [vector, ones, torch.ones(n, n)]
    else:
        writes = [vector, ones] if n > 1 else [vector]
    write, _ = per_token(lambda *inputs: carry_out(config, *inputs), state, *writes)
    assert flops["write"] == 6 * write

    # The product and the addition to the sum for each tap
    if config.reads_by_residual:
        compressor = DDLChannelCompressor(config)
    else:
        compressor = COMPRESSORS[config.compressor](config)
    _, products = per_token(lambda inputs: compressor(inputs, layer_idx=0, state_idx=0), state)
    assert flops["compressor"] == 7 * 2 * products
    if config.embedding_conv:
        convolution = DDLEmbeddingConvolution(config)
        _, products = per_token(lambda inputs: convolution(inputs, layer_idx=0, state_idx=0), vector)
        assert flops["embedding_conv"] == 2 * products > 0
    else:
        assert flops["embedding_conv"] == 0


def test_paper_sizes():
    """The sizes that the paper names, and 6 FLOPs per parameter and 12·d per layer and token of context."""
    small = DDLConfig(residual_type="additive")
    medium = DDLConfig(residual_type="additive", hidden_size=1024, num_hidden_layers=24, num_attention_heads=8)
    for config, size in ((small, 124e6), (medium, 353e6)):
        parameters = count_parameters(config)
        total = sum(parameters.values())
        assert total == pytest.approx(size, rel=4e-3)
        attention = 12 * config.num_hidden_layers * config.hidden_size * 1024
        norms = parameters["norms"] + 2 * 128 * config.num_hidden_layers
        assert training_flops_per_token(config, 1024) == 6 * (total - norms) + attention


@pytest.mark.parametrize("variant", ["additive", "scalar", "cc", "tc", "mhc"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activation_bytes(variant, dtype, gradient_checkpointing):
    """Against the storages that a model in real memory keeps, of which there are less with checkpoints."""
    config = tiny_config(variant, num_hidden_layers=4)
    model = DDLForCausalLM(config).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}
    input_ids = torch.zeros(1, 50, dtype=torch.long)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(input_ids, labels=input_ids, use_cache=False).loss
    expected = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)
    actual = activation_bytes(config, 50, dtype, gradient_checkpointing)
    assert actual == pytest.approx(expected, rel=0.01)  # real memory is reused for scalars that nothing else holds
    if gradient_checkpointing:
        assert actual < 0.7 * activation_bytes(config, 50, dtype)
    assert loss.requires_grad
