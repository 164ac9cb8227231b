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
"""The whole model against the plain loops of `reference.py`: logits and all gradients, for every variant and option."""

import pytest
import reference
import torch
from conftest import VARIANTS, random_tokens, relative_error, tiny_model


# Every option of the configuration that changes the computation, on the variant where it matters.
OPTIONS = {
    "cc-kernel-1": ("cc", {"compressor_kernel_size": 1}),
    "cc-kernel-2": ("cc", {"compressor_kernel_size": 2}),
    "cc-n-5-kernel-4": ("cc", {"num_value_channels": 5, "compressor_kernel_size": 4}),
    "cc-separate": ("cc", {"share_compressor": False}),
    "ec-kernel-1": ("cc", {"embedding_conv_kernel_size": 1}),
    "ec-kernel-3": ("cc", {"embedding_conv_kernel_size": 3}),
    "ec-kernel-longer-than-text": ("cc", {"embedding_conv_kernel_size": 9}),
    "tc-kernel-1": ("tc", {"compressor_kernel_size": 1}),
    "tc-kernel-2-ec-kernel-3": ("tc", {"compressor_kernel_size": 2, "embedding_conv_kernel_size": 3}),
    "tc-kernel-longer-than-text": ("tc", {"compressor_kernel_size": 9}),
    "two-layer-gate-multi-step": ("multi-step", {"gate_hidden_size": 7}),
    "value-constant-multi-step": ("multi-step", {"value_activation": "constant", "num_delta_steps": 3}),
    "multi-step-biases": ("multi-step", {"attention_bias": True, "mlp_bias": True}),
    "multi-step-tc": ("tc", {"num_delta_steps": 2}),
    "multi-step-scalar": ("scalar", {"num_delta_steps": 2}),
    "write-only-scalar": ("scalar", {"residual_type": "write_only"}),
    "write-only-multi-step": ("write-only", {"num_delta_steps": 2}),
    "expanded-additive-tc": ("tc", {"residual_type": "expanded_additive"}),
    "hc-ec": ("hc", {"embedding_conv": True}),
    "two-layer-gate": ("cc", {"gate_hidden_size": 7}),
    "two-layer-gate-scalar": ("scalar", {"gate_hidden_size": 7}),
    "value-context": ("cc", {"value_input": "context"}),
    "value-linear": ("cc", {"value_activation": None}),
    "value-linear-bias": ("cc", {"value_activation": None, "value_bias": True}),
    "value-linear-context": ("cc", {"value_activation": None, "value_input": "context"}),
    "value-linear-scalar": ("scalar", {"value_activation": None, "value_scale": 0.7}),
    "value-constant": ("cc", {"value_activation": "constant"}),
    "value-constant-scale": ("scalar", {"value_activation": "constant", "value_scale": 0.7}),
    "value-sigmoid-scale": ("cc", {"value_scale": 0.7}),
    "value-sigmoid-no-bias": ("cc", {"value_bias": False}),
    "anchor": ("cc", {"value_anchor": 1.0}),
    "anchor-scalar-linear": ("scalar", {"value_anchor": 0.0, "value_activation": None}),
    "anchor-tc-key-eps": ("tc", {"value_anchor": 0.5, "key_eps": 0.5}),
    "key-eps": ("cc", {"key_eps": 0.5}),
    "rms-norm-eps": ("cc", {"rms_norm_eps": 0.1}),
    "qk-norm-post-rope": ("cc", {"qk_norm": "post_rope"}),
    "qk-norm-none": ("cc", {"qk_norm": None}),
    "no-grouped-queries": ("cc", {"num_key_value_heads": 4}),
    "one-key-value-head": ("cc", {"num_key_value_heads": 1}),
    "head-dim-from-sizes": ("cc", {"hidden_size": 24, "head_dim": None}),
    "attention-bias": ("cc", {"attention_bias": True}),
    "mlp-bias": ("cc", {"mlp_bias": True}),
    "gelu": ("cc", {"hidden_act": "gelu"}),
    "rope-theta": ("cc", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "partial-rotary": (
        "cc",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2 / 3}},
    ),
    "logits-scale": ("cc", {"logits_scale": 0.3}),
    "untied-head": ("cc", {"tie_word_embeddings": False}),
    "additive-biases": ("additive", {"attention_bias": True, "mlp_bias": True, "qk_norm": "post_rope"}),
}
CASES = {**{variant: (variant, {}) for variant in VARIANTS}, **OPTIONS}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def reference_parameters(model):
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def run_both(model, **inputs):
    """
    Logits and gradients with respect to all parameters and floating-point inputs of a random linear function of the
    logits: the model's, and the reference's in fp64.
    """
    parameters = reference_parameters(model)
    reference_inputs = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.items()}
    leaves = dict(model.named_parameters())
    for name, x in inputs.items():
        if x.is_floating_point():
            leaves[name] = x.requires_grad_()
            parameters[name] = reference_inputs[name].requires_grad_()
    assert list(leaves) == list(parameters)

    actual = model(**inputs, use_cache=False).logits
    expected = reference.logits(model.config, parameters, **reference_inputs)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual_gradients = torch.autograd.grad((actual.double() * cotangent).sum(), list(leaves.values()))
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), list(parameters.values()))
    return (
        {"logits": actual.detach(), **dict(zip(leaves, actual_gradients))},
        {"logits": expected.detach(), **dict(zip(leaves, expected_gradients))},
    )


def assert_equals_reference(model, **inputs):
    """
    Rounding in fp64 is 1e-16 an operation: 1e-9 leaves no room for a different formula, only for its condition.
    Transformers computes the weights of manifold-constrained hyper-connections in fp32, whatever the model's dtype.
    """
    actual, expected = run_both(model, **inputs)
    bound = 1e-5 if model.config.residual_type == "manifold_hyper_connections" else 1e-9
    for name in expected:
        assert relative_error(actual[name], expected[name]) < bound, name


@pytest.mark.parametrize("case", CASES)
def test_fp64(case):
    variant, options = CASES[case]
    assert_equals_reference(tiny_model(variant, dtype=torch.float64, **options), input_ids=random_tokens(2, 7))


@pytest.mark.parametrize("case", [*VARIANTS, "logits-scale"])
def test_fp64_inputs_embeds(case):
    """With an untied head, as a tied one is the only use of the embedding matrix then."""
    variant, options = CASES[case]
    model = tiny_model(variant, dtype=torch.float64, **{**options, "tie_word_embeddings": False})
    del model.model.embed_tokens
    inputs_embeds = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).double()
    assert_equals_reference(model, inputs_embeds=inputs_embeds)


# Largest relative L2 errors of the logits and of the whole gradient, twice the largest that was measured over all cases
# and four seeds. They are some tens of unit roundoffs, and the additive model's errors are about half of the others'.
BOUNDS = {torch.float32: (4e-6, 8e-6), torch.float16: (1e-2, 4e-2), torch.bfloat16: (7e-2, 0.2)}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_low_precision(case, dtype):
    variant, options = CASES[case]
    model = tiny_model(variant, dtype=dtype, **options)
    actual, expected = run_both(model, input_ids=random_tokens(2, 7))
    assert all(gradient.dtype == dtype for gradient in actual.values())

    def error(names):
        difference = torch.cat([(actual[name] - expected[name]).flatten() for name in names])
        return difference.norm() / torch.cat([expected[name].flatten() for name in names]).norm()

    logits_bound, gradient_bound = BOUNDS[dtype]
    assert error(["logits"]) < logits_bound
    assert error(expected.keys() - {"logits"}) < gradient_bound
