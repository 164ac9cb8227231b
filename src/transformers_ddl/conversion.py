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
code, `transformers-ddl convert llama MODEL OUT` for Llamas.
"""

import argparse
import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.modeling_utils import load_state_dict
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from .cli import InputError
from .configuration_ddl import DDLConfig
from .modeling_ddl import DDLChannelCompressor, DDLDeltaResidual, DDLForCausalLM, DDLTokenCompressor


# Of parameters
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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
    "ddl_sequence_reduction_version": (None, 1),
}
OFFICIAL_NUMBERS = (
    "block_size",
    "head_dim",
    "hidden_size_base",
    "num_hidden_layers_base",
    "rope_base",
    "rope_ratio",
    "rms_norm_eps",
    "ddl_beta_init",
    "ddl_k_eps",
    "ddl_v_sigmoid_scale",
    "ddl_v_constant_value",
    "ddl_v_dim1_constant_value",
)
OFFICIAL_SWITCHES = (
    "use_qk_rmsnorm",
    "mup",
    "ddl_beta_single_linear",
    "ddl_v_sigmoid",
    "ddl_v_constant",
    "ddl_v_dim1_constant",
    "ddl_state_dv_shortconv_causal",
)
# Values of the authors' `parameterization` that scale the residual branches and the logits, those that scale the logits (as
# `mup` did in their first release; other values change nothing), and those that they themselves refuse
OFFICIAL_BRANCHES_SCALED = ("completeP", "completep", "spectralP", "SpectralP", "spectralp")
OFFICIAL_LOGITS_SCALED = ("widthmuP", "widthmup", *OFFICIAL_BRANCHES_SCALED)
OFFICIAL_PARAMETERIZATIONS_REFUSED = ("muP", "mup")


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
    for prefix in ("module.", "_orig_mod.", "module."):  # whichever is within the other
        consume_prefix_in_state_dict_if_present(state_dict, prefix)

    sources = {}  # our name: theirs
    for source, tensor in state_dict.items():
        name = _official_to_ours(source)
        if name is None or name in sources:
            raise ValueError(f"unexpected parameter {source}: it belongs to no model that can be converted")
        if name.endswith(("norm.weight", ".read")) and tensor.dim() != 1:
            raise ValueError(f"{source} has the shape {tuple(tensor.shape)}, expected one dimension")
        sources[name] = source
    shapes = {name: tuple(state_dict[source].shape) for name, source in sources.items()}
    ddl_config = _official_config(shapes, config, is_later_release=any(".o_proj." in source for source in state_dict))
    ddl_config.dtype = _common_dtype(state_dict)
    head, embedding = (state_dict.get(sources.get(name)) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    ddl_config.tie_word_embeddings = head is None or torch.equal(head, embedding)

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
    ec_option = "input_embed_shortconv_kernel_size"
    options = {name: value for name, value in options.items() if value is not None or name == ec_option}
    for name, neutral in OFFICIAL_NEUTRAL_OPTIONS.items():
        if options.get(name) not in neutral:
            raise ValueError(f"{name}={options[name]!r} cannot be converted; allowed: {neutral[-1]!r}")
    for name in OFFICIAL_NUMBERS:
        if type(options.get(name, 0)) not in (int, float) or not math.isfinite(options.get(name, 0)):
            raise ValueError(f"{name}={options[name]!r} cannot be converted; allowed: a number")
    for name in OFFICIAL_SWITCHES:
        if options.get(name, False) not in (False, True):
            raise ValueError(f"{name}={options[name]!r} cannot be converted; allowed: true, false")

    layer = "model.layers.0."
    for name in ("model.embed_tokens.weight", f"{layer}self_attn.q_proj.weight", f"{layer}mlp.gate_proj.weight"):
        if len(shapes.get(name, ())) != 2:
            raise ValueError(f"missing parameter {_ours_to_official(name)} with two dimensions")
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]

    def first(*endings: str) -> str | None:
        return next((name for name in shapes if name.endswith(endings)), None)

    query_norm, read = first(".q_norm.weight"), first(".read")
    if query_norm is None and options.get("use_qk_rmsnorm", True):
        raise ValueError(
            "missing parameter transformer.h.0.attn.q_rms.weight, which only use_qk_rmsnorm=False does without"
        )
    (num_value_channels,) = shapes.get(read, (1,))
    (head_dim,) = shapes.get(query_norm, (options.get("head_dim"),))
    if not head_dim:
        raise ValueError("head_dim is missing: without q_rms parameters, only the configuration can tell it")
    is_delta = any(name.startswith((f"{layer}attn_residual.", f"{layer}mlp_residual.")) for name in shapes)
    gate_hidden = shapes.get(first(".beta_hidden_proj.weight"))
    compressor = shapes.get(first(".compressor.weight", ".readout.weight"))
    embedding_conv = shapes.get("model.embedding_conv.weight")

    found = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shapes[f"{layer}mlp.gate_proj.weight"][0],
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")),
        "num_attention_heads": shapes[f"{layer}self_attn.q_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
        "use_qk_rmsnorm": query_norm is not None,
        "ddl_value_channels": num_value_channels,
        "ddl_state_shortconv_kernel_size": compressor[-1] if compressor else None,
        ec_option: embedding_conv[-1] if embedding_conv else None,
    }
    if is_delta:
        found["ddl_beta_single_linear"] = gate_hidden is None
    if gate_hidden:
        found["ddl_beta_hidden_size"] = gate_hidden[0]
    for name, value in found.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name} is {options[name]!r} in the configuration, but {value} by the parameters")

    ddl_options = {}
    if is_delta:
        constant = "ddl_v_dim1_constant" if num_value_channels == 1 else "ddl_v_constant"
        activation = "constant" if options.get(constant) else "sigmoid" if options.get("ddl_v_sigmoid", True) else None
        scales = {"constant": (f"{constant}_value", 2.0), "sigmoid": ("ddl_v_sigmoid_scale", 4.0)}
        ddl_options = {
            "num_value_channels": num_value_channels,
            # Theirs keeps the gate's logit finite
            "gate_init": min(max(options.get("ddl_beta_init", 1.0), 2e-6), 2 - 2e-6),
            "gate_hidden_size": found.get("ddl_beta_hidden_size"),
            "value_activation": activation,
            "value_scale": options.get(*scales[activation]) if activation else None,
            "value_bias": activation != "constant",
            "key_eps": options.get("ddl_k_eps", 1e-5),
        }
    else:
        for name in options:
            if name.startswith("ddl_") and name not in OFFICIAL_NEUTRAL_OPTIONS:
                raise ValueError(
                    f"missing parameter transformer.h.0.ddl_attn.beta.weight: {name} is for models with it"
                )
        if options.get("rms_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"rms_norm_eps={options['rms_norm_eps']} cannot be converted; allowed: 1e-05")
    if num_value_channels > 1:
        is_channel = compressor is not None and len(compressor) == 2 and compressor[0] == hidden_size
        if is_channel and is_later_release and options.get("ddl_state_dv_shortconv_causal"):  # had no effect before
            raise ValueError("ddl_state_dv_shortconv_causal=True cannot be converted; allowed: False")
        ddl_options |= {
            "compressor": "channel" if is_channel else "token",
            "compressor_kernel_size": found["ddl_state_shortconv_kernel_size"],
            "embedding_conv": embedding_conv is not None,
            "embedding_conv_kernel_size": found[ec_option],
        }

    if options.get("rope_base", 1) <= 0:
        raise ValueError(f"rope_base={options['rope_base']} cannot be converted; allowed: a positive number")
    rope = {"rope_type": "default", "rope_theta": float(options.get("rope_base", 10_000.0))}
    rope_ratio = float(options.get("rope_ratio", 1.0))
    if not 0 <= rope_ratio <= 1 or (rotary_dim := int(head_dim * rope_ratio) // 2 * 2) == 0:
        raise ValueError(f"rope_ratio={rope_ratio} cannot be converted; allowed: from 2 / head_dim to 1")
    if rotary_dim < head_dim:
        rope["partial_rotary_factor"] = (rotary_dim + 0.5) / head_dim  # times head_dim it is rounded down
    return DDLConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=found["intermediate_size"],
        num_hidden_layers=found["num_hidden_layers"],
        num_attention_heads=found["num_attention_heads"],
        head_dim=head_dim,
        max_position_embeddings=options.get("block_size", 1024),
        rope_parameters=rope,
        residual_type="delta" if is_delta else "additive",
        qk_norm=None if query_norm is None else "post_rope",
        logits_scale=_official_logits_scale(options, hidden_size, found["num_hidden_layers"]),
        init_scheme="authors",
        **ddl_options,
    )


def _official_logits_scale(options: dict[str, Any], hidden_size: int, num_hidden_layers: int) -> float | None:
    """The factor on the logits that the µP options say: `mup` in the first release, `parameterization` in the later one."""
    parameterization = options.get("parameterization")
    num_layers_base = options.get("num_hidden_layers_base", num_hidden_layers)
    if parameterization in OFFICIAL_PARAMETERIZATIONS_REFUSED:
        raise ValueError(f"parameterization={parameterization!r} cannot be converted; they call it 'widthmuP' now")
    if parameterization in OFFICIAL_BRANCHES_SCALED and num_layers_base != num_hidden_layers:
        if options.get("residual_branch_mult") is None:
            raise ValueError(f"num_hidden_layers_base={num_layers_base} cannot be converted: it scales the branches")
    is_scaled = parameterization in OFFICIAL_LOGITS_SCALED
    if parameterization is not None and options.get("mup", is_scaled) != is_scaled:
        raise ValueError(f"mup={options['mup']!r} contradicts parameterization={parameterization!r}")
    is_scaled = is_scaled or options.get("mup", False)
    return options.get("hidden_size_base", 1024) / hidden_size if is_scaled else None


def _common_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """
    Raises `ValueError` for one that is not among `DTYPES`, and if there are several: a configuration names one, to which all
    would be cast.
    """
    (first, dtype), *others = ((name, tensor.dtype) for name, tensor in tensors.items())
    if dtype not in DTYPES:
        raise ValueError(f"{first} is of {dtype}; allowed: {', '.join(map(str, DTYPES))}")
    for name, other in others:
        if other != dtype:
            raise ValueError(f"{first} is of {dtype}, but {name} of {other}; allowed: one dtype")
    return dtype


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
            names = _read_json(indices[0]).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"{indices[0]} has no weight_map from parameters to files")
            files = sorted({path / name for name in names.values()})
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
        except Exception as error:  # whatever bytes lead an unpickler to
            raise ValueError(f"{file} is damaged, or holds more than parameters and options") from error
        if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
            # Where there are both, the training script's settings and the model's
            for part in (content.get("config"), content.get("model_args")):
                if isinstance(part, Mapping):
                    options |= part
            content = content["model"]
        if not isinstance(content, Mapping) or not all(map(_is_parameter, content, content.values())):
            raise ValueError(f"{file} holds no parameters by name")
        state_dict.update(content)
    if (folder / CONFIG_NAME).is_file():
        options = _read_json(folder / CONFIG_NAME)
    if not isinstance(options, Mapping) or not options:
        raise ValueError(f"there is no {CONFIG_NAME} beside {files[0].name}, and no options in it")
    return state_dict, dict(options)


def _is_parameter(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


# Architectures that are Llamas but for the RMSNorm over each query and key head, and their `qk_norm`
LLAMA_MODEL_TYPES = {"llama": None, "mistral": None, "qwen3": "pre_rope"}
# What may be chosen at a conversion; the Llama, or its equality with the DDL model, decides the other fields of DDLConfig
LLAMA_OPTIONS = (
    "num_value_channels",
    "compressor",
    "compressor_kernel_size",
    "share_compressor",
    "embedding_conv",
    "embedding_conv_kernel_size",
    "gate_init",
    "gate_hidden_size",
    "value_input",
    "value_bias",
    "value_scale",
    "key_eps",
)


@torch.no_grad()
def convert_llama(model_or_path: PreTrainedModel | str | Path, **ddl_options) -> DDLForCausalLM:
    """
    Turns a Llama into a DDL model that computes the same function and can be trained into a true delta model.

    The model has an anchored target (`value_anchor`, see `delta_rewrite`): `X' = X + β k (W c − (1 − a) ∘ Xᵀk)ᵀ + k̃ bᵀ`. It
    starts at W = 0, a = 1 and b = (1, 0, ..., 0), so that the first value channel is the residual stream of the Llama and
    compressors start by reading that alone. The others hold the token's embedding until something is written to them.
    W, a and b of that channel and the read vectors have gradients from the start, those of the others and the gates β after one
    step. Weight decay would take a, b and the read vectors towards 0: [`ResumableTrainer`] spares them,
    [`~transformers.Trainer`] does not.

    Args:
        model_or_path: A causal language model of type llama, mistral or qwen3, which is copied, or the folder or Hub name
            of one, which is converted as transformers loads it, in the one dtype that its configuration names.
        ddl_options: Fields of [`DDLConfig`] (`LLAMA_OPTIONS`): the number of value channels (1 if not given), the
            compressor, the gate and the input of the value.

    Raises:
        `ValueError`: naming it, for an option of the Llama that DDL has not (a sliding window, say) or that cannot be
            chosen here, for a model without a head, with parameters of several dtypes or without their values, for a
            parameter that is missing, unexpected or of a wrong shape, and for files that cannot be read, in which nothing is
            executed.
    """
    if isinstance(model_or_path, PreTrainedModel):
        llama = model_or_path
        config = _llama_config(llama.config, ddl_options)
        if llama.get_output_embeddings() is None:
            raise ValueError(
                f"{type(llama).__name__} cannot be converted; allowed: a causal language model, with its head"
            )
        if any(parameter.is_meta for parameter in llama.parameters()):
            raise ValueError(
                f"{type(llama).__name__} has parameters on the meta device; allowed: loaded ones, or its folder"
            )
        state_dict = {name: parameter.clone() for name, parameter in llama.state_dict().items()}
    else:
        try:
            llama_config = AutoConfig.from_pretrained(model_or_path, trust_remote_code=False)
        except Exception as error:  # whatever values lead transformers to
            raise ValueError(f"{model_or_path} has no configuration that can be read: {error}") from error
        config = _llama_config(llama_config, ddl_options)
        try:
            llama, info = AutoModelForCausalLM.from_pretrained(
                model_or_path, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
            )
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ValueError(f"{model_or_path} has no weights that can be read: {error}") from error
        except Exception as error:  # whatever bytes lead an unpickler to
            raise ValueError(f"{model_or_path} is damaged, or its files hold more than a model") from error
        _check_loaded(info, model_or_path)
        state_dict = llama.state_dict()

    config.dtype = _common_dtype(state_dict)
    # The parameters of the anchored residual, the compressors and the convolution are missing, of which it would warn
    with _only_errors_logged():
        model, info = DDLForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=state_dict,
            attn_implementation=llama.config._attn_implementation,
            output_loading_info=True,
        )
    _check_loaded({**info, "missing_keys": ()}, type(llama).__name__)
    model.generation_config = copy.deepcopy(llama.generation_config)
    for module in model.modules():
        if isinstance(module, DDLDeltaResidual):
            module.float()  # as it is when it is loaded: in bfloat16, small steps of an anchor would be lost
            module.value_proj.weight.zero_()
            module.anchor_add[1:] = 0
        elif isinstance(module, (DDLChannelCompressor, DDLTokenCompressor)):
            module.read[:1], module.read[1:] = 1, 0
    return model


def _llama_config(llama: PreTrainedConfig, ddl_options: dict[str, Any]) -> DDLConfig:
    """The configuration of the DDL model that a Llama is converted to."""
    if llama.model_type not in LLAMA_MODEL_TYPES:
        allowed = ", ".join(LLAMA_MODEL_TYPES)
        raise ValueError(f"model_type={llama.model_type!r} cannot be converted; allowed: {allowed}")
    for name in ("sliding_window", "quantization_config"):
        if getattr(llama, name, None) is not None:
            raise ValueError(f"{name}={getattr(llama, name)!r} cannot be converted; allowed: None")
    if "partial_rotary_factor" in llama.rope_parameters:  # which DDL would follow, but not every Llama does
        raise ValueError(f"rope_parameters={llama.rope_parameters} cannot be converted with a partial_rotary_factor")
    for name in ddl_options:
        if name not in LLAMA_OPTIONS:
            raise ValueError(f"{name} cannot be chosen; allowed: {', '.join(LLAMA_OPTIONS)}")
    fields = {name: getattr(llama, name) for name in LlamaConfig.__annotations__ if hasattr(llama, name)}
    return DDLConfig(
        **fields,
        qk_norm=LLAMA_MODEL_TYPES[llama.model_type],
        value_activation=None,
        value_anchor=1.0,
        **{"num_value_channels": 1, **ddl_options},
    )


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_loaded(info: dict[str, Any], model: Any):
    """Raises `ValueError` if parameters of a model are missing, unexpected or of a wrong shape."""
    for problem, names in info.items():
        if names:
            raise ValueError(f"{model} has {problem.removesuffix('_keys')} parameters: {sorted(names)[0]}")


class AnchorAnnealingCallback(TrainerCallback):
    """
    Takes the anchors of a converted Llama to (0, 0), those of the pure delta rule, linearly within the first `steps` steps
    of a training, whether they are trained besides or not.
    """

    def __init__(self, steps: int):
        self.steps = steps

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        # Relative to the step before, as nobody knows their start in a training that is resumed
        share = max(self.steps - state.global_step, 0) / max(self.steps - state.global_step + 1, 1)
        for module in model.modules():
            if isinstance(module, DDLDeltaResidual):
                module.anchor_keep.mul_(share)
                module.anchor_add.mul_(share)


def check_output_folder(folder: str | Path):
    """Raises `ValueError` if the folder holds anything, or is a file."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; allowed: a new or empty folder")


def save_converted(
    folder: str | Path,
    model: DDLForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
):
    """
    Saves a model, and a tokenizer, to a new or empty folder, which appears when all of it is there.

    Raises:
        `ValueError`: if the folder holds anything.
    """
    check_output_folder(folder)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary, folder.name)
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        unfinished.replace(folder)


def read_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """That of a model, None if it has none: without files, `AutoTokenizer` would make an empty one."""
    try:
        return AutoTokenizer.from_pretrained(source) if get_tokenizer_config(source) else None
    except Exception as error:  # whatever files lead tokenizers to
        raise ValueError(f"{source} has no tokenizer that can be read: {error}") from error


def json_or_text(value: str) -> Any:
    """The value of a field on the command line."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def main(arguments: list[str]):
    """`transformers-ddl convert official PATH OUT` and `transformers-ddl convert llama MODEL OUT [--field value ...]`."""
    parser = argparse.ArgumentParser(prog="transformers-ddl convert", description="Convert a checkpoint to DDL.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    official = kinds.add_parser("official", help="a checkpoint of the authors' research code")
    official.add_argument("source", help="folder, or .safetensors, .bin or .pt file beside its config.json")
    llama = kinds.add_parser("llama", help="a Llama, Mistral or Qwen3, to the same function")
    llama.add_argument("source", help="folder or Hub name of a model")
    for name in LLAMA_OPTIONS:
        llama.add_argument(f"--{name}", type=json_or_text, default=argparse.SUPPRESS, help="field of DDLConfig")
    for kind in (official, llama):
        kind.add_argument("out", help="folder to write, new or empty")
        kind.add_argument("--max-shard-size", default="5GB", help="largest file to write (default: %(default)s)")
    options = parser.parse_args(arguments)

    tokenizer = None
    try:
        check_output_folder(options.out)
        if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", options.max_shard_size):
            raise ValueError(
                f"max-shard-size={options.max_shard_size}; allowed: a number of KB, MB, GB or TB, as in 5GB"
            )
        if options.kind == "official":
            config, state_dict = convert_official_checkpoint(*read_official_checkpoint(options.source))
            model = DDLForCausalLM.from_pretrained(None, config=config, state_dict=state_dict)
        else:
            ddl_options = {name: value for name, value in vars(options).items() if name in LLAMA_OPTIONS}
            model = convert_llama(options.source, **ddl_options)
            tokenizer = read_tokenizer(options.source)
        save_converted(options.out, model, tokenizer, max_shard_size=options.max_shard_size)
    except (OSError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"{options.out}: {model.num_parameters():,} parameters, {'a' if tokenizer else 'no'} tokenizer")
