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
"""Checkpoints of other models: the same logits and gradients, and clear refusals of what cannot be converted."""

import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
import zipfile
from unittest import mock

import official
import pytest
import torch
from conftest import TINY, all_gradients, gradients_close, random_tokens, randomise, relative_error, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from transformers_ddl import DDLForCausalLM, cli, conversion, modeling_ddl
from transformers_ddl.conversion import AnchorAnnealingCallback, convert_llama, convert_official_checkpoint
from transformers_ddl.modeling_ddl import DDLRotaryEmbedding


# Checkpoints of the authors' research code

OPTIONS = {
    "scalar-linear-value": ("scalar", {"ddl_v_sigmoid": False}),
    "scalar-constant-value": ("scalar", {"ddl_v_dim1_constant": True, "ddl_v_dim1_constant_value": 1.5}),
    "cc-linear-value": ("cc", {"ddl_v_sigmoid": False, "ddl_v_sigmoid_scale": 3.0}),
    "cc-constant-value": ("cc", {"ddl_v_constant": True}),
    "cc-value-scale": ("cc-ec", {"ddl_v_sigmoid_scale": 3.0}),
    "cc-two-layer-gate": ("cc-ec", {"ddl_beta_single_linear": False, "ddl_beta_hidden_size": 5}),
    "cc-kernel-3": ("cc", {"ddl_state_shortconv_kernel_size": 3}),
    "tc-two-channels": ("tc-ec", {"ddl_value_channels": 2}),
    "key-eps": ("tc", {"ddl_k_eps": 0.5}),
    "partial-rotary": ("cc", {"rope_ratio": 0.75}),
    "partial-rotary-additive": ("additive", {"rope_ratio": 0.4}),
    "odd-heads": ("cc", {"head_dim": 7}),
    "partial-rotary-odd-heads": ("scalar", {"head_dim": 49, "rope_ratio": 0.5}),
    "rope-base": ("scalar", {"rope_base": 500.0}),
    "scaled-logits": ("cc", {"mup": True, "hidden_size_base": 12}),
}
CASES = {**{variant: (variant, {}) for variant in official.VARIANTS}, **OPTIONS}
cases = pytest.mark.parametrize("case", CASES)
layouts = pytest.mark.parametrize("layout", ["first", "later"])


def official_checkpoint(case="cc-ec", layout="first", dtype=torch.float32):
    variant, options = CASES[case]
    config = {**official.SIZES, **official.VARIANTS[variant], **options}
    return official.random_parameters(variant, config, layout, dtype), config


def load(config, state_dict):
    model, info = DDLForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not any(info.values())
    return model


@cases
@layouts
def test_official_logits_and_gradients_in_fp64(case, layout):
    """Rounding is 1e-16 an operation: 1e-9 leaves no room for a different formula."""
    parameters, config = official_checkpoint(case, layout, torch.float64)
    model, tokens = load(*convert_official_checkpoint(parameters, config)), random_tokens(2, 7)
    logits = model(tokens).logits
    expected = official.logits(CASES[case][0], config, {n: p.requires_grad_() for n, p in parameters.items()}, tokens)
    assert logits.dtype == torch.float64
    assert relative_error(logits, expected) < 1e-9

    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = all_gradients((logits * cotangent).sum(), model)
    del parameters["lm_head.weight"]  # the embeddings
    names, leaves = zip(*parameters.items())
    expected_gradients = dict(zip(names, torch.autograd.grad((expected * cotangent).sum(), leaves)))
    # The conversion of parameters, which is linear, is that of gradients too
    _, expected_gradients = convert_official_checkpoint(expected_gradients, config)
    for name, expected_gradient in expected_gradients.items():
        if not name.endswith("beta_hidden_proj.bias"):  # of which they have none
            assert relative_error(gradients[name], expected_gradient) < 1e-9, name


@cases
@layouts
def test_official_logits_in_fp32(case, layout):
    """Of order 1 here; the bound is for logits of order 10."""
    parameters, config = official_checkpoint(case, layout)
    model, tokens = load(*convert_official_checkpoint(parameters, config)), random_tokens(2, 64)
    with torch.no_grad():
        expected = official.logits(CASES[case][0], config, parameters, tokens)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_official_fields_without_effect_on_logits():
    parameters, config = official_checkpoint("cc-ec", dtype=torch.bfloat16)
    options = {"block_size": 99, "ddl_beta_init": 0.5, "ddl_state_dv_shortconv_causal": True, "architectures": ["GPT"]}
    ddl_config, state_dict = convert_official_checkpoint(parameters, {**config, **options})
    assert (ddl_config.max_position_embeddings, ddl_config.gate_init, ddl_config.dtype) == (99, 0.5, torch.bfloat16)
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.bfloat16}
    ddl_config, _ = convert_official_checkpoint(parameters, {**config, "ddl_beta_init": 0.0})
    assert 0 < ddl_config.gate_init < 1e-5


def test_official_sizes_follow_from_the_parameters():
    parameters, config = official_checkpoint("tc-ec")
    expected, _ = convert_official_checkpoint(parameters, config)
    ddl_config, _ = convert_official_checkpoint(parameters, {"block_size": config["block_size"]})
    assert ddl_config.to_dict() == expected.to_dict()


def test_official_untied_head():
    parameters, config = official_checkpoint("scalar")
    parameters["lm_head.weight"] = 2 * parameters["lm_head.weight"]
    model, tokens = load(*convert_official_checkpoint(parameters, config)), random_tokens(2, 7)
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        expected = official.logits("scalar", config, parameters, tokens)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_official_names_with_prefixes(prefix):
    parameters, config = official_checkpoint()
    _, expected = convert_official_checkpoint(parameters, config)
    _, state_dict = convert_official_checkpoint({f"{prefix}{n}": p for n, p in parameters.items()}, config)
    assert state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


REFUSED_OPTIONS = [
    *[("cc", "first", {name: True}, name) for name in ("using_groupnorm", "use_output_gate", "use_k_shift")],
    ("scalar", "later", {"v_activation": "relu"}, "v_activation='relu'"),
    ("scalar", "later", {"residual_branch_mult": 0.5}, "residual_branch_mult=0.5"),
    ("scalar", "later", {"parameterization": "completeP", "num_hidden_layers_base": 4}, "num_hidden_layers_base=4"),
    ("cc", "later", {"ddl_state_dv_shortconv_causal": True}, "ddl_state_dv_shortconv_causal=True"),
    ("cc", "first", {"ddl_v_constant": True, "ddl_v_constant_value": -1.0}, "value_scale"),
    ("additive", "first", {"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
    ("scalar", "first", {"rope_ratio": 0.0}, "rope_ratio=0.0"),
    ("scalar", "first", {"rope_ratio": 1.5}, "rope_ratio=1.5"),
    ("scalar", "first", {"rope_ratio": float("inf")}, "rope_ratio=inf"),
    ("scalar", "first", {"ddl_k_eps": True}, "ddl_k_eps=True"),
    ("scalar", "first", {"ddl_beta_init": float("nan")}, "ddl_beta_init=nan"),
    ("scalar", "first", {"ddl_v_sigmoid": "false"}, "ddl_v_sigmoid='false'"),
    ("scalar", "first", {"rope_base": "10k"}, "rope_base='10k'"),
    ("scalar", "first", {"rope_base": 0}, "rope_base=0 .*positive"),
    ("scalar", "first", {"ddl_beta_init": [1.0]}, "ddl_beta_init="),
    ("scalar", "first", {"num_attention_heads": 9}, "num_attention_heads is 9"),
    ("cc", "first", {"ddl_value_channels": 2}, "ddl_value_channels is 2"),
    ("cc", "first", {"hidden_size": 21}, "hidden_size is 21"),
    ("cc", "first", {"intermediate_size": 54}, "intermediate_size is 54"),
    ("cc", "first", {"use_qk_rmsnorm": False}, "use_qk_rmsnorm is False"),
    ("cc", "first", {"ddl_state_shortconv_kernel_size": 3}, "ddl_state_shortconv_kernel_size is 3"),
    ("cc", "first", {"ddl_beta_single_linear": False}, "ddl_beta_single_linear is False"),
    ("cc-two-layer-gate", "later", {"ddl_beta_single_linear": True}, "ddl_beta_single_linear is True"),
    ("cc-two-layer-gate", "later", {"ddl_beta_hidden_size": 128}, "ddl_beta_hidden_size is 128"),
    ("cc", "first", {"input_embed_shortconv_kernel_size": 4}, "input_embed_shortconv_kernel_size is 4"),
    ("cc-ec", "later", {"input_embed_shortconv_kernel_size": 4}, "input_embed_shortconv_kernel_size is 4"),
    ("tc-ec", "later", {"input_embed_shortconv_kernel_size": None}, "input_embed_shortconv_kernel_size is None"),
    ("scalar", "first", {"ddl_value_channels": 4}, "ddl_value_channels is 4"),
    ("scalar", "later", {"ddl_state_shortconv_kernel_size": 4}, "ddl_state_shortconv_kernel_size is 4"),
    ("additive", "first", {"ddl_k_eps": 1e-5}, "missing parameter .*ddl_attn.*ddl_k_eps"),
    ("scalar", "later", {"ddl_sequence_reduction_version": 2}, "ddl_sequence_reduction_version=2"),
    ("scalar", "later", {"parameterization": "muP"}, "parameterization='muP'"),
    ("scalar", "later", {"parameterization": "standard", "mup": True}, "mup=True contradicts"),
    ("scalar", "later", {"parameterization": "widthmuP", "mup": False}, "mup=False contradicts"),
]


@pytest.mark.parametrize("case, layout, options, message", REFUSED_OPTIONS, ids=lambda value: str(value)[:40])
def test_official_options_that_cannot_be_converted(case, layout, options, message):
    parameters, config = official_checkpoint(case, layout)
    with pytest.raises(ValueError, match=message):
        convert_official_checkpoint(parameters, {**config, **options})


MUP_OPTIONS = [
    ({"mup": True}, 12 / 20),
    ({"mup": False}, None),
    ({"parameterization": "widthmuP"}, 12 / 20),
    ({"parameterization": "widthmuP", "mup": True}, 12 / 20),
    ({"parameterization": "completeP", "num_hidden_layers_base": 2}, 12 / 20),
    ({"parameterization": "spectralP", "num_hidden_layers_base": 4, "residual_branch_mult": 1.0}, 12 / 20),
    ({"parameterization": "standard"}, None),
]


@layouts
@pytest.mark.parametrize("options, scale", MUP_OPTIONS, ids=str)
def test_official_logits_scale(options, scale, layout):
    parameters, config = official_checkpoint("scalar", layout)
    ddl_config, _ = convert_official_checkpoint(parameters, {**config, "hidden_size_base": 12, **options})
    assert ddl_config.logits_scale == scale


@pytest.mark.parametrize("group", ["input_embed", "ddl_", "compress|readout", "ddl_|compress|readout|input_embed"])
def test_official_missing_groups(group):
    """What is left looks like another variant; the options tell that it is not."""
    parameters, config = official_checkpoint("cc-ec")
    rest = {name: tensor for name, tensor in parameters.items() if not re.search(group, name)}
    with pytest.raises(ValueError, match="ddl_|input_embed"):
        convert_official_checkpoint(rest, {**config, "ddl_k_eps": 1e-5})


def test_official_parameters_of_several_dtypes():
    parameters, config = official_checkpoint()
    parameters["ln_f.weight"] = parameters["ln_f.weight"].bfloat16()
    with pytest.raises(ValueError, match="but ln_f.weight of torch.bfloat16; allowed: one dtype"):
        convert_official_checkpoint(parameters, config)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64], ids=str)
def test_official_parameters_of_dtypes_that_no_model_has(dtype):
    parameters, config = official_checkpoint()
    parameters = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    with pytest.raises(ValueError, match=f"transformer.wte.weight is of {dtype}; allowed: torch.float32,"):
        convert_official_checkpoint(parameters, config)


@pytest.mark.parametrize("head_dim", range(3, 130))
def test_official_rotary_features(head_dim):
    """Exactly as many features turn as theirs turn: ⌊head_dim · ratio⌋, made even."""
    variant, config = "additive", {**official.SIZES, "num_attention_heads": 1, "head_dim": head_dim, "rope_ratio": 1.0}
    parameters = official.random_parameters(variant, config, "first", torch.float32)
    for rotary_dim in range(2, head_dim + 1, 2):
        config["rope_ratio"] = (rotary_dim + 0.5) / head_dim if rotary_dim < head_dim else 1.0
        ddl_config, _ = convert_official_checkpoint(parameters, config)
        assert 2 * len(DDLRotaryEmbedding(ddl_config).inv_freq) == rotary_dim


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_q.weight",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.attn.q_rms.weight",
        "transformer.h.1.ddl_mlp.v_proj.bias",
        "transformer.h.0.compress.weight",
        "transformer.h.1.compress.read",
        "readout.read",
        "ln_f.weight",
    ],
)
def test_official_missing_parameters(name):
    parameters, config = official_checkpoint()
    del parameters[name]
    with pytest.raises(ValueError, match=f"missing parameter {name}"):
        convert_official_checkpoint(parameters, config)


@pytest.mark.parametrize(
    "case, name",
    [
        ("cc", "transformer.h.0.attn.subln.weight"),
        ("cc", "transformer.h.0.attn.c_q.bias"),
        ("cc", "transformer.wpe.weight"),
        ("cc", "transformer.h.0.attn.o_proj.weight"),
        ("scalar", "transformer.h.1.compress.weight"),
        ("additive", "transformer.h.1.ddl_mlp.beta.weight"),
    ],
)
def test_official_unexpected_parameters(case, name):
    parameters, config = official_checkpoint(case)
    with pytest.raises(ValueError, match=f"unexpected parameter {name}"):
        convert_official_checkpoint({**parameters, name: torch.zeros(20, 20)}, config)


@pytest.mark.parametrize(
    "case, name, shape",
    [
        ("cc", "transformer.h.0.attn.c_k.weight", (20, 18)),
        ("cc", "transformer.h.1.ln_1.weight", (21,)),
        ("tc", "transformer.h.1.compress.shortconv.weight", (3, 80)),
        ("cc-ec", "input_embed.conv.weight", (80, 2, 3)),
        ("cc", "transformer.h.0.compress.read", (4, 1)),
        ("scalar", "transformer.h.0.attn.q_rms.weight", (6, 1)),
    ],
)
def test_official_wrong_shapes(case, name, shape):
    parameters, config = official_checkpoint(case)
    with pytest.raises(ValueError, match=rf"{name} has the shape \({shape[0]},.* expected"):
        convert_official_checkpoint({**parameters, name: torch.zeros(shape)}, config)


# Llamas

LLAMA_CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-3-rope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": None, "pad_token_id": 0}),
    "qwen3": (Qwen3Config, {"rms_norm_eps": 1e-3}),
}
LLAMA_OPTIONS = {
    "scalar": {},
    "scalar-context-bias": {"value_input": "context", "value_bias": True, "gate_init": 1.0},
    "cc": {"num_value_channels": 3},
    "cc-repeat-kernel-2": {"num_value_channels": 3, "embedding_conv": False, "compressor_kernel_size": 2},
    "tc-separate": {
        "num_value_channels": 3,
        "compressor": "token",
        "share_compressor": False,
        "gate_hidden_size": 5,
    },
}
llamas = pytest.mark.parametrize("llama", LLAMA_CONFIGS)
llama_options = pytest.mark.parametrize("options", LLAMA_OPTIONS)


def make_llama(name="llama", dtype=torch.float32, **overrides):
    config_class, options = LLAMA_CONFIGS[name]
    config = config_class(**{**TINY, "hidden_size": 24, **options, **overrides})
    # Not cast by `to`, which would round the frequencies of the rotary embedding too
    return randomise(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()


@llamas
@llama_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_converted_llama_is_the_same_function(llama, options, dtype):
    """To the last bit: b k̃ is added as the Llama adds it, and all else that is added is 0."""
    donor, tokens = make_llama(llama, dtype), random_tokens(2, 33)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    model = convert_llama(donor, **LLAMA_OPTIONS[options])
    assert type(model) is DDLForCausalLM and model.dtype == dtype and not model.training
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, donor(tokens).logits)
        difference = model(tokens, attention_mask=mask).logits - donor(tokens, attention_mask=mask).logits
        assert not difference[mask.bool()].any()


@llama_options
def test_converted_llama_generates_and_is_saved(options, tmp_path):
    donor, tokens = make_llama(), random_tokens(2, 5)
    model = convert_llama(donor, **LLAMA_OPTIONS[options])
    model.save_pretrained(tmp_path)
    for converted in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        arguments = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
        assert torch.equal(converted.generate(tokens, **arguments), donor.generate(tokens, **arguments))


def test_conversion_copies_the_llama():
    donor = make_llama()
    donor.generation_config.temperature = 0.3
    before = {name: parameter.clone() for name, parameter in donor.named_parameters()}
    with mock.patch.object(logging.getLogger("transformers.modeling_utils"), "handle") as handle:
        model = convert_llama(donor, num_value_channels=3)
    handle.assert_not_called()  # what is new is not reported as missing
    assert model.generation_config.temperature == 0.3
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(parameter, before[name]) for name, parameter in donor.named_parameters())


@llama_options
def test_all_that_is_new_can_be_trained(options):
    """
    At the start every anchor and read vector and the value map of the first channel have gradients; those of the gate are
    0, as its factor in the rewrite is, and so are those of the channels that no one reads. After one step all have some.
    """
    tokens = random_tokens(4, 9)
    model = convert_llama(make_llama(dtype=torch.float64), **LLAMA_OPTIONS[options])
    n = model.config.num_value_channels

    def gradients():
        return all_gradients(model(tokens, labels=tokens).loss, model)

    first = gradients()
    for name, gradient in first.items():
        if "beta" in name:
            assert not gradient.any(), name
        elif "anchor" in name or "value_proj" in name:
            assert gradient[0].any() and not gradient[1:].any(), name
        elif name.endswith("read"):
            assert gradient.ne(0).all(), name
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.1 * first[name]
    for name, gradient in gradients().items():
        if "beta" in name:
            assert gradient.any(), name
        elif "anchor" in name or "value_proj" in name:
            assert gradient.reshape(n, -1).ne(0).any(-1).all(), name


def test_annealing_of_a_half_precision_model():
    """A thousand small steps are made as 4 large ones are: anchors do not stay where bfloat16 would round them to."""
    model = convert_llama(make_llama().bfloat16())
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if "residual" in name)
    assert model.lm_head.weight.dtype == torch.bfloat16
    annealing, state = AnchorAnnealingCallback(steps=1000), TrainerState()
    for state.global_step in range(1, 751):
        annealing.on_step_end(None, state, None, model=model)
    anchor = model.model.layers[0].attn_residual.anchor()
    torch.testing.assert_close(anchor, torch.full((2, 1), 0.25), rtol=1e-3, atol=0)


def test_official_norms_of_queries_are_not_left_out():
    parameters, config = official_checkpoint()
    parameters = {name: tensor for name, tensor in parameters.items() if "_rms" not in name}
    with pytest.raises(ValueError, match="q_rms"):
        convert_official_checkpoint(parameters, {**config, "use_qk_rmsnorm": None})


def test_annealing_of_anchors(tmp_path):
    """The rewrite is the pure delta rule after the given steps, also if the training was interrupted."""
    tokens = random_tokens(32, 8)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        learning_rate=0.0,
        report_to="none",
        use_cpu=True,
    )
    anchors = {}

    class Recorder(AnchorAnnealingCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, model=model, **kwargs)
            anchors.setdefault(state.global_step, []).append(model.model.layers[1].mlp_residual.anchor().clone())

    for checkpoint in (None, tmp_path / "checkpoint-2"):
        model = convert_llama(make_llama(), num_value_channels=2)
        dataset = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[Recorder(steps=3)])
        trainer.train(resume_from_checkpoint=checkpoint)
    for step, share in {1: 2 / 3, 2: 1 / 3, 3: 0.0, 4: 0.0}.items():
        for anchor in anchors[step]:
            torch.testing.assert_close(anchor, share * torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert [len(anchors[step]) for step in (1, 2, 3, 4)] == [1, 1, 2, 2]


@pytest.mark.parametrize("variant", ["scalar", "cc", "tc"])
def test_anchored_model_with_caches_checkpointing_and_kernels(variant, monkeypatch):
    model, tokens = tiny_model(variant, value_anchor=0.5), random_tokens(1, 7)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    logits, expected = model(tokens).logits, all_gradients(loss, model)
    prefix = model(tokens[:, :5], use_cache=True)
    rest = model(tokens[:, 5:], past_key_values=prefix.past_key_values).logits
    torch.testing.assert_close(torch.cat((prefix.logits, rest), 1), logits, rtol=1e-5, atol=1e-5)

    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = all_gradients(model(tokens, labels=tokens, use_cache=False).loss, model)
    gradients_close(actual, expected)


@pytest.mark.parametrize("options", ["scalar", "cc", "cc-repeat-kernel-2"])
def test_converted_llama_with_kernels(options, monkeypatch):
    """Outputs and gradients are those of the PyTorch path, also when training has moved gates, targets and anchors."""
    pytest.importorskip("triton")
    tokens, steps = random_tokens(1, 4), {"0": [], "1": []}
    converted = convert_llama(make_llama(), **LLAMA_OPTIONS[options])
    for kernels, results in steps.items():
        monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", kernels)
        model = copy.deepcopy(converted)
        with mock.patch.object(modeling_ddl, "fused_boundary", wraps=modeling_ddl.fused_boundary) as fused_boundary:
            for _ in range(3):
                outputs = model(tokens, labels=tokens, use_cache=False)
                gradients = all_gradients(outputs.loss, model)
                results.append({"logits": outputs.logits.detach(), **gradients})
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter -= 0.1 * gradients[name]
        assert fused_boundary.called == (kernels == "1")
    for expected, actual in zip(*steps.values()):
        for (
            name
        ) in expected:  # of order 1e-3 and more, but for those of gates and anchors, which are 0 at first or later
            size = max(expected[name].abs().max().item(), 1e-3)
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4 * size, msg=name)


@pytest.mark.parametrize("options", ["scalar", "cc"])
def test_kernels_round_where_a_llama_rounds(options, monkeypatch):
    """
    Triton's interpreter rounds to the nearest float16, but not to the nearest bfloat16, so that float16 stands for both. The
    sums of the norms run in another order, which changes single roundings; rounding elsewhere changed 82 % of the logits.
    """
    pytest.importorskip("triton")
    donor, tokens = make_llama(dtype=torch.float16), random_tokens(2, 9)
    model = convert_llama(donor, **LLAMA_OPTIONS[options])
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")
    with torch.no_grad():
        assert (model(tokens).logits != donor(tokens).logits).float().mean() < 0.1


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


REFUSED_LLAMAS = [
    (
        LlamaConfig,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {},
        "quantization_config",
    ),
    (LlamaConfig, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {}, "partial_rotary_factor"),
    (MistralConfig, {"sliding_window": 16}, {}, "sliding_window=16"),
    (Qwen3Config, {"use_sliding_window": True, "sliding_window": 16}, {}, "sliding_window=16"),
    (GemmaConfig, {}, {}, "model_type='gemma'"),
    (LlamaConfig, {}, {"value_activation": "sigmoid"}, "value_activation cannot be chosen"),
    (LlamaConfig, {}, {"qk_norm": "pre_rope"}, "qk_norm cannot be chosen"),
    (LlamaConfig, {}, {"compressor": "token"}, "compressor must be None"),
    (LlamaConfig, {}, {"gate_init": 2.0}, "gate_init must lie"),
]


@pytest.mark.parametrize(
    "config_class, options, ddl_options, message", REFUSED_LLAMAS, ids=lambda value: str(value)[:40]
)
def test_llamas_that_cannot_be_converted(config_class, options, ddl_options, message, tmp_path, capsys):
    config_class(**{**TINY, **options}).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=message):
        convert_llama(tmp_path / "llama", **ddl_options)
    flags = [f"--{name}={value}" for name, value in ddl_options.items() if name in conversion.LLAMA_OPTIONS]
    if len(flags) == len(ddl_options):
        assert convert("llama", tmp_path / "llama", tmp_path / "ours", *flags) == 2
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_llamas_without_values():
    with torch.device("meta"):
        llama = make_llama()
    with pytest.raises(ValueError, match="LlamaForCausalLM has parameters on the meta device; allowed: loaded ones"):
        convert_llama(llama)


def test_llamas_without_a_head():
    model = make_llama().model
    with pytest.raises(ValueError, match="LlamaModel cannot be converted; allowed: a causal language model"):
        convert_llama(model)


def test_llamas_of_several_dtypes():
    """Casting some of the parameters would change the function."""
    model = make_llama(dtype=torch.bfloat16)
    model.model.norm.float()
    with pytest.raises(ValueError, match="but model.norm.weight of torch.float32; allowed: one dtype"):
        convert_llama(model)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dtype": "float17"}, "'torch' has no attribute 'float17'"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "Missing required keys"),
        ({"model_type": "new"}, "model type `new`"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_read(fields, message, tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    assert convert("llama", tmp_path / "llama", tmp_path / "ours") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith(f"error: {tmp_path / 'llama'} has no configuration that can be read: ") and message in error
    )


@pytest.mark.parametrize("problem", ["missing", "unexpected", "mismatched"])
def test_damaged_llamas(problem, tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "llama")
    file, name = tmp_path / "llama" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    if problem == "missing":
        del tensors[name]
    elif problem == "mismatched":
        tensors[name] = tensors[name].T.contiguous()
    else:
        name = "model.layers.1.mlp.other_proj.weight"
        tensors[name] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    assert convert("llama", tmp_path / "llama", tmp_path / "ours") == 2
    assert f"{problem} parameters: {name}" in capsys.readouterr().err.replace("('", "")
    assert not (tmp_path / "ours").exists()


def spoil_llama(folder, how):
    weights, trap = folder / "model.safetensors", Trap(folder.parent / "executed")
    if how.startswith("tokenizer"):
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (folder / "tokenizer.json").write_text("{")
    elif how == "generation_config is a list":
        (folder / "generation_config.json").write_text("[]")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif how.startswith("index"):
        weights.unlink()
        content = {"index is a list": "[]", "index without weight_map": "{}", "index is cut": "{"}[how]
        (folder / "model.safetensors.index.json").write_text(content)
    else:
        weights.unlink()
        file = folder / "pytorch_model.bin"
        if how == "text":
            file.write_text("hello, these are no parameters")
        elif how == "empty":
            file.touch()
        elif how == "another zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("hello.txt", "hello")
        elif how == "pickle":
            file.write_bytes(pickle.dumps({"trap": trap}))
        elif how == "pickle in a checkpoint":
            torch.save({"trap": trap}, file)


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "no weights that can be read: .*metadata"),
        ("no weights", "no weights that can be read: .*no file named model.safetensors"),
        ("text", "damaged, or its files hold more than a model"),
        ("empty", "damaged, or its files hold more than a model"),
        ("another zip", "no weights that can be read"),
        ("pickle", "damaged, or its files hold more than a model"),
        ("pickle in a checkpoint", "damaged, or its files hold more than a model"),
        ("index is a list", "damaged, or its files hold more than a model"),
        ("index without weight_map", "damaged, or its files hold more than a model"),
        ("index is cut", "no weights that can be read"),
        ("generation_config is a list", "damaged, or its files hold more than a model"),
        ("tokenizer is cut", "no tokenizer that can be read"),
    ],
)
def test_llama_files_that_cannot_be_read(how, message, tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "llama")
    spoil_llama(tmp_path / "llama", how)
    assert convert("llama", tmp_path / "llama", tmp_path / "ours") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.match(f"error: {tmp_path / 'llama'} (has|is) {message}", line)
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]  # nothing was written, nothing executed


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_llama_files(with_tokenizer, tmp_path):
    donor, tokens = make_llama("qwen3", torch.bfloat16), random_tokens(2, 7)
    donor.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    if with_tokenizer:
        tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "theirs")
    assert (
        convert("llama", tmp_path / "theirs", tmp_path / "ours", "--num_value_channels", 3, "--compressor=token") == 0
    )
    assert (tmp_path / "ours" / "tokenizer.json").is_file() == with_tokenizer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (model.config.num_value_channels, model.config.compressor, model.dtype) == (3, "token", torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, donor(tokens).logits)


# Files


def write_checkpoint(folder, kind, parameters, config):
    """Writes a checkpoint the way this kind of file is made; returns what to give to the command."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        tensors = {name: tensor for name, tensor in parameters.items() if name != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(parameters, folder / "pytorch_model.bin")
    elif kind == "file":
        torch.save(parameters, folder / "weights.pt")
        return folder / "weights.pt"
    elif kind.startswith("training"):
        (folder / "config.json").unlink()
        content = {"model": parameters, "optimizer": {"state": {}}, "config": config, "iter_num": 7}
        if kind == "training-with-script-settings":  # as nanoGPT's
            content |= {"config": {"learning_rate": 1e-3, "rope_base": 1.0}, "model_args": config | {"rope_base": 1e4}}
        torch.save(content, folder / "ckpt.pt")
    else:
        names = [name for name in parameters if name != "lm_head.weight"]
        files = {name: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: parameters[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    "kind", ["safetensors", "bin", "file", "training", "training-with-script-settings", "sharded"]
)
@layouts
def test_official_files(kind, layout, tmp_path):
    parameters, config = official_checkpoint("tc-ec", layout)
    path, tokens = write_checkpoint(tmp_path / "theirs", kind, parameters, config), random_tokens(2, 7)
    assert convert("official", path, tmp_path / "ours") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = official.logits("tc-ec", config, parameters, tokens)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_sharded_output(tmp_path):
    path = write_checkpoint(tmp_path / "theirs", "safetensors", *official_checkpoint())
    assert convert("official", path, tmp_path / "ours", "--max-shard-size", "20KB") == 0
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())


def test_size_of_shards_is_checked_at_once(tmp_path, capsys):
    assert convert("official", tmp_path / "theirs", tmp_path / "ours", "--max-shard-size", "5") == 2
    assert "max-shard-size=5; allowed: a number of KB, MB, GB or TB" in capsys.readouterr().err


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "theirs", "bin", *official_checkpoint())
    torch.save({"trap": Trap(tmp_path / "executed")}, path / "pytorch_model.bin")
    assert convert("official", path, tmp_path / "ours") == 2
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"theirs"}


def spoil(folder, how):
    file = folder / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "missing shard":
        (folder / "model-00002-of-00003.safetensors").unlink()
    elif how == "no weights":
        file.unlink()
    elif how == "text":
        file.rename(folder / "weights.pt").write_text("hello, these are no parameters")
    elif how == "numbered parameters":
        torch.save({1: torch.zeros(2)}, file.rename(folder / "weights.pt"))
    elif how == "sparse parameters":
        torch.save({"ln_f.weight": torch.zeros(2).to_sparse()}, file.rename(folder / "weights.pt"))
    elif how == "weight_map is a list":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    elif how == "weight_map of numbers":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"ln_f.weight": 1}}')
    elif how == "no weight_map":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "config is cut":
        (folder / "config.json").write_text('{"vocab_size": ')
    elif how == "missing":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "model.safetensors is damaged"),
        ("missing shard", "no file .*model-00002-of-00003.safetensors"),
        ("no weights", "holds no checkpoint"),
        ("text", "weights.pt is damaged"),
        ("numbered parameters", "weights.pt holds no parameters by name"),
        ("sparse parameters", "weights.pt holds no parameters by name"),
        ("weight_map is a list", "index.json has no weight_map from parameters to files"),
        ("weight_map of numbers", "index.json has no weight_map from parameters to files"),
        ("no weight_map", "index.json has no weight_map from parameters to files"),
        ("no config", "no config.json beside model.safetensors"),
        ("config is a list", "config.json holds no JSON object"),
        ("config is cut", "config.json is not JSON"),
        ("missing", "there is no file .*theirs"),
    ],
)
def test_files_that_cannot_be_read(how, message, tmp_path, capsys):
    kind = "sharded" if how == "missing shard" or "weight_map" in how else "safetensors"
    path = write_checkpoint(tmp_path / "theirs", kind, *official_checkpoint())
    spoil(path, how)
    assert convert("official", path, tmp_path / "ours") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and re.search(message, line)
    assert not (tmp_path / "ours").exists()


def test_output_folder_is_never_overwritten(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "theirs", "safetensors", *official_checkpoint())
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    assert convert("official", path, tmp_path / "ours") == 2
    assert "ours exists" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["notes.txt"]

    (tmp_path / "ours" / "notes.txt").unlink()
    assert convert("official", path, tmp_path / "ours") == 0


def test_output_folder_appears_only_when_it_is_whole(tmp_path):
    path = write_checkpoint(tmp_path / "theirs", "safetensors", *official_checkpoint())

    class FullDisk:
        def save_pretrained(self, folder):
            assert (folder / "model.safetensors").is_file()
            raise OSError("no space left on device")

    model = DDLForCausalLM(convert_official_checkpoint(*official_checkpoint())[0])
    with pytest.raises(OSError, match="no space left"):
        conversion.save_converted(tmp_path / "ours", model, FullDisk())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", ["safetensors", pytest.param("bin", marks=pytest.mark.slow), "llama"])
def test_memory_of_a_conversion(kind, tmp_path):
    """Parameters go from file to file: the process itself never holds half of them."""
    path, vocab_size = tmp_path / "theirs", 1_600_000
    if kind == "llama":
        make_llama(vocab_size=vocab_size, hidden_size=20, tie_word_embeddings=True).save_pretrained(path)
    else:
        parameters, config = official_checkpoint("cc")
        parameters["transformer.wte.weight"] = parameters["lm_head.weight"] = torch.randn(vocab_size, 20)
        write_checkpoint(path, kind, parameters, {**config, "vocab_size": vocab_size})
    program = """
        import pathlib, sys, threading, time
        from transformers_ddl import cli
        def anonymous_memory():
            status = pathlib.Path("/proc/self/status").read_text()
            return int(status.split("RssAnon:")[1].split()[0]) * 1024
        before, samples = anonymous_memory(), []
        def watch():
            while True:
                samples.append(anonymous_memory())
                time.sleep(1e-3)
        threading.Thread(target=watch, daemon=True).start()
        assert cli.main(["convert", *sys.argv[1:]]) == 0
        print(max(samples) - before)
    """
    result = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(program)),
            *("llama" if kind == "llama" else "official", str(path), str(tmp_path / "ours")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout.splitlines()[-1]) < vocab_size * 20 * 4 / 2
