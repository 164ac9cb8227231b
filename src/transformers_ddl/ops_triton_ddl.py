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
Triton kernels of the boundary between two sublayers: the delta rewrite that ends one and the compression, RMSNorm, gate
and target that begin the next, so that the state is read once and written once per sublayer (spec §5).

Notation of the kernels, per token (d the hidden size, n the number of value channels):

    X [n, d] state, k̃ [d] direction, v [n] target, β gate of the ending sublayer;
    C [n, d] mixing of the compressor, g [d] weight of the RMSNorm, (w_b, b_b) gate map, (W_v, b_v) value map of the
    beginning one.
"""

import torch
import triton
import triton.language as tl


# The n channels of a token are a tuple of `[BLOCK_D]` tensors, and what there is per channel a tuple of scalars: all
# tensors then share one layout over threads, and sums over channels need no communication.


@triton.jit
def load_channels(ptr, channel_stride, features, in_d, N: tl.constexpr):
    values = ()
    for j in tl.static_range(N):
        values = values + (tl.load(ptr + j * channel_stride + features, mask=in_d, other=0.0).to(tl.float32),)
    return values


@triton.jit
def store_channels(ptr, values, features, in_d, D: tl.constexpr, N: tl.constexpr):
    for j in tl.static_range(N):
        tl.store(ptr + j * D + features, values[j].to(ptr.dtype.element_ty), mask=in_d)


@triton.jit
def load_scalars(ptr, N: tl.constexpr):
    values = ()
    for j in tl.static_range(N):
        values = values + (tl.load(ptr + j).to(tl.float32),)
    return values


@triton.jit
def store_scalars(ptr, values, N: tl.constexpr):
    for j in tl.static_range(N):
        tl.store(ptr + j, values[j])


@triton.jit
def add_scaled(values, factors, vector, N: tl.constexpr):
    """`values[j] + factors[j] · vector` for every channel j, the factors being scalars or vectors."""
    results = ()
    for j in tl.static_range(N):
        results = results + (values[j] + factors[j] * vector,)
    return results


@triton.jit
def scale(scalars, factor, N: tl.constexpr):
    results = ()
    for j in tl.static_range(N):
        results = results + (factor * scalars[j],)
    return results


@triton.jit
def zeros(BLOCK_D: tl.constexpr, N: tl.constexpr):
    values = ()
    for j in tl.static_range(N):
        values = values + (tl.zeros([BLOCK_D], tl.float32),)
    return values


@triton.jit
def sum_over_channels(weights, values, N: tl.constexpr):
    """`Σ_j weights[j] · values[j]`."""
    total = weights[0] * values[0]
    for j in tl.static_range(1, N):
        total += weights[j] * values[j]
    return total


@triton.jit
def add_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def sum_over_features(values, NUM: tl.constexpr):
    """Sums of NUM vectors, in as few exchanges between threads as possible."""
    sums = ()
    for i in tl.static_range(NUM // 4):
        sums = sums + tl.reduce((values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]), 0, add_4)
    if NUM % 4 >= 2:
        sums = sums + tl.reduce((values[NUM // 4 * 4], values[NUM // 4 * 4 + 1]), 0, add_2)
    if NUM % 2 == 1:
        sums = sums + (tl.sum(values[NUM - 1], 0),)
    return sums


@triton.jit
def boundary_forward_kernel(
    state_ptr,
    direction_ptr,
    target_ptr,
    gate_ptr,
    mixing_ptr,
    norm_weight_ptr,
    value_weight_ptr,
    value_bias_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    new_state_ptr,
    context_ptr,
    new_target_ptr,
    new_gate_ptr,
    error_ptr,
    write_ptr,
    inv_key_norm_ptr,
    rstd_ptr,
    num_tokens,
    state_token_stride,
    state_channel_stride,
    key_eps,
    norm_eps,
    value_scale,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    STORE_STATE: tl.constexpr,
    HAS_MIXING: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    VALUE_FROM_CONTEXT: tl.constexpr,
    VALUE_ACTIVATION: tl.constexpr,  # 0 identity, 1 sigmoid, 2 constant
):
    features = tl.arange(0, BLOCK_D)
    in_d = features < D

    # An int64 start makes offsets int64, which large batches need
    for token in range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0)):
        state = load_channels(state_ptr + token * state_token_stride, state_channel_stride, features, in_d, N)

        if HAS_WRITE:
            direction = tl.load(direction_ptr + token * D + features, mask=in_d, other=0.0).to(tl.float32)
            target = load_scalars(target_ptr + token * N, N)
            gate = tl.load(gate_ptr + token)
            sums = sum_over_features(scale(state, direction, N) + (direction * direction,), N + 1)
            inv_key_norm = 1.0 / tl.sqrt(sums[N] + key_eps * key_eps)
            key = direction * inv_key_norm
            error = ()  # r = v − Xᵀk
            for j in tl.static_range(N):
                error = error + (target[j] - sums[j] * inv_key_norm,)
            write = scale(error, gate, N)
            state = add_scaled(state, write, key, N)
            if STORE_STATE:
                store_channels(new_state_ptr + token * (N * D), state, features, in_d, D, N)
            store_scalars(error_ptr + token * N, error, N)
            store_scalars(write_ptr + token * N, write, N)
            tl.store(inv_key_norm_ptr + token, inv_key_norm)

        if HAS_MIXING:
            hidden = sum_over_channels(state, load_channels(mixing_ptr, D, features, in_d, N), N)
        else:
            hidden = state[0]
        # c = x · rstd ∘ g, so that the maps of c can be summed before rstd is known
        unscaled_context = hidden * tl.load(norm_weight_ptr + features, mask=in_d, other=0.0).to(tl.float32)
        terms = (hidden * hidden,)
        if HAS_HEADS:
            gate_weight = tl.load(gate_weight_ptr + features, mask=in_d, other=0.0).to(tl.float32)
            terms = terms + (unscaled_context * gate_weight,)
            if VALUE_ACTIVATION != 2:
                source = unscaled_context if VALUE_FROM_CONTEXT else hidden
                terms = terms + scale(load_channels(value_weight_ptr, D, features, in_d, N), source, N)
        sums = sum_over_features(terms, 1 if not HAS_HEADS else (2 if VALUE_ACTIVATION == 2 else 2 + N))
        rstd = 1.0 / tl.sqrt(sums[0] / D + norm_eps)
        context = unscaled_context * rstd
        tl.store(context_ptr + token * D + features, context.to(context_ptr.dtype.element_ty), mask=in_d)
        tl.store(rstd_ptr + token, rstd)

        if HAS_HEADS:
            gate_logit = sums[1] * rstd + tl.load(gate_bias_ptr).to(tl.float32)
            tl.store(new_gate_ptr + token, 2.0 * tl.sigmoid(gate_logit))
            if VALUE_ACTIVATION != 2:
                for j in tl.static_range(N):
                    value = sums[2 + j] * rstd if VALUE_FROM_CONTEXT else sums[2 + j]
                    if HAS_VALUE_BIAS:
                        value += tl.load(value_bias_ptr + j).to(tl.float32)
                    if VALUE_ACTIVATION == 1:
                        value = tl.sigmoid(value)
                    tl.store(new_target_ptr + token * N + j, value_scale * value)


@triton.jit
def boundary_backward_kernel(
    snapshot_ptr,
    replay0_direction_ptr,
    replay0_inv_key_norm_ptr,
    replay0_write_ptr,
    replay1_direction_ptr,
    replay1_inv_key_norm_ptr,
    replay1_write_ptr,
    replay2_direction_ptr,
    replay2_inv_key_norm_ptr,
    replay2_write_ptr,
    direction_ptr,
    target_ptr,
    gate_ptr,
    error_ptr,
    inv_key_norm_ptr,
    mixing_ptr,
    norm_weight_ptr,
    value_weight_ptr,
    gate_weight_ptr,
    rstd_ptr,
    new_target_ptr,
    new_gate_ptr,
    grad_new_state_ptr,
    grad_context_ptr,
    grad_new_target_ptr,
    grad_new_gate_ptr,
    grad_state_ptr,
    grad_direction_ptr,
    grad_target_ptr,
    grad_gate_ptr,
    grad_rows_ptr,  # per program: [2n + 2, d] sums of the gradients of mixing, value map, norm weight, gate map
    grad_biases_ptr,  # per program: [n + 1] sums of the gradients of value bias and gate bias
    num_tokens,
    snapshot_token_stride,
    snapshot_channel_stride,
    value_scale,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_REPLAYS: tl.constexpr,
    HAS_GRAD_STATE: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_MIXING: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    VALUE_FROM_CONTEXT: tl.constexpr,
    VALUE_ACTIVATION: tl.constexpr,
):
    features = tl.arange(0, BLOCK_D)
    in_d = features < D
    program = tl.program_id(0).to(tl.int64)

    sum_mixing = zeros(BLOCK_D, N)
    sum_value_weight = zeros(BLOCK_D, N)
    sum_norm_weight = tl.zeros([BLOCK_D], tl.float32)
    sum_gate_weight = tl.zeros([BLOCK_D], tl.float32)
    sum_value_bias = ()
    for j in tl.static_range(N):
        sum_value_bias = sum_value_bias + (0.0,)
    sum_gate_bias = 0.0

    for token in range(program, num_tokens, tl.num_programs(0)):
        # The state before the write, rebuilt from the snapshot: X + Σ k wᵀ
        state = load_channels(snapshot_ptr + token * snapshot_token_stride, snapshot_channel_stride, features, in_d, N)
        grad_context = tl.load(grad_context_ptr + token * D + features, mask=in_d, other=0.0).to(tl.float32)
        if HAS_GRAD_STATE:
            grad_state = load_channels(grad_new_state_ptr + token * (N * D), D, features, in_d, N)
        else:
            grad_state = zeros(BLOCK_D, N)
        if NUM_REPLAYS > 0:
            key = tl.load(replay0_direction_ptr + token * D + features, mask=in_d, other=0.0).to(tl.float32)
            key *= tl.load(replay0_inv_key_norm_ptr + token)
            state = add_scaled(state, load_scalars(replay0_write_ptr + token * N, N), key, N)
        if NUM_REPLAYS > 1:
            key = tl.load(replay1_direction_ptr + token * D + features, mask=in_d, other=0.0).to(tl.float32)
            key *= tl.load(replay1_inv_key_norm_ptr + token)
            state = add_scaled(state, load_scalars(replay1_write_ptr + token * N, N), key, N)
        if NUM_REPLAYS > 2:
            key = tl.load(replay2_direction_ptr + token * D + features, mask=in_d, other=0.0).to(tl.float32)
            key *= tl.load(replay2_inv_key_norm_ptr + token)
            state = add_scaled(state, load_scalars(replay2_write_ptr + token * N, N), key, N)
        new_state = state
        if HAS_WRITE:
            inv_key_norm = tl.load(inv_key_norm_ptr + token)
            key = tl.load(direction_ptr + token * D + features, mask=in_d, other=0.0).to(tl.float32) * inv_key_norm
            gate = tl.load(gate_ptr + token)
            error = load_scalars(error_ptr + token * N, N)
            new_state = add_scaled(state, scale(error, gate, N), key, N)

        # Gate and target → context and hidden
        if HAS_MIXING:
            mixing = load_channels(mixing_ptr, D, features, in_d, N)
            hidden = sum_over_channels(new_state, mixing, N)
        else:
            hidden = new_state[0]
        norm_weight = tl.load(norm_weight_ptr + features, mask=in_d, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + token)
        normed = hidden * rstd
        grad_hidden = tl.zeros([BLOCK_D], tl.float32)
        if HAS_HEADS:
            new_gate = tl.load(new_gate_ptr + token)
            grad_logit = tl.load(grad_new_gate_ptr + token) * new_gate * (1.0 - 0.5 * new_gate)  # β = 2σ
            grad_context += grad_logit * tl.load(gate_weight_ptr + features, mask=in_d, other=0.0).to(tl.float32)
            sum_gate_weight += grad_logit * normed * norm_weight
            sum_gate_bias += grad_logit
            if VALUE_ACTIVATION != 2:
                grad_value = ()
                for j in tl.static_range(N):
                    grad = tl.load(grad_new_target_ptr + token * N + j)
                    if VALUE_ACTIVATION == 1:
                        value = tl.load(new_target_ptr + token * N + j)
                        grad_value = grad_value + (grad * value * (1.0 - value / value_scale),)  # v = scale · σ
                    else:
                        grad_value = grad_value + (grad * value_scale,)
                value_weight = load_channels(value_weight_ptr, D, features, in_d, N)
                if VALUE_FROM_CONTEXT:
                    grad_context += sum_over_channels(grad_value, value_weight, N)
                    sum_value_weight = add_scaled(sum_value_weight, grad_value, normed * norm_weight, N)
                else:
                    grad_hidden += sum_over_channels(grad_value, value_weight, N)
                    sum_value_weight = add_scaled(sum_value_weight, grad_value, hidden, N)
                sum_value_bias = add_scaled(sum_value_bias, grad_value, 1.0, N)

        # RMSNorm and compressor → state
        sum_norm_weight += grad_context * normed
        grad_normed = grad_context * norm_weight
        grad_hidden += rstd * (grad_normed - normed * (tl.sum(grad_normed * normed, 0) / D))
        if HAS_MIXING:
            sum_mixing = add_scaled(sum_mixing, new_state, grad_hidden, N)
            grad_state = add_scaled(grad_state, mixing, grad_hidden, N)
        else:
            grad_state = (grad_state[0] + grad_hidden,)

        # Delta rewrite (spec §5): ∂v = βp, ∂β = p·r, ∂k = β(Gr − Xp), ∂k̃ = (∂k − k(k·∂k)) / ‖k̃‖, ∂X = G − βkpᵀ
        if HAS_WRITE:
            projected = sum_over_features(scale(grad_state, key, N), N)  # p = Gᵀk
            grad_gate = 0.0
            along_key = 0.0
            for j in tl.static_range(N):
                readout = tl.load(target_ptr + token * N + j) - error[j]
                grad_gate += projected[j] * error[j]
                along_key += projected[j] * (error[j] - readout)
            grad_key = sum_over_channels(error, grad_state, N) - sum_over_channels(projected, state, N)
            grad_direction = gate * inv_key_norm * (grad_key - along_key * key)
            grad_state = add_scaled(grad_state, scale(projected, -gate, N), key, N)
            tl.store(
                grad_direction_ptr + token * D + features,
                grad_direction.to(grad_direction_ptr.dtype.element_ty),
                mask=in_d,
            )
            store_scalars(grad_target_ptr + token * N, scale(projected, gate, N), N)
            tl.store(grad_gate_ptr + token, grad_gate)
        store_channels(grad_state_ptr + token * (N * D), grad_state, features, in_d, D, N)

    rows_ptr = grad_rows_ptr + program * (2 * N + 2) * D
    store_channels(rows_ptr, sum_mixing, features, in_d, D, N)
    store_channels(rows_ptr + N * D, sum_value_weight, features, in_d, D, N)
    tl.store(rows_ptr + 2 * N * D + features, sum_norm_weight, mask=in_d)
    tl.store(rows_ptr + (2 * N + 1) * D + features, sum_gate_weight, mask=in_d)
    store_scalars(grad_biases_ptr + program * (N + 1), sum_value_bias, N)
    tl.store(grad_biases_ptr + program * (N + 1) + N, sum_gate_bias)


MAX_VALUE_CHANNELS = 8
VALUE_ACTIVATIONS = {None: 0, "sigmoid": 1, "constant": 2}
# Programs that stay on a streaming multiprocessor and walk through the tokens, and warps of each
FORWARD_PROGRAMS_PER_SM, FORWARD_WARPS = 8, 4
BACKWARD_PROGRAMS_PER_SM, BACKWARD_WARPS = 2, 8


def launch_options(tensor: torch.Tensor, num_tokens: int, programs_per_sm: int, num_warps: int):
    if tensor.device.type == "cuda":
        programs = torch.cuda.get_device_properties(tensor.device).multi_processor_count * programs_per_sm
    else:  # Triton's interpreter
        programs = 3
    return (max(1, min(programs, num_tokens)),), {"num_warps": num_warps}


def blocks(state: torch.Tensor) -> dict[str, int]:
    n, d = state.shape[1:]
    return {"D": d, "N": n, "BLOCK_D": triton.next_power_of_2(d)}


@torch.library.custom_op("transformers_ddl::boundary", mutates_args=())
def boundary_op(
    state: torch.Tensor,
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    mixing: torch.Tensor | None,
    norm_weight: torch.Tensor,
    value_weight: torch.Tensor | None,
    value_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    snapshot: torch.Tensor,
    replay_directions: list[torch.Tensor],
    replay_inv_key_norms: list[torch.Tensor],
    replay_writes: list[torch.Tensor],
    key_eps: float,
    norm_eps: float,
    value_scale: float,
    value_activation: int,
    value_from_context: bool,
) -> list[torch.Tensor]:
    num_tokens, n, d = state.shape
    has_write, has_heads = direction is not None, gate_weight is not None
    outputs = boundary_fake(
        state, direction, target, gate, mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias,
        snapshot, replay_directions, replay_inv_key_norms, replay_writes,
        key_eps, norm_eps, value_scale, value_activation, value_from_context,
    )  # fmt: skip
    if has_heads and value_activation == 2:
        outputs[2].fill_(value_scale)
    new_state, context, new_target, new_gate, error, write, inv_key_norm, rstd = outputs
    grid, options = launch_options(state, num_tokens, FORWARD_PROGRAMS_PER_SM, FORWARD_WARPS)
    boundary_forward_kernel[grid](
        state, direction, target, gate, mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias,
        new_state, context, new_target, new_gate, error, write, inv_key_norm, rstd,
        num_tokens, state.stride(0), state.stride(1), key_eps, norm_eps, value_scale,
        HAS_WRITE=has_write, STORE_STATE=has_heads, HAS_MIXING=mixing is not None, HAS_HEADS=has_heads,
        HAS_VALUE_BIAS=value_bias is not None, VALUE_FROM_CONTEXT=value_from_context,
        VALUE_ACTIVATION=value_activation, **blocks(state), **options,
    )  # fmt: skip
    return outputs


@boundary_op.register_fake
def boundary_fake(
    state, direction, target, gate, mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias,
    snapshot, replay_directions, replay_inv_key_norms, replay_writes,
    key_eps, norm_eps, value_scale, value_activation, value_from_context,
):  # fmt: skip
    num_tokens, n, d = state.shape
    write_tokens = num_tokens if direction is not None else 0
    heads_tokens = num_tokens if gate_weight is not None else 0
    new_state_tokens = num_tokens if direction is not None and gate_weight is not None else 0
    return [
        state.new_empty(new_state_tokens, n, d),
        state.new_empty(num_tokens, d),
        state.new_empty(heads_tokens, n, dtype=torch.float32),
        state.new_empty(heads_tokens, dtype=torch.float32),
        state.new_empty(write_tokens, n, dtype=torch.float32),
        state.new_empty(write_tokens, n, dtype=torch.float32),
        state.new_empty(write_tokens, dtype=torch.float32),
        state.new_empty(num_tokens, dtype=torch.float32),
    ]


@torch.library.custom_op("transformers_ddl::boundary_backward", mutates_args=())
def boundary_backward_op(
    snapshot: torch.Tensor,
    replay_directions: list[torch.Tensor],
    replay_inv_key_norms: list[torch.Tensor],
    replay_writes: list[torch.Tensor],
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    error: torch.Tensor,
    inv_key_norm: torch.Tensor,
    mixing: torch.Tensor | None,
    norm_weight: torch.Tensor,
    value_weight: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    rstd: torch.Tensor,
    new_target: torch.Tensor,
    new_gate: torch.Tensor,
    grad_new_state: torch.Tensor | None,
    grad_context: torch.Tensor,
    grad_new_target: torch.Tensor | None,
    grad_new_gate: torch.Tensor | None,
    value_scale: float,
    value_activation: int,
    value_from_context: bool,
) -> list[torch.Tensor]:
    num_tokens, n, d = snapshot.shape
    grid, options = launch_options(snapshot, num_tokens, BACKWARD_PROGRAMS_PER_SM, BACKWARD_WARPS)
    grad_state = torch.empty_like(snapshot, memory_format=torch.contiguous_format)
    grad_direction, grad_target, grad_gate = [
        snapshot.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in (direction, target, gate)
    ]
    grad_rows = snapshot.new_empty(grid[0], 2 * n + 2, d, dtype=torch.float32)
    grad_biases = snapshot.new_empty(grid[0], n + 1, dtype=torch.float32)
    replays = list(zip(replay_directions, replay_inv_key_norms, replay_writes))
    replay_args = [tensor for replay in replays for tensor in replay] + [None] * (9 - 3 * len(replays))
    boundary_backward_kernel[grid](
        snapshot, *replay_args, direction, target, gate, error, inv_key_norm,
        mixing, norm_weight, value_weight, gate_weight, rstd, new_target, new_gate,
        grad_new_state, grad_context, grad_new_target, grad_new_gate,
        grad_state, grad_direction, grad_target, grad_gate, grad_rows, grad_biases,
        num_tokens, snapshot.stride(0), snapshot.stride(1), value_scale,
        NUM_REPLAYS=len(replays), HAS_GRAD_STATE=grad_new_state is not None, HAS_WRITE=direction is not None,
        HAS_MIXING=mixing is not None, HAS_HEADS=gate_weight is not None, VALUE_FROM_CONTEXT=value_from_context,
        VALUE_ACTIVATION=value_activation, **blocks(snapshot), **options,
    )  # fmt: skip
    return [grad_state, grad_direction, grad_target, grad_gate, grad_rows.sum(0), grad_biases.sum(0)]


@boundary_backward_op.register_fake
def _(snapshot, replay_directions, replay_inv_key_norms, replay_writes, direction, target, gate, *args):
    num_tokens, n, d = snapshot.shape
    return [
        torch.empty_like(snapshot, memory_format=torch.contiguous_format),
        *(
            snapshot.new_empty(0) if tensor is None else torch.empty_like(tensor)
            for tensor in (direction, target, gate)
        ),
        snapshot.new_empty(2 * n + 2, d, dtype=torch.float32),
        snapshot.new_empty(n + 1, dtype=torch.float32),
    ]


def setup_context(ctx, inputs, output):
    (
        state, direction, target, gate, mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias,
        snapshot, replay_directions, replay_inv_key_norms, replay_writes,
        key_eps, norm_eps, value_scale, value_activation, value_from_context,
    ) = inputs  # fmt: skip
    new_state, context, new_target, new_gate, error, write, inv_key_norm, rstd = output
    ctx.mark_non_differentiable(error, write, inv_key_norm, rstd)
    ctx.set_materialize_grads(False)
    ctx.num_replays = len(replay_directions)
    ctx.value = (value_scale, value_activation, value_from_context)
    ctx.dtypes = [
        None if t is None else t.dtype for t in (mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias)
    ]
    ctx.save_for_backward(
        snapshot, *replay_directions, *replay_inv_key_norms, *replay_writes,
        direction, target, gate, error, inv_key_norm, mixing, norm_weight, value_weight, gate_weight,
        rstd, new_target, new_gate,
    )  # fmt: skip


def backward(ctx, grads):
    grad_new_state, grad_context, grad_new_target, grad_new_gate, *_ = grads
    m = ctx.num_replays
    snapshot, *rest = ctx.saved_tensors
    replays = [list(rest[i * m : (i + 1) * m]) for i in range(3)]
    (
        direction,
        target,
        gate,
        error,
        inv_key_norm,
        mixing,
        norm_weight,
        value_weight,
        gate_weight,
        rstd,
        new_target,
        new_gate,
    ) = rest[3 * m :]
    if grad_new_state is not None and grad_new_state.numel() == 0:
        grad_new_state = None
    grad_new_state, grad_new_target, grad_new_gate = [
        g if g is None else g.contiguous() for g in (grad_new_state, grad_new_target, grad_new_gate)
    ]
    if gate_weight is not None:
        grad_new_target = torch.zeros_like(new_target) if grad_new_target is None else grad_new_target
        grad_new_gate = torch.zeros_like(new_gate) if grad_new_gate is None else grad_new_gate
    if grad_context is None:
        grad_context = snapshot.new_zeros(snapshot.shape[0], snapshot.shape[2])
    grad_state, grad_direction, grad_target, grad_gate, grad_rows, grad_biases = boundary_backward_op(
        snapshot, *replays, direction, target, gate, error, inv_key_norm, mixing, norm_weight, value_weight,
        gate_weight, rstd, new_target, new_gate, grad_new_state, grad_context.contiguous(), grad_new_target,
        grad_new_gate, *ctx.value,
    )  # fmt: skip
    n = snapshot.shape[1]
    parameters = [
        grad_rows[:n],
        grad_rows[2 * n],
        grad_rows[n : 2 * n],
        grad_biases[:n],
        grad_rows[2 * n + 1],
        grad_biases[n:],
    ]
    parameters = [None if dtype is None else grad.to(dtype) for grad, dtype in zip(parameters, ctx.dtypes)]
    if direction is None:
        grad_direction = grad_target = grad_gate = None
    return (
        grad_state,
        grad_direction,
        grad_target,
        grad_gate,
        *parameters,
        None,
        [None] * m,
        [None] * m,
        [None] * m,
        *[None] * 5,
    )


boundary_op.register_autograd(backward, setup_context=setup_context)
