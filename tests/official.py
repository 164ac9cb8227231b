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
The models of the authors' research code in plain PyTorch: what the conversion of their checkpoints is held against.

Written from a description of the architecture and of its files, it shares no code with theirs, with `transformers_ddl` or
with `transformers`. The state is `[batch, sequence, d, n]`, so that the d·n channels of a convolution run feature-major.
The parameters are a state dict under the authors' names, in the layout of their first or of their later release.
"""

import math

import torch
import torch.nn.functional as F


EPS = 1e-5

# The options of a checkpoint, as its config.json has them. All sizes differ from one another.
SIZES = {
    "vocab_size": 37,
    "block_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_size": 20,
    "head_dim": 6,
}
EXPANDED = {"ddl_value_channels": 4, "ddl_state_shortconv_kernel_size": 4}
EC = {"input_embed_shortconv_kernel_size": 3}
# Not a setting of theirs: which of their files a model is made by
VARIANTS = {
    "additive": {},
    "scalar": {},
    "cc": EXPANDED,
    "cc-ec": {**EXPANDED, **EC},
    "tc": {**EXPANDED, "ddl_state_shortconv_kernel_size": 3},
    "tc-ec": {**EXPANDED, "ddl_state_shortconv_kernel_size": 3, **EC},
}


def random_parameters(variant: str, config: dict, layout: str, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Parameters of order 1 / √inputs, under the names of the layout "first" or "later"."""
    d, n, heads, dim = (
        config["hidden_size"],
        config.get("ddl_value_channels", 1),
        config["num_attention_heads"],
        config["head_dim"],
    )
    kernel, width = config.get("ddl_state_shortconv_kernel_size"), 8 * d // 3
    attn_out, mlp_out = ("attn.c_proj", "mlp.c_proj") if layout == "first" else ("attn.o_proj", "mlp.o_proj")

    def compressor(name: str) -> dict[str, tuple[int, ...]]:
        if variant.startswith("cc"):
            return {f"{name}.weight": (d, kernel), f"{name}.read": (n,)}
        if variant.startswith("tc"):
            by_layout = {
                "first": {f"{name}.shortconv.weight": (d * n, kernel)},
                "later": {f"{name}.weight": (d, n, kernel)},
            }
            return {**by_layout[layout], f"{name}.read": (n,)}
        return {}

    def residual(name: str) -> dict[str, tuple[int, ...]]:
        if variant == "additive":
            return {}
        shapes = {f"{name}.beta.weight": (1, d), f"{name}.beta.bias": (1,)}
        if not config.get("ddl_beta_single_linear", True):
            hidden = config["ddl_beta_hidden_size"]
            shapes = {
                f"{name}.beta_in.weight": (hidden, d),
                f"{name}.beta_out.weight": (1, hidden),
                f"{name}.beta_out.bias": (1,),
            }
        if not is_constant(variant, config):
            shapes |= {f"{name}.v_proj.weight": (n, d), f"{name}.v_proj.bias": (n,)}
        return shapes

    shapes = {"transformer.wte.weight": (config["vocab_size"], d)}
    if variant.endswith("-ec"):
        taps = config["input_embed_shortconv_kernel_size"]
        by_layout = {
            "first": {"input_embed.conv.weight": (d * n, 1, taps)},
            "later": {"input_embed.weight": (d, n, taps)},
        }
        shapes |= by_layout[layout]
    for layer in range(config["num_hidden_layers"]):
        block = {
            "ln_1.weight": (d,),
            "attn.c_q.weight": (heads * dim, d),
            "attn.c_k.weight": (heads * dim, d),
            "attn.c_v.weight": (heads * dim, d),
            f"{attn_out}.weight": (d, heads * dim),
            "attn.q_rms.weight": (dim,),
            "attn.k_rms.weight": (dim,),
            "ln_2.weight": (d,),
            "mlp.c_fc1.weight": (width, d),
            "mlp.c_fc2.weight": (width, d),
            f"{mlp_out}.weight": (d, width),
            **compressor("compress"),
            **residual("ddl_attn"),
            **residual("ddl_mlp"),
        }
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (d,), **compressor("readout")}

    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        parameters[name] = (1 + values if ".ln_" in f".{name}" or "_rms" in name else values).to(dtype)
    parameters["lm_head.weight"] = parameters["transformer.wte.weight"]
    return parameters


def is_constant(variant: str, config: dict) -> bool:
    return config.get("ddl_v_dim1_constant" if variant == "scalar" else "ddl_v_constant", False)


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def rotate(x, config):
    """Heads `[batch, sequence, heads, head_dim]`: the first `rope_ratio` of the features turn, in two halves."""
    rotary = int(x.shape[-1] * config.get("rope_ratio", 1.0)) // 2 * 2
    frequencies = config.get("rope_base", 10_000.0) ** (-torch.arange(0, rotary, 2, dtype=x.dtype) / rotary)
    angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), frequencies)[:, None]
    first, second, rest = x.split([rotary // 2, rotary // 2, x.shape[-1] - rotary], dim=-1)
    turned = torch.view_as_complex(torch.stack((first, second), -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, rest), dim=-1)


def depthwise(x, weight):
    """Causal depthwise convolution of `[batch, sequence, channels]` whose last tap is the current token."""
    taps = weight.shape[-1]
    inputs = F.pad(x.transpose(1, 2), (taps - 1, 0))
    return F.conv1d(inputs, weight.reshape(-1, 1, taps), groups=x.shape[-1]).transpose(1, 2)


def compress(variant, params, name, state):
    """`[batch, sequence, d, n]` to `[batch, sequence, d]`."""
    if f"{name}.read" not in params:
        return state.squeeze(-1)
    if variant.startswith("tc"):
        weight = params[f"{name}.shortconv.weight" if f"{name}.shortconv.weight" in params else f"{name}.weight"]
        mixed = depthwise(state.flatten(2), weight).view_as(state)
    else:
        weight = params[f"{name}.weight"]
        left, right = (weight.shape[1] - 1) // 2, weight.shape[1] // 2
        inputs = F.pad(state.flatten(0, 1), (left, right))
        mixed = F.conv1d(inputs, weight[:, None], groups=weight.shape[0]).view_as(state)
    return mixed @ params[f"{name}.read"]


def expand(config, params, embeddings):
    """`[batch, sequence, d]` to `[batch, sequence, d, n]`."""
    state = embeddings[..., None].expand(*embeddings.shape, config.get("ddl_value_channels", 1))
    weight = params.get("input_embed.conv.weight", params.get("input_embed.weight"))
    return state if weight is None else depthwise(state.flatten(2), weight).view_as(state)


def attention(config, params, name, context):
    def heads(kind):
        return (context @ params[f"{name}.c_{kind}.weight"].T).unflatten(-1, (-1, config["head_dim"]))

    query = rms_norm(rotate(heads("q"), config), params[f"{name}.q_rms.weight"]).transpose(1, 2)
    key = rms_norm(rotate(heads("k"), config), params[f"{name}.k_rms.weight"]).transpose(1, 2)
    scores = query @ key.transpose(-1, -2) / math.sqrt(config["head_dim"])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ heads("v").transpose(1, 2)
    return mixed.transpose(1, 2).flatten(2) @ output_projection(params, name).T


def mlp(config, params, name, context):
    hidden = F.silu(context @ params[f"{name}.c_fc1.weight"].T) * (context @ params[f"{name}.c_fc2.weight"].T)
    return hidden @ output_projection(params, name).T


def output_projection(params, name):
    return params[f"{name}.c_proj.weight" if f"{name}.c_proj.weight" in params else f"{name}.o_proj.weight"]


def rewrite(variant, config, params, name, state, direction, x, context):
    """X + β k (v − Xᵀk)ᵀ."""
    if f"{name}.beta.weight" in params:
        logit = F.linear(context, params[f"{name}.beta.weight"], params[f"{name}.beta.bias"])
    else:
        hidden = torch.tanh(context @ params[f"{name}.beta_in.weight"].T)
        logit = F.linear(hidden, params[f"{name}.beta_out.weight"], params[f"{name}.beta_out.bias"])
    if is_constant(variant, config):
        prefix = "ddl_v_dim1_constant" if variant == "scalar" else "ddl_v_constant"
        value = torch.full_like(state[..., 0, :], config.get(f"{prefix}_value", 2.0))
    else:
        value = F.linear(x, params[f"{name}.v_proj.weight"], params[f"{name}.v_proj.bias"])
        if config.get("ddl_v_sigmoid", True):
            value = config.get("ddl_v_sigmoid_scale", 4.0) * value.sigmoid()
    key = direction / (direction.square().sum(-1, keepdim=True) + config.get("ddl_k_eps", 1e-5) ** 2).sqrt()
    discrepancy = value - torch.einsum("btdn,btd->btn", state, key)
    return state + 2 * logit.sigmoid()[..., None] * torch.einsum("btd,btn->btdn", key, discrepancy)


def logits(variant, config, params, tokens):
    """Logits `[batch, sequence, vocabulary]` of tokens `[batch, sequence]`."""
    state = expand(config, params, params["transformer.wte.weight"][tokens])
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        for norm, kind, process in (("ln_1", "attn", attention), ("ln_2", "mlp", mlp)):
            x = compress(variant, params, f"{block}.compress", state)
            context = rms_norm(x, params[f"{block}.{norm}.weight"])
            direction = process(config, params, f"{block}.{kind}", context)
            if variant == "additive":
                state = state + direction[..., None]
            else:
                state = rewrite(variant, config, params, f"{block}.ddl_{kind}", state, direction, x, context)
    hidden = rms_norm(compress(variant, params, "readout", state), params["ln_f.weight"])
    if config.get("mup", False):
        hidden = hidden * (config["hidden_size_base"] / config["hidden_size"])
    return hidden @ params["lm_head.weight"].T
