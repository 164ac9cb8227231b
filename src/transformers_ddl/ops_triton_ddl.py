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

    X [n, d] state, k̃ [d] direction, v [n] target, β gate, a [n] kept share, b [n] amplitude of the ending sublayer, which
    writes X ← X + k̃ wᵀ with w = β r / ‖k̃‖ + b and r = v − (1 − a) ∘ Xᵀk, k = k̃ / ‖k̃‖: a and b are zero unless the target is
    anchored, r = v where nothing is erased, and there is b alone in the expanded additive residual;
    C [n, d] mixing of the compressor, g [d] weight of the RMSNorm, (w_b, b_b) gate map, (W_v, b_v) value map of the
    beginning one.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
from transformers.utils.import_utils import is_triton_available

from .ops_ddl import MAX_REPLAYS


# Always true here. Transformers refuses to load remote code with an import that is missing, unless under such a condition
if is_triton_available():
    import triton
    import triton.language as tl
    from triton.language.target_info import cuda_capability_geq

    INTERPRETS = tl.constexpr(triton.knobs.runtime.interpret)

# Remote code lies in a package of its own: an operator of the same name would replace this one without a word
NAMESPACE = re.sub(r"\W", "_", __package__)


# A vector over the hidden size is a tuple of NUM_BLOCKS tensors `[BLOCK_D]` (no padding to a power of two), n of them the
# concatenation of their tuples, and what there is per channel a tuple of scalars. All tensors thus share one layout over
# threads, and sums over channels need no communication.


@triton.jit
def load_vectors(
    ptr, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_BLOCKS: tl.constexpr, first_feature=0
):
    features = first_feature + tl.arange(0, BLOCK_D)
    values = ()
    for j in tl.static_range(COUNT):
        for b in tl.static_range(NUM_BLOCKS):
            block_ptr = ptr + j * D + b * BLOCK_D + features
            if D % BLOCK_D == 0:
                values = values + (tl.load(block_ptr).to(tl.float32),)
            else:
                value = tl.load(block_ptr, mask=b * BLOCK_D + features < D, other=0.0)
                values = values + (value.to(tl.float32),)
    return values


@triton.jit
def store_vectors(
    ptr, values, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_BLOCKS: tl.constexpr, first_feature=0
):
    features = first_feature + tl.arange(0, BLOCK_D)
    for j in tl.static_range(COUNT):
        for b in tl.static_range(NUM_BLOCKS):
            block_ptr = ptr + j * D + b * BLOCK_D + features
            value = values[j * NUM_BLOCKS + b].to(ptr.dtype.element_ty)
            if D % BLOCK_D == 0:
                tl.store(block_ptr, value)
            else:
                tl.store(block_ptr, value, mask=b * BLOCK_D + features < D)


@triton.jit
def prefetch(ptr, COUNT: tl.constexpr, D: tl.constexpr):
    """
    Has COUNT vectors brought into the L2 cache while something else is computed: for the next token, or each would wait for
    the memory. To load it ahead would take registers for it, of which there are none left. Only a hint, and only since Hopper.
    """
    # One thread asks for all, in units of 16 bytes
    num_bytes: tl.constexpr = COUNT * D * ptr.dtype.element_ty.primitive_bitwidth // 128 * 16
    if not INTERPRETS and cuda_capability_geq(9, 0) and num_bytes > 0:
        tl.inline_asm_elementwise(
            """{
            .reg .pred is_first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [ptr.to(tl.int64) & -16, num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


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
def zero_scalars(LENGTH: tl.constexpr):
    values = ()
    for i in tl.static_range(LENGTH):
        values = values + (0.0,)
    return values


@triton.jit
def zeros(LENGTH: tl.constexpr, BLOCK_D: tl.constexpr):
    values = ()
    for i in tl.static_range(LENGTH):
        values = values + (tl.zeros([BLOCK_D], tl.float32),)
    return values


@triton.jit
def add(values, others, LENGTH: tl.constexpr):
    results = ()
    for i in tl.static_range(LENGTH):
        results = results + (values[i] + others[i],)
    return results


@triton.jit
def subtract(values, others, LENGTH: tl.constexpr):
    results = ()
    for i in tl.static_range(LENGTH):
        results = results + (values[i] - others[i],)
    return results


@triton.jit
def products(values, others, LENGTH: tl.constexpr):
    results = ()
    for i in tl.static_range(LENGTH):
        results = results + (values[i] * others[i],)
    return results


@triton.jit
def dot(values, others, LENGTH: tl.constexpr):
    total = values[0] * others[0]
    for i in tl.static_range(1, LENGTH):
        total += values[i] * others[i]
    return total


@triton.jit
def scale(values, factor, LENGTH: tl.constexpr):
    results = ()
    for i in tl.static_range(LENGTH):
        results = results + (factor * values[i],)
    return results


@triton.jit
def rounded(values, ptr, LENGTH: tl.constexpr):
    """The values as they would be stored at `ptr`."""
    results = ()
    for i in tl.static_range(LENGTH):
        results = results + (values[i].to(ptr.dtype.element_ty).to(tl.float32),)
    return results


@triton.jit
def multiply(values, vector, COUNT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """`values[j] ∘ vector` for each of COUNT vectors."""
    results = ()
    for j in tl.static_range(COUNT):
        for b in tl.static_range(NUM_BLOCKS):
            results = results + (values[j * NUM_BLOCKS + b] * vector[b],)
    return results


@triton.jit
def add_multiples(values, scalars, vector, COUNT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """`values[j] + scalars[j] · vector` for each of COUNT vectors."""
    results = ()
    for j in tl.static_range(COUNT):
        for b in tl.static_range(NUM_BLOCKS):
            results = results + (values[j * NUM_BLOCKS + b] + scalars[j] * vector[b],)
    return results


@triton.jit
def add_products(values, left, vector, COUNT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """`values[j] + left[j] ∘ vector` for each of COUNT vectors."""
    results = ()
    for j in tl.static_range(COUNT):
        for b in tl.static_range(NUM_BLOCKS):
            results = results + (values[j * NUM_BLOCKS + b] + left[j * NUM_BLOCKS + b] * vector[b],)
    return results


@triton.jit
def sum_of_multiples(scalars, values, COUNT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """`Σ_j scalars[j] · values[j]`."""
    results = ()
    for b in tl.static_range(NUM_BLOCKS):
        total = scalars[0] * values[b]
        for j in tl.static_range(1, COUNT):
            total += scalars[j] * values[j * NUM_BLOCKS + b]
        results = results + (total,)
    return results


@triton.jit
def sum_of_products(left, values, COUNT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """`Σ_j left[j] ∘ values[j]`."""
    results = ()
    for b in tl.static_range(NUM_BLOCKS):
        total = left[b] * values[b]
        for j in tl.static_range(1, COUNT):
            total += left[j * NUM_BLOCKS + b] * values[j * NUM_BLOCKS + b]
        results = results + (total,)
    return results


@triton.jit
def add_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def sums_over_features(values, COUNT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The sums of COUNT vectors, in as few exchanges between threads as possible."""
    totals = ()
    for j in tl.static_range(COUNT):
        total = values[j * NUM_BLOCKS]
        for b in tl.static_range(1, NUM_BLOCKS):
            total += values[j * NUM_BLOCKS + b]
        totals = totals + (total,)
    sums = ()
    for i in tl.static_range(COUNT // 4):
        sums = sums + tl.reduce((totals[4 * i], totals[4 * i + 1], totals[4 * i + 2], totals[4 * i + 3]), 0, add_4)
    if COUNT % 4 >= 2:
        sums = sums + tl.reduce((totals[COUNT // 4 * 4], totals[COUNT // 4 * 4 + 1]), 0, add_2)
    if COUNT % 2 == 1:
        sums = sums + (tl.sum(totals[COUNT - 1], 0),)
    return sums


@triton.jit
def write_forward(
    state,
    direction_ptr,
    target_ptr,
    gate_ptr,
    keep_ptr,
    amplitude_ptr,
    readout_ptr,
    write_ptr,
    inv_key_norm_ptr,
    token,
    key_eps,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ERASE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
):
    """`X + k̃ wᵀ`; stores Xᵀk, w and 1/‖k̃‖."""
    direction = load_vectors(direction_ptr + token * D, 1, D, BLOCK_D, NUM_BLOCKS)
    # Before the sums: after them, each token would wait for the memory a second time
    target = load_scalars(target_ptr + token * N, N) if HAS_GATE else ()
    gate = tl.load(gate_ptr + token) if HAS_GATE else 0.0
    terms = multiply(direction, direction, 1, NUM_BLOCKS)
    if ERASE:
        terms = terms + multiply(state, direction, N, NUM_BLOCKS)
    sums = sums_over_features(terms, N + 1 if ERASE else 1, NUM_BLOCKS)
    inv_key_norm = tl.div_rn(1.0, tl.sqrt_rn(sums[0] + key_eps * key_eps))
    write = ()
    for j in tl.static_range(N):
        weight = 0.0
        if HAS_GATE:
            error = target[j]
            if ERASE:
                readout = sums[1 + j] * inv_key_norm
                tl.store(readout_ptr + token * N + j, readout)
                if HAS_KEEP:
                    readout *= 1.0 - tl.load(keep_ptr + j).to(tl.float32)
                error -= readout
            weight = gate * error * inv_key_norm
        if HAS_AMPLITUDE:
            weight += tl.load(amplitude_ptr + j).to(tl.float32)
        write = write + (weight,)
    store_scalars(write_ptr + token * N, write, N)
    tl.store(inv_key_norm_ptr + token, inv_key_norm)
    return add_multiples(state, write, direction, N, NUM_BLOCKS)


@triton.jit
def load_parameters(
    mixing_ptr,
    norm_weight_ptr,
    value_weight_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    D: tl.constexpr,
    N: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HAS_MIXING: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    VALUE_ACTIVATION: tl.constexpr,
):
    """g, C, w_b, b_b and W_v; empty or zero where there are none."""
    norm_weight = load_vectors(norm_weight_ptr, 1, D, BLOCK_D, NUM_BLOCKS)
    mixing = load_vectors(mixing_ptr, N, D, BLOCK_D, NUM_BLOCKS) if HAS_MIXING else ()
    gate_weight, gate_bias, value_weight = (), 0.0, ()
    if HAS_HEADS:
        gate_weight = load_vectors(gate_weight_ptr, 1, D, BLOCK_D, NUM_BLOCKS)
        gate_bias = tl.load(gate_bias_ptr).to(tl.float32)
        if VALUE_ACTIVATION != 2:
            value_weight = load_vectors(value_weight_ptr, NUM_VALUES, D, BLOCK_D, NUM_BLOCKS)
    return norm_weight, mixing, gate_weight, gate_bias, value_weight


# For a single token, too, there is a loop: the compiler moves no loads into it, to where they are used
@triton.jit(do_not_specialize=["num_tokens"])
def boundary_forward_kernel(
    state_ptr,
    direction_ptr,
    target_ptr,
    gate_ptr,
    keep_ptr,
    amplitude_ptr,
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
    readout_ptr,
    write_ptr,
    inv_key_norm_ptr,
    rstd_ptr,
    num_tokens,
    key_eps,
    norm_eps,
    value_scale,
    D: tl.constexpr,
    N: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ERASE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
    STORE_STATE: tl.constexpr,
    HAS_MIXING: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    VALUE_FROM_CONTEXT: tl.constexpr,
    VALUE_ACTIVATION: tl.constexpr,  # 0 identity, 1 sigmoid, 2 constant
    PRELOAD: tl.constexpr,
):
    # For single tokens, which wait for the memory rather than for registers, and whose parameters are in no cache; and for states of
    # one channel, which leave registers for them
    if PRELOAD:
        parameters = load_parameters(
            mixing_ptr, norm_weight_ptr, value_weight_ptr, gate_weight_ptr, gate_bias_ptr,
            D, N, NUM_VALUES, BLOCK_D, NUM_BLOCKS, HAS_MIXING, HAS_HEADS, VALUE_ACTIVATION,
        )  # fmt: skip
        value_bias = load_scalars(value_bias_ptr, NUM_VALUES) if HAS_VALUE_BIAS else ()
    # An int64 index makes offsets int64
    for token in range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0)):
        next_token = tl.minimum(token + tl.num_programs(0), num_tokens - 1)
        prefetch(state_ptr + next_token * (N * D), N, D)
        if HAS_WRITE:
            prefetch(direction_ptr + next_token * D, 1, D)

        state = load_vectors(state_ptr + token * (N * D), N, D, BLOCK_D, NUM_BLOCKS)
        if HAS_WRITE:
            state = write_forward(
                state,
                direction_ptr,
                target_ptr,
                gate_ptr,
                keep_ptr,
                amplitude_ptr,
                readout_ptr,
                write_ptr,
                inv_key_norm_ptr,
                token,
                key_eps,
                D,
                N,
                BLOCK_D,
                NUM_BLOCKS,
                HAS_GATE,
                ERASE,
                HAS_KEEP,
                HAS_AMPLITUDE,
            )
            if HAS_KEEP:  # a converted Llama reads what the Llama would
                state = rounded(state, new_state_ptr, N * NUM_BLOCKS)
            if STORE_STATE:
                store_vectors(new_state_ptr + token * (N * D), state, N, D, BLOCK_D, NUM_BLOCKS)

        if not PRELOAD:
            parameters = load_parameters(
                mixing_ptr, norm_weight_ptr, value_weight_ptr, gate_weight_ptr, gate_bias_ptr,
                D, N, NUM_VALUES, BLOCK_D, NUM_BLOCKS, HAS_MIXING, HAS_HEADS, VALUE_ACTIVATION,
            )  # fmt: skip
        norm_weight, mixing, gate_weight, gate_bias, value_weight = parameters

        hidden = sum_of_products(state, mixing, N, NUM_BLOCKS) if HAS_MIXING else state
        # c = x · rstd ∘ g, so that the maps of c can be summed before rstd is known
        unscaled_context = multiply(hidden, norm_weight, 1, NUM_BLOCKS)
        terms = multiply(hidden, hidden, 1, NUM_BLOCKS)
        if HAS_HEADS:
            terms = terms + multiply(unscaled_context, gate_weight, 1, NUM_BLOCKS)
            if VALUE_ACTIVATION != 2:
                source = unscaled_context if VALUE_FROM_CONTEXT else hidden
                terms = terms + multiply(value_weight, source, NUM_VALUES, NUM_BLOCKS)
        num_sums: tl.constexpr = 1 if not HAS_HEADS else (2 if VALUE_ACTIVATION == 2 else 2 + NUM_VALUES)
        sums = sums_over_features(terms, num_sums, NUM_BLOCKS)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(sums[0] / D + norm_eps))
        normed = rounded(scale(hidden, rstd, NUM_BLOCKS), context_ptr, NUM_BLOCKS)  # as Llama's RMSNorm rounds
        store_vectors(context_ptr + token * D, multiply(normed, norm_weight, 1, NUM_BLOCKS), 1, D, BLOCK_D, NUM_BLOCKS)
        tl.store(rstd_ptr + token, rstd)

        if HAS_HEADS:
            gate_logit = sums[1] * rstd + gate_bias
            tl.store(new_gate_ptr + token, 2.0 * tl.sigmoid(gate_logit))
            if VALUE_ACTIVATION != 2:
                if HAS_VALUE_BIAS and not PRELOAD:
                    value_bias = load_scalars(value_bias_ptr, NUM_VALUES)
                for j in tl.static_range(NUM_VALUES):
                    value = sums[2 + j] * rstd if VALUE_FROM_CONTEXT else sums[2 + j]
                    if HAS_VALUE_BIAS:
                        value += value_bias[j]
                    if VALUE_ACTIVATION == 1:
                        value = tl.sigmoid(value)
                    tl.store(new_target_ptr + token * NUM_VALUES + j, value_scale * value)


@triton.jit
def replay(
    state,
    direction_ptr,
    write_ptr,
    token,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    first_feature,
):
    """`X + k̃ wᵀ`."""
    direction = load_vectors(direction_ptr + token * D, 1, D, BLOCK_D, NUM_BLOCKS, first_feature)
    return add_multiples(state, load_scalars(write_ptr + token * N, N), direction, N, NUM_BLOCKS)


@triton.jit
def rebuild_state(
    snapshot_ptr,
    replays,
    token,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_REPLAYS: tl.constexpr,
    first_feature=0,
):
    """The state before a write, from an earlier one and the writes since."""
    state = load_vectors(snapshot_ptr + token * (N * D), N, D, BLOCK_D, NUM_BLOCKS, first_feature)
    for i in tl.static_range(NUM_REPLAYS):
        direction_ptr, write_ptr = replays[2 * i], replays[2 * i + 1]
        state = replay(state, direction_ptr, write_ptr, token, N, D, BLOCK_D, NUM_BLOCKS, first_feature)
    return state


@triton.jit
def rebuild_kernel(
    snapshot_ptr,
    replays,
    state_ptr,
    num_tokens,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_VALUES: tl.constexpr,  # none, as there are no maps
    NUM_REPLAYS: tl.constexpr,
):
    tokens_per_program = tl.cdiv(num_tokens, tl.num_programs(0))
    begin = tl.program_id(0).to(tl.int64) * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)
    for token in range(begin, end):
        next_token = tl.minimum(token + 1, end - 1)
        prefetch(snapshot_ptr + next_token * (N * D), N, D)
        for i in tl.static_range(NUM_REPLAYS):
            prefetch(replays[2 * i] + next_token * D, 1, D)
        state = load_vectors(snapshot_ptr + token * (N * D), N, D, BLOCK_D, NUM_BLOCKS)
        for i in tl.static_range(NUM_REPLAYS):
            state = replay(state, replays[2 * i], replays[2 * i + 1], token, N, D, BLOCK_D, NUM_BLOCKS, 0)
            state = rounded(state, state_ptr, N * NUM_BLOCKS)  # as it was when it was first written
        store_vectors(state_ptr + token * (N * D), state, N, D, BLOCK_D, NUM_BLOCKS)


@triton.jit
def load_write_scalars(
    write_ptr,
    target_ptr,
    gate_ptr,
    readout_ptr,
    inv_key_norm_ptr,
    token,
    N: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ERASE: tl.constexpr,
):
    """w, v, β, Xᵀk and 1/‖k̃‖; w stands for those that the write has not."""
    write = load_scalars(write_ptr + token * N, N)
    target = load_scalars(target_ptr + token * N, N) if HAS_GATE else write
    gate = tl.load(gate_ptr + token) if HAS_GATE else write[0]
    readout = load_scalars(readout_ptr + token * N, N) if ERASE else write
    return write, target, gate, readout, tl.load(inv_key_norm_ptr + token)


@triton.jit
def write_backward(
    grad_state,
    direction,
    scalars,
    keep_ptr,
    grad_target_ptr,
    grad_gate_ptr,
    sum_keep,
    sum_amplitude,
    token,
    N: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ERASE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
):
    """
    The write (spec §5), with p = Gᵀk and q = β (1 − a) ∘ p, which is ‑∂(Xᵀk): ∂v = βp, ∂β = p·r, ∂X = G − k qᵀ,
    ∂k̃ = Gw − (Xq + k (β r·p − q·Xᵀk)) / ‖k̃‖, ∂a = β p ∘ Xᵀk, ∂b = Gᵀk̃; without erasing, q = 0.

    Stores ∂v and ∂β; returns ∂X, ∂k̃ without its term in X, the weights of that one, −q / ‖k̃‖, and the sums of ∂a and ∂b.
    """
    write, target, gate, readout, inv_key_norm = scalars
    projected = sums_over_features(multiply(grad_state, direction, N, NUM_BLOCKS), N, NUM_BLOCKS)  # ∂w = Gᵀk̃
    if HAS_AMPLITUDE:
        sum_amplitude = add(sum_amplitude, projected, N)
    grad_direction = sum_of_multiples(write, grad_state, N, NUM_BLOCKS)
    grad_erased = write
    if HAS_GATE:
        projected = scale(projected, inv_key_norm, N)
        grad_target = scale(projected, gate, N)
        error = target
        if ERASE:
            erased = readout
            grad_erased = grad_target
            if HAS_KEEP:
                keep = load_scalars(keep_ptr, N)
                erased = subtract(readout, products(keep, readout, N), N)
                grad_erased = subtract(grad_target, products(keep, grad_target, N), N)
                sum_keep = add(sum_keep, products(grad_target, readout, N), N)
            error = subtract(target, erased, N)
        store_scalars(grad_target_ptr + token * N, grad_target, N)
        tl.store(grad_gate_ptr + token, dot(projected, error, N))
        along_key = dot(grad_target, error, N)
        if ERASE:
            along_key -= dot(grad_erased, readout, N)
            grad_erased = scale(grad_erased, -inv_key_norm, N)
            grad_state = add_multiples(grad_state, grad_erased, direction, N, NUM_BLOCKS)
        factor = -along_key * inv_key_norm * inv_key_norm
        grad_direction = add_multiples(grad_direction, (factor,), direction, 1, NUM_BLOCKS)
    return grad_state, grad_direction, grad_erased, sum_keep, sum_amplitude


@triton.jit
def boundary_backward_kernel(
    snapshot_ptr,
    replays,  # direction and w of each write since the snapshot
    direction_ptr,
    target_ptr,
    gate_ptr,
    keep_ptr,
    readout_ptr,
    write_ptr,
    inv_key_norm_ptr,
    mixing_ptr,
    norm_weight_ptr,
    value_weight_ptr,
    gate_weight_ptr,
    rstd_ptr,
    new_target_ptr,
    new_gate_ptr,
    grad_new_state_ptr,
    grad_contexts,  # one for each reader
    grad_new_target_ptr,
    grad_new_gate_ptr,
    grad_state_ptr,
    grad_direction_ptr,
    grad_target_ptr,
    grad_gate_ptr,
    sums_ptr,  # per program: the sums of the parameters' gradients, one after the other as `parameter_sizes` says
    num_tokens,
    value_scale,
    ROW_LENGTH: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_REPLAYS: tl.constexpr,
    NUM_READERS: tl.constexpr,
    HAS_GRAD_STATE: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ERASE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
    HAS_MIXING: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    VALUE_FROM_CONTEXT: tl.constexpr,
    VALUE_ACTIVATION: tl.constexpr,
):
    sum_mixing = zeros(N * NUM_BLOCKS, BLOCK_D)
    sum_value_weight = zeros(NUM_VALUES * NUM_BLOCKS, BLOCK_D)
    sum_norm_weight = zeros(NUM_BLOCKS, BLOCK_D)
    sum_gate_weight = zeros(NUM_BLOCKS, BLOCK_D)
    sum_value_bias = zero_scalars(NUM_VALUES)
    sum_keep = zero_scalars(N)
    sum_amplitude = zero_scalars(N)
    sum_gate_bias = 0.0

    # Tokens that follow one another share the cache lines of their scalars
    program = tl.program_id(0).to(tl.int64)
    tokens_per_program = tl.cdiv(num_tokens, tl.num_programs(0))
    begin = program * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)
    for token in range(begin, end):
        next_token = tl.minimum(token + 1, end - 1)
        for i in tl.static_range(NUM_READERS):
            prefetch(grad_contexts[i] + next_token * D, 1, D)
        if HAS_GRAD_STATE:
            prefetch(grad_new_state_ptr + next_token * (N * D), N, D)
        prefetch(snapshot_ptr + next_token * (N * D), N, D)
        if HAS_WRITE:
            prefetch(direction_ptr + next_token * D, 1, D)
        for i in tl.static_range(NUM_REPLAYS):
            prefetch(replays[2 * i] + next_token * D, 1, D)

        # Read from the cache for every token: registers are for the sums
        norm_weight = load_vectors(norm_weight_ptr, 1, D, BLOCK_D, NUM_BLOCKS)
        if HAS_MIXING:
            mixing = load_vectors(mixing_ptr, N, D, BLOCK_D, NUM_BLOCKS)
        if HAS_HEADS:
            gate_weight = load_vectors(gate_weight_ptr, 1, D, BLOCK_D, NUM_BLOCKS)
            if VALUE_ACTIVATION != 2:
                value_weight = load_vectors(value_weight_ptr, NUM_VALUES, D, BLOCK_D, NUM_BLOCKS)

        grad_context = load_vectors(grad_contexts[0] + token * D, 1, D, BLOCK_D, NUM_BLOCKS)
        for i in tl.static_range(1, NUM_READERS):
            another = load_vectors(grad_contexts[i] + token * D, 1, D, BLOCK_D, NUM_BLOCKS)
            grad_context = add(grad_context, another, NUM_BLOCKS)
        rstd = tl.load(rstd_ptr + token)
        if HAS_GRAD_STATE:
            grad_state = load_vectors(grad_new_state_ptr + token * (N * D), N, D, BLOCK_D, NUM_BLOCKS)
        else:
            grad_state = zeros(N * NUM_BLOCKS, BLOCK_D)
        state = rebuild_state(
            snapshot_ptr,
            replays,
            token,
            D,
            N,
            BLOCK_D,
            NUM_BLOCKS,
            NUM_REPLAYS,
        )
        new_state = state
        if HAS_WRITE:
            direction = load_vectors(direction_ptr + token * D, 1, D, BLOCK_D, NUM_BLOCKS)
            scalars = load_write_scalars(
                write_ptr, target_ptr, gate_ptr, readout_ptr, inv_key_norm_ptr, token, N, HAS_GATE, ERASE
            )
            new_state = add_multiples(state, scalars[0], direction, N, NUM_BLOCKS)

        # Gate and target → context and hidden
        hidden = sum_of_products(new_state, mixing, N, NUM_BLOCKS) if HAS_MIXING else new_state
        normed = scale(hidden, rstd, NUM_BLOCKS)
        grad_hidden = zeros(NUM_BLOCKS, BLOCK_D)
        if HAS_HEADS:
            new_gate = tl.load(new_gate_ptr + token)
            grad_logit = tl.load(grad_new_gate_ptr + token) * new_gate * (1.0 - 0.5 * new_gate)  # β = 2σ
            context = multiply(normed, norm_weight, 1, NUM_BLOCKS)
            grad_context = add_multiples(grad_context, (grad_logit,), gate_weight, 1, NUM_BLOCKS)
            sum_gate_weight = add_multiples(sum_gate_weight, (grad_logit,), context, 1, NUM_BLOCKS)
            sum_gate_bias += grad_logit
            if VALUE_ACTIVATION != 2:
                grad_value = ()
                for j in tl.static_range(NUM_VALUES):
                    grad = tl.load(grad_new_target_ptr + token * NUM_VALUES + j)
                    if VALUE_ACTIVATION == 1:  # v = scale · σ
                        value = tl.load(new_target_ptr + token * NUM_VALUES + j)
                        grad_value = grad_value + (grad * value * (1.0 - value / value_scale),)
                    else:
                        grad_value = grad_value + (grad * value_scale,)
                grad_source = sum_of_multiples(grad_value, value_weight, NUM_VALUES, NUM_BLOCKS)
                if VALUE_FROM_CONTEXT:
                    grad_context = add(grad_context, grad_source, NUM_BLOCKS)
                    sum_value_weight = add_multiples(sum_value_weight, grad_value, context, NUM_VALUES, NUM_BLOCKS)
                else:
                    grad_hidden = grad_source
                    sum_value_weight = add_multiples(sum_value_weight, grad_value, hidden, NUM_VALUES, NUM_BLOCKS)
                sum_value_bias = add(sum_value_bias, grad_value, NUM_VALUES)

        # RMSNorm and compressor → state
        grad_normed = multiply(grad_context, norm_weight, 1, NUM_BLOCKS)
        mean = sums_over_features(multiply(grad_normed, normed, 1, NUM_BLOCKS), 1, NUM_BLOCKS)[0] / D
        sum_norm_weight = add_products(sum_norm_weight, grad_context, normed, 1, NUM_BLOCKS)
        grad_hidden = add_multiples(grad_hidden, (rstd,), grad_normed, 1, NUM_BLOCKS)
        grad_hidden = add_multiples(grad_hidden, (-rstd * mean,), normed, 1, NUM_BLOCKS)
        if HAS_MIXING:
            sum_mixing = add_products(sum_mixing, new_state, grad_hidden, N, NUM_BLOCKS)
            grad_state = add_products(grad_state, mixing, grad_hidden, N, NUM_BLOCKS)
        else:
            grad_state = add(grad_state, grad_hidden, NUM_BLOCKS)

        if HAS_WRITE:
            grad_state, grad_direction, grad_erased, sum_keep, sum_amplitude = write_backward(
                grad_state,
                direction,
                scalars,
                keep_ptr,
                grad_target_ptr,
                grad_gate_ptr,
                sum_keep,
                sum_amplitude,
                token,
                N,
                NUM_BLOCKS,
                HAS_GATE,
                ERASE,
                HAS_KEEP,
                HAS_AMPLITUDE,
            )
            if ERASE:
                read = sum_of_multiples(grad_erased, state, N, NUM_BLOCKS)
                grad_direction = add(grad_direction, read, NUM_BLOCKS)
            store_vectors(grad_direction_ptr + token * D, grad_direction, 1, D, BLOCK_D, NUM_BLOCKS)
        store_vectors(grad_state_ptr + token * (N * D), grad_state, N, D, BLOCK_D, NUM_BLOCKS)

    sums_ptr += program * ROW_LENGTH
    store_vectors(sums_ptr, sum_mixing, N, D, BLOCK_D, NUM_BLOCKS)
    store_vectors(sums_ptr + N * D, sum_value_weight, NUM_VALUES, D, BLOCK_D, NUM_BLOCKS)
    store_vectors(sums_ptr + (N + NUM_VALUES) * D, sum_norm_weight, 1, D, BLOCK_D, NUM_BLOCKS)
    store_vectors(sums_ptr + (N + NUM_VALUES + 1) * D, sum_gate_weight, 1, D, BLOCK_D, NUM_BLOCKS)
    scalars_ptr = sums_ptr + (N + NUM_VALUES + 2) * D
    store_scalars(scalars_ptr, sum_value_bias, NUM_VALUES)
    tl.store(scalars_ptr + NUM_VALUES, sum_gate_bias)
    store_scalars(scalars_ptr + NUM_VALUES + 1, sum_keep, N)
    store_scalars(scalars_ptr + N + NUM_VALUES + 1, sum_amplitude, N)


VALUE_ACTIVATIONS = {None: 0, "sigmoid": 1, "constant": 2}


def vector_sizes(n: int, d: int, largest_block: int = 512) -> dict[str, int]:
    """Compile-time sizes for a state `[tokens, n, d]`."""
    # The largest block that wastes least
    blocks = (2**i for i in range(7, largest_block.bit_length()))
    block_d = min(blocks, key=lambda block: (triton.cdiv(d, block) * block, -block))
    return {"D": d, "N": n, "BLOCK_D": block_d, "NUM_BLOCKS": triton.cdiv(d, block_d)}


@functools.cache
def launch_sizes(n: int, d: int, num_values: int, backward: bool) -> dict[str, int]:
    """Compile-time sizes for a state `[tokens, n, d]`, as measured best on an H200 (`benchmarks/NOTES.md`)."""
    if backward:
        # Each program keeps the sums of the parameters' gradients in registers: at most 80 of a thread
        num_sums = (n + num_values + 2) * d
        num_warps = max(2 if num_sums <= 4096 else 4, triton.next_power_of_2(num_sums // 2560))
    else:
        num_warps = max(2, triton.next_power_of_2(triton.cdiv(n * d, 1536)))
    return {**vector_sizes(n, d), "NUM_VALUES": num_values, "num_warps": min(num_warps, 32)}


def programs_per_multiprocessor(num_registers: int, num_warps: int, gpu) -> int:
    """
    As many of `num_warps` warps as the registers, so many for each thread, and threads of a GPU's properties allow. Registers lie in
    four files, of which each warp uses one.
    """
    registers_per_warp = triton.cdiv(num_registers, 8) * 8 * gpu.warp_size
    max_warps = gpu.max_threads_per_multi_processor // gpu.warp_size
    return max(min(4 * (gpu.regs_per_multiprocessor // 4 // registers_per_warp), max_warps) // num_warps, 1)


_resident_programs: dict[tuple, int] = {}


def resident_programs(kernel: Callable, *args, **sizes) -> int:
    """
    How many programs of a kernel, launched with such arguments, all multiprocessors hold at a time. Where each takes an equal
    share of the tokens there should be as many: a second round would take as long as the first.
    """
    if triton.knobs.runtime.interpret:
        return 2
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))

    def kind(arg):
        if isinstance(arg, torch.Tensor):
            return arg.dtype
        if isinstance(arg, int):  # 1 and multiples of 16 are compiled for themselves
            return arg == 1, arg % 16 == 0
        return tuple(map(kind, arg)) if isinstance(arg, tuple) else type(arg)

    key = (kernel, device, kind(args), *sizes.items())
    if key not in _resident_programs:
        compiled = kernel.warmup(*args, grid=(1,), **sizes)
        compiled._init_handles()
        gpu = torch.cuda.get_device_properties(device)
        programs = programs_per_multiprocessor(compiled.n_regs, compiled.metadata.num_warps, gpu)
        _resident_programs[key] = programs * gpu.multi_processor_count
    return _resident_programs[key]


def on_its_device(function: Callable) -> Callable:
    """The function on the device of its first argument: Triton launches on the current one, which may be another GPU."""

    @functools.wraps(function)
    def launch(tensor: torch.Tensor, *args):
        with torch.cuda.device_of(tensor):
            return function(tensor, *args)

    return launch


class Operation:
    """
    A function that launches kernels as an operation of torch, `custom_op`, which is what programs see. Torch looks at each of
    its arguments several times, which takes longer than all else (`benchmarks/NOTES.md`). In eager execution, the
    function itself is called instead, and differentiated by an autograd function.
    """

    def __init__(self, function: Callable, name: str):
        self.launch = on_its_device(function)
        self.custom_op = torch.library.custom_op(f"{NAMESPACE}::{name}", self.launch, mutates_args=())
        self.launch_with_gradients = self.custom_op  # which raises an error if it is to be differentiated
        self.register_fake = self.custom_op.register_fake

    def register_autograd(self, backward: Callable, setup_context: Callable):
        """As `torch.library.register_autograd`."""
        self.custom_op.register_autograd(backward, setup_context=setup_context)
        returns_list = self.launch.__annotations__["return"] == list[torch.Tensor]

        def forward(ctx, *args):
            outputs = self.launch(*args)
            setup_context(ctx, args, outputs)
            return tuple(outputs) if returns_list else outputs

        def backward_of_all(ctx, *grads):
            grads = backward(ctx, grads) if returns_list else backward(ctx, *grads)
            return tuple(None if isinstance(grad, list) else grad for grad in grads)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
        self.launch_with_gradients = type(self.launch.__name__, (torch.autograd.Function,), methods).apply

    def __call__(self, *args):
        # Compilers, tracers, modes of dispatch, `torch.func` and subclasses of tensors want to see an operation
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.custom_op(*args)
        if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
            return self.custom_op(*args)
        if any(isinstance(arg, torch.Tensor) and type(arg) not in (torch.Tensor, torch.nn.Parameter) for arg in args):
            return self.custom_op(*args)
        return self.launch_with_gradients(*args) if torch.is_grad_enabled() else self.launch(*args)


def operation(name: str) -> Callable[[Callable], Operation]:
    """Makes an `Operation` of the function that is decorated."""
    return functools.partial(Operation, name=name)


# Every operation takes tokens in one dimension: state `[tokens, n, d]`, direction and context `[tokens, d]`, target
# `[tokens, n]`, gate `[tokens]`, keep and amplitude `[n]`, the new target `[tokens, num_values]`. `direction` is None where
# there is no write before, target and gate, keep, amplitude where the write has none, and the maps of gate and value where
# no gated sublayer begins. The readout needs no new state (`begins_sublayer`). The backward pass rebuilds the state from
# `snapshot`, an earlier state, and `replays`, direction and w of each write since.


@operation("boundary")
def boundary_op(
    state: torch.Tensor,
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    keep: torch.Tensor | None,
    amplitude: torch.Tensor | None,
    mixing: torch.Tensor | None,
    norm_weight: torch.Tensor,
    value_weight: torch.Tensor | None,
    value_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    snapshot: torch.Tensor,
    replays: list[torch.Tensor],
    key_eps: float,
    norm_eps: float,
    num_values: int,
    value_scale: float,
    value_activation: int,
    value_from_context: bool,
    erase: bool,
    begins_sublayer: bool,
    num_readers: int,
) -> list[torch.Tensor]:
    """
    Returns new state, context, new target, new gate and, for the backward pass, Xᵀk, w, 1/‖k̃‖ and 1/rms, then receivers of the context's
    gradient for all of `num_readers` but the first (`hand_out`).
    """
    outputs = boundary_outputs(state, direction, gate_weight, num_values, begins_sublayer, num_readers)
    new_state, context, new_target, new_gate, readout, write, inv_key_norm, rstd, *_ = outputs
    if value_activation == VALUE_ACTIVATIONS["constant"]:
        new_target.fill_(value_scale)
    if state.shape[0] > 0:
        args = (
            state, direction, target, gate, keep, amplitude,
            mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias,
            new_state, context, new_target, new_gate, readout, write, inv_key_norm, rstd,
            state.shape[0], key_eps, norm_eps, value_scale,
        )  # fmt: skip
        options = dict(
            HAS_WRITE=direction is not None, HAS_GATE=gate is not None, ERASE=erase,
            HAS_KEEP=keep is not None, HAS_AMPLITUDE=amplitude is not None,
            STORE_STATE=begins_sublayer, HAS_MIXING=mixing is not None,
            HAS_HEADS=gate_weight is not None, HAS_VALUE_BIAS=value_bias is not None,
            VALUE_FROM_CONTEXT=value_from_context, VALUE_ACTIVATION=value_activation,
            **launch_sizes(*state.shape[1:], num_values, backward=False),
        )  # fmt: skip
        # Resident programs, 132 or more on an H200, depend on it. For 16 warps there are no registers for the parameters
        num_tokens, n, d = state.shape
        registers = (2 + num_values + (0 if mixing is None else n)) * d // (32 * options["num_warps"])
        if num_tokens <= 128:
            options["PRELOAD"] = options["num_warps"] <= 8 and registers <= 192
        else:
            options["PRELOAD"] = n == 1 and registers <= 96
        if direction is not None and options["num_warps"] == 8 and not options["PRELOAD"] and torch.version.cuda:
            options["maxnreg"] = 128  # room for two programs on a multiprocessor
        num_programs = resident_programs(boundary_forward_kernel, *args, **options)
        boundary_forward_kernel[min(num_programs, state.shape[0]),](*args, **options)
    return outputs


def boundary_outputs(
    state: torch.Tensor,
    direction: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    num_values: int,
    begins_sublayer: bool,
    num_readers: int,
) -> list[torch.Tensor]:
    num_tokens, n, d = state.shape
    num_writes = 0 if direction is None else num_tokens
    num_heads = 0 if gate_weight is None else num_tokens
    return [
        state.new_empty(num_writes if begins_sublayer else 0, n, d),
        state.new_empty(num_tokens, d),
        state.new_empty(num_heads, num_values, dtype=torch.float32),
        state.new_empty(num_heads, dtype=torch.float32),
        state.new_empty(num_writes, n, dtype=torch.float32),
        state.new_empty(num_writes, n, dtype=torch.float32),
        state.new_empty(num_writes, dtype=torch.float32),
        state.new_empty(num_tokens, dtype=torch.float32),
        *(state.new_empty(1, 1).expand(num_tokens, d) for _ in range(1, num_readers)),
    ]


@boundary_op.register_fake
def _(state, direction, *args):
    gate_weight, num_values, begins_sublayer, num_readers = args[8], args[14], *args[-2:]
    return boundary_outputs(state, direction, gate_weight, num_values, begins_sublayer, num_readers)


@operation("boundary_backward")
def boundary_backward_op(
    snapshot: torch.Tensor,
    replays: list[torch.Tensor],
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    keep: torch.Tensor | None,
    amplitude: torch.Tensor | None,
    readout: torch.Tensor,
    write: torch.Tensor,
    inv_key_norm: torch.Tensor,
    mixing: torch.Tensor | None,
    norm_weight: torch.Tensor,
    value_weight: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    new_target: torch.Tensor,
    new_gate: torch.Tensor,
    rstd: torch.Tensor,
    grad_new_state: torch.Tensor | None,
    grad_contexts: list[torch.Tensor],
    grad_new_target: torch.Tensor | None,
    grad_new_gate: torch.Tensor | None,
    num_values: int,
    value_scale: float,
    value_activation: int,
    value_from_context: bool,
    erase: bool,
) -> list[torch.Tensor]:
    """Returns the gradients of state, direction, target and gate, then in float32 those of the parameters, as `parameter_sizes` says."""
    num_tokens, n, d = snapshot.shape
    outputs = boundary_backward_outputs(snapshot, direction, target, gate, num_values)
    if num_tokens == 0:
        return [output.zero_() for output in outputs]
    *per_token, grad_parameters = outputs
    row_length = triton.cdiv(len(grad_parameters), 4) * 4  # each begins at a multiple of 16 bytes
    args = (
        snapshot, tuple(replays), direction, target, gate, keep,
        readout, write, inv_key_norm, mixing, norm_weight, value_weight, gate_weight, rstd, new_target, new_gate,
        grad_new_state, tuple(grad_contexts), grad_new_target, grad_new_gate, *per_token,
    )  # fmt: skip
    options = dict(
        NUM_REPLAYS=len(replays) // 2, NUM_READERS=len(grad_contexts),
        HAS_GRAD_STATE=grad_new_state is not None, HAS_WRITE=direction is not None,
        HAS_GATE=gate is not None, ERASE=erase, HAS_KEEP=keep is not None, HAS_AMPLITUDE=amplitude is not None,
        HAS_MIXING=mixing is not None, HAS_HEADS=gate_weight is not None,
        VALUE_FROM_CONTEXT=value_from_context, VALUE_ACTIVATION=value_activation,
        ROW_LENGTH=row_length, **launch_sizes(n, d, num_values, backward=True),
    )  # fmt: skip
    sizes = num_tokens, value_scale
    num_programs = resident_programs(boundary_backward_kernel, *args, grad_parameters, *sizes, **options)
    num_programs = min(num_programs, num_tokens)
    sums = grad_parameters.new_empty(num_programs, row_length)
    boundary_backward_kernel[num_programs,](*args, sums, *sizes, **options)
    # In two steps, or PyTorch would have few threads add up hundreds of rows, which are multiples of 132 on an H200
    sums = sums.unflatten(0, (-1, math.gcd(num_programs, 12))).sum(1).sum(0)
    return [*per_token, sums[: len(grad_parameters)]]


def parameter_sizes(n: int, d: int, num_values: int) -> list[int]:
    """Of mixing, value map, norm weight, gate map, value bias, gate bias, keep and amplitude, as the backward kernel stores their gradients."""
    return [n * d, num_values * d, d, d, num_values, 1, n, n]


def boundary_backward_outputs(
    snapshot: torch.Tensor,
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    num_values: int,
) -> list[torch.Tensor]:
    num_tokens, n, d = snapshot.shape
    return [
        snapshot.new_empty(num_tokens, n, d),
        *(
            snapshot.new_empty(0) if tensor is None else torch.empty_like(tensor)
            for tensor in (direction, target, gate)
        ),
        snapshot.new_empty(sum(parameter_sizes(n, d, num_values)), dtype=torch.float32),
    ]


@boundary_backward_op.register_fake
def _(snapshot, replays, direction, target, gate, *args):
    return boundary_backward_outputs(snapshot, direction, target, gate, num_values=args[-5])


@operation("rebuild")
def rebuild_op(snapshot: torch.Tensor, replays: list[torch.Tensor]) -> torch.Tensor:
    """Returns the state after all replayed writes."""
    state = torch.empty_like(snapshot)
    num_tokens, n, d = snapshot.shape
    if num_tokens > 0:
        options = {"NUM_REPLAYS": len(replays) // 2, **launch_sizes(n, d, num_values=0, backward=False)}
        args = snapshot, tuple(replays), state, num_tokens
        num_programs = resident_programs(rebuild_kernel, *args, **options)
        rebuild_kernel[min(num_programs, num_tokens),](*args, **options)
    return state


@rebuild_op.register_fake
def _(snapshot, replays):
    return torch.empty_like(snapshot)


def last_of_history(snapshot: torch.Tensor, replays: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    A state of which at most MAX_REPLAYS writes are left to be replayed, rebuilt from the one before, and so on from the snapshot. A compiled
    program computes each of these states once, all before its first backward kernel, when what the loss took is free again. Elsewhere
    each boundary computes those that it needs.
    """
    length = 2 * (MAX_REPLAYS + 1)
    while len(replays) >= length:
        snapshot, replays = rebuild_op(snapshot, replays[:length]), replays[length:]
    return snapshot, replays


def setup_context(ctx, inputs, output):
    (
        state, direction, target, gate, keep, amplitude,
        mixing, norm_weight, value_weight, value_bias, gate_weight, gate_bias,
        snapshot, replays, key_eps, norm_eps, *ctx.options, ctx.begins_sublayer, _,
    ) = inputs  # fmt: skip
    new_state, context, new_target, new_gate, readout, write, inv_key_norm, rstd, *_ = output
    ctx.mark_non_differentiable(readout, write, inv_key_norm, rstd)
    ctx.set_materialize_grads(False)
    ctx.num_replays = len(replays)
    parameters = (mixing, value_weight, norm_weight, gate_weight, value_bias, gate_bias, keep, amplitude)
    ctx.parameter_dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
    ctx.save_for_backward(
        snapshot, *replays, direction, target, gate, keep, amplitude, readout, write, inv_key_norm,
        mixing, norm_weight, value_weight, gate_weight, new_target, new_gate, rstd,
    )  # fmt: skip


def backward(ctx, grads):
    grad_new_state, grad_context, grad_new_target, grad_new_gate, _, _, _, _, *grad_contexts = grads
    snapshot, *saved = ctx.saved_tensors
    replays, saved = saved[: ctx.num_replays], saved[ctx.num_replays :]
    snapshot, replays = last_of_history(snapshot, replays)
    direction, target, gate = saved[:3]
    new_target, new_gate, _ = saved[-3:]
    n, d = snapshot.shape[1:]

    # Gradients are None for outputs that nothing used
    grad_contexts = [grad.contiguous() for grad in (grad_context, *grad_contexts) if grad is not None]
    if not grad_contexts:
        grad_contexts = [snapshot.new_zeros(snapshot.shape[0], snapshot.shape[2])]
    if new_gate.shape[0] > 0:
        grad_new_target = torch.zeros_like(new_target) if grad_new_target is None else grad_new_target.contiguous()
        grad_new_gate = torch.zeros_like(new_gate) if grad_new_gate is None else grad_new_gate.contiguous()
    if grad_new_state is not None:
        grad_new_state = grad_new_state.contiguous() if direction is not None and ctx.begins_sublayer else None

    grad_state, *grad_write, grad_parameters = boundary_backward_op(
        snapshot, replays, *saved, grad_new_state, grad_contexts, grad_new_target, grad_new_gate,
        *ctx.options,
    )  # fmt: skip
    grad_write = [
        None if tensor is None else grad for tensor, grad in zip((direction, target, gate), grad_write, strict=True)
    ]
    num_values = ctx.options[0]
    grad_mixing, grad_value_weight, *grad_vectors = grad_parameters.split(parameter_sizes(n, d, num_values))
    parameter_grads = (grad_mixing.view(n, d), grad_value_weight.view(num_values, d), *grad_vectors)
    (
        grad_mixing, grad_value_weight, grad_norm_weight, grad_gate_weight,
        grad_value_bias, grad_gate_bias, grad_keep, grad_amplitude,
    ) = (
        None if dtype is None else grad.to(dtype) for grad, dtype in zip(parameter_grads, ctx.parameter_dtypes, strict=True)
    )  # fmt: skip
    return (
        grad_state, *grad_write, grad_keep, grad_amplitude, grad_mixing, grad_norm_weight,
        grad_value_weight, grad_value_bias, grad_gate_weight, grad_gate_bias,
        None, [None] * ctx.num_replays, *[None] * 9,
    )  # fmt: skip


boundary_op.register_autograd(backward, setup_context=setup_context)


class HandOut(torch.autograd.Function):
    """See `hand_out`."""

    @staticmethod
    def forward(ctx, context: torch.Tensor, *receivers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # of what nothing reads, there is none to add
        return tuple(context.view_as(context) for _ in (context, *receivers))

    @staticmethod
    def backward(ctx, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads


# Dynamo would make a higher-order operation of an autograd function, and DDP could not cut compiled programs in two
@torch.compiler.allow_in_graph
def hand_out(context: torch.Tensor, *receivers: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    The context `[tokens, d]`, and once more for each receiver from `boundary_op`. What reads one of them gives that a gradient, which
    reaches the backward kernel by the receiver, a tensor of the same shape whose values nothing reads: the kernel adds up what
    autograd would otherwise add up in kernels of their own.
    """
    return HandOut.apply(context, *receivers) if receivers else (context,)


# Or torch would not store compiled programs with it from one process to the next; what it stores holds for this source
torch._inductor.config.unsafe_marked_cacheable_functions[f"{__name__}.{hand_out.__name__}"] = hashlib.sha256(
    Path(__file__).read_bytes()
).hexdigest()
