"""
The fused kernels against the PyTorch path, which `test_reference.py` holds to the specification. On a CPU they run in
Triton's interpreter, on a GPU compiled.
"""

import copy
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import random_tokens, randomise, tiny_config, tiny_model
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.models.llama.modeling_llama import LlamaMLP

from transformers_ddl import DDLForCausalLM, modeling_ddl, ops_ddl
from transformers_ddl.modeling_ddl import DDLMLP, DDLEmbeddingConvolution, DDLTokenCompressor, delta_rewrite


pytest.importorskip("triton")
from transformers_ddl import ops_triton_conv_ddl, ops_triton_ddl  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter's time goes with channels times taps
TWO_TOKENS = {"compressor": "token", "num_value_channels": 2, "compressor_kernel_size": 2}
# With one layer of n > 1 channels, the backward pass rebuilds a state from a snapshot and one write, with three from two and up to n - 1
VARIANTS = {
    "scalar": {"num_value_channels": 1, "num_hidden_layers": 3},
    "channel": {"num_value_channels": 4, "num_hidden_layers": 3},
    "channel-without-ec": {"num_value_channels": 5, "embedding_conv": False},
    "two-channels-short-kernel": {"num_value_channels": 2, "compressor_kernel_size": 1},
    "three-channels-own-compressors": {"num_value_channels": 3, "share_compressor": False},
    "eight-channels": {"num_value_channels": 8},
    "linear-value-of-context": {"value_activation": None, "value_input": "context", "value_bias": False},
    "constant-value": {"value_activation": "constant"},
    "scalar-linear-value": {"num_value_channels": 1, "value_activation": None},
    "write-only": {"residual_type": "write_only"},
    "scalar-write-only": {"residual_type": "write_only", "num_value_channels": 1},
    "expanded-additive": {"residual_type": "expanded_additive", "num_hidden_layers": 3},
    "anchored": {"value_anchor": 0.5, "num_hidden_layers": 3},
    "scalar-anchored": {"num_value_channels": 1, "value_anchor": 1.0},
    "token": {"compressor": "token", "num_hidden_layers": 3},
    "token-without-ec": TWO_TOKENS | {"share_compressor": False, "embedding_conv": False},
    "token-linear-value-of-context": TWO_TOKENS | {"value_activation": None, "value_input": "context"},
    "token-constant-write": TWO_TOKENS | {"residual_type": "write_only", "value_activation": "constant"},
    "token-expanded-additive": TWO_TOKENS | {"residual_type": "expanded_additive"},
    "token-anchored": TWO_TOKENS | {"value_anchor": 0.5},
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")


def run(model, tokens, monkeypatch, kernels, **kwargs):
    """Logits and gradients, all parameters' and the input embeddings', of a loss with random cotangents."""
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", kernels)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False, **kwargs).logits
    if "attention_mask" in kwargs:
        logits = logits[kwargs["attention_mask"].bool()]
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(logits.shape, generator=generator).to(logits)
    model.zero_grad()
    (logits * cotangent).sum().backward()
    results = {"logits": [logits], "embeddings": [embeddings.grad]}
    # The same parameter of all layers and sublayers together: the gradient of a single bias can be a sum that cancels
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = re.sub(r"layers\.\d+\.|attn_|mlp_(?=residual|compressor)", "", name)
            results.setdefault(kind, []).append(parameter.grad)
    return {kind: torch.cat([value.detach().flatten() for value in values]) for kind, values in results.items()}


def run_and_count(model, *args, **kwargs):
    """As `run`, of a model that is not compiled; kernels must have stood in for all that they can, or nothing."""
    with (
        patch("transformers_ddl.modeling_ddl.fused_boundary", wraps=ops_ddl.fused_boundary) as boundary,
        patch("transformers_ddl.modeling_ddl.fused_expansion", wraps=ops_ddl.fused_expansion) as expansion,
    ):
        results = run(model, *args, **kwargs)
    _, _, kernels = args
    num_boundaries, num_expansions = 2 * model.config.num_hidden_layers + 1, int(bool(model.config.embedding_conv))
    expected = (num_boundaries, num_expansions) if kernels == "1" else (0, 0)
    assert (boundary.call_count, expansion.call_count) == expected
    return results


def hand_out_contexts(monkeypatch):
    """Gives each map that reads a context one of its own, as in compiled training."""
    monkeypatch.setattr(modeling_ddl, "count_readers", lambda layer: 1 if layer is None else layer.forward.num_readers)


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_model_with_kernels_is_as_exact_as_without(options, dtype, monkeypatch):
    """
    Against the float64 model, the kernels' error in outputs and gradients is at most twice that of the PyTorch path
    in the same dtype; the floor covers sums that come out exact by chance in one of them.
    """
    hand_out_contexts(monkeypatch)
    results = {"exact": {}, "plain": {}, "fused": {}}
    # A single draw of weights can make much of one rounding
    for seed in range(5 if DEVICE == "cuda" else 1):
        torch.manual_seed(seed)
        config = tiny_config(**{"num_hidden_layers": 1, **options})
        model = randomise(DDLForCausalLM(config), seed).to(DEVICE)
        tokens = torch.randint(0, config.vocab_size, (1, 4), device=DEVICE)
        for path, kernels, its_dtype in (("exact", "0", torch.float64), ("plain", "0", dtype), ("fused", "1", dtype)):
            values = run_and_count(copy.deepcopy(model).to(its_dtype), tokens, monkeypatch, kernels)
            for name, value in values.items():
                results[path].setdefault(name, []).append(value)
    exact, plain, fused = (
        {name: torch.cat(values) for name, values in values_of.items()} for values_of in results.values()
    )
    assert fused.keys() == plain.keys() == exact.keys()
    floor = 30 * torch.finfo(dtype).eps
    for name, reference in exact.items():
        error, plain_error = relative_error(fused[name], reference), relative_error(plain[name], reference)
        assert error <= 2 * plain_error + floor, f"{name}: {error:.2e}, without kernels {plain_error:.2e}"


LAYOUTS = {
    "left-padding": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])},
    "padding-anywhere": {"attention_mask": torch.tensor([[0, 1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1, 0]])},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1], [0, 0, 1, 0, 1, 2, 3]])},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@layouts
def test_token_convolutions_of_padded_and_packed_batches(layout, monkeypatch):
    torch.manual_seed(0)
    model = randomise(DDLForCausalLM(tiny_config(**TWO_TOKENS))).to(DEVICE)
    tokens = torch.randint(0, model.config.vocab_size, (2, 7), device=DEVICE)
    layout = {name: value.to(DEVICE) for name, value in layout.items()}
    exact = run_and_count(copy.deepcopy(model).double(), tokens, monkeypatch, "0", **layout)
    plain = run_and_count(model, tokens, monkeypatch, "0", **layout)
    fused = run_and_count(model, tokens, monkeypatch, "1", **layout)
    floor = 30 * torch.finfo(torch.float32).eps
    for name, reference in exact.items():
        error, plain_error = relative_error(fused[name], reference), relative_error(plain[name], reference)
        assert error <= 2 * plain_error + floor, f"{name}: {error:.2e}, without kernels {plain_error:.2e}"


def test_what_padding_holds_does_not_matter():
    """Not even to gradients, where it is infinite: it is left out, not multiplied by zeros."""
    from transformers_ddl.ops_ddl import walk
    from transformers_ddl.ops_triton_conv_ddl import convolution_op

    torch.manual_seed(0)
    mask = LAYOUTS["padding-anywhere"]["attention_mask"].bool().to(DEVICE)
    state, cotangent = torch.randn(2, 7, 3, 20, device=DEVICE), torch.randn(14, 20, device=DEVICE)
    mixing = torch.randn(4, 3, 20, device=DEVICE, requires_grad=True)
    results = []
    for padding in (0.0, float("inf")):
        state[~mask] = padding
        flat = state.flatten(0, 1)
        _, hidden, *_ = convolution_op(flat, *[None] * 5, mixing, *walk(mask, None), flat, [], 7, 1e-5, True, True)
        results.append((hidden, *torch.autograd.grad(hidden, mixing, cotangent)))
    for value, expected in zip(*results):
        assert expected.isfinite().all() and torch.equal(value, expected)


def convolution(state, direction, target, gate, kernel_size, layout, dtype):
    """The write and the token convolution after it, and gradients, of the kernels or, in float64, of PyTorch."""
    from transformers_ddl.ops_ddl import walk
    from transformers_ddl.ops_triton_conv_ddl import convolution_op

    seq_length, n, d = state.shape[1:]
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(*shape, generator=generator) for shape in ((n, d, kernel_size), (n,))]
    inputs = [tensor.to(DEVICE, dtype) for tensor in (state, direction)]
    inputs += [tensor.to(DEVICE, torch.promote_types(dtype, torch.float32)) for tensor in (target, gate, *maps)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    layout = {name: tensor.to(DEVICE) for name, tensor in layout.items()}
    config = tiny_config(num_value_channels=n, hidden_size=d, compressor="token", compressor_kernel_size=kernel_size)
    compressor = DDLTokenCompressor(config)
    del compressor.weight, compressor.read
    *write, compressor.weight, compressor.read = inputs
    if dtype == torch.float64:
        new_state = delta_rewrite(*write, key_eps=1e-5)
        hidden = compressor(new_state, layer_idx=0, state_idx=0, **layout)
    else:
        flat = [tensor.flatten(0, 1) for tensor in write]
        positions = walk(layout.get("conv_mask"), layout.get("document_ids"))
        new_state, hidden, *_ = convolution_op(
            *flat, None, None, compressor.mixing(), *positions, flat[0].detach(), [], seq_length, 1e-5, True, True
        )
        new_state, hidden = new_state.view_as(state), hidden.view_as(direction)
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(output.shape, generator=generator).to(output) for output in (new_state, hidden)]
    return [new_state, hidden, *torch.autograd.grad((new_state, hidden), inputs, cotangents)]


CONVOLUTION_NAMES = ["state", "x"] + [f"∂{name}" for name in ["X", "k̃", "v", "β", "kernel", "read"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "seq_length", "n", "d", "kernel_size"),
    [(2, 11, 4, 20, 4), (1, 1, 2, 8, 3), (3, 2, 3, 130, 8), (2, 6, 8, 33, 1), (1, 5, 5, 300, 2)],
)
def test_convolution(batch, seq_length, n, d, kernel_size, dtype):
    torch.manual_seed(0)
    state, direction = torch.randn(batch, seq_length, n, d), torch.randn(batch, seq_length, d)
    target, gate = torch.randn(batch, seq_length, n), 2 * torch.rand(batch, seq_length)
    args = (state.to(dtype).float(), direction.to(dtype).float(), target, gate, kernel_size, {})
    # Roundings of outputs and gradients; ∂k̃ is rounded twice
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for name, value, reference in zip(
        CONVOLUTION_NAMES, convolution(*args, dtype), convolution(*args, torch.float64), strict=True
    ):
        assert relative_error(value, reference) < tolerance, name


@pytest.mark.parametrize(
    ("direction_scale", "gate_value"),
    [(1e4, 0.7), (1e-6, 0.7), (0.0, 0.7), (1.0, 0.0), (1.0, 2.0), (1.0, 1e-7)],
    ids=["huge-direction", "tiny-direction", "zero-direction", "gate-0", "gate-2", "gate-nearly-0"],
)
def test_convolution_at_extremes(direction_scale, gate_value):
    torch.manual_seed(0)
    layout = {"conv_mask": LAYOUTS["padding-anywhere"]["attention_mask"].bool()}
    state, direction = torch.randn(2, 7, 3, 33), direction_scale * torch.randn(2, 7, 33)
    args = (state, direction, torch.randn(2, 7, 3), torch.full((2, 7), gate_value), 4, layout)
    for name, value, reference in zip(
        CONVOLUTION_NAMES, convolution(*args, torch.float32), convolution(*args, torch.float64), strict=True
    ):
        assert value.isfinite().all(), name
        torch.testing.assert_close(
            value.double(), reference, rtol=1e-4, atol=1e-5 * reference.abs().max().clamp(min=1e-30).item(), msg=name
        )


def expansion(embeddings, n, kernel_size, layout, dtype):
    """The embedding convolution, and gradients, of the kernels or, in float64, of PyTorch."""
    from transformers_ddl.ops_ddl import fused_expansion

    generator = torch.Generator().manual_seed(2)
    d = embeddings.shape[-1]
    weight = torch.randn(n, d, kernel_size, generator=generator).to(DEVICE, torch.promote_types(dtype, torch.float32))
    inputs = [embeddings.to(DEVICE, dtype).requires_grad_(), weight.requires_grad_()]
    layout = {name: tensor.to(DEVICE) for name, tensor in layout.items()}
    convolution = DDLEmbeddingConvolution(tiny_config(num_value_channels=n, embedding_conv_kernel_size=kernel_size))
    del convolution.weight
    _, convolution.weight = inputs
    if dtype == torch.float64:
        state = convolution(inputs[0], layer_idx=0, state_idx=0, **layout)
    else:
        state = fused_expansion(inputs[0], convolution.mixing(), dtype, **layout)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(state.shape, generator=generator).to(state)
    return [state, *torch.autograd.grad(state, inputs, cotangent)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "seq_length", "n", "d", "kernel_size"),
    [(2, 31, 4, 20, 4), (1, 1, 2, 8, 3), (3, 2, 3, 130, 8), (2, 6, 8, 33, 1), (1, 5, 5, 300, 2)],
)
def test_expansion(batch, seq_length, n, d, kernel_size, dtype):
    torch.manual_seed(0)
    args = (torch.randn(batch, seq_length, d).to(dtype).float(), n, kernel_size, {})
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    for name, value, reference in zip(
        ("state", "∂e", "∂kernel"), expansion(*args, dtype), expansion(*args, torch.float64), strict=True
    ):
        assert relative_error(value, reference) < tolerance, name


@layouts
def test_expansion_of_padded_and_packed_batches(layout):
    """Whatever padding holds: it is left out, not multiplied by zeros."""
    torch.manual_seed(0)
    embeddings = torch.randn(2, 7, 33)
    if "attention_mask" in layout:
        layout = {"conv_mask": layout["attention_mask"].bool()}
        unreadable = embeddings.masked_fill(~layout["conv_mask"].unsqueeze(-1), float("inf"))
    else:
        layout, unreadable = {"document_ids": find_packed_sequence_indices(layout["position_ids"])}, embeddings
    exact = expansion(embeddings, 3, 4, layout, torch.float64)
    for value, reference in zip(expansion(unreadable, 3, 4, layout, torch.float32), exact, strict=True):
        assert relative_error(value, reference) < 1e-6


def test_autocast_expands_to_its_own_dtype():
    """The state is rounded once, and embeddings get their gradient in float32."""
    from transformers_ddl.ops_ddl import fused_expansion

    convolution = DDLEmbeddingConvolution(tiny_config())
    torch.nn.init.normal_(convolution.to(DEVICE).weight)
    embeddings = torch.randn(2, 5, 20, device=DEVICE, requires_grad=True)
    state = fused_expansion(embeddings, convolution.mixing(), torch.bfloat16)
    assert torch.equal(state, fused_expansion(embeddings, convolution.mixing(), torch.float32).bfloat16())
    (gradient,) = torch.autograd.grad(state.float().square().sum(), embeddings)
    assert gradient.dtype == torch.float32 and gradient.all()


def test_empty_batch_of_expansions():
    state, *gradients = expansion(torch.randn(0, 4, 16), 3, 4, {}, torch.float32)
    assert state.shape == (0, 4, 3, 16) and gradients[0].shape == (0, 4, 16) and not gradients[1].any()


def boundary(state, direction, target, gate, dtype):
    """A boundary of one channel per feature mixing, and its gradients, of the kernel or, in float64, of PyTorch."""
    from transformers_ddl.ops_triton_ddl import VALUE_ACTIVATIONS, boundary_op

    n, d = state.shape[1:]
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(*shape, generator=generator) for shape in ((n, d), (d,), (n, d), (n,), (d,), (1,))]
    inputs = [tensor.to(DEVICE, dtype) for tensor in (state, direction)]
    inputs += [tensor.to(DEVICE, torch.promote_types(dtype, torch.float32)) for tensor in (target, gate, *maps)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    state, direction, target, gate, mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias = inputs
    if dtype == torch.float64:
        new_state = delta_rewrite(state, direction, target, gate, key_eps=1e-5)
        hidden = (new_state * mixing).sum(1)
        context = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5) * norm_weight
        new_target = 4 * torch.sigmoid(hidden @ value_weight.T + value_bias)
        new_gate = 2 * torch.sigmoid(context @ gate_weight + gate_bias)
        outputs = [new_state, context, new_target, new_gate]
    else:
        options = (1e-5, 1e-5, n, 4.0, VALUE_ACTIVATIONS["sigmoid"], False, True, True, 1)
        outputs = boundary_op(*inputs[:4], None, None, *inputs[4:], state, [], *options)[:4]
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, inputs, cotangents)
    return [*outputs, *gradients]


NAMES = ["state", "context", "target", "gate"] + [
    f"∂{name}" for name in ["X", "k̃", "v", "β", "C", "norm", "W_v", "b_v", "w_β", "b_β"]
]


@pytest.mark.parametrize(
    ("direction_scale", "gate_value"),
    [(1.0, 0.7), (1e4, 0.7), (1e-6, 0.7), (0.0, 0.7), (1.0, 0.0), (1.0, 2.0), (1.0, 1e-7)],
    ids=["ordinary", "huge-direction", "tiny-direction", "zero-direction", "gate-0", "gate-2", "gate-nearly-0"],
)
@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 4, 33), (3, 3, 130), (129, 1, 8), (129, 2, 8)], ids=str)
def test_boundary_at_extremes(shape, direction_scale, gate_value):
    torch.manual_seed(0)
    tokens, n, d = shape
    args = (
        torch.randn(shape),
        direction_scale * torch.randn(tokens, d),
        torch.randn(tokens, n),
        torch.full((tokens,), gate_value),
    )
    for name, value, reference in zip(NAMES, boundary(*args, torch.float32), boundary(*args, torch.float64)):
        assert value.isfinite().all(), name
        torch.testing.assert_close(
            value.double(), reference, rtol=1e-4, atol=1e-5 * reference.abs().max().clamp(min=1e-30).item(), msg=name
        )


@pytest.mark.parametrize("num_programs", [1, 4, 12])
def test_programs_share_tokens(num_programs, monkeypatch):
    """Some have fewer than others or, of four for nine tokens, none; each adds to the gradients of the parameters."""
    monkeypatch.setattr("transformers_ddl.ops_triton_ddl.resident_programs", lambda *args, **sizes: num_programs)
    torch.manual_seed(3)  # of 0, ∂b_β is a sum that nearly cancels
    args = torch.randn(9, 2, 7), torch.randn(9, 7), torch.randn(9, 2), torch.rand(9)
    for name, value, reference in zip(
        NAMES, boundary(*args, torch.float32), boundary(*args, torch.float64), strict=True
    ):
        assert relative_error(value, reference) < 1e-5, name


def test_empty_batch_of_convolutions():
    args = (torch.randn(0, 4, 3, 16), torch.randn(0, 4, 16), torch.randn(0, 4, 3), torch.randn(0, 4), 4, {})
    for name, value in zip(CONVOLUTION_NAMES, convolution(*args, torch.float32), strict=True):
        assert value.isfinite().all() and not value.any(), name


def test_empty_batch():
    outputs = boundary(torch.randn(0, 4, 16), torch.randn(0, 16), torch.randn(0, 4), torch.randn(0), torch.float32)
    for name, value in zip(NAMES, outputs):
        assert value.isfinite().all() and not value.any(), name


def test_operator_registrations():
    """Schema, fake tensors and autograd registration agree with what the operator does (`torch.library.opcheck`)."""
    from transformers_ddl.ops_ddl import walk
    from transformers_ddl.ops_triton_conv_ddl import convolution_op, expansion_op
    from transformers_ddl.ops_triton_ddl import boundary_op, rebuild_op

    torch.manual_seed(0)
    state = torch.randn(3, 2, 16, device=DEVICE, requires_grad=True)
    per_token = [torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((3, 16), (3, 2), (3,))]
    maps = [torch.randn(*shape, device=DEVICE) for shape in ((2, 16), (16,), (2, 16), (2,), (16,), (1,))]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for num_readers in (1, 3):
        options = (1e-5, 1e-5, 2, 4.0, 1, False, True, True, num_readers)
        args = (state, *per_token, None, None, *maps, state.detach(), [], *options)
        torch.library.opcheck(boundary_op.custom_op, args, test_utils=checks)
    direction, write = (tensor.detach() for tensor in per_token[:2])
    torch.library.opcheck(rebuild_op.custom_op, (state.detach(), [direction, write]), test_utils=checks[:2])

    mixing = torch.randn(4, 2, 16, device=DEVICE, requires_grad=True)
    for positions in ((None, None), walk(None, torch.tensor([[0, 1, 1]], device=DEVICE))):
        args = (state, *per_token, None, None, mixing, *positions, state.detach(), [], 3, 1e-5, True, True)
        torch.library.opcheck(convolution_op.custom_op, args, test_utils=checks)
        args = (per_token[0], mixing, *positions, 3, torch.bfloat16)
        torch.library.opcheck(expansion_op.custom_op, args, test_utils=checks)


class Operators(TorchDispatchMode):
    """Writes down what it sees, of which a kernel launched by Python is none."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"num_value_channels": 1}, {"num_value_channels": 2}, TWO_TOKENS], ids=str)
def test_eager_execution_and_operators(options, monkeypatch):
    """Eager execution takes a short cut past the operators that modes of dispatch see: with the same results and gradients."""
    torch.manual_seed(0)
    model = randomise(DDLForCausalLM(tiny_config(**options))).to(DEVICE).train()
    tokens = torch.randint(0, model.config.vocab_size, (2, 3), device=DEVICE)
    with Operators() as operators:
        expected = run(model, tokens, monkeypatch, "1")
    num_boundaries = 2 * model.config.num_hidden_layers + 1
    counts = {"boundary": num_boundaries, "expansion": int(bool(model.config.embedding_conv))}
    counts["convolution"] = num_boundaries if model.config.compressor == "token" else 0
    for name, count in counts.items():
        assert operators.names.count(f"transformers_ddl::{name}") == count, name
        assert operators.names.count(f"transformers_ddl::{name}_backward") == count, name

    def refuse(*args):
        raise AssertionError("an operator where there need be none")

    for module in (ops_triton_ddl, ops_triton_conv_ddl):
        for operation in (value for value in vars(module).values() if isinstance(value, ops_triton_ddl.Operation)):
            monkeypatch.setattr(operation, "custom_op", refuse)
    for name, actual in run(model, tokens, monkeypatch, "1").items():
        assert torch.equal(actual, expected[name]), name


def test_tracers_and_fake_tensors_see_operators():
    model = randomise(DDLForCausalLM(tiny_config())).to(DEVICE)
    tokens = torch.randint(0, model.config.vocab_size, (2, 2, 3), device=DEVICE)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens, use_cache=False).logits

    traced, file = torch.jit.trace(Logits(), tokens[0], check_trace=False), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert "transformers_ddl::boundary" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(tokens[1]), Logits()(tokens[1]))
    mode = FakeTensorMode()
    embeddings, mixing = (
        mode.from_tensor(torch.zeros(shape, device=DEVICE, requires_grad=True)) for shape in ((3, 8), (4, 2, 8))
    )
    assert ops_triton_conv_ddl.expansion_op(embeddings, mixing, None, None, 3, torch.float32).shape == (3, 2, 8)


def test_second_derivatives_are_refused():
    model = randomise(DDLForCausalLM(tiny_config())).to(DEVICE)
    tokens = torch.randint(0, model.config.vocab_size, (2, 3), device=DEVICE)
    weight = model.model.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(model(tokens, labels=tokens).loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="boundary_backward"):
        torch.autograd.grad(gradient.sum(), weight)


@pytest.mark.parametrize("options", [{"num_value_channels": 1}, {"num_value_channels": 2}, TWO_TOKENS], ids=str)
def test_compiled_training(options, monkeypatch):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = randomise(DDLForCausalLM(tiny_config(**options))).to(DEVICE).train()
    tokens = torch.randint(0, model.config.vocab_size, (2, 3), device=DEVICE)
    expected = run(model, tokens, monkeypatch, "1")
    operations, detached = [], []

    def backend(program, inputs):
        nodes = list(program.graph.nodes)
        operations.extend(str(node.target) for node in nodes if node.op == "call_function")
        # Wherever DDP cuts the program, no tensor goes on both with its gradient and detached
        for i, node in enumerate(nodes):
            if node.target == "detach":
                detached.append(node)
                assert set(node.args[0].users).isdisjoint(nodes[i + 1 :])
        return aot_eager(program, inputs)

    model.compile(fullgraph=True, backend=backend)
    for value, reference in zip(run(model, tokens, monkeypatch, "1").values(), expected.values(), strict=True):
        assert relative_error(value, reference) < 1e-5
    assert detached
    boundaries = 2 * model.config.num_hidden_layers + 1
    assert sum("boundary" in operation for operation in operations) == boundaries
    assert sum("expansion" in operation for operation in operations) == int(bool(model.config.embedding_conv))


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"num_value_channels": 2}, "transformers"),
        ({"num_value_channels": 2}, CheckpointImpl.REENTRANT),
        ({"num_value_channels": 2}, CheckpointImpl.NO_REENTRANT),
        (TWO_TOKENS, "transformers"),
    ],
    ids=["channel-transformers", "channel-reentrant", "channel-not-reentrant", "token-transformers"],
)
def test_checkpointing_with_kernels(options, how, monkeypatch):
    """A layer that runs again in the backward pass must rebuild the same states, whoever checkpoints it."""
    torch.manual_seed(0)
    model = randomise(DDLForCausalLM(tiny_config(num_hidden_layers=3, **options))).to(DEVICE).train()
    tokens = torch.randint(0, model.config.vocab_size, (1, 4), device=DEVICE)
    plain = run(model, tokens, monkeypatch, "1")
    if how == "transformers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=how)
    checkpointed = run(model, tokens, monkeypatch, "1")
    # States are rebuilt from other snapshots, so that they differ by rounding
    for value, expected in zip(checkpointed.values(), plain.values(), strict=True):
        assert relative_error(value, expected) < 1e-5


def test_only_a_backward_pass_holds_earlier_states():
    """Neither inference nor what checkpoints store, which is all that goes into a layer."""
    model = randomise(DDLForCausalLM(tiny_config())).to(DEVICE).train()
    tokens = torch.randint(0, model.config.vocab_size, (1, 4), device=DEVICE)
    histories = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, outputs: histories.append(outputs[2]))
    model(tokens)
    assert all(histories)
    histories.clear()
    with torch.no_grad():
        model(tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(tokens)
    assert histories == 2 * model.config.num_hidden_layers * [()]


@pytest.mark.parametrize(
    ("options", "num_replays"),
    [
        ({"num_value_channels": 2}, 0),
        ({"num_value_channels": 2}, 8),
        ({"num_value_channels": 1}, 3),
        ({"num_value_channels": 1, "value_anchor": 0.5}, 3),
        (TWO_TOKENS, 4),
    ],
    ids=["none", "channel", "scalar", "scalar-anchored", "token"],
)
def test_number_of_writes_that_are_replayed(options, num_replays, monkeypatch):
    torch.manual_seed(0)
    model = randomise(DDLForCausalLM(tiny_config(num_hidden_layers=3, **options))).to(DEVICE).train()
    tokens = torch.randint(0, model.config.vocab_size, (1, 3), device=DEVICE)
    expected = run(model, tokens, monkeypatch, "1")
    lengths = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, outputs: lengths.append(len(outputs[2])))
    monkeypatch.setattr(ops_ddl, "NUM_REPLAYS", num_replays)
    for name, value in run(model, tokens, monkeypatch, "1").items():
        assert relative_error(value, expected[name]) < 1e-5, name
    # A snapshot, then direction and weights of each write; a layer makes the first of its two
    assert lengths == [1 + 2 * ((2 * i) % (num_replays + 1) + 1) for i in range(3)]


def test_states_that_are_rebuilt_drift_little():
    """
    Over 48 sublayers in bfloat16, each state is that of the last snapshot with up to three writes since replayed on it. Those which
    other states are rebuilt from are rebuilt to the last bit.
    """
    from transformers_ddl.ops_triton_ddl import boundary_op, rebuild_op

    torch.manual_seed(0)
    tokens, n, d = (4096, 4, 1024) if DEVICE == "cuda" else (2, 4, 32)
    state = torch.randn(tokens, 1, d, device=DEVICE, dtype=torch.bfloat16).expand(-1, n, -1).contiguous()
    maps = [torch.rand(*shape, device=DEVICE) for shape in ((n, d), (d,), (n, d), (n,), (d,), (1,))]
    drifts, snapshot, replays = [], state, []
    for sublayer in range(48):
        if sublayer % 4 == 0:
            assert torch.equal(rebuild_op(snapshot, replays), state)
            snapshot, rebuilt, replays = state, state.float(), []
        drifts.append(relative_error(rebuilt, state.float()))
        direction = torch.randn(tokens, d, device=DEVICE, dtype=torch.bfloat16)
        target, gate = 4 * torch.rand(tokens, n, device=DEVICE), 2 * torch.rand(tokens, device=DEVICE)
        args = (
            state,
            direction,
            target,
            gate,
            None,
            None,
            *maps,
            snapshot,
            [],
            1e-5,
            1e-5,
            n,
            4.0,
            1,
            False,
            True,
            True,
            1,
        )
        state, _, _, _, _, write, *_ = boundary_op(*args)
        rebuilt = rebuilt + write.unsqueeze(-1) * direction.float().unsqueeze(-2)
        replays += [direction, write]
    assert 0 < max(drifts) < 1e-2


def test_compiled_programs_rebuild_each_state_once(monkeypatch):
    """The two boundaries with more than three writes since the only state that is stored share one."""
    torch.compiler.reset()
    monkeypatch.setattr(ops_ddl, "NUM_REPLAYS", 6)
    model = tiny_model("scalar", num_hidden_layers=3).to(DEVICE).train()
    tokens, kernels, resident_programs = random_tokens(1, 4).to(DEVICE), [], ops_triton_ddl.resident_programs

    def record(kernel, *args, **options):
        kernels.append(kernel)
        return resident_programs(kernel, *args, **options)

    def gradients(step):
        kernels.clear()
        model.zero_grad()
        step(tokens, labels=tokens, use_cache=False).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    monkeypatch.setattr(ops_triton_ddl, "resident_programs", record)
    expected = gradients(model)
    assert kernels.count(ops_triton_ddl.rebuild_kernel) == 2
    assert relative_error(gradients(torch.compile(model, fullgraph=True)), expected) < 1e-5
    ways = [kernel.__name__.split("_")[-2] for kernel in kernels]
    assert ways == 7 * ["forward"] + ["rebuild"] + 7 * ["backward"], "not in the forward pass, which would store it"


def test_environment_variable_turns_kernels_off(monkeypatch):
    from transformers_ddl.ops_ddl import can_fuse

    model = DDLForCausalLM(tiny_config()).model.to(DEVICE)
    state, modules = torch.zeros(1, 1, 3, 20, device=DEVICE), (model.readout, model.norm, None)
    assert can_fuse(model.config, state, *modules)
    assert not can_fuse(model.config, state.double(), *modules)
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "0")
    assert not can_fuse(model.config, state, *modules)
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "off")
    with pytest.raises(ValueError, match="TRANSFORMERS_DDL_KERNELS must be 0, 1 or auto, got 'off'"):
        can_fuse(model.config, state, *modules)


def test_token_convolutions_with_past_inputs_need_the_pytorch_path():
    from transformers_ddl.ops_ddl import can_fuse, can_fuse_expansion

    model = DDLForCausalLM(tiny_config(compressor="token")).model.to(DEVICE)
    state, modules = torch.zeros(1, 1, 3, 20, device=DEVICE), (model.readout, model.norm, None)
    assert can_fuse(model.config, state, *modules)
    cache = DynamicCache(config=model.config)
    assert not can_fuse(model.config, state, *modules, cache)
    embeddings = torch.zeros(1, 1, 20, device=DEVICE)
    assert can_fuse_expansion(model.config, embeddings, model.embedding_conv)
    assert not can_fuse_expansion(model.config, embeddings, model.embedding_conv, cache)


HOOKS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]
CHANGES = ["value_proj", "residual", "norm", "compressor", "offload", "quantise", *HOOKS]


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_wrapped_offloaded_or_watched_are_not_bypassed(change):
    """An adapter must take part in the forward pass, offloaded weights must be fetched, and hooks called."""
    from transformers_ddl.ops_ddl import can_fuse

    layer = DDLForCausalLM(tiny_config()).model.layers[0].to(DEVICE)
    modules = {"compressor": layer.compressor, "norm": layer.input_layernorm, "residual": layer.attn_residual}
    state = torch.zeros(1, 1, 3, 20, device=DEVICE)
    assert can_fuse(layer.config, state, *modules.values())
    if change == "value_proj":
        layer.attn_residual.value_proj = torch.nn.Sequential(layer.attn_residual.value_proj)
    elif change == "offload":
        layer.compressor.to("meta")
    elif change == "quantise":
        linear = layer.attn_residual.value_proj
        linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(type("Quantised", (torch.Tensor,), {})))
        assert type(linear) is torch.nn.Linear
    elif change.endswith("hook"):
        for module in (*modules.values(), layer.attn_residual.beta_proj):
            with getattr(module, f"register_{change}")(lambda *args: None):
                assert not can_fuse(layer.config, state, *modules.values())
        assert can_fuse(layer.config, state, *modules.values())
        return
    else:
        modules[change] = torch.nn.Sequential(modules[change])
    assert not can_fuse(layer.config, state, *modules.values())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sharded_weights_are_gathered(tied, tmp_path, monkeypatch):
    """By FSDP2 in the groups that accelerate makes, of which the last has the norm before the head: by hooks of what is called first."""
    model = tiny_model("cc", tie_word_embeddings=tied, num_hidden_layers=1).to(DEVICE).train()
    tokens = random_tokens(1, 4).to(DEVICE)
    fused_boundary = Mock(wraps=ops_ddl.fused_boundary)
    monkeypatch.setattr("transformers_ddl.modeling_ddl.fused_boundary", fused_boundary)

    def loss_and_gradients():
        loss = model(tokens, labels=tokens, use_cache=False, skip_logits=True).loss  # as `DDLTrainer`
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return loss, gradients

    expected_loss, expected = loss_and_gradients()
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh(DEVICE, (1,))
        embeddings = model.get_input_embeddings()
        for module in [*model.model.layers, *([] if tied else [embeddings])]:
            fully_shard(module, mesh=mesh)
        fully_shard([model.model.norm, *([embeddings] if tied else []), model.lm_head], mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss, gradients = loss_and_gradients()
        assert fused_boundary.call_count == 3 + 2, "with weights that are not sharded, the readout's too"
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name].to_local(), gradient, rtol=1e-4, atol=1e-6, msg=name)
    finally:
        torch.distributed.destroy_process_group()


def test_programs_that_ddp_cuts(tmp_path, monkeypatch):
    """DDP has one program compiled for each bucket of gradients; states, snapshots and writes go from one to the next."""
    torch.compiler.reset()
    monkeypatch.setattr(ops_ddl, "NUM_REPLAYS", 0)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    model = tiny_model("cc", num_hidden_layers=1).to(DEVICE).train()
    tokens = random_tokens(1, 4).to(DEVICE)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    programs = []

    def backend(program, inputs):
        programs.append(program)
        return compile_fx(program, inputs)

    backend_of_ddp = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend_of_ddp, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        replicated = torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.01), backend=backend)
        replicated(tokens, labels=tokens, use_cache=False).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(programs) > 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("variant", "compiled"),
    [("scalar", False), ("cc", False), ("tc", False), ("scalar", True)],
    ids=["scalar", "cc", "tc", "scalar-compiled"],
)
def test_gradients_of_contexts_are_added_up_by_the_backward_kernel(variant, compiled, monkeypatch):
    """Each map that reads a context gives the kernel a gradient."""
    torch.compiler.reset()
    counters.clear()
    model, tokens = tiny_model(variant, num_hidden_layers=1).to(DEVICE).train(), random_tokens(1, 4).to(DEVICE)
    num_readers, resident_programs = [], ops_triton_ddl.resident_programs

    def record(kernel, *args, **options):
        if kernel is ops_triton_ddl.boundary_backward_kernel:
            num_readers.append(options["NUM_READERS"])
        return resident_programs(kernel, *args, **options)

    def gradients(kernels="1"):
        monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", kernels)
        num_readers.clear()
        model.zero_grad()
        step = torch.compile(model, fullgraph=True) if compiled else model
        step(tokens, labels=tokens, use_cache=False).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    monkeypatch.setattr(ops_triton_ddl, "resident_programs", record)
    expected = gradients(kernels="0")
    assert not num_readers
    if not compiled:
        hand_out_contexts(monkeypatch)
    readout, mlp, attention = 1, 2, 3
    assert relative_error(gradients(), expected) < 1e-5 and num_readers == [readout, mlp, attention]
    if compiled:
        stored = counters["aot_autograd"]["autograd_cache_miss"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert stored == 2, "torch keeps the programs with kernels and without for the next process"


def test_only_our_forwards_are_given_several_inputs(monkeypatch):
    layer = tiny_model("cc").model.layers[0]
    assert ops_ddl.count_readers(layer.mlp) == 1, "uncompiled"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [ops_ddl.count_readers(module) for module in (layer.self_attn, layer.mlp, None)] == [3, 2, 1]
    with torch.no_grad():
        assert ops_ddl.count_readers(layer.mlp) == 1
    handle = layer.self_attn.register_forward_pre_hook(lambda *args: None)
    assert ops_ddl.count_readers(layer.self_attn) == 1
    handle.remove()
    assert ops_ddl.count_readers(layer.self_attn) == 3
    for forward in (LlamaMLP.forward, functools.wraps(DDLMLP.forward)(lambda mlp, x: LlamaMLP.forward(mlp, x))):
        layer.mlp.forward = forward.__get__(layer.mlp)  # as Liger does
        assert ops_ddl.count_readers(layer.mlp) == 1


@pytest.mark.parametrize("name", ["norm", "layers.0.input_layernorm", "layers.0.compressor", "layers.0.mlp_residual"])
def test_other_classes_are_not_bypassed(name, monkeypatch):
    """What a class of the user's does in the place of ours is done with kernels, too."""
    model, tokens = tiny_model("cc").to(DEVICE), random_tokens(1, 4).to(DEVICE)
    module = model.model.get_submodule(name)
    unchanged = model(tokens).logits

    def forward(self, *args, **kwargs):
        outputs = super(type(self), self).forward(*args, **kwargs)
        return tuple(0.5 * output for output in outputs) if isinstance(outputs, tuple) else 0.5 * outputs

    module.__class__ = type("Halved", (type(module),), {"forward": forward})
    logits = model(tokens).logits
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "0")
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (logits - unchanged).abs().max() > 1e-2


def test_hidden_states_need_the_pytorch_path(monkeypatch):
    torch.manual_seed(0)
    model = randomise(DDLForCausalLM(tiny_config())).to(DEVICE).eval()
    tokens = torch.randint(0, model.config.vocab_size, (1, 4), device=DEVICE)
    with torch.no_grad():
        outputs = model(tokens, output_hidden_states=True)
        torch.testing.assert_close(outputs.logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize("variant", ["scalar", "cc"])
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_decoding_takes_one_kernel_per_boundary(variant, cache_implementation, monkeypatch):
    """Of single tokens with a cache too: the two of each layer and the readout, and what they give is what PyTorch does."""
    from transformers_ddl import ops_triton_ddl

    launches = []
    boundary_op = ops_triton_ddl.boundary_op

    def count_launches(state, *args):
        launches.append(state.shape[0])
        return boundary_op(state, *args)

    model, tokens = tiny_model(variant).to(DEVICE), random_tokens(2, 5).to(DEVICE)
    options = {"cache_implementation": cache_implementation} if cache_implementation == "static" else {}
    options |= {"max_new_tokens": 3, "do_sample": False, "disable_compile": True, "output_logits": True}
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "0")
    plain = model.generate(tokens, return_dict_in_generate=True, **options)
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")
    monkeypatch.setattr(ops_triton_ddl, "boundary_op", count_launches)
    fused = model.generate(tokens, return_dict_in_generate=True, **options)

    boundaries = 2 * model.config.num_hidden_layers + 1
    assert launches == boundaries * [2 * 5] + 2 * boundaries * [2]
    torch.testing.assert_close(fused.logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["scalar", "cc"])
@pytest.mark.parametrize("checked", [True, False], ids=["modules-checked", "modules-not-checked"])
def test_decoding_in_cuda_graphs(variant, checked, monkeypatch):
    """
    `generate` compiles single tokens with a static cache by itself, in mode "reduce-overhead", of which the option is the equivalent
    (docs/serving.md).
    """
    torch.compiler.reset()  # without the checks, the program of another model would be taken for this one's
    compile_config = CompileConfig(fullgraph=True)
    if not checked:
        skip_guards = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        compile_config.mode, compile_config.options = None, {"triton.cudagraphs": True, "guard_filter_fn": skip_guards}
    model, tokens = tiny_model(variant).cuda(), random_tokens(2, 5).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens, disable_compile=True, **options)
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")
    for _ in range(2):
        generated = model.generate(tokens, compile_config=compile_config, **options)
        assert torch.equal(generated, expected)
    assert hasattr(model, "_compiled_call"), "not compiled"


@pytest.mark.parametrize(
    ("num_warps", "programs"),
    [
        (2, {32: 32, 40: 24, 48: 20, 88: 10, 107: 8, 128: 8, 135: 6, 144: 6, 168: 6, 184: 4, 199: 4, 228: 4, 255: 4}),
        (4, {32: 16, 96: 5, 103: 4, 128: 4, 154: 3, 168: 3, 254: 2}),
        (8, {255: 1}),
        (16, {64: 2, 255: 1}),
    ],
)
def test_resident_programs(num_warps, programs):
    """The numbers of CUDA's occupancy calculator for sm_90; of programs that are too large for a GPU, one is tried."""
    from hopper import H200

    from transformers_ddl.ops_triton_ddl import programs_per_multiprocessor

    assert programs == {registers: programs_per_multiprocessor(registers, num_warps, H200) for registers in programs}


def test_kernels_for_hopper():
    """All programs of a kernel run at the same time, without spilling registers; boundaries ask for the next token."""
    from hopper import H200

    from transformers_ddl.ops_triton_ddl import programs_per_multiprocessor

    scalar = {"num_value_channels": 1, "hidden_size": 768, "num_hidden_layers": 3}
    options = [scalar, {"hidden_size": 768}, {"compressor": "token"}]
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("hopper.py"), json.dumps(options)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    launches = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    names = {launch["kernel"].removesuffix("_kernel") for launch in launches}
    assert {f"{name}_{way}" for name in ("boundary", "expansion") for way in ("forward", "backward")} < names
    assert {"convolution_forward", "convolution_backward_state", "convolution_backward_mixing"} < names
    for launch in launches:
        resident = H200.multi_processor_count * programs_per_multiprocessor(launch["registers"], launch["warps"], H200)
        is_full = 0.8 * resident < math.prod(launch["grid"]) <= resident
        assert launch["stack"] == 0 and (is_full or launch["num_tokens"] == 1), launch
        assert bool(launch["prefetches"]) != launch["kernel"].startswith("expansion"), launch
