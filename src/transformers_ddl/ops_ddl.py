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
"""Where the fused kernels of `ops_triton_ddl` and `ops_triton_conv_ddl` stand in for the PyTorch definitions of `modeling_ddl`."""

import os

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.utils.import_utils import is_liger_kernel_available, is_triton_available


TRITON_AVAILABLE = is_triton_available()
MAX_VALUE_CHANNELS = 8
MAX_REPLAYS = 3  # of a backward kernel: each number of them is a kernel to compile
NUM_REPLAYS = os.environ.get("TRANSFORMERS_DDL_REPLAYS", "auto")
if NUM_REPLAYS != "auto":
    if not (NUM_REPLAYS.isascii() and NUM_REPLAYS.isdecimal()):
        raise ValueError(f"TRANSFORMERS_DDL_REPLAYS must be auto or an integer of at least 0, got {NUM_REPLAYS!r}")
    NUM_REPLAYS = int(NUM_REPLAYS)


def num_replays(n: int) -> int:
    """
    Boundaries whose states `[batch, sequence, n, hidden_size]` the backward pass rebuilds for each one that is stored: with 0 all are
    stored, with twice the number of layers only the first. By default, a state of n vectors is stored at every n-th boundary, one vector
    for each, and at every fourth for n > 4: a kernel replays no more (`MAX_REPLAYS`), and what rebuilds states beside takes time.
    """
    return min(n - 1, MAX_REPLAYS) if NUM_REPLAYS == "auto" else NUM_REPLAYS


def load_kernels():
    """
    Imports Triton where there is a GPU to use it on, ahead of a compilation that could not, and makes DDL known to Liger,
    ahead of a `Trainer` that asks for it.
    """
    if TRITON_AVAILABLE and torch.cuda.is_available():
        from .ops_triton_conv_ddl import convolution_op  # noqa: F401
        from .ops_triton_ddl import boundary_op  # noqa: F401
    if TRITON_AVAILABLE and is_liger_kernel_available():
        from .liger_ddl import apply_liger_kernel_to_ddl  # noqa: F401


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` is at work. In programs of `torch.compile`, torch 2.11 takes its own function to be True."""
    return torch.compiler.is_exporting()


def is_watched(module: nn.Module) -> bool:
    """Whether hooks are called with a module's inputs or outputs or, where there are any, their gradients."""
    if torch.is_grad_enabled() and (module._backward_pre_hooks or module._backward_hooks):
        return True
    return bool(module._forward_pre_hooks or module._forward_hooks)


def can_run(tensor: torch.Tensor, *modules: nn.Module) -> bool:
    """
    Whether kernels, which read the weights of modules without calling them, can stand in for these: with Triton, for a tensor in
    float32, bfloat16 or float16 on a GPU, and modules that are what they were made as: not wrapped by an adapter, without hooks (by
    which FSDP2 and DeepSpeed gather sharded weights), and with weights that are neither quantised nor offloaded. Programs that
    `torch.export` makes have none, so that they can run anywhere. The environment variable `TRANSFORMERS_DDL_KERNELS` overrides
    the device: 0 always takes the PyTorch path, 1 takes the kernels on a CPU too (Triton's interpreter).
    """
    kernels = os.environ.get("TRANSFORMERS_DDL_KERNELS", "auto")
    if kernels not in ("0", "1", "auto"):
        raise ValueError(f"TRANSFORMERS_DDL_KERNELS must be 0, 1 or auto, got {kernels!r}")
    if kernels == "0" or not TRITON_AVAILABLE or not (tensor.is_cuda or kernels == "1" and tensor.is_cpu):
        return False
    if is_exporting() or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    # What wraps a module has it as a child. Compiled models check what is looked at here at every call, which takes time in
    # decoding: hence not by iterating over `children()` and `parameters()`, and one parameter for all, as they are offloaded together
    if any(module._modules or is_watched(module) for module in modules):
        return False
    weights = [getattr(module, "weight", None) for module in modules]
    return all(
        weight is None or type(weight) in (nn.Parameter, torch.Tensor) and weight.device == tensor.device
        for weight in weights
    )


def can_fuse(
    config: PreTrainedConfig,
    state: torch.Tensor,
    compressor: nn.Module,
    norm: nn.Module,
    residual: nn.Module | None,
    past_key_values: Cache | None = None,
) -> bool:
    """
    Whether the fused kernels can compute the boundary before a sublayer (see `can_run`): for a state `[batch, sequence, n ≤ 8,
    hidden_size]`, one write of rank 1, gates of one layer, and no token convolution with past inputs.
    """
    if config.residual_type not in ("delta", "write_only", "expanded_additive"):
        return False
    if config.compressor == "token" and past_key_values is not None:
        return False
    if config.num_delta_steps > 1 or config.num_value_channels > MAX_VALUE_CHANNELS:
        return False
    if residual is not None and is_watched(residual):
        hooks = [*residual._forward_pre_hooks.values(), *residual._forward_hooks.values()]
        hooks += [*residual._backward_pre_hooks.values(), *residual._backward_hooks.values()]
        if not all(getattr(hook, "works_beside_kernels", False) for hook in hooks):
            return False
    maps = []
    if residual is not None and config.has_gates:
        names = ["beta_proj"] if config.value_activation == "constant" else ["beta_proj", "value_proj"]
        maps = [residual._modules.get(name) for name in names]
        if config.gate_hidden_size is not None or any(type(module) is not nn.Linear for module in maps):
            return False
    return can_run(state, compressor, norm, *maps)


def can_fuse_expansion(
    config: PreTrainedConfig, embeddings: torch.Tensor, embedding_conv: nn.Module, past_key_values: Cache | None = None
) -> bool:
    """Whether the fused kernel can compute the embedding convolution (see `can_run`): for n ≤ 8 and without past inputs."""
    if past_key_values is not None or config.num_value_channels > MAX_VALUE_CHANNELS:
        return False
    return can_run(embeddings, embedding_conv)


def count_readers(sublayer: nn.Module | None) -> int:
    """
    How many inputs a sublayer is given: in compiled training one for each map that reads it, if `forward` is ours, which takes several.
    (Uncompiled, that would cost more of the host's time than it saves.)
    """
    if sublayer is None or not torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_watched(sublayer):
        return 1
    # What wraps a function takes over its attributes (`functools.wraps`)
    return 1 if hasattr(sublayer.forward, "__wrapped__") else getattr(sublayer.forward, "num_readers", 1)


def fused_expansion(
    embeddings: torch.Tensor,
    mixing: torch.Tensor,
    dtype: torch.dtype,
    conv_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The embedding convolution in one kernel, of `embeddings` `[batch, sequence, hidden_size]` with `mixing` `[taps, n,
    hidden_size]`: the state `[batch, sequence, n, hidden_size]` in the given dtype. Masks are those of `fused_boundary`.
    """
    from .ops_triton_conv_ddl import expansion_op

    batch_shape = embeddings.shape[:2]
    embeddings = embeddings.flatten(0, 1).contiguous()
    state = expansion_op(embeddings, mixing, *walk(conv_mask, document_ids), batch_shape[1], dtype)
    return state.unflatten(0, batch_shape)


def fused_boundary(
    config: PreTrainedConfig,
    state: torch.Tensor,
    write: tuple[torch.Tensor, ...],
    mixing: torch.Tensor | None,
    norm: nn.Module,
    residual: nn.Module | None,
    history: tuple[torch.Tensor, ...],
    conv_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    num_readers: int = 1,
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """
    The boundary between two sublayers in one kernel: the write of the one, compression by `mixing` (over channels `[n,
    hidden_size]`, over tokens `[taps, n, hidden_size]`, None for n = 1), RMSNorm and the weights of `residual` for the write
    of the other (None at the readout, which needs no new state either). Compression over tokens, which reads neither where
    `conv_mask` is False nor other documents of `document_ids`, both `[batch, sequence]`, takes a kernel of its own with the
    write, and is followed by the rest.

    The backward pass needs the state, which is not kept for it at every boundary: `history` holds an earlier state and
    what has been written since, from which it is rebuilt. It is begun anew when it is full.

    Returns:
        The new state (None at the readout), the context, once for each of `num_readers`, the weights of the next write, as
        `begin_sublayer` says, and the history for the next boundary.
    """
    from .ops_triton_ddl import VALUE_ACTIVATIONS, boundary_op, hand_out

    batch_shape = state.shape[:2]
    state = state.flatten(0, 1).contiguous()
    if len(history) > 1 + 2 * num_replays(config.num_value_channels):
        history = ()
    snapshot, *replays = history or (state,)
    direction = target = gate = keep = amplitude = None
    if write:
        direction, weights = write[0].flatten(0, 1).contiguous(), write[1:]
        if config.has_gates:
            target, gate, *anchor = weights
            target, gate = target.flatten(0, 1).contiguous(), gate.flatten().contiguous()
            if anchor:
                keep, amplitude = anchor[0].unbind(0)
        else:
            (amplitude,) = weights
    heads = residual if config.has_gates else None
    value_proj = getattr(heads, "value_proj", None)
    write = (direction, target, gate, keep, amplitude)
    maps = (
        norm.weight,
        None if value_proj is None else value_proj.weight,
        None if value_proj is None else value_proj.bias,
        None if heads is None else heads.beta_proj.weight.squeeze(0),
        None if heads is None else heads.beta_proj.bias,
    )
    erase, begins_sublayer = config.residual_type == "delta", residual is not None
    options = (
        config.key_eps,
        norm.variance_epsilon,
        config.num_value_channels,
        float(config.value_scale),
        VALUE_ACTIVATIONS[config.value_activation],
        config.value_input == "context",
        erase,
        begins_sublayer,
        num_readers,
    )
    if config.compressor == "token":
        from .ops_triton_conv_ddl import convolution_op

        order, segment = walk(conv_mask, document_ids)
        new_state, hidden_states, _, written, _ = convolution_op(
            state,
            *write,
            mixing,
            order,
            segment,
            snapshot,
            replays,
            batch_shape[1],
            config.key_eps,
            erase,
            begins_sublayer,
        )
        # What is left is a boundary without a write, of a state of one channel
        hidden_states = hidden_states.unsqueeze(1)
        no_write = [None] * len(write)
        _, context, new_target, new_gate, _, _, _, _, *receivers = boundary_op(
            hidden_states, *no_write, None, *maps, hidden_states, [], *options
        )
    else:
        new_state, context, new_target, new_gate, _, written, _, _, *receivers = boundary_op(
            state, *write, mixing, *maps, snapshot, replays, *options
        )
    contexts = tuple(context.unflatten(0, batch_shape) for context in hand_out(context, *receivers))
    if residual is None:
        return None, contexts, (), ()
    if direction is None:
        new_state = state
    else:
        # Detached after the operation: where DDP cuts a compiled program in two, at the operation's parameters, the first one
        # would otherwise return a tensor both with and without gradients, for which torch (2.11 and 2.13) loses them or stops
        history = history or (state.detach(),)
        history = (*history, direction.detach(), written)
    if not torch.is_grad_enabled():  # or earlier states would stay in memory
        history = ()
    if heads is not None:
        weights = (new_target.unflatten(0, batch_shape), new_gate.unflatten(0, batch_shape).unsqueeze(-1))
        if config.value_anchor is not None:
            weights = (*weights, heads.anchor())
    else:
        weights = residual(None, contexts[0])
    return new_state.unflatten(0, batch_shape), contexts, weights, history


def walk(
    conv_mask: torch.Tensor | None, document_ids: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    The order in which a token convolution walks along the tokens of a batch, padding first in each row, and for each of its
    positions the document, negative at padding: both `[tokens]`, or None for rows without padding of one document each.
    """
    if conv_mask is None and document_ids is None:
        return None, None
    layout = conv_mask if document_ids is None else document_ids
    rows = torch.arange(layout.shape[0], device=layout.device).unsqueeze(1)
    seq_length = layout.shape[1]
    if document_ids is None:
        is_token, order = conv_mask.int().sort(dim=1, stable=True)
        segment = torch.where(is_token == 1, rows, -1)
    else:
        order = torch.arange(seq_length, device=layout.device)
        segment = rows * seq_length + document_ids
    return (rows * seq_length + order).flatten().int(), segment.flatten().int()
