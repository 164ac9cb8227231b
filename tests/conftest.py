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
"""Small models with random weights, shared by the tests."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several threads only wait for each other in models this small: one is ten times as fast. Read when torch is imported, by the
# processes that tests start too: other numbers of threads round otherwise
os.environ["OMP_NUM_THREADS"] = "1"
# On some CPUs, rounding would depend on where in memory a tensor begins, and a loaded model would differ from the saved one
os.environ["MKL_CBWR"] = "AUTO"

import pytest
import torch
from transformers.utils.import_utils import is_triton_available


# Triton's interpreter runs the kernels where there is no GPU; it is chosen when Triton is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if is_triton_available():
        from interpreter import accelerate_interpreter

        accelerate_interpreter()

from transformers_ddl import DDLConfig, DDLForCausalLM


# The models of the paper, separate compressors for the two sublayers of a layer, the controls of the specification.
# n = 3 and the other sizes below differ from each other, so that no two dimensions can be mistaken for one another.
VARIANTS = {
    "scalar": {"num_value_channels": 1},
    "cc": {"num_value_channels": 3},
    "cc-repeat": {"num_value_channels": 3, "embedding_conv": False},
    "tc": {"num_value_channels": 3, "compressor": "token"},
    "tc-repeat": {"num_value_channels": 3, "compressor": "token", "embedding_conv": False},
    "tc-separate": {"num_value_channels": 3, "compressor": "token", "share_compressor": False},
    "multi-step": {"num_value_channels": 3, "num_delta_steps": 2},
    "write-only": {"num_value_channels": 3, "residual_type": "write_only"},
    "additive": {"residual_type": "additive"},
    "expanded-additive": {"num_value_channels": 3, "residual_type": "expanded_additive"},
    "hc": {"num_value_channels": 3, "residual_type": "hyper_connections"},
    "mhc": {"num_value_channels": 3, "residual_type": "manifold_hyper_connections"},
}
CONV_VARIANTS = ["cc", "tc", "tc-repeat", "tc-separate", "multi-step", "write-only", "expanded-additive"]

TINY = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def seed():
    """What a test draws must not depend on the tests before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def tiny_config(variant: str = "cc", **overrides) -> DDLConfig:
    return DDLConfig(**{**TINY, **VARIANTS[variant], **overrides})


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """
    Draws every parameter at random. Initial values are special (unit kernels, zero biases, unit norms) and would hide
    exchanged taps, channels and layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / parameter.shape[-1] ** 0.5
        parameter.copy_(1 + values if "norm" in name else values)
    return model


def tiny_model(
    variant: str = "cc", model_class=DDLForCausalLM, dtype=torch.float32, attention: str = "sdpa", **overrides
) -> torch.nn.Module:
    """A model in evaluation mode with random weights."""
    config = tiny_config(variant, **overrides)
    config._attn_implementation = attention
    return randomise(model_class(config)).to(dtype).eval()


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error relative to the largest expected magnitude, which must not be 0; NaN where anything is NaN."""
    expected = expected.double()
    assert expected.abs().max() > 0, "nothing to compare"
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def all_gradients(output: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a scalar with respect to every parameter."""
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(output, parameters)))


def close(actual: torch.Tensor, expected: torch.Tensor):
    """For logits in fp32: they are of order 1, so that 1e-5 is some tens of roundings in fp32: enough for another order of summation."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def gradients_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """In fp32; gradients of parameters are sums over tokens that cancel in part."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-4, name
