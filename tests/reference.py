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
Deep Delta Learning in plain loops: the definition that the tests hold the package against.

Written from the paper, it shares no code with `transformers_ddl` or `transformers`. A document is a list of tokens, the
residual state of a token is a `(d, n)` tensor, and loops run over tokens, heads, value channels and taps. Gradients come
from autograd. The parameters are a state dict under the package's names.
"""

import math

import torch


ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: torch.where(x > 0, x, 0 * x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
}


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def linear(x, params, name):
    y = params[f"{name}.weight"] @ x
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean() + eps)


def delta_rewrite(state, direction, gate, target, key_eps, erase=True, anchor=None):
    """
    X' = X + β k (v − Xᵀk)ᵀ with k = k̃ / sqrt(‖k̃‖² + ε²); state (d, n), direction (d,), gate (), target (n,). An anchor
    (a, b), each (n,), adds a ∘ Xᵀk + b sqrt(‖k̃‖² + ε²) / β to the target.
    """
    norm = torch.sqrt((direction * direction).sum() + key_eps**2)
    key = direction / norm
    readout = state.T @ key
    if anchor is not None:
        target = target + anchor[0] * readout + anchor[1] * norm / gate
    return state + gate * torch.outer(key, target - readout if erase else target)


# Hyper-Connections: how a sublayer reads the streams of a token, and how they are mixed and written to


def hyper_connection(config, params, name, state):
    """Arrays a (n,), b (n,), M (n, n) of arXiv 2409.19606: static and, through a tanh, dependent on the streams."""
    n = config.num_value_channels
    static, dynamic, (scale_b, scale_am) = (params[f"{name}.{x}"] for x in ("static", "dynamic", "scale"))
    b, a, M = [], [], []
    for j in range(n):
        stream = torch.tanh(dynamic @ rms_norm(state[:, j], params[f"{name}.norm.weight"], config.rms_norm_eps))
        b.append(static[j, 0] + scale_b * stream[0])
        a.append(static[j, 1] + scale_am * stream[1])
        M.append(torch.stack([static[j, 2 + k] + scale_am * stream[2 + k] for k in range(n)]))
    return torch.stack(a), torch.stack(b), torch.stack(M)


def manifold_hyper_connection(config, params, name, state):
    """The same of arXiv 2512.24880 with 20 Sinkhorn steps, in DeepSeek-V4's order and with its guards of 1e-6."""
    n, eps = config.num_value_channels, 1e-6
    flat = state.T.reshape(-1)
    logits = params[f"{name}.fn"] @ rms_norm(flat, torch.ones_like(flat), config.rms_norm_eps)
    scale, base = params[f"{name}.scale"], params[f"{name}.base"]
    a = sigmoid(scale[0] * logits[:n] + base[:n]) + eps
    b = 2 * sigmoid(scale[1] * logits[n : 2 * n] + base[n : 2 * n])
    M = torch.exp((scale[2] * logits[2 * n :] + base[2 * n :]).reshape(n, n))
    M = M / M.sum(1, keepdim=True) + eps
    for step in range(20):
        if step > 0:
            M = M / (M.sum(1, keepdim=True) + eps)
        M = M / (M.sum(0, keepdim=True) + eps)
    return a, b, M


HYPER_CONNECTIONS = {
    "hyper_connections": hyper_connection,
    "manifold_hyper_connections": manifold_hyper_connection,
}


# Embedding and compressors


def token_convolution(inputs, kernel, channel):
    """Causal depthwise convolution of one value channel over tokens: the last tap is the current token."""
    taps = kernel.shape[-1]
    outputs = []
    for t in range(len(inputs)):
        y = torch.zeros_like(inputs[t])
        for tap in range(taps):
            source = t - (taps - 1) + tap
            if source >= 0:
                y = y + kernel[channel, :, tap] * inputs[source]
        outputs.append(y)
    return outputs


def expand(config, params, embeddings):
    """Token embeddings, a list of (d,), to states, a list of (d, n)."""
    channels = []
    for j in range(config.num_value_channels):
        if config.embedding_conv:
            channels.append(token_convolution(embeddings, params["model.embedding_conv.weight"], j))
        else:
            channels.append(embeddings)
    return [torch.stack([channel[t] for channel in channels], dim=1) for t in range(len(embeddings))]


def mix_channels(state, kernel):
    """'Same'-padded correlation of every feature's n values with its kernel of s taps, left pad ⌊(s − 1)/2⌋."""
    n, taps = state.shape[1], kernel.shape[1]
    left = (taps - 1) // 2
    mixed = []
    for j in range(n):
        y = torch.zeros_like(state[:, 0])
        for tap in range(taps):
            source = j - left + tap
            if 0 <= source < n:
                y = y + kernel[:, tap] * state[:, source]
        mixed.append(y)
    return mixed


def compress(config, params, name, states):
    """States, a list of (d, n), to sublayer inputs, a list of (d,)."""
    n = config.num_value_channels
    if n == 1:
        return [state[:, 0] for state in states]
    kernel, read = params[f"{name}.weight"], params[f"{name}.read"]
    if config.compressor == "channel":
        mixed = [mix_channels(state, kernel) for state in states]
    else:
        channels = [token_convolution([state[:, j] for state in states], kernel, j) for j in range(n)]
        mixed = [[channel[t] for channel in channels] for t in range(len(states))]
    return [sum(read[j] * values[j] for j in range(n)) for values in mixed]


# Sublayers


def rotate(x, position, theta, share):
    """Rotary embedding of the first D = share · |x| features of a head: i and i + D/2 turn by position · theta^(−2i/D)."""
    dim = int(share * len(x))
    half = dim // 2
    angles = torch.tensor([position * theta ** (-2 * i / dim) for i in range(half)], dtype=x.dtype)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[:half], x[half:dim]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[dim:]])


def place_head(config, params, name, x, position):
    """Query or key head at a position: rotary embedding and RMSNorm in the configured order."""
    rope = config.rope_parameters
    if config.qk_norm == "pre_rope":
        x = rms_norm(x, params[f"{name}.weight"], config.rms_norm_eps)
    x = rotate(x, position, rope["rope_theta"], rope.get("partial_rotary_factor", 1.0))
    if config.qk_norm == "post_rope":
        x = rms_norm(x, params[f"{name}.weight"], config.rms_norm_eps)
    return x


def attention(config, params, name, contexts):
    heads, dim = config.num_attention_heads, config.head_dim
    group = heads // config.num_key_value_heads
    queries = [linear(c, params, f"{name}.q_proj").split(dim) for c in contexts]
    keys = [linear(c, params, f"{name}.k_proj").split(dim) for c in contexts]
    values = [linear(c, params, f"{name}.v_proj").split(dim) for c in contexts]
    keys = [[place_head(config, params, f"{name}.k_norm", k, t) for k in keys[t]] for t in range(len(contexts))]
    outputs = []
    for t in range(len(contexts)):
        mixed = []
        for h in range(heads):
            query = place_head(config, params, f"{name}.q_norm", queries[t][h], t)
            scores = torch.stack([query @ keys[s][h // group] for s in range(t + 1)]) / math.sqrt(dim)
            weights = torch.exp(scores - scores.max().detach())
            weights = weights / weights.sum()
            mixed.append(sum(weights[s] * values[s][h // group] for s in range(t + 1)))
        outputs.append(linear(torch.cat(mixed), params, f"{name}.o_proj"))
    return outputs


def mlp(config, params, name, context):
    activate = ACTIVATIONS[config.hidden_act]
    hidden = activate(linear(context, params, f"{name}.gate_proj")) * linear(context, params, f"{name}.up_proj")
    return linear(hidden, params, f"{name}.down_proj")


def gate(config, params, name, context):
    """β = 2 σ(w·c + b), or 2 σ(w₂·tanh(W₁ c + b₁) + b₂), of every step."""
    hidden = context
    if config.gate_hidden_size is not None:
        hidden = torch.tanh(linear(context, params, f"{name}.beta_hidden_proj"))
    return 2 * sigmoid(linear(hidden, params, f"{name}.beta_proj"))


def target(config, params, name, sublayer_input, context):
    """v = value_scale · a(W x + b), of every step one after the other."""
    if config.value_activation == "constant":
        values = config.num_delta_steps * config.num_value_channels
        return config.value_scale * torch.ones(values, dtype=context.dtype)
    source = context if config.value_input == "context" else sublayer_input
    value = linear(source, params, f"{name}.value_proj")
    return config.value_scale * (sigmoid(value) if config.value_activation == "sigmoid" else value)


def sublayer(config, params, layer, kind, states):
    """Compress, process, rewrite: `kind` is "attn" or "mlp"."""
    norm = {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}[kind]
    residual = f"{layer}.{kind}_residual"
    if config.residual_type in HYPER_CONNECTIONS:
        connections = [HYPER_CONNECTIONS[config.residual_type](config, params, residual, state) for state in states]
        inputs = [state @ a for state, (a, _, _) in zip(states, connections)]
    else:
        own_compressor = kind == "mlp" and not config.share_compressor
        compressor = f"{layer}.mlp_compressor" if own_compressor else f"{layer}.compressor"
        inputs = compress(config, params, compressor, states)
    contexts = [rms_norm(x, params[f"{layer}.{norm}.weight"], config.rms_norm_eps) for x in inputs]
    if kind == "attn":
        outputs = attention(config, params, f"{layer}.self_attn", contexts)
    else:
        outputs = [mlp(config, params, f"{layer}.mlp", c) for c in contexts]

    if config.residual_type in HYPER_CONNECTIONS:
        return [state @ M + torch.outer(output, b) for state, output, (_, b, M) in zip(states, outputs, connections)]
    if config.residual_type == "additive":
        return [state + output[:, None] for state, output in zip(states, outputs)]
    if config.residual_type == "expanded_additive":
        return [state + torch.outer(output, params[f"{residual}.amplitude"]) for state, output in zip(states, outputs)]
    rewritten = []
    anchor = None
    if config.value_anchor is not None:
        anchor = params[f"{residual}.anchor_keep"], params[f"{residual}.anchor_add"]
    for state, output, x, c in zip(states, outputs, inputs, contexts):
        betas = gate(config, params, residual, c)
        values = target(config, params, residual, x, c).split(config.num_value_channels)
        for direction, beta, v in zip(output.split(config.hidden_size), betas, values, strict=True):
            erase = config.residual_type == "delta"
            state = delta_rewrite(state, direction, beta, v, config.key_eps, erase, anchor)
        rewritten.append(state)
    return rewritten


def document_logits(config, params, embeddings):
    """Logits (T, vocabulary) of one document given its token embeddings (T, d)."""
    states = expand(config, params, list(embeddings))
    for index in range(config.num_hidden_layers):
        for kind in ("attn", "mlp"):
            states = sublayer(config, params, f"model.layers.{index}", kind, states)
    outputs = compress(config, params, "model.readout", states)
    head = params["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = [head @ rms_norm(x, params["model.norm.weight"], config.rms_norm_eps) for x in outputs]
    scale = 1.0 if config.logits_scale is None else config.logits_scale
    return scale * torch.stack(logits)


def logits(config, params, input_ids=None, inputs_embeds=None):
    """Logits (B, T, vocabulary) of whole documents, one per row."""
    if inputs_embeds is None:
        inputs_embeds = params["model.embed_tokens.weight"][input_ids]
    return torch.stack([document_logits(config, params, embeddings) for embeddings in inputs_embeds])
