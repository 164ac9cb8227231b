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
"""Where the fused kernels of `ops_triton_ddl` stand in for the PyTorch definitions of `modeling_ddl`."""

import os

import torch
from torch import nn
from transformers.utils.import_utils import is_triton_available


if is_triton_available():
    from .ops_triton_ddl import MAX_VALUE_CHANNELS, VALUE_ACTIVATIONS, boundary_op


def can_fuse(state: torch.Tensor, residual: nn.Module | None) -> bool:
    """
    Whether the fused kernels can compute the boundary before a sublayer: with Triton, on a GPU, for a state
    `[batch, sequence, n, hidden_size]` in float32, bfloat16 or float16 and gate and value maps that are plain linear
    layers (not wrapped by an adapter, say). The environment variable `TRANSFORMERS_DDL_KERNELS` overrides the device:
    0 always takes the PyTorch path, 1 takes the kernels on a CPU too (Triton's interpreter).
    """
    kernels = os.environ.get("TRANSFORMERS_DDL_KERNELS", "auto")
    if kernels == "0" or not is_triton_available() or not (state.is_cuda or kernels == "1"):
        return False
    if state.dtype not in (torch.float32, torch.bfloat16, torch.float16) or state.shape[2] > MAX_VALUE_CHANNELS:
        return False
    if residual is None:
        return True
    linears = [module for name, module in residual.named_children() if name in ("beta_proj", "value_proj")]
    return residual.config.gate_hidden_size is None and all(type(module) is nn.Linear for module in linears)


def fused_boundary(
    state: torch.Tensor,
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    mixing: torch.Tensor | None,
    norm: nn.Module,
    residual: nn.Module | None,
    key_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    The boundary between two sublayers in one kernel: `delta_rewrite`, compression by `mixing` `[n, hidden_size]` (None for
    n = 1), RMSNorm and the heads of `residual` (None at the readout, which needs no new state either).

    Returns:
        The new state (None at the readout), the context, the target and the gate, shaped as `DDLDeltaResidual` says.
    """
    batch_shape = state.shape[:2]
    value_proj = getattr(residual, "value_proj", None)
    new_state, context, new_target, new_gate, *_ = boundary_op(
        state.flatten(0, 1),
        None if direction is None else direction.flatten(0, 1),
        None if direction is None else target.flatten(0, 1),
        None if direction is None else gate.flatten(),
        mixing,
        norm.weight,
        None if value_proj is None else value_proj.weight,
        None if value_proj is None else value_proj.bias,
        None if residual is None else residual.beta_proj.weight.squeeze(0),
        None if residual is None else residual.beta_proj.bias,
        state.flatten(0, 1),
        [],
        [],
        [],
        key_eps,
        norm.variance_epsilon,
        1.0 if residual is None else float(residual.config.value_scale),
        2 if residual is None else VALUE_ACTIVATIONS[residual.config.value_activation],
        residual is not None and residual.config.value_input == "context",
    )
    context = context.unflatten(0, batch_shape)
    if residual is None:
        return None, context, None, None
    new_state = state if direction is None else new_state.unflatten(0, batch_shape)
    return new_state, context, new_target.unflatten(0, batch_shape), new_gate.unflatten(0, batch_shape)
