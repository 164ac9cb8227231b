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
"""
What a configuration costs: parameters, floating-point operations (FLOPs) per token and memory for activations.

A multiplication and an addition count as one FLOP each. Matrix products are counted as PyTorch's `FlopCounterMode` does:
attention over the whole sequence, the causal mask notwithstanding. The rotary table, made once for a batch, is left out.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from .configuration_ddl import DDLConfig
from .modeling_ddl import DDLForCausalLM, DDLHyperConnection, DDLManifoldHyperConnection


# A part of the model: the names of the modules that belong to it
PARTS = {
    "embedding": {"embed_tokens"},
    "embedding_conv": {"embedding_conv"},
    "attention": {"self_attn"},
    "mlp": {"mlp"},
    "residual": {"attn_residual", "mlp_residual"},
    "compressors": {"compressor", "mlp_compressor", "readout"},
    "norms": {"input_layernorm", "post_attention_layernorm", "norm"},
    "head": {"lm_head"},
}


def part_of(name: str) -> str:
    """The part of the model that a parameter or module belongs to, by its name in [`DDLForCausalLM`]."""
    return next(part for part, modules in PARTS.items() if modules & set(name.split(".")))


def meta_model(config: DDLConfig) -> DDLForCausalLM:
    """The model without memory for its parameters, whatever its size."""
    with torch.device("meta"):
        return DDLForCausalLM(config)


def count_parameters(config: DDLConfig) -> dict[str, int]:
    """Number of parameters of each part of [`DDLForCausalLM`]; a tied head has none of its own."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in meta_model(config).named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def linear_maps(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Name and matrix of each linear map of a model, the head included, and how often a token goes through it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{name}.weight", module.weight, 1
        elif isinstance(module, DDLHyperConnection):
            yield f"{name}.dynamic", module.dynamic, module.static.shape[0]
        elif isinstance(module, DDLManifoldHyperConnection):
            yield f"{name}.fn", module.fn, 1


def forward_flops_per_token(config: DDLConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of the matrix products of each part for one token of a sequence of `sequence_length` tokens."""
    counts = dict.fromkeys(PARTS, 0)
    for name, matrix, times in linear_maps(meta_model(config)):
        counts[part_of(name)] += 2 * times * matrix.numel()
    counts["attention"] += attention_flops_per_pair(config) * sequence_length
    return counts


def attention_flops_per_pair(config: DDLConfig) -> int:
    """FLOPs for a token and each of its keys: of the score and of the weighted value, in all heads and layers."""
    return config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim


def training_flops_per_token(config: DDLConfig, sequence_length: int) -> int:
    """
    FLOPs of the matrix products of one training step, per token: the forward pass, and twice as much in the backward
    pass for the gradients of both factors. What is computed a second time, by flash attention or gradient checkpointing,
    is not counted.
    """
    return 3 * sum(forward_flops_per_token(config, sequence_length).values())


def training_flops(model: PreTrainedModel) -> Callable[[int], int]:
    """
    [`training_flops_per_token`] by the length of the sequence, of a model as it is, with its own head or with adapters: a
    matrix that is not trained has no gradient.
    """
    of_matrices = sum(
        (6 if matrix.requires_grad else 4) * times * matrix.numel() for _, matrix, times in linear_maps(model)
    )
    per_key = 3 * attention_flops_per_pair(model.config)
    return lambda sequence_length: of_matrices + per_key * sequence_length


def state_flops_per_token(config: DDLConfig) -> dict[str, int]:
    """
    Element-wise FLOPs of a forward pass on the residual state, for one token. No matrix products, they are no part of
    [`forward_flops_per_token`]; their cost is memory traffic. For n channels of width d, in every sublayer:

        write       delta: 2d + 2 for 1 / ‖k̃‖, d for k, 2nd for kᵀX, 2n for β (v − kᵀX), 2nd to add it to X (spec §2), for
                    each step; without erasing, 2nd + n less; additive: d, or 2nd if expanded; hyper-connections: 2n²d to
                    mix the streams and nd to write
        compressor  2nd, also of hyper-connections, times the number of taps if they are over tokens; nothing if n = 1

    and the readout's compressor and the embedding convolution, which takes 2nd per tap.
    """
    n, d, sublayers = config.num_value_channels, config.hidden_size, 2 * config.num_hidden_layers
    write = {
        "delta": config.num_delta_steps * (4 * n * d + 3 * d + 2 * n + 2),
        "write_only": config.num_delta_steps * (2 * n * d + 3 * d + n + 2),
        "additive": d,
        "expanded_additive": 2 * n * d,
        "hyper_connections": 2 * n * n * d + n * d,
        "manifold_hyper_connections": 2 * n * n * d + n * d,
    }[config.residual_type]
    taps = {None: 0, "channel": 1, "token": config.compressor_kernel_size}[config.compressor]
    return {
        "write": sublayers * write,
        "compressor": (sublayers + 1) * taps * 2 * n * d,
        "embedding_conv": 2 * n * d * config.embedding_conv_kernel_size if config.embedding_conv else 0,
    }


def activation_bytes(
    config: DDLConfig, sequence_length: int, dtype: torch.dtype | None = None, gradient_checkpointing: bool = False
) -> int:
    """
    Bytes that the forward pass and the loss of one sequence keep for the backward pass, parameters aside, under autocast to
    `dtype` if given. It is what eager PyTorch keeps: the fused kernels and `torch.compile` need less.
    """
    with FakeTensorMode():  # a forward pass without memory and without arithmetic
        model = DDLForCausalLM(config).train()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        kept = {}
        input_ids = torch.zeros(1, sequence_length, dtype=torch.long)
        with (
            saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.untyped_storage()._cdata, tensor), lambda x: x),
            nullcontext() if dtype is None else torch.autocast("cpu", dtype),
        ):
            loss = model(input_ids, labels=input_ids, use_cache=False).loss  # the graph keeps what is counted alive
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        total = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)
        del loss
    return total
