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
PyTorch DDL model: a Llama whose residual additions are delta rewrites (Deep Delta Learning, arXiv 2601.00417).

Every layer passes on a state X of n value channels, `[batch, sequence, n, hidden_size]`. A sublayer (attention or MLP)

    compresses   x = C(X),  c = RMSNorm(x)                      [batch, sequence, hidden_size]
    processes    k̃ = F(c)                                       [batch, sequence, hidden_size]
    rewrites     X ← X + β k (vᵀ − kᵀX),  k = k̃ / ‖k̃‖           [batch, sequence, n, hidden_size]

with a gate β ∈ (0, 2) computed from c and a target v ∈ Rⁿ computed from x or c. With n = 1 the state is the ordinary
residual stream and C drops the channel axis. A rewrite is carried out by the sublayer after it, together with what that
one reads from the state (`begin_sublayer`), so that kernels can do both in one pass over the state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin, StaticCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_partial_rotary_pos_emb
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_ddl import DDLConfig
from .ops_ddl import (
    can_fuse,
    can_fuse_expansion,
    count_readers,
    fused_boundary,
    fused_expansion,
    is_exporting,
    is_watched,
    load_kernels,
)


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: norms, gates, readouts and convolutions are computed in it and rounded once, at the end."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class DDLRMSNorm(LlamaRMSNorm):
    """Llama's, which computes in float32 whatever its input, but exact in float64."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float64:
            # Of `super()`, Dynamo would check the classes of every single norm at each call
            return LlamaRMSNorm.forward(self, hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class DDLRotaryEmbedding(LlamaRotaryEmbedding):
    """
    Llama's, which computes in float32 whatever its input, but exact in float64 for unscaled frequencies. As in GPT-NeoX, a
    `partial_rotary_factor` below 1 turns only that share of each head, its first features.
    """

    compute_default_rope_parameters = staticmethod(GPTNeoXRotaryEmbedding.compute_default_rope_parameters)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.dtype != torch.float64 or self.rope_type != "default":
            cos, sin = super().forward(x, position_ids)
        else:
            rotary_dim = 2 * self.inv_freq.shape[0]
            exponents = torch.arange(0, rotary_dim, 2, device=x.device, dtype=x.dtype) / rotary_dim
            angles = position_ids[..., None] * self.config.rope_parameters["rope_theta"] ** -exponents
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos(), angles.sin()
        if torch.compiler.is_compiling() and not is_exporting():
            # Inductor would compute them again in each layer for each head; what this is taken of, it keeps in memory
            cos, sin = cos.as_strided(cos.size(), cos.stride()), sin.as_strided(sin.size(), sin.stride())
        return cos, sin


def delta_rewrite(
    state: torch.Tensor,
    direction: torch.Tensor,
    target: torch.Tensor,
    gate: torch.Tensor,
    key_eps: float,
    erase: bool = True,
    anchor: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The delta rewrite `X' = X + β k (vᵀ − kᵀX)` with `k = k̃ / sqrt(‖k̃‖² + ε²)` (paper §2).

    An anchor (a, b) replaces the target v by `v + a ∘ Xᵀk + b ‖k̃‖ / β`: the share a of what is read is kept, and b k̃ is
    added as in an ordinary residual connection, `X' = X + β k (v − (1 − a) ∘ Xᵀk)ᵀ + k̃ bᵀ`. With v = 0 and a = b = 1 this is
    `X + k̃`, to the last bit.

    Args:
        state (`[batch, sequence, n, hidden_size]`): X.
        direction (`[batch, sequence, hidden_size]`): k̃, not normalised.
        target (`[batch, sequence, n]`): v.
        gate (`[batch, sequence]`): β.
        key_eps (`float`): ε.
        erase (`bool`): Without, what the state holds along k stays: `X' = X + β k vᵀ` (spec §6).
        anchor (`[2, n]`, *optional*): a and b; those of the pure rewrite, zeros, if None.

    Returns:
        `[batch, sequence, n, hidden_size]`, in the dtype of `state`, computed in at least float32.
    """
    direction = upcast(direction)
    key = direction * torch.rsqrt(direction.square().sum(-1, keepdim=True) + key_eps**2)
    key = key.unsqueeze(-2)
    error = target
    if erase:
        readout = (state * key).sum(-1)
        error = target - (readout if anchor is None else (1 - anchor[0]) * readout)
    write = gate.unsqueeze(-1) * error
    update = write.unsqueeze(-1) * key
    if anchor is not None:
        update = update + anchor[1].unsqueeze(-1) * direction.unsqueeze(-2)
    return (state + update).to(state.dtype)


# What a sublayer writes into the state. The module of a residual type computes the weights of the write from what the
# sublayer reads, the function that goes with it carries the write out (`RESIDUALS`).


class DDLDeltaResidual(nn.Module):
    """
    Gate and target of a sublayer's delta rewrites: `β = 2σ(w·c + b)` or `β = 2σ(w·tanh(W₁c + b₁) + b)` (paper §2) and
    `v = scale · a(W x + b)`, for each of the `num_delta_steps` directions that the sublayer outputs. With `value_anchor` also
    an anchor of the target, two learned vectors.
    """

    def __init__(self, config: DDLConfig, sublayer_idx: int):
        super().__init__()
        self.config = config
        if config.gate_hidden_size is not None:
            self.beta_hidden_proj = nn.Linear(config.hidden_size, config.gate_hidden_size)
        self.beta_proj = nn.Linear(config.gate_hidden_size or config.hidden_size, config.num_delta_steps)
        self.num_values = config.num_delta_steps * config.num_value_channels
        if config.value_activation != "constant":
            self.value_proj = nn.Linear(config.hidden_size, self.num_values, bias=config.value_bias)
        if config.value_anchor is not None:
            self.anchor_keep = nn.Parameter(torch.empty(config.num_value_channels))
            self.anchor_add = nn.Parameter(torch.empty(config.num_value_channels))

    def gate(self, context: torch.Tensor) -> torch.Tensor:
        """β `[batch, sequence, steps]` in at least float32, from the normalised context `[batch, sequence, hidden_size]`."""
        if self.config.gate_hidden_size is not None:
            context = torch.tanh(self.beta_hidden_proj(context.to(self.beta_hidden_proj.weight.dtype)))
        # Near 0 and 2 the gate is decided by small differences between logits: they are computed in float32 (§2),
        # unless the weights themselves were cast to less.
        with maybe_autocast(device_type=context.device.type, enabled=False):
            logits = self.beta_proj(context.to(self.beta_proj.bias.dtype))
        return 2 * torch.sigmoid(upcast(logits))

    def target(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """v `[batch, sequence, steps · n]` in at least float32, from x or c `[batch, sequence, hidden_size]`."""
        config = self.config
        if config.value_activation == "constant":
            return upcast(context).new_full((*context.shape[:-1], self.num_values), config.value_scale)
        source = hidden_states if config.value_input == "residual" else context
        value = upcast(self.value_proj(source.to(self.value_proj.weight.dtype)))
        if config.value_activation == "sigmoid":
            value = torch.sigmoid(value)
        return config.value_scale * value

    def anchor(self) -> torch.Tensor:
        """a and b, `[2, n]` in at least float32; a copy, as FSDP may have freed the parameters when the write is made."""
        # Upcast before, as autocast cannot stack half-precision tensors of another dtype than its own
        return torch.stack((upcast(self.anchor_keep), upcast(self.anchor_add)))

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        anchor = () if self.config.value_anchor is None else (self.anchor(),)
        return self.target(hidden_states, context), self.gate(context), *anchor


def write_delta(
    config: DDLConfig,
    state: torch.Tensor,
    output: torch.Tensor,
    target: torch.Tensor,
    gate: torch.Tensor,
    anchor: torch.Tensor | None = None,
) -> torch.Tensor:
    """One [`delta_rewrite`] for each direction in `output` `[batch, sequence, steps · hidden_size]`, one after another."""
    steps = config.num_delta_steps
    for direction, step_target, step_gate in zip(output.chunk(steps, -1), target.chunk(steps, -1), gate.unbind(-1)):
        erase = config.residual_type == "delta"
        state = delta_rewrite(state, direction, step_target, step_gate, config.key_eps, erase, anchor)
    return state


class DDLAdditiveResidual(nn.Module):
    """`X ← X + a F(c)ᵀ` with a learned `a ∈ Rⁿ` that starts at 1 (spec §6), or, for n = 1, the plain `x + F(c)`."""

    def __init__(self, config: DDLConfig, sublayer_idx: int):
        super().__init__()
        if config.residual_type == "expanded_additive":
            self.amplitude = nn.Parameter(torch.empty(config.num_value_channels))
        else:
            self.amplitude = None

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # A copy, as the write is made where FSDP may have freed the parameters of this layer
        return () if self.amplitude is None else (self.amplitude.clone(),)


def write_additive(
    config: DDLConfig, state: torch.Tensor, output: torch.Tensor, amplitude: torch.Tensor | None = None
) -> torch.Tensor:
    """`X ← X + a F(c)ᵀ` for a `[n]` and the output F(c) `[batch, sequence, hidden_size]`; a is 1 if None (spec §6)."""
    output = output.unsqueeze(-2)
    if amplitude is None:
        return state + output
    return (state + upcast(amplitude).unsqueeze(-1) * output).to(state.dtype)


class DDLHyperConnection(nn.Module):
    """
    Hyper-Connections (arXiv 2409.19606, the dynamic form): from the normalised streams of a token come the weights with
    which they are read for the sublayer, mixed among themselves, and written to with its output,

        x = aᵀX,    X ← MᵀX + b F(c)ᵀ,    (b, a, M) = static + scale ∘ tanh(W RMSNorm(X)).

    At the start, each sublayer reads one stream, in turn, none are mixed, and all are written to alike.
    """

    def __init__(self, config: DDLConfig, sublayer_idx: int):
        super().__init__()
        n = config.num_value_channels
        self.first_stream = sublayer_idx % n
        self.norm = DDLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.static = nn.Parameter(torch.empty(n, n + 2))  # columns: b, a, M
        self.dynamic = nn.Parameter(torch.empty(n + 2, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(2))  # of b, of a and M

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """
        Returns what the sublayer reads `[batch, sequence, hidden_size]` and the weights of its write, b `[batch, sequence,
        n]` and M `[batch, sequence, n, n]`, in at least float32.
        """
        n = state.shape[2]
        scale = upcast(self.scale)
        scale = torch.cat([scale[:1], scale[1:].expand(n + 1)])
        weights = upcast(self.static + scale * torch.tanh(F.linear(self.norm(state), self.dynamic)))
        write, read, mixing = weights.split([1, 1, n], dim=-1)
        return (read * state).sum(2).to(state.dtype), (write.squeeze(-1), mixing)


class DDLManifoldHyperConnection(DeepseekV4HyperConnection):
    """
    Manifold-constrained Hyper-Connections (arXiv 2512.24880), as in DeepSeek-V4: the mixing of streams is doubly
    stochastic. Starts, up to the small scale of the dynamic weights, as the addition to all streams of what their mean
    leads to.
    """

    def __init__(self, config: DDLConfig, sublayer_idx: int):
        super().__init__(
            SimpleNamespace(
                hidden_size=config.hidden_size,
                hc_mult=config.num_value_channels,
                hc_sinkhorn_iters=20,
                hc_eps=1e-6,
                rms_norm_eps=config.rms_norm_eps,
            )
        )

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """As [`DDLHyperConnection`]'s, in float32."""
        write, mixing, hidden_states = super().forward(state.contiguous())
        return hidden_states, (write, mixing)


def write_streams(
    config: DDLConfig, state: torch.Tensor, output: torch.Tensor, write: torch.Tensor, mixing: torch.Tensor
) -> torch.Tensor:
    """`X ← MᵀX + b F(c)ᵀ`, for b `[batch, sequence, n]` and M `[batch, sequence, n, n]`."""
    # Sums written out fuse into one kernel under `torch.compile`, products of many 4 × 4 matrices do not
    new_state = write.unsqueeze(-1) * output.unsqueeze(-2)
    for stream in range(state.shape[2]):
        new_state = new_state + mixing[:, :, stream].unsqueeze(-1) * state[:, :, stream].unsqueeze(-2)
    return new_state.to(state.dtype)


RESIDUALS = {
    "delta": (DDLDeltaResidual, write_delta),
    "write_only": (DDLDeltaResidual, write_delta),
    "additive": (DDLAdditiveResidual, write_additive),
    "expanded_additive": (DDLAdditiveResidual, write_additive),
    "hyper_connections": (DDLHyperConnection, write_streams),
    "manifold_hyper_connections": (DDLManifoldHyperConnection, write_streams),
}


def left_align_padding(hidden_states: torch.Tensor, token_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Moves padding, as zeros, in front of the tokens of each row, so that a convolution sees the tokens as if alone.

    Args:
        hidden_states (`[batch, sequence, channels]`): inputs of a convolution.
        token_mask (`[batch, sequence]`, bool): False at padding.

    Returns:
        The rearranged inputs, and for every position the one it moved to (`[batch, sequence]`, int64).
    """
    padding = ~token_mask
    first_token = padding.sum(1, keepdim=True)
    moved_to = torch.where(token_mask, first_token + token_mask.cumsum(1), padding.cumsum(1)) - 1
    aligned = torch.empty_like(hidden_states).scatter(
        1,
        moved_to.unsqueeze(-1).expand_as(hidden_states),
        hidden_states.masked_fill(padding.unsqueeze(-1), 0),
    )
    return aligned, moved_to


class DDLTokenConvolution(nn.Module):
    """
    Causal depthwise convolution over tokens, the last of its taps being the current token. It reads neither padding nor
    other documents of a packed batch. Its past inputs live in transformers' caches, as state `state_idx` of the layer
    `layer_idx`.
    """

    def __init__(self, config: DDLConfig, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(config.num_value_channels, config.hidden_size, kernel_size))

    def apply_tap(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """One term of the sum over taps: `hidden_states` some tokens ago, `weight` `[n, hidden_size]`."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_idx: int,
        state_idx: int,
        past_key_values: Cache | None = None,
        conv_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        input_dtype, seq_length, channels = hidden_states.dtype, hidden_states.shape[1], hidden_states.shape[2:]
        inputs = hidden_states.flatten(2)
        if past_key_values is not None:
            inputs = self.prepend_past(inputs, layer_idx, state_idx, past_key_values)
        past_length = inputs.shape[1] - seq_length

        # Padding may stand between the tokens of this call and the past, hence all positions are computed
        num_outputs = seq_length
        if conv_mask is not None:
            num_outputs += past_length
            inputs, moved_to = left_align_padding(inputs, F.pad(conv_mask, (past_length, 0), value=True))
            if past_key_values is not None:
                past = past_key_values.layers[layer_idx].conv_states[state_idx]
                past.copy_(inputs[:, -past.shape[-1] :].transpose(1, 2))

        inputs = F.pad(inputs, (0, 0, self.kernel_size - 1, 0)).unflatten(2, channels)
        weight, output = upcast(self.weight), 0
        for tap in range(self.kernel_size):
            offset = self.kernel_size - 1 - tap
            end = inputs.shape[1] - offset
            window = inputs[:, end - num_outputs : end]
            if document_ids is not None:
                same_document = F.pad(document_ids, (offset, 0), value=-1)[:, :seq_length] == document_ids
                window = window * same_document.view(*same_document.shape, *[1] * len(channels))
            output = output + self.apply_tap(window, weight[..., tap])

        if conv_mask is not None:
            moved_to = moved_to[:, past_length:].view(*moved_to.shape[:1], seq_length, *[1] * (output.dim() - 2))
            # `torch.take_along_dim` would fix the lengths of programs that `torch.export` makes
            output = output.gather(1, moved_to.expand(-1, -1, *output.shape[2:]))
        return output.to(input_dtype)

    def prepend_past(
        self, inputs: torch.Tensor, layer_idx: int, state_idx: int, past_key_values: Cache
    ) -> torch.Tensor:
        """Stores the inputs `[batch, sequence, channels]` in the cache and returns them behind the past ones."""
        if past_key_values.offloading:
            # Transformers moves the convolution states of a layer out with its keys and values, but back only before those
            # are used, and those of static caches not at all. It takes static layers with both for layers without keys
            if all(past_key_values.is_linear):
                raise ValueError(
                    "an offloaded static cache cannot hold a convolution in every layer; "
                    'allowed: cache_implementation="offloaded", or a compressor over channels'
                )
            torch.cuda.current_stream(inputs.device).wait_stream(past_key_values.prefetch_stream)
            past_key_values.layers[layer_idx].prefetch()
        return past_key_values.update_conv_state(
            inputs.transpose(1, 2), layer_idx, state_idx=state_idx, conv_kernel_size=self.kernel_size
        ).transpose(1, 2)


class DDLEmbeddingConvolution(DDLTokenConvolution):
    """
    Expands token embeddings `[batch, sequence, hidden_size]` to the state `[batch, sequence, n, hidden_size]` by
    `X[t, j] = Σ_τ w[j, τ] ∘ e[t − τ]` (EC, paper §3).
    """

    def __init__(self, config: DDLConfig):
        super().__init__(config, config.embedding_conv_kernel_size)

    def mixing(self) -> torch.Tensor:
        """The taps, `[taps, n, hidden_size]`."""
        return upcast(self.weight).permute(2, 0, 1).contiguous()

    def apply_tap(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return hidden_states.unsqueeze(2) * weight


class DDLTokenCompressor(DDLTokenConvolution):
    """
    Reads the state `[batch, sequence, n, hidden_size]` as `x[t] = Σ_j r_j Σ_τ w[j, τ] ∘ X[t − τ, j]`,
    `[batch, sequence, hidden_size]` (TC, paper §3).
    """

    def __init__(self, config: DDLConfig):
        super().__init__(config, config.compressor_kernel_size)
        self.read = nn.Parameter(torch.empty(config.num_value_channels))

    def mixing(self) -> torch.Tensor:
        """The products of read vector and taps, `[taps, n, hidden_size]`."""
        return (upcast(self.read)[:, None, None] * upcast(self.weight)).permute(2, 0, 1).contiguous()

    def apply_tap(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (hidden_states * (upcast(self.read).unsqueeze(-1) * weight)).sum(2)


class DDLChannelCompressor(nn.Module):
    """
    Reads the state `[batch, sequence, n, hidden_size]` as `x = Σ_j C[j] ∘ X[j]`, `[batch, sequence, hidden_size]` (CC,
    paper §3). C is the read vector r over channels behind a 'same'-padded convolution over channels with a kernel per
    feature, `C[j] = Σ_m r_m kernel[j − m + ⌊(s − 1)/2⌋]`.
    """

    def __init__(self, config: DDLConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.compressor_kernel_size))
        self.read = nn.Parameter(torch.empty(config.num_value_channels))

    @property
    def current_tap(self) -> int:
        """Index of the kernel's tap on the channel itself."""
        return (self.weight.shape[1] - 1) // 2

    def mixing(self) -> torch.Tensor:
        """C, `[n, hidden_size]`."""
        weight, read = upcast(self.weight), upcast(self.read)
        kernel_size = weight.shape[1]
        read = F.pad(read, (kernel_size - 1 - self.current_tap, self.current_tap)).unfold(0, kernel_size, 1)
        return (read.unsqueeze(1) * weight.flip(1)).sum(-1)

    def forward(self, state: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return (state * self.mixing()).sum(2).to(state.dtype)


class DDLScalarCompressor(nn.Module):
    """The state of one channel `[batch, sequence, 1, hidden_size]` is read as it is, `[batch, sequence, hidden_size]`."""

    def __init__(self, config: DDLConfig):
        super().__init__()

    def forward(self, state: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return state.squeeze(2)


COMPRESSORS = {None: DDLScalarCompressor, "channel": DDLChannelCompressor, "token": DDLTokenCompressor}


def apply_rotary(
    query_states: torch.Tensor, key_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Turns the features of each head for which there are angles: all of them as in Llama, or the first as in GPT-NeoX.

    Args:
        query_states, key_states (`[batch, sequence, heads, head_dim]`): to be turned.
        cos, sin (`[batch, sequence, rotary_dim]`): of the angles.
    """
    is_partial = cos.shape[-1] < query_states.shape[-1]
    rotate = apply_partial_rotary_pos_emb if is_partial else apply_rotary_pos_emb
    return rotate(query_states, key_states, cos, sin, unsqueeze_dim=2)


def widen(linear: nn.Linear, factor: int) -> nn.Linear:
    """A new map with `factor` times the outputs."""
    return nn.Linear(linear.in_features, factor * linear.out_features, bias=linear.bias is not None)


class DDLMLP(LlamaMLP):
    """Llama's MLP with `num_delta_steps` outputs, side by side."""

    def __init__(self, config: DDLConfig):
        super().__init__(config)
        if config.num_delta_steps > 1:
            self.down_proj = widen(self.down_proj, config.num_delta_steps)

    def forward(self, x: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        gate_input, up_input = x if isinstance(x, tuple) else 2 * (x,)
        return self.down_proj(self.act_fn(self.gate_proj(gate_input)) * self.up_proj(up_input))

    forward.num_readers = 2  # maps that read the input, of which each may be given one of its own (`begin_sublayer`)


class DDLAttention(LlamaAttention):
    """
    Llama's attention with an optional RMSNorm over each query and key head, before or after the rotary embedding, and
    `num_delta_steps` outputs, side by side.
    """

    apply_rotary = staticmethod(apply_rotary)

    def __init__(self, config: DDLConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qk_norm is not None:
            self.q_norm = DDLRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = DDLRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.num_delta_steps > 1:
            self.o_proj = widen(self.o_proj, config.num_delta_steps)

    def forward(
        self,
        hidden_states: torch.Tensor | tuple[torch.Tensor, ...],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_input, key_input, value_input = (
            hidden_states if isinstance(hidden_states, tuple) else 3 * (hidden_states,)
        )
        input_shape = query_input.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states = self.q_proj(query_input).view(hidden_shape)
        key_states = self.k_proj(key_input).view(hidden_shape)
        value_states = self.v_proj(value_input).view(hidden_shape)

        if self.config.qk_norm == "pre_rope":
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = self.apply_rotary(query_states, key_states, *position_embeddings)
        if self.config.qk_norm == "post_rope":
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        # Not before, as in Llama: norm and rotation would be compiled to two passes instead of one
        query_states, key_states, value_states = (
            states.transpose(1, 2) for states in (query_states, key_states, value_states)
        )

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights

    forward.num_readers = 3  # as the MLP's


def begin_sublayer(
    config: DDLConfig,
    state: torch.Tensor,
    write: tuple[torch.Tensor, ...],
    compressor: nn.Module | None,
    norm: DDLRMSNorm,
    residual: nn.Module | None,
    sublayer: nn.Module | None,
    history: tuple[torch.Tensor, ...],
    output_hidden_states: bool,
    past_key_values: Cache | None = None,
    conv_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    **compressor_kwargs,
) -> tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | tuple[torch.Tensor, ...], tuple, tuple[torch.Tensor, ...]
]:
    """
    Carries out the write of the sublayer before, its output and the weights that its residual gave, and reads the state
    for the next, `sublayer`. `write` is empty before the first one, `residual` and `sublayer` None at the readout.
    `history` is what the fused kernels need to rebuild states in their backward pass. Token convolutions read neither
    where `conv_mask` is False nor other documents of `document_ids`, both `[batch, sequence]`.

    Returns:
        state (`[batch, sequence, n, hidden_size]`): X.
        hidden_states (`[batch, sequence, hidden_size]`): x = C(X); None from the fused kernels.
        context (`[batch, sequence, hidden_size]`): c, the input of the next sublayer. In compiled training with the fused
            kernels, a tuple of as many as there are maps that read it, whose gradients the kernels add up.
        weights: of the next sublayer's write.
        history: what it is for the next boundary.
    """
    residual_class, carry_out = RESIDUALS[config.residual_type]
    # Kernels compute what these classes do, not what others do in their place
    is_known = (
        type(norm) is DDLRMSNorm
        and type(compressor) is COMPRESSORS[config.compressor]
        and (residual is None or type(residual) is residual_class)
    )
    if is_known and not output_hidden_states and can_fuse(config, state, compressor, norm, residual, past_key_values):
        mixing = None if config.compressor is None else compressor.mixing()
        state, contexts, weights, history = fused_boundary(
            config, state, write, mixing, norm, residual, history, conv_mask, document_ids, count_readers(sublayer)
        )
        return state, None, contexts if len(contexts) > 1 else contexts[0], weights, history

    if write:
        state = carry_out(config, state, *write)
    if config.reads_by_residual and residual is not None:  # which an adapter's library may have wrapped
        hidden_states, weights = residual(state)
        return state, hidden_states, norm(hidden_states), weights, ()
    hidden_states = compressor(
        state, past_key_values=past_key_values, conv_mask=conv_mask, document_ids=document_ids, **compressor_kwargs
    )
    context = norm(hidden_states)
    weights = () if residual is None else residual(hidden_states, context)
    return state, hidden_states, context, weights, ()


class DDLDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DDLConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.self_attn = DDLAttention(config, layer_idx)
        self.mlp = DDLMLP(config)
        self.input_layernorm = DDLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DDLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.compressor = self.mlp_compressor = None
        if not config.reads_by_residual:
            self.compressor = COMPRESSORS[config.compressor](config)
            if not config.share_compressor:
                self.mlp_compressor = COMPRESSORS[config.compressor](config)
        residual_class, _ = RESIDUALS[config.residual_type]
        self.attn_residual = residual_class(config, 2 * layer_idx)
        self.mlp_residual = residual_class(config, 2 * layer_idx + 1)

    def forward(
        self,
        state: torch.Tensor,
        *write: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        conv_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        history: tuple[torch.Tensor, ...] = (),
        output_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | tuple | None, ...]:
        """
        Takes the state `[batch, sequence, n, hidden_size]` and the write that is still to be made into it: the output of the
        sublayer before, `[batch, sequence, hidden_size]`, and what its residual returned. Returns the state, what the layer
        read from it, `[batch, sequence, hidden_size]` (its entry in `hidden_states`; None unless these are asked for),
        `history`, and its own last write.
        """
        read_kwargs = {
            "output_hidden_states": output_hidden_states,
            "layer_idx": self.layer_idx,
            "past_key_values": past_key_values,
            "conv_mask": conv_mask,
            "document_ids": document_ids,
        }

        # Self Attention
        state, layer_input, context, weights, history = begin_sublayer(
            self.config,
            state,
            write,
            self.compressor,
            self.input_layernorm,
            self.attn_residual,
            self.self_attn,
            history,
            state_idx=0,
            **read_kwargs,
        )
        output, _ = self.self_attn(
            hidden_states=context,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )

        # Fully Connected
        state, _, context, weights, history = begin_sublayer(
            self.config,
            state,
            (output, *weights),
            self.compressor if self.mlp_compressor is None else self.mlp_compressor,
            self.post_attention_layernorm,
            self.mlp_residual,
            self.mlp,
            history,
            state_idx=1,
            **read_kwargs,
        )
        # What is read may be a view of the state, of which FSDP2 warns when a layer returns it
        if not output_hidden_states:
            layer_input = None
        # Checkpointing stores what goes into the next layer: the state alone is enough
        if self.gradient_checkpointing and self.training:
            history = ()
        return state, layer_input, history, self.mlp(context), *weights


@dataclass
class DDLHiddenStatesRecorder(OutputRecorder):
    """Records what every layer and the readout read from the state."""

    # The config's attribute by which newer versions of transformers resolve negative indices in `output_hidden_states`
    num_hidden_layers_key: str = "num_hidden_states"


class DDLPreTrainedModel(LlamaPreTrainedModel):
    config: DDLConfig
    config_class = DDLConfig
    _no_split_modules = ["DDLDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": DDLHiddenStatesRecorder(
            DDLDecoderLayer, index=1, class_name=".readout", capture_initial_hidden_state=False
        ),
        "attentions": DDLAttention,
    }

    def __init__(self, config: DDLConfig, *args, **kwargs):
        # Fields may have been assigned since the configuration was made
        config.validate_architecture()
        config.validate_residual()
        # Transformers' heads create their base model by `AutoModel`, which would ask to trust remote code once more
        if type(config).__name__ == DDLConfig.__name__:
            AutoModel.register(type(config), DDLModel, exist_ok=True)
        super().__init__(config, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # In code outside of transformers, modules are skipped all of whose own parameters are loaded: also those that own
        # none, but whose children `_init_weights` gives their starting values. The init functions skip loaded ones.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if self.config.init_scheme == "authors":
            self._init_weights_as_authors(module)

        # Parameters that define a starting point rather than a distribution
        n = self.config.num_value_channels
        if isinstance(module, DDLDeltaResidual):
            gate_init = self.config.gate_init / 2
            init.constant_(module.beta_proj.bias, math.log(gate_init / (1 - gate_init)))
            if self.config.value_anchor is not None:
                init.constant_(module.anchor_keep, self.config.value_anchor)
                init.constant_(module.anchor_add, self.config.value_anchor)
        elif isinstance(module, DDLAdditiveResidual) and module.amplitude is not None:
            init.ones_(module.amplitude)
        elif isinstance(module, DDLHyperConnection):
            static = torch.cat([torch.ones(n, 1), torch.zeros(n, 1), torch.eye(n)], dim=1)
            static[module.first_stream, 1] = 1
            init.copy_(module.static, static)
            init.zeros_(module.dynamic)
            init.constant_(module.scale, 0.01)
        elif isinstance(module, DDLManifoldHyperConnection):
            # Sigmoids of 1/n to read and 1 = 2σ(0) to write with; mixing weights e⁴ : 1 in favour of a stream itself
            base = torch.cat([torch.full((n,), -math.log(n - 1)), torch.zeros(n), 4 * torch.eye(n).flatten()])
            init.copy_(module.base, base)
            init.normal_(module.fn, std=self.config.initializer_range)
            init.constant_(module.scale, 0.01)
        elif isinstance(module, DDLEmbeddingConvolution):
            init.copy_(module.weight, unit_kernel_like(module.weight, tap=-1))
        elif isinstance(module, (DDLTokenCompressor, DDLChannelCompressor)):
            init.constant_(module.read, 1 / n)
            if self.config.init_scheme == "default":
                tap = -1 if isinstance(module, DDLTokenCompressor) else module.current_tap
                init.copy_(module.weight, unit_kernel_like(module.weight, tap))

    def _init_weights_as_authors(self, module: nn.Module):
        """Every matrix of attention, MLP, gates, targets and compressors N(0, 0.5/√d), embeddings N(0, 0.02) (spec §4)."""
        std = 0.5 / math.sqrt(self.config.hidden_size)
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, (nn.Linear, DDLTokenCompressor, DDLChannelCompressor)):
            init.normal_(module.weight, std=std)
        elif isinstance(module, DDLAttention):
            init.normal_(module.o_proj.weight, std=std / math.sqrt(self.config.num_hidden_layers))
        elif isinstance(module, LlamaMLP):
            init.normal_(module.down_proj.weight, std=std / math.sqrt(self.config.num_hidden_layers))


def unit_kernel_like(weight: torch.Tensor, tap: int) -> torch.Tensor:
    """Kernel (taps in the last dimension) of the convolution that copies its input at `tap`."""
    kernel = torch.zeros_like(weight)
    kernel.select(-1, tap).fill_(1)  # indexing would fail on the sharded weights of FSDP2
    return kernel


class DDLModel(DDLPreTrainedModel):
    """The stack of DDL decoder layers between the token embeddings and the final norm, without a head."""

    def __init__(self, config: DDLConfig):
        super().__init__(config)
        # Serving engines keep keys and values for attention, but no inputs of convolutions: they would be wrong silently
        if config.number_of_conv_states > 0 and config._attn_implementation in ("vllm", "sglang"):
            raise ValueError(
                f"{config._attn_implementation} cannot serve a model with convolutions over tokens; allowed: "
                "num_value_channels=1, or compressor='channel' with embedding_conv=False"
            )
        load_kernels()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embedding_conv = DDLEmbeddingConvolution(config) if config.embedding_conv else None
        self.layers = nn.ModuleList(
            [DDLDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.readout = COMPRESSORS[config.compressor](config)
        self.norm = DDLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DDLRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        if config.has_gates:
            # Gates and targets are kept in float32 by `from_pretrained(dtype=...)`, for which bfloat16 takes the strict list,
            # and spared by quantisers, which take the other one and match a name from its start. No entry may be in both.
            self._keep_in_fp32_modules = [".*attn_residual", ".*mlp_residual"]
            self._keep_in_fp32_modules_strict = ["attn_residual", "mlp_residual"]

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args are [`LlamaModel`]'s. Of the outputs, `hidden_states` holds what each layer reads from the state and the
        final `last_hidden_state`, all `[batch, sequence, hidden_size]`. Padding is known to the convolutions of EC and TC from
        masks `[batch, tokens]`, not from masks with four dimensions.

        Raises:
            `ValueError`: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        new_tokens = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
        attention_mask, boundaries = self._prepare_masks(
            inputs_embeds, attention_mask, position_ids, past_key_values, new_tokens
        )

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and self.config.number_of_conv_states > 0:
            layers = past_key_values.layers
            if not layers or not isinstance(layers[0], LinearAttentionCacheLayerMixin):
                raise ValueError("past_key_values has no room for convolutions, make it with `config=model.config`")
            # A program made with an empty static cache keeps the keys and values that it finds there, but nothing else
            is_empty = isinstance(past_key_values, StaticCache) and not past_key_values.has_previous_state(0)
            if is_empty and is_exporting():
                raise ValueError(
                    "torch.export would lose the inputs of convolutions, which an empty static cache does not have; "
                    "allowed: use_cache=False, or a model without convolutions over tokens"
                )
        if past_key_values is not None and self.config.compressor == "token":
            self._fill_unused_conv_states(past_key_values, inputs_embeds)
        boundaries["past_key_values"] = past_key_values
        output_hidden_states = bool(kwargs.pop("output_hidden_states", self.config.output_hidden_states))

        if position_ids is None:
            position_ids = new_tokens.unsqueeze(0)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        # Under autocast the state is stored in the precision of the matrix products; rewrites are computed in float32
        device_type, state_dtype = inputs_embeds.device.type, inputs_embeds.dtype
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            state_dtype = torch.get_autocast_dtype(device_type)
        if self.embedding_conv is None:
            state = inputs_embeds.to(state_dtype).unsqueeze(2).expand(-1, -1, self.config.num_value_channels, -1)
        elif can_fuse_expansion(self.config, inputs_embeds, self.embedding_conv, past_key_values):
            state = fused_expansion(
                inputs_embeds,
                self.embedding_conv.mixing(),
                state_dtype,
                boundaries["conv_mask"],
                boundaries["document_ids"],
            )
        else:
            state_idx = self.config.number_of_conv_states - 1
            state = self.embedding_conv(inputs_embeds, layer_idx=0, state_idx=state_idx, **boundaries).to(state_dtype)

        write, history = (), ()
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            state, _, history, *write = decoder_layer(
                state,
                *write,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                history=history,
                output_hidden_states=output_hidden_states,
                **boundaries,
                **kwargs,
            )

        _, _, hidden_states, _, _ = begin_sublayer(
            self.config,
            state,
            write,
            self.readout,
            self.norm,
            None,
            None,
            history,
            output_hidden_states,
            layer_idx=self.config.num_hidden_layers - 1,
            state_idx=2,
            **boundaries,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
        )

    def _prepare_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        new_tokens: torch.LongTensor,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor | None]]:
        """
        The mask of the attention and, for the convolutions, `conv_mask` (False at padding) and `document_ids` of packed
        documents, both `[batch, sequence]` or None. `new_tokens` are the columns of the mask that `inputs_embeds` stand for.
        As in transformers, position ids denote packed documents where neither a mask nor a cache is given.
        """
        conv_mask = document_ids = None
        # `generate` prepares the masks of a compiled forward pass in advance
        if isinstance(attention_mask, dict):
            causal_mask, conv_mask = attention_mask["full_attention"], attention_mask.get("linear_attention")
        else:
            is_plain = attention_mask is None and past_key_values is None and position_ids is None
            # While compiling, `create_causal_mask` writes out even a plain causal mask, which bars sdpa's fast kernels
            causal_mask = None
            if not (is_plain and self.config._attn_implementation == "sdpa"):
                causal_mask = create_causal_mask(
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
            if self.config.number_of_conv_states == 0:
                pass
            elif attention_mask is not None and attention_mask.ndim == 2:
                conv_mask = attention_mask[:, new_tokens]
            elif attention_mask is None and past_key_values is None and position_ids is not None:
                document_ids = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
        conv_mask = conv_mask.bool() if conv_mask is not None else None
        return causal_mask, {"conv_mask": conv_mask, "document_ids": document_ids}

    def _fill_unused_conv_states(self, past_key_values: Cache, inputs_embeds: torch.Tensor):
        """
        Every hybrid layer of transformers' caches has the same number of convolution states and can only be cropped
        when all of them are in use. The readout (state 2) uses one of the last layer and the embedding convolution
        (state 3) one of the first, so that the others hold empty tensors.
        """
        used = {(self.config.num_hidden_layers - 1, 2), (0, 3)}
        for layer_idx in range(self.config.num_hidden_layers):
            for state_idx in range(2, self.config.number_of_conv_states):
                if (layer_idx, state_idx) in used or past_key_values.has_previous_state(layer_idx, state_idx):
                    continue
                empty = inputs_embeds.new_empty(inputs_embeds.shape[0], 0, 1)
                past_key_values.update_conv_state(empty, layer_idx, state_idx=state_idx, conv_kernel_size=1)


class DDLForCausalLM(DDLPreTrainedModel, GenerationMixin):
    """The DDL model with a language modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    # The loss from hidden states and the weight of the head, see `apply_liger_kernel_to_ddl`
    loss_without_logits: Callable | None = None

    def __init__(self, config: DDLConfig):
        super().__init__(config)
        self.model = DDLModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args and outputs are [`LlamaForCausalLM`]'s: `labels` `[batch, sequence]` are shifted inside and ignored where
        -100; the loss is the mean over labels, or their sum divided by `num_items_in_batch`; `logits_to_keep` limits
        the logits to the last so many positions, or to the given ones. With labels and `skip_logits`, by default in training
        with Liger's kernels, which compute the loss without them, logits are None.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, slice_indices, :]
        if self.config.logits_scale is not None:
            hidden_states = hidden_states * self.config.logits_scale

        logits = loss = None
        if skip_logits is None:
            skip_logits = self.training and self.loss_without_logits is not None
        skip_logits = skip_logits and labels is not None
        if skip_logits and self.loss_without_logits is not None and self._head_is_plain(hidden_states.device):
            loss = self.loss_without_logits(hidden_states, self.lm_head.weight, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(
        config: DDLConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor | None]:
        """
        The masks of a forward pass that `generate` may compile, as transformers makes them; but one for the attention of all
        layers, where transformers may make another one for those with convolutions (it depends on the order of a set).
        """
        mask_kwargs = {
            "config": config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks = {"full_attention": create_causal_mask(**mask_kwargs)}
        if config.number_of_conv_states > 0:
            masks["linear_attention"] = create_recurrent_attention_mask(**mask_kwargs)
        return masks

    def _head_is_plain(self, device: torch.device) -> bool:
        # A head that an adapter wraps, that has hooks, or whose weight is sharded, quantised or offloaded must be called
        head = self.lm_head
        is_plain = type(head) is nn.Linear and not is_watched(head)
        return is_plain and type(head.weight) is nn.Parameter and head.weight.device == device


class DDLForSequenceClassification(GenericForSequenceClassification, DDLPreTrainedModel): ...


class DDLForTokenClassification(GenericForTokenClassification, DDLPreTrainedModel): ...


class DDLForQuestionAnswering(GenericForQuestionAnswering, DDLPreTrainedModel): ...


# By these tables, not by the Auto classes, `Trainer` finds out whether it must shift labels that it smooths, pipelines whether
# they support a model, and model cards what a model is for
modeling_auto.MODEL_MAPPING_NAMES["ddl"] = "DDLModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ddl"] = "DDLForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["ddl"] = "DDLForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["ddl"] = "DDLForTokenClassification"
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["ddl"] = "DDLForQuestionAnswering"


__all__ = [
    "DDLPreTrainedModel",
    "DDLModel",
    "DDLForCausalLM",
    "DDLForSequenceClassification",
    "DDLForTokenClassification",
    "DDLForQuestionAnswering",
]
