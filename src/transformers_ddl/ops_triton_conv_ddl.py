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
Triton kernels of the boundary between two sublayers for states that are compressed over tokens (DDL-TC): the delta rewrite
that ends one and the token convolution x[t] = Σ_τ Σ_j M[τ, j] ∘ X[t − K + 1 + τ, j], in one pass over the state. What follows
upon x, RMSNorm, gate and target, is that of `boundary_op` for a state of one channel.

Programs walk along tokens, forwards for x, which they sum for K tokens at once, and backwards for the gradient of X, which
needs those of the K − 1 tokens after it. The notation is that of `ops_triton_ddl`.

And the embedding convolution X[t, j] = Σ_τ M[τ, j] ∘ e[t − K + 1 + τ] (EC).
"""

from collections.abc import Callable

import torch
from transformers.utils.import_utils import is_triton_available

from .ops_triton_ddl import (
    add,
    add_products,
    last_of_history,
    load_scalars,
    load_vectors,
    load_write_scalars,
    operation,
    prefetch,
    rebuild_state,
    replay,
    resident_programs,
    rounded,
    store_scalars,
    store_vectors,
    sum_of_multiples,
    vector_sizes,
    write_backward,
    write_forward,
    zero_scalars,
    zeros,
)


# Always true here. Transformers refuses to load remote code with an import that is missing, unless under such a condition
if is_triton_available():
    import triton
    import triton.language as tl


@triton.jit
def locate(position, order_ptr, segment_ptr, seq_length, HAS_ORDER: tl.constexpr):
    """The token at a position of the walk and the segment it may be read with, negative for padding."""
    if HAS_ORDER:
        token = tl.load(order_ptr + position)
        segment = tl.load(segment_ptr + position)
    else:
        token = position
        segment = position // seq_length
    return token.to(tl.int64), segment  # int64 makes offsets int64


@triton.jit
def zero_unless(condition, values, LENGTH: tl.constexpr):
    results = ()
    for i in tl.static_range(LENGTH):
        results = results + (tl.where(condition, values[i], 0.0),)
    return results


@triton.jit
def add_sum_of_products(values, left, right, COUNT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """`values + Σ_j left[j] ∘ right[j]`."""
    results = ()
    for b in tl.static_range(NUM_BLOCKS):
        total = values[b]
        for j in tl.static_range(COUNT):
            total += left[j * NUM_BLOCKS + b] * right[j * NUM_BLOCKS + b]
        results = results + (total,)
    return results


@triton.jit(do_not_specialize=["chunk_length"])
def convolution_forward_kernel(
    state_ptr,
    direction_ptr,
    target_ptr,
    gate_ptr,
    keep_ptr,
    amplitude_ptr,
    mixing_ptr,
    order_ptr,
    segment_ptr,
    new_state_ptr,
    hidden_ptr,
    readout_ptr,
    write_ptr,
    inv_key_norm_ptr,
    key_eps,
    num_tokens,
    seq_length,
    chunk_length,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ERASE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
    STORE_STATE: tl.constexpr,
):
    PAST: tl.constexpr = (KERNEL_SIZE - 1) * NUM_BLOCKS
    begin = tl.program_id(0) * chunk_length
    partial = zeros(PAST, BLOCK_D)  # of the next K - 1 tokens' x, what is known
    last_segment = -1
    # Each chunk computes the K - 1 tokens before it once more
    for position in range(tl.maximum(begin - KERNEL_SIZE + 1, 0), tl.minimum(begin + chunk_length, num_tokens)):
        next_token, _ = locate(tl.minimum(position + 1, num_tokens - 1), order_ptr, segment_ptr, seq_length, HAS_ORDER)
        prefetch(state_ptr + next_token * (N * D), N, D)
        if HAS_WRITE:
            prefetch(direction_ptr + next_token * D, 1, D)

        token, segment = locate(position, order_ptr, segment_ptr, seq_length, HAS_ORDER)
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
                if position >= begin:
                    store_vectors(new_state_ptr + token * (N * D), state, N, D, BLOCK_D, NUM_BLOCKS)

        partial = zero_unless(segment == last_segment, partial, PAST) + zeros(NUM_BLOCKS, BLOCK_D)
        last_segment = segment
        sums = ()
        for i in tl.static_range(KERNEL_SIZE):
            tap_ptr = mixing_ptr + (KERNEL_SIZE - 1 - i) * (N * D)
            tap = load_vectors(tap_ptr, N, D, BLOCK_D, NUM_BLOCKS)
            known = partial[i * NUM_BLOCKS : (i + 1) * NUM_BLOCKS]
            sums = sums + add_sum_of_products(known, state, tap, N, NUM_BLOCKS)
        partial = sums[NUM_BLOCKS:]
        if position >= begin:
            hidden = zero_unless(segment >= 0, sums, NUM_BLOCKS)
            store_vectors(hidden_ptr + token * D, hidden, 1, D, BLOCK_D, NUM_BLOCKS)


@triton.jit
def gradients_after(
    grad_hidden_ptr,
    position,
    order_ptr,
    segment_ptr,
    num_tokens,
    seq_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    first_feature=0,
):
    """∂x of the K − 1 tokens after a position in its segment, 0 where there are less, and the segment."""
    _, segment = locate(position, order_ptr, segment_ptr, seq_length, HAS_ORDER)
    later = ()
    for i in tl.static_range(1, KERNEL_SIZE):
        token, its_segment = locate(
            tl.minimum(position + i, num_tokens - 1), order_ptr, segment_ptr, seq_length, HAS_ORDER
        )
        gradient = load_vectors(grad_hidden_ptr + token * D, 1, D, BLOCK_D, NUM_BLOCKS, first_feature)
        is_read = (position + i < num_tokens) & (its_segment == segment) & (segment >= 0)
        later = later + zero_unless(is_read, gradient, NUM_BLOCKS)
    return later, segment


@triton.jit(do_not_specialize=["chunk_length"])
def convolution_backward_state_kernel(
    direction_ptr,
    target_ptr,
    gate_ptr,
    keep_ptr,
    readout_ptr,
    write_ptr,
    inv_key_norm_ptr,
    mixing_ptr,
    order_ptr,
    segment_ptr,
    grad_new_state_ptr,
    grad_hidden_ptr,
    grad_state_ptr,
    grad_direction_ptr,  # without the term in X
    grad_erased_ptr,  # the weights of that term, `[n]` per token
    grad_target_ptr,
    grad_gate_ptr,
    grad_scalars_ptr,  # per program: [2n] sums of the gradients of kept share and amplitude
    num_tokens,
    seq_length,
    chunk_length,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_GRAD_STATE: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ERASE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
):
    begin = tl.program_id(0) * chunk_length
    end = tl.minimum(begin + chunk_length, num_tokens)
    later, last_segment = gradients_after(
        grad_hidden_ptr,
        end - 1,
        order_ptr,
        segment_ptr,
        num_tokens,
        seq_length,
        D,
        BLOCK_D,
        NUM_BLOCKS,
        KERNEL_SIZE,
        HAS_ORDER,
    )
    sum_keep = zero_scalars(N)
    sum_amplitude = zero_scalars(N)
    for step in range(end - begin):
        next_token, _ = locate(tl.maximum(end - 2 - step, 0), order_ptr, segment_ptr, seq_length, HAS_ORDER)
        prefetch(grad_hidden_ptr + next_token * D, 1, D)
        if HAS_GRAD_STATE:
            prefetch(grad_new_state_ptr + next_token * (N * D), N, D)
        if HAS_WRITE:
            prefetch(direction_ptr + next_token * D, 1, D)

        token, segment = locate(end - 1 - step, order_ptr, segment_ptr, seq_length, HAS_ORDER)
        grad_hidden = load_vectors(grad_hidden_ptr + token * D, 1, D, BLOCK_D, NUM_BLOCKS)
        if HAS_GRAD_STATE:
            grad_state = load_vectors(grad_new_state_ptr + token * (N * D), N, D, BLOCK_D, NUM_BLOCKS)
        else:
            grad_state = zeros(N * NUM_BLOCKS, BLOCK_D)
        if HAS_WRITE:
            direction = load_vectors(direction_ptr + token * D, 1, D, BLOCK_D, NUM_BLOCKS)
            scalars = load_write_scalars(
                write_ptr, target_ptr, gate_ptr, readout_ptr, inv_key_norm_ptr, token, N, HAS_GATE, ERASE
            )

        grad_hidden = zero_unless(segment >= 0, grad_hidden, NUM_BLOCKS)
        later = zero_unless(segment == last_segment, later, (KERNEL_SIZE - 1) * NUM_BLOCKS)
        last_segment = segment
        window = grad_hidden + later
        for i in tl.static_range(KERNEL_SIZE):
            tap_ptr = mixing_ptr + (KERNEL_SIZE - 1 - i) * (N * D)
            tap = load_vectors(tap_ptr, N, D, BLOCK_D, NUM_BLOCKS)
            gradient = window[i * NUM_BLOCKS : (i + 1) * NUM_BLOCKS]
            grad_state = add_products(grad_state, tap, gradient, N, NUM_BLOCKS)
        later = window[: (KERNEL_SIZE - 1) * NUM_BLOCKS]

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
                store_scalars(grad_erased_ptr + token * N, grad_erased, N)
            store_vectors(grad_direction_ptr + token * D, grad_direction, 1, D, BLOCK_D, NUM_BLOCKS)
        store_vectors(grad_state_ptr + token * (N * D), grad_state, N, D, BLOCK_D, NUM_BLOCKS)

    scalars_ptr = grad_scalars_ptr + tl.program_id(0) * (2 * N)
    store_scalars(scalars_ptr, sum_keep, N)
    store_scalars(scalars_ptr + N, sum_amplitude, N)


@triton.jit(do_not_specialize=["chunk_length"])
def convolution_backward_mixing_kernel(
    snapshot_ptr,
    replays,  # direction and w of each write since the snapshot
    direction_ptr,
    write_ptr,
    order_ptr,
    segment_ptr,
    grad_hidden_ptr,
    grad_erased_ptr,
    grad_direction_ptr,  # gets its term in X
    grad_mixing_ptr,  # per chunk: [K, n, d]
    num_tokens,
    seq_length,
    chunk_length,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    NUM_REPLAYS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    ERASE: tl.constexpr,
):
    # What needs no sums over features: a program has one block of them
    first_feature = tl.program_id(0) * BLOCK_D
    begin = tl.program_id(1) * chunk_length
    end = tl.minimum(begin + chunk_length, num_tokens)
    later, last_segment = gradients_after(
        grad_hidden_ptr,
        end - 1,
        order_ptr,
        segment_ptr,
        num_tokens,
        seq_length,
        D,
        BLOCK_D,
        1,
        KERNEL_SIZE,
        HAS_ORDER,
        first_feature,
    )
    sum_mixing = zeros(KERNEL_SIZE * N, BLOCK_D)
    # What is prefetched of a vector ends where the vector does
    block_size: tl.constexpr = min(BLOCK_D, D)
    first_prefetched = tl.minimum(first_feature, D - block_size)
    for step in range(end - begin):
        next_token, _ = locate(tl.maximum(end - 2 - step, 0), order_ptr, segment_ptr, seq_length, HAS_ORDER)
        prefetch(grad_hidden_ptr + next_token * D + first_prefetched, 1, block_size)
        for j in tl.static_range(N):
            prefetch(snapshot_ptr + next_token * (N * D) + j * D + first_prefetched, 1, block_size)
        for i in tl.static_range(NUM_REPLAYS):
            prefetch(replays[2 * i] + next_token * D + first_prefetched, 1, block_size)
        if HAS_WRITE:
            prefetch(direction_ptr + next_token * D + first_prefetched, 1, block_size)
            if ERASE:
                prefetch(grad_direction_ptr + next_token * D + first_prefetched, 1, block_size)

        token, segment = locate(end - 1 - step, order_ptr, segment_ptr, seq_length, HAS_ORDER)
        grad_hidden = load_vectors(grad_hidden_ptr + token * D, 1, D, BLOCK_D, 1, first_feature)
        state = rebuild_state(
            snapshot_ptr,
            replays,
            token,
            D,
            N,
            BLOCK_D,
            1,
            NUM_REPLAYS,
            first_feature,
        )
        if HAS_WRITE:
            if ERASE:
                grad_direction = load_vectors(grad_direction_ptr + token * D, 1, D, BLOCK_D, 1, first_feature)
                read = sum_of_multiples(load_scalars(grad_erased_ptr + token * N, N), state, N, 1)
                grad_direction = add(grad_direction, read, 1)
                store_vectors(grad_direction_ptr + token * D, grad_direction, 1, D, BLOCK_D, 1, first_feature)
            state = replay(state, direction_ptr, write_ptr, token, N, D, BLOCK_D, 1, first_feature)

        later = zero_unless(segment == last_segment, later, KERNEL_SIZE - 1)
        last_segment = segment
        if HAS_ORDER:
            grad_hidden = zero_unless(segment >= 0, grad_hidden, 1)
            state = zero_unless(segment >= 0, state, N)  # which may be infinite
        window = grad_hidden + later
        sums = ()
        for tap in tl.static_range(KERNEL_SIZE):
            sum_tap = sum_mixing[tap * N : (tap + 1) * N]
            gradient = window[KERNEL_SIZE - 1 - tap : KERNEL_SIZE - tap]
            sums = sums + add_products(sum_tap, state, gradient, N, 1)
        sum_mixing = sums
        later = window[: KERNEL_SIZE - 1]

    rows_ptr = grad_mixing_ptr + tl.program_id(1) * (KERNEL_SIZE * N * D)
    store_vectors(rows_ptr, sum_mixing, KERNEL_SIZE * N, D, BLOCK_D, 1, first_feature)


@triton.jit(do_not_specialize=["chunk_length"])
def expansion_forward_kernel(
    embeddings_ptr,
    mixing_ptr,
    order_ptr,
    segment_ptr,
    state_ptr,
    num_tokens,
    seq_length,
    chunk_length,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    first_feature = tl.program_id(0) * BLOCK_D
    begin = tl.program_id(1) * chunk_length
    mixing = load_vectors(mixing_ptr, KERNEL_SIZE * N, D, BLOCK_D, 1, first_feature)
    earlier = zeros(KERNEL_SIZE - 1, BLOCK_D)  # e of the K − 1 tokens before
    last_segment = -1
    for position in range(tl.maximum(begin - KERNEL_SIZE + 1, 0), tl.minimum(begin + chunk_length, num_tokens)):
        token, segment = locate(position, order_ptr, segment_ptr, seq_length, HAS_ORDER)
        embedding = load_vectors(embeddings_ptr + token * D, 1, D, BLOCK_D, 1, first_feature)
        window = zero_unless(segment == last_segment, earlier, KERNEL_SIZE - 1)
        window = window + zero_unless(segment >= 0, embedding, 1)
        last_segment = segment
        earlier = window[1:]
        state = zeros(N, BLOCK_D)
        for tap in tl.static_range(KERNEL_SIZE):
            state = add_products(state, mixing[tap * N : (tap + 1) * N], window[tap : tap + 1], N, 1)
        if position >= begin:
            store_vectors(state_ptr + token * (N * D), state, N, D, BLOCK_D, 1, first_feature)


@triton.jit(do_not_specialize=["chunk_length"])
def expansion_backward_kernel(
    embeddings_ptr,
    mixing_ptr,
    order_ptr,
    segment_ptr,
    grad_state_ptr,
    grad_embeddings_ptr,
    grad_mixing_ptr,  # per chunk: [K, n, d]
    num_tokens,
    seq_length,
    chunk_length,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    """∂M[K − 1 − i, j] = Σ_t e[t − i] ∘ G[t, j] and ∂e[t] = Σ_i Σ_j M[K − 1 − i, j] ∘ G[t + i, j], for i < K."""
    PAST: tl.constexpr = KERNEL_SIZE - 1
    first_feature = tl.program_id(0) * BLOCK_D
    begin = tl.program_id(1) * chunk_length
    end = tl.minimum(begin + chunk_length, num_tokens)
    mixing = load_vectors(mixing_ptr, KERNEL_SIZE * N, D, BLOCK_D, 1, first_feature)
    sum_mixing = zeros(KERNEL_SIZE * N, BLOCK_D)
    earlier = zeros(PAST, BLOCK_D)  # e of the K − 1 tokens before
    partial = zeros(PAST, BLOCK_D)  # of their ∂e, what is known
    last_segment = -1
    length = 0  # of the segment, as far as it has been walked
    for position in range(tl.maximum(begin - PAST, 0), end + PAST):
        token, segment = locate(tl.minimum(position, num_tokens - 1), order_ptr, segment_ptr, seq_length, HAS_ORDER)
        embedding = load_vectors(embeddings_ptr + token * D, 1, D, BLOCK_D, 1, first_feature)
        grad_state = load_vectors(grad_state_ptr + token * (N * D), N, D, BLOCK_D, 1, first_feature)
        embedding = zero_unless(segment >= 0, embedding, 1)
        grad_state = zero_unless((segment >= 0) & (position < num_tokens), grad_state, N)
        length = tl.where(segment == last_segment, length + 1, 0)
        earlier = zero_unless(segment == last_segment, earlier, PAST)
        last_segment = segment

        window = earlier + embedding
        counted = zero_unless((position >= begin) & (position < end), grad_state, N)
        sums = ()
        for tap in tl.static_range(KERNEL_SIZE):
            sum_tap = sum_mixing[tap * N : (tap + 1) * N]
            sums = sums + add_products(sum_tap, counted, window[tap : tap + 1], N, 1)
        sum_mixing = sums
        earlier = window[1:]

        # Of the tokens before, those of the same segment have been read for this one
        known = partial + zeros(1, BLOCK_D)
        gradients = ()
        for tap in tl.static_range(KERNEL_SIZE):
            read = zeros(1, BLOCK_D)
            read = add_sum_of_products(read, grad_state, mixing[tap * N : (tap + 1) * N], N, 1)
            is_read = length >= KERNEL_SIZE - 1 - tap
            gradients = gradients + add(known[tap : tap + 1], zero_unless(is_read, read, 1), 1)
        partial = gradients[1:]
        finished = position - PAST
        if (finished >= begin) & (finished < end):
            token, _ = locate(finished, order_ptr, segment_ptr, seq_length, HAS_ORDER)
            store_vectors(grad_embeddings_ptr + token * D, gradients, 1, D, BLOCK_D, 1, first_feature)

    rows_ptr = grad_mixing_ptr + tl.program_id(1) * (KERNEL_SIZE * N * D)
    store_vectors(rows_ptr, sum_mixing, KERNEL_SIZE * N, D, BLOCK_D, 1, first_feature)


def launch_sizes(state: torch.Tensor, kernel_size: int) -> dict[str, int]:
    """Compile-time sizes of programs that have all features of a token, which keep (n + K) d numbers in registers."""
    n, d = state.shape[1:]
    num_warps = min(max(4, triton.next_power_of_2(triton.cdiv((n + kernel_size) * d, 1536))), 16)
    return {**vector_sizes(n, d, largest_block=128 * num_warps), "KERNEL_SIZE": kernel_size, "num_warps": num_warps}


def block_launch_sizes(state: torch.Tensor, kernel_size: int) -> tuple[int, dict[str, int]]:
    """
    Number of blocks of features, and compile-time sizes of programs that have one, which keep K n numbers for each feature in
    registers: at most 64.
    """
    sizes = vector_sizes(*state.shape[1:], largest_block=256)
    num_blocks = sizes.pop("NUM_BLOCKS")
    num_warps = min(max(2, triton.next_power_of_2(kernel_size * state.shape[1] * sizes["BLOCK_D"] // 2048)), 32)
    return num_blocks, {**sizes, "KERNEL_SIZE": kernel_size, "num_warps": num_warps}


def chunks(num_tokens: int, kernel: Callable, *args, num_blocks: int = 1, **options) -> tuple[int, int]:
    """Number and length of the chunks of tokens of which each program of a kernel with such arguments has one."""
    num_programs = resident_programs(kernel, *args, num_tokens, **options)
    chunk_length = triton.cdiv(num_tokens, max(num_programs // num_blocks, 1))
    return triton.cdiv(num_tokens, chunk_length), chunk_length


# Every operation takes tokens in one dimension, as those of `ops_triton_ddl`, and the mixing `[K, n, d]`. Sequences of
# `seq_length` follow one another, or else `order` and `segment`, int32 `[tokens]`, say which token each position of the walk
# is, and what is read together: positions of the same segment, unless negative.


@operation("convolution")
def convolution_op(
    state: torch.Tensor,
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    keep: torch.Tensor | None,
    amplitude: torch.Tensor | None,
    mixing: torch.Tensor,
    order: torch.Tensor | None,
    segment: torch.Tensor | None,
    snapshot: torch.Tensor,
    replays: list[torch.Tensor],
    seq_length: int,
    key_eps: float,
    erase: bool,
    begins_sublayer: bool,
) -> list[torch.Tensor]:
    """Returns new state, x `[tokens, d]` and, for the backward pass, Xᵀk, w and 1/‖k̃‖."""
    outputs = convolution_outputs(state, direction, begins_sublayer)
    if state.shape[0] > 0:
        args = (
            state, direction, target, gate, keep, amplitude, mixing, order, segment, *outputs,
            key_eps, state.shape[0], seq_length,
        )  # fmt: skip
        options = dict(
            HAS_ORDER=order is not None, HAS_WRITE=direction is not None, HAS_GATE=gate is not None, ERASE=erase,
            HAS_KEEP=keep is not None, HAS_AMPLITUDE=amplitude is not None, STORE_STATE=begins_sublayer,
            **launch_sizes(state, mixing.shape[0]),
        )  # fmt: skip
        num_chunks, chunk_length = chunks(state.shape[0], convolution_forward_kernel, *args, **options)
        convolution_forward_kernel[num_chunks,](*args, chunk_length, **options)
    return outputs


def convolution_outputs(
    state: torch.Tensor, direction: torch.Tensor | None, begins_sublayer: bool
) -> list[torch.Tensor]:
    num_tokens, n, d = state.shape
    num_writes = 0 if direction is None else num_tokens
    return [
        state.new_empty(num_writes if begins_sublayer else 0, n, d),
        state.new_empty(num_tokens, d),
        state.new_empty(num_writes, n, dtype=torch.float32),
        state.new_empty(num_writes, n, dtype=torch.float32),
        state.new_empty(num_writes, dtype=torch.float32),
    ]


@convolution_op.register_fake
def _(state, direction, *args):
    return convolution_outputs(state, direction, begins_sublayer=args[-1])


@operation("convolution_backward")
def convolution_backward_op(
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
    mixing: torch.Tensor,
    order: torch.Tensor | None,
    segment: torch.Tensor | None,
    grad_new_state: torch.Tensor | None,
    grad_hidden: torch.Tensor,
    seq_length: int,
    erase: bool,
) -> list[torch.Tensor]:
    """Returns the gradients of state, direction, target, gate, then in float32 those of mixing and of `[keep, amplitude]`."""
    num_tokens, n, d = snapshot.shape
    outputs = convolution_backward_outputs(snapshot, direction, target, gate, mixing)
    if num_tokens == 0:
        return [output.zero_() for output in outputs]
    *per_token, grad_mixing, grad_scalars = outputs
    grad_state, grad_direction, grad_target, grad_gate = per_token
    grad_erased = torch.empty_like(readout)
    kernel_size = mixing.shape[0]
    flags = {"HAS_ORDER": order is not None, "HAS_WRITE": direction is not None, "ERASE": erase}

    args = (
        direction, target, gate, keep, readout, write, inv_key_norm, mixing, order, segment,
        grad_new_state, grad_hidden, grad_state, grad_direction, grad_erased, grad_target, grad_gate,
    )  # fmt: skip
    options = dict(
        HAS_GRAD_STATE=grad_new_state is not None, HAS_GATE=gate is not None, HAS_KEEP=keep is not None,
        HAS_AMPLITUDE=amplitude is not None, **launch_sizes(snapshot, kernel_size), **flags,
    )  # fmt: skip
    kernel, lengths = convolution_backward_state_kernel, (num_tokens, seq_length)
    num_chunks, chunk_length = chunks(num_tokens, kernel, *args, grad_scalars, *lengths, **options)
    grad_scalars = grad_scalars.new_empty(num_chunks, *grad_scalars.shape)
    kernel[num_chunks,](*args, grad_scalars, *lengths, chunk_length, **options)

    num_blocks, sizes = block_launch_sizes(snapshot, kernel_size)
    args = (
        snapshot, tuple(replays), direction, write, order, segment,
        grad_hidden, grad_erased, grad_direction,
    )  # fmt: skip
    options = {"NUM_REPLAYS": len(replays) // 2, **sizes, **flags}
    kernel = convolution_backward_mixing_kernel
    num_chunks, chunk_length = chunks(
        num_tokens, kernel, *args, grad_mixing, *lengths, num_blocks=num_blocks, **options
    )
    grad_mixing = grad_mixing.new_empty(num_chunks, *grad_mixing.shape)
    kernel[num_blocks, num_chunks](*args, grad_mixing, *lengths, chunk_length, **options)
    return [*per_token, grad_mixing.sum(0), grad_scalars.sum(0)]


def convolution_backward_outputs(
    snapshot: torch.Tensor,
    direction: torch.Tensor | None,
    target: torch.Tensor | None,
    gate: torch.Tensor | None,
    mixing: torch.Tensor,
) -> list[torch.Tensor]:
    return [
        torch.empty(snapshot.shape, dtype=snapshot.dtype, device=snapshot.device),
        *(
            snapshot.new_empty(0) if tensor is None else torch.empty_like(tensor)
            for tensor in (direction, target, gate)
        ),
        torch.empty_like(mixing, dtype=torch.float32),
        snapshot.new_empty(2, snapshot.shape[1], dtype=torch.float32),
    ]


@convolution_backward_op.register_fake
def _(snapshot, replays, direction, target, gate, *args):
    return convolution_backward_outputs(snapshot, direction, target, gate, mixing=args[5])


def setup_context(ctx, inputs, output):
    (
        _, direction, target, gate, keep, amplitude, mixing, order, segment,
        snapshot, replays, ctx.seq_length, _, ctx.erase, ctx.begins_sublayer,
    ) = inputs  # fmt: skip
    _, _, *saved_outputs = output
    ctx.mark_non_differentiable(*saved_outputs)
    ctx.set_materialize_grads(False)
    ctx.num_replays = len(replays)
    ctx.save_for_backward(
        snapshot, *replays, direction, target, gate, keep, amplitude, *saved_outputs, mixing, order, segment
    )


def backward(ctx, grads):
    grad_new_state, grad_hidden, *_ = grads
    snapshot, *saved = ctx.saved_tensors
    replays, saved = saved[: ctx.num_replays], saved[ctx.num_replays :]
    snapshot, replays = last_of_history(snapshot, replays)
    direction, target, gate, keep, amplitude, *_, mixing, _, _ = saved

    # Gradients are None for outputs that nothing used
    if grad_hidden is None:
        grad_hidden = snapshot.new_zeros(snapshot.shape[0], snapshot.shape[2])
    if grad_new_state is not None:
        grad_new_state = grad_new_state.contiguous() if direction is not None and ctx.begins_sublayer else None

    grad_state, *grad_write, grad_mixing, (grad_keep, grad_amplitude) = convolution_backward_op(
        snapshot, replays, *saved, grad_new_state, grad_hidden.contiguous(), ctx.seq_length, ctx.erase
    )
    grads = (*grad_write, grad_keep, grad_amplitude, grad_mixing)
    tensors = (direction, target, gate, keep, amplitude, mixing)
    return (
        grad_state,
        *(None if tensor is None else grad.to(tensor.dtype) for tensor, grad in zip(tensors, grads, strict=True)),
        None, None, None, [None] * ctx.num_replays, *[None] * 4,
    )  # fmt: skip


convolution_op.register_autograd(backward, setup_context=setup_context)


@operation("expansion")
def expansion_op(
    embeddings: torch.Tensor,
    mixing: torch.Tensor,
    order: torch.Tensor | None,
    segment: torch.Tensor | None,
    seq_length: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The state `[tokens, n, d]` in the given dtype, of embeddings `[tokens, d]`."""
    state = embeddings.new_empty(embeddings.shape[0], *mixing.shape[1:], dtype=dtype)
    if state.shape[0] > 0:
        num_blocks, sizes = block_launch_sizes(state, mixing.shape[0])
        args = (embeddings, mixing, order, segment, state, state.shape[0], seq_length)
        options = {"HAS_ORDER": order is not None, **sizes}
        kernel = expansion_forward_kernel
        num_chunks, chunk_length = chunks(state.shape[0], kernel, *args, num_blocks=num_blocks, **options)
        kernel[num_blocks, num_chunks](*args, chunk_length, **options)
    return state


@expansion_op.register_fake
def _(embeddings, mixing, order, segment, seq_length, dtype):
    return embeddings.new_empty(embeddings.shape[0], *mixing.shape[1:], dtype=dtype)


@operation("expansion_backward")
def expansion_backward_op(
    embeddings: torch.Tensor,
    mixing: torch.Tensor,
    order: torch.Tensor | None,
    segment: torch.Tensor | None,
    grad_state: torch.Tensor,
    seq_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of embeddings and, in float32, of mixing."""
    grad_embeddings = torch.empty_like(embeddings)
    if embeddings.shape[0] == 0:
        return grad_embeddings, mixing.new_zeros(mixing.shape)
    num_blocks, sizes = block_launch_sizes(grad_state, mixing.shape[0])
    args, lengths = (
        (embeddings, mixing, order, segment, grad_state, grad_embeddings),
        (embeddings.shape[0], seq_length),
    )
    options = {"HAS_ORDER": order is not None, **sizes}
    kernel, stand_in = expansion_backward_kernel, torch.empty_like(mixing)
    num_chunks, chunk_length = chunks(
        embeddings.shape[0], kernel, *args, stand_in, *lengths, num_blocks=num_blocks, **options
    )
    grad_mixing = mixing.new_empty(num_chunks, *mixing.shape)
    kernel[num_blocks, num_chunks](*args, grad_mixing, *lengths, chunk_length, **options)
    return grad_embeddings, grad_mixing.sum(0)


@expansion_backward_op.register_fake
def _(embeddings, mixing, *args):
    return torch.empty_like(embeddings), torch.empty_like(mixing)


def expansion_setup_context(ctx, inputs, output):
    *tensors, ctx.seq_length, _ = inputs
    ctx.save_for_backward(*tensors)


def expansion_backward(ctx, grad_state):
    grads = expansion_backward_op(*ctx.saved_tensors, grad_state.contiguous(), ctx.seq_length)
    return *grads, *[None] * 4


expansion_op.register_autograd(expansion_backward, setup_context=expansion_setup_context)
