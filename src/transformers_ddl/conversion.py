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
Checkpoints of other models as DDL models: `transformers-ddl convert official PATH OUT` for those of the authors' research
code.
"""

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .cli import InputError
from .configuration_ddl import DDLConfig
from .modeling_ddl import DDLForCausalLM


# Modules of the authors' models, in the names of both of their releases, and ours
OFFICIAL_MODULES = {
    "transformer.wte": "model.embed_tokens",
    "input_embed": "model.embedding_conv",
    "input_embed.conv": "model.embedding_conv",
    "readout": "model.readout",
    "readout.shortconv": "model.readout",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
}
# Those of a layer, "transformer.h.0" for instance
OFFICIAL_LAYER_MODULES = {
    "ln_1": "input_layernorm",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.o_proj": "self_attn.o_proj",
    "attn.q_rms": "self_attn.q_norm",
    "attn.k_rms": "self_attn.k_norm",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc1": "mlp.gate_proj",
    "mlp.c_fc2": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "mlp.o_proj": "mlp.down_proj",
    "compress": "compressor",
    "compress.shortconv": "compressor",
    **{
        f"ddl_{kind}.{theirs}": f"{kind}_residual.{ours}"
        for kind in ("attn", "mlp")
        for theirs, ours in {
            "beta": "beta_proj",
            "beta_in": "beta_hidden_proj",
            "beta_out": "beta_proj",
            "v_proj": "value_proj",
        }.items()
    },
}
# Options of the authors' models that DDLConfig cannot express, and the values at which they change nothing
OFFICIAL_NEUTRAL_OPTIONS = {
    **dict.fromkeys(("using_groupnorm", "use_output_gate", "use_k_shift", "use_v_shift"), (None, False)),
    **dict.fromkeys(("q_activation", "k_activation", "v_activation"), (None, "identity")),
    "residual_branch_mult": (None, 1),
}
# Values of the authors' `parameterization` that scale the logits, and those that also scale the residual branches
OFFICIAL_LOGITS_SCALED = ("widthmup", "completep", "spectralp")
OFFICIAL_BRANCHES_SCALED = ("completep", "spectralp")


def convert_official_checkpoint(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[DDLConfig, dict[str, torch.Tensor]]:
    """
    Turns a model of the authors' research code (github.com/yifanzhang-pro/deep-delta-learning) into ours, with the same
    logits: the scalar, the CC and the TC models, with or without EC, and the additive baseline, in the parameter names
    of their first and of their later release.

    Args:
        state_dict: Their parameters. Names may begin with the prefix of `torch.compile` or of data parallelism.
        config: The options in their `config.json`; what the shapes of the parameters tell may be missing.

    Returns:
        The configuration and the parameters of a [`DDLForCausalLM`], for `from_pretrained(None, config=...,
        state_dict=...)`. They share the memory of the given ones, token convolutions aside, so that those of a
        memory-mapped file stay there.

    Raises:
        `ValueError`: naming the parameter, for one that is missing, unexpected or of a wrong shape; naming the option, for
            one that contradicts the parameters or that `DDLConfig` cannot express.
    """
    state_dict = dict(state_dict)
    for prefix in ("module.", "_orig_mod."):
        consume_prefix_in_state_dict_if_present(state_dict, prefix)

    sources = {}  # our name: theirs
    for source in state_dict:
        name = _official_to_ours(source)
        if name is None or name in sources:
            raise ValueError(f"unexpected parameter {source}: it belongs to no model that can be converted")
        sources[name] = source
    shapes = {name: tuple(state_dict[source].shape) for name, source in sources.items()}
    ddl_config = _official_config(shapes, config, is_later_release=any(".o_proj." in source for source in state_dict))
    head, embedding = (state_dict.get(sources.get(name)) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    ddl_config.tie_word_embeddings = head is None or torch.equal(head, embedding)
    ddl_config.dtype = embedding.dtype

    with torch.device("meta"):
        expected = DDLForCausalLM(ddl_config).state_dict()
    if ddl_config.tie_word_embeddings:
        del expected["lm_head.weight"]
        sources.pop("lm_head.weight", None)
    if ddl_config.value_activation == "constant":  # their models then have a value map without using it
        sources = {name: source for name, source in sources.items() if ".value_proj." not in name}

    converted = {}
    for name, parameter in expected.items():
        if name.endswith("beta_hidden_proj.bias"):
            converted[name] = torch.zeros(parameter.shape, dtype=embedding.dtype)
            continue
        if name not in sources:
            raise ValueError(f"missing parameter {_ours_to_official(name)}")
        source = sources.pop(name)
        converted[name] = _convert_parameter(source, state_dict[source], parameter.shape)
    if sources:
        raise ValueError(f"unexpected parameter {next(iter(sources.values()))}: the other parameters leave it no use")
    return ddl_config, converted


def _official_to_ours(source: str) -> str | None:
    """Our name of a parameter of theirs, None if there is none."""
    module, _, parameter = source.rpartition(".")
    if match := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module):
        layer_idx, module = match.groups()
        name = OFFICIAL_LAYER_MODULES.get(module)
        return name and f"model.layers.{layer_idx}.{name}.{parameter}"
    name = OFFICIAL_MODULES.get(module)
    return name and f"{name}.{parameter}"


def _ours_to_official(name: str) -> str:
    """Their name of a parameter of ours, "or" the other if their releases differ."""
    module, _, parameter = name.rpartition(".")
    prefix, names = "", OFFICIAL_MODULES
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        layer_idx, module = match.groups()
        prefix, names = f"transformer.h.{layer_idx}.", OFFICIAL_LAYER_MODULES
    return " or ".join(f"{prefix}{theirs}.{parameter}" for theirs, ours in names.items() if ours == module)


def _official_config(
    shapes: dict[str, tuple[int, ...]], options: Mapping[str, Any], is_later_release: bool
) -> DDLConfig:
    """The configuration that the shapes of the parameters, under our names, and the options of a checkpoint say."""
    for name, neutral in OFFICIAL_NEUTRAL_OPTIONS.items():
        if options.get(name) not in neutral:
            raise ValueError(f"{name}={options[name]!r} cannot be converted; allowed: {neutral[-1]!r}")

    layer = "model.layers.0."
    for name in ("model.embed_tokens.weight", f"{layer}self_attn.q_proj.weight", f"{layer}mlp.gate_proj.weight"):
        if len(shapes.get(name, ())) != 2:
            raise ValueError(f"missing parameter {_ours_to_official(name)} with two dimensions")
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    is_delta = f"{layer}attn_residual.beta_proj.weight" in shapes
    has_qk_norm = f"{layer}self_attn.q_norm.weight" in shapes
    (num_value_channels,) = shapes.get(f"{layer}compressor.read", (1,))
    (head_dim,) = shapes.get(f"{layer}self_attn.q_norm.weight", (options.get("head_dim"),))
    if head_dim is None:
        raise ValueError("head_dim is missing: without q_rms parameters, only the configuration can tell it")
    found = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")),
        "num_attention_heads": shapes[f"{layer}self_attn.q_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
    }
    ddl_options = {}
    if is_delta:
        constant = "ddl_v_dim1_constant" if num_value_channels == 1 else "ddl_v_constant"
        activation = "constant" if options.get(constant) else "sigmoid" if options.get("ddl_v_sigmoid", True) else None
        scales = {"constant": (f"{constant}_value", 2.0), "sigmoid": ("ddl_v_sigmoid_scale", 4.0)}
        gate_hidden = shapes.get(f"{layer}attn_residual.beta_hidden_proj.weight")
        ddl_options = {
            "num_value_channels": num_value_channels,
            # Theirs keeps the gate's logit finite
            "gate_init": min(max(options.get("ddl_beta_init", 1.0), 2e-6), 2 - 2e-6),
            "gate_hidden_size": gate_hidden and gate_hidden[0],
            "value_activation": activation,
            "value_scale": options.get(*scales[activation]) if activation else None,
            "value_bias": activation != "constant",
            "key_eps": options.get("ddl_k_eps", 1e-5),
        }
    elif options.get("rms_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"rms_norm_eps={options['rms_norm_eps']} cannot be converted; allowed: 1e-05")
    if num_value_channels > 1:
        compressor = shapes.get(f"{layer}compressor.weight", ())
        is_channel = len(compressor) == 2 and compressor[0] == hidden_size
        if is_channel and is_later_release and options.get("ddl_state_dv_shortconv_causal"):  # had no effect before
            raise ValueError("ddl_state_dv_shortconv_causal=True cannot be converted; allowed: False")
        embedding_conv = shapes.get("model.embedding_conv.weight")
        ddl_options |= {
            "compressor": "channel" if is_channel else "token",
            "compressor_kernel_size": compressor[-1] if compressor else None,
            "embedding_conv": embedding_conv is not None,
            "embedding_conv_kernel_size": embedding_conv and embedding_conv[-1],
        }
        found |= {"ddl_value_channels": num_value_channels}
    for name, value in found.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name} is {options[name]!r} in the configuration, but {value} by the parameters")

    parameterization = str(options.get("parameterization")).lower()
    num_layers_base = options.get("num_hidden_layers_base", found["num_hidden_layers"])
    if parameterization in OFFICIAL_BRANCHES_SCALED and num_layers_base != found["num_hidden_layers"]:
        if options.get("residual_branch_mult") is None:
            raise ValueError(f"num_hidden_layers_base={num_layers_base} cannot be converted: it scales the branches")
    is_scaled = options.get("mup") or parameterization in OFFICIAL_LOGITS_SCALED
    rope = {"rope_type": "default", "rope_theta": float(options.get("rope_base", 10_000.0))}
    if (rope_ratio := float(options.get("rope_ratio", 1.0))) != 1:
        rope["partial_rotary_factor"] = int(head_dim * rope_ratio) // 2 * 2 / head_dim
    return DDLConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=shapes[f"{layer}mlp.gate_proj.weight"][0],
        num_hidden_layers=found["num_hidden_layers"],
        num_attention_heads=found["num_attention_heads"],
        head_dim=head_dim,
        max_position_embeddings=options.get("block_size", 1024),
        rope_parameters=rope,
        residual_type="delta" if is_delta else "additive",
        qk_norm="post_rope" if has_qk_norm else None,
        logits_scale=options.get("hidden_size_base", 1024) / hidden_size if is_scaled else None,
        init_scheme="authors",
        **ddl_options,
    )


def _convert_parameter(source: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A parameter of theirs in our `shape`; the d·n channels of their token convolutions run feature-major."""
    allowed = [tuple(shape)]
    if len(shape) == 3:
        n, d, kernel_size = shape
        allowed = [(d, n, kernel_size), (d * n, kernel_size), (d * n, 1, kernel_size)]
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"{source} has the shape {tuple(tensor.shape)}, expected {' or '.join(map(str, allowed))}")
    return tensor.reshape(d, n, kernel_size).transpose(0, 1).contiguous() if len(shape) == 3 else tensor


def read_official_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    The parameters and the options of a checkpoint: a folder, or a file with a `config.json` beside it. Nothing in a file
    is executed. Parameters stay in the file, memory-mapped, until they are used.

    Args:
        path: A `.safetensors`, `.bin` or `.pt` file, or a folder with one, or one sharded as transformers does. A file of a
            training run may hold the parameters as its `"model"` and the options as its `"config"`.

    Raises:
        `ValueError`: if there is no such file, or it holds anything else.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = [path]
    if path.is_dir():
        indices = [path / name for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME) if (path / name).is_file()]
        names = [name for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME) if (path / name).is_file()]
        if names:
            files = [path / names[0]]
        elif indices:
            files = sorted({path / name for name in _read_json(indices[0]).get("weight_map", {}).values()})
        else:
            files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".bin", ".pt")]
            if len(files) > 1:
                raise ValueError(f"{path} holds several checkpoints, name one: {', '.join(f.name for f in files)}")
    if not files:
        raise ValueError(f"{path} holds no checkpoint; allowed: .safetensors, .bin and .pt files")

    state_dict, options = {}, {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        try:
            content = load_state_dict(file)
        except (EOFError, OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is damaged, or holds more than parameters and options") from error
        if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
            options = content.get("config", content.get("model_args", {}))
            content = content["model"]
        if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise ValueError(f"{file} holds no parameters by name")
        state_dict.update(content)
    if (folder / CONFIG_NAME).is_file():
        options = _read_json(folder / CONFIG_NAME)
    if not isinstance(options, Mapping) or not options:
        raise ValueError(f"there is no {CONFIG_NAME} beside {files[0].name}, and no options in it")
    return state_dict, dict(options)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def check_output_folder(folder: str | Path):
    """Raises `ValueError` if the folder holds anything, or is a file."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; allowed: a new or empty folder")


def save_converted(folder: str | Path, *parts, max_shard_size: int | str = "5GB"):
    """
    Saves parts with `save_pretrained` (model, tokenizer) to a new or empty folder, which appears when all of it is there.

    Raises:
        `ValueError`: if the folder holds anything.
    """
    check_output_folder(folder)
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        for part in parts:
            part.save_pretrained(Path(temporary, folder.name), max_shard_size=max_shard_size)
        Path(temporary, folder.name).replace(folder)


def main(arguments: list[str]):
    """`transformers-ddl convert official PATH OUT`."""
    parser = argparse.ArgumentParser(prog="transformers-ddl convert", description="Convert a checkpoint to DDL.")
    parser.add_argument("kind", choices=["official"], help="official: of the authors' research code")
    parser.add_argument(
        "path", help="checkpoint: a folder, or a .safetensors, .bin or .pt file beside its config.json"
    )
    parser.add_argument("out", help="folder to write, new or empty")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        check_output_folder(options.out)
        config, state_dict = convert_official_checkpoint(*read_official_checkpoint(options.path))
        model = DDLForCausalLM.from_pretrained(None, config=config, state_dict=state_dict)
        save_converted(options.out, model, max_shard_size=options.max_shard_size)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"{options.out}: {model.num_parameters():,} parameters")
