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
"""DDL model configuration."""

import difflib
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Names that transformers (or a tool that loads through it) hands to any configuration without declaring a field.
GENERIC_OPTIONS = {
    "attn_implementation",
    "auto_map",
    "classifier_dropout",
    "custom_pipelines",
    "experts_implementation",
    "hidden_dropout",
    "is_causal",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "tie_last_hidden_states",
    "token_classification_bias",
    "tokenizer_class",
    "torch_dtype",
    *GenerationConfig().to_dict(),
}

# What the Auto classes load with `trust_remote_code=True` where this package is not installed
AUTO_MAP = {
    "AutoConfig": "configuration_ddl.DDLConfig",
    "AutoModel": "modeling_ddl.DDLModel",
    "AutoModelForCausalLM": "modeling_ddl.DDLForCausalLM",
    "AutoModelForSequenceClassification": "modeling_ddl.DDLForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_ddl.DDLForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_ddl.DDLForQuestionAnswering",
}


@strict
class DDLConfig(LlamaConfig):
    r"""
    Configuration of Deep Delta Learning models (arXiv 2601.00417): Llama's attention and MLP, with every residual
    addition replaced by the rank-1 delta rewrite `X' = X + β k (vᵀ − kᵀX)` of a state `X` of `num_value_channels`
    streams of width `hidden_size`. `DDLConfig()` is DDL-CC (n = 4, embedding convolution) at the paper's small size;
    `DDLConfig(num_value_channels=1)` is the scalar model, whose state is the ordinary residual stream;
    `DDLConfig(residual_type="additive")` is the ordinary Transformer.

    Fields not listed here are [`LlamaConfig`]'s. `layer_types` and `number_of_conv_states`, from which transformers
    builds caches, follow from the fields and are read-only.

    Args:
        intermediate_size (`int`, *optional*):
            Width of the SwiGLU MLP; `⌊8 hidden_size / 3⌋` if None (paper §4).
        residual_type (`str`, defaults to `"delta"`):
            How a sublayer writes its output `F(c)` into the state: `"delta"`, or one of its controls (spec §6):
            `"write_only"` (the rewrite without the erase term, `X + β k vᵀ`), `"additive"` (`x + F(c)`, the ordinary
            Transformer), `"expanded_additive"` (`X + F(c) aᵀ` with a learned a ∈ Rⁿ), `"hyper_connections"`
            (arXiv 2409.19606) or `"manifold_hyper_connections"` (arXiv 2512.24880).
        num_value_channels (`int`, *optional*):
            Number n of value channels, or streams; 1 for the additive residual and 4 for the others if None.
        num_delta_steps (`int`, defaults to 1):
            Number of rewrites per sublayer, one after another: `F(c)` then outputs as many directions, each with its
            gate and target (DeltaProduct, arXiv 2502.10297, over depth). Only for `"delta"` and `"write_only"`.
        compressor (`"channel"` or `"token"`, *optional*):
            How the n channels are read into the width `hidden_size` of a sublayer: a per-feature mixing of the current
            token's channels (DDL-CC) or a causal convolution over tokens (DDL-TC). `"channel"` if None and n > 1.
        compressor_kernel_size (`int`, *optional*):
            Taps over channels (at most n; n if None) or over tokens (4 if None). Only for n > 1.
        share_compressor (`bool`, *optional*):
            Whether the attention and the MLP sublayer of a layer share one compressor; True if None. Only for n > 1.
            Hyper-connections read with weights of their own, and the compressor at the end only.
        embedding_conv (`bool`, *optional*):
            Whether token embeddings are expanded to n channels by a causal convolution over tokens (EC) instead of by
            repetition; if None, True for n > 1, but for hyper-connections, which define repetition.
        embedding_conv_kernel_size (`int`, *optional*):
            Taps of that convolution; 4 if None. Only with `embedding_conv`.
        gate_init (`float`, defaults to 0.1):
            Gate β₀ ∈ (0, 2) at which training starts. The authors' is 1; docs/results.md compares trainings from 0.1 and 0.2,
            and says why the default model, DDL-CC with its embedding convolution, is what it is.
        gate_hidden_size (`int`, *optional*):
            Hidden width of the gate's two-layer form; one linear map if None.
        value_input (`"residual"` or `"context"`, defaults to `"residual"`):
            Whether the target v is computed from the sublayer's input before (the authors' code) or after (the
            paper's text) its RMSNorm.
        value_activation (`"sigmoid"`, `"constant"` or None, defaults to `"sigmoid"`):
            v = value_scale · a(W x + b), with a the sigmoid (the authors' code), a = 1 without any map, or the
            identity (the paper's text).
        value_scale (`float`, *optional*):
            Scale of v; 4 for `"sigmoid"`, 2 for `"constant"`, 1 for the linear value if None.
        value_bias (`bool`, *optional*):
            Whether the value map has a bias; True for `"sigmoid"`, False otherwise if None.
        value_anchor (`float`, *optional*):
            Starts two learned vectors a, b ∈ Rⁿ per sublayer at this value between 0 and 1, which turn the target into
            `v + a ∘ Xᵀk + b ‖k̃‖ / β`: at 0 the rewrite is the pure delta rule, at 1 and v = 0 an ordinary residual addition.
            They are how a converted Llama becomes a delta model by degrees. None for the pure delta rule without them.
        key_eps (`float`, defaults to 1e-5):
            Guard ε of the direction `k = k̃ / sqrt(‖k̃‖² + ε²)`. Where k̃ vanishes the gradient is of order 1/ε.
        qk_norm (`"pre_rope"`, `"post_rope"` or None, defaults to `"pre_rope"`):
            RMSNorm over each query and key head, before the rotary embedding as in most models on the Hub, after it
            as in the authors' code, or none.
        logits_scale (`float`, *optional*):
            Factor on the logits (the authors' µP option uses `hidden_size_base / hidden_size`); none if None.
        init_scheme (`"default"` or `"authors"`, defaults to `"default"`):
            `"default"`: matrices N(0, `initializer_range`), compressors start as the mean over channels of the
            current token. `"authors"`: embeddings N(0, 0.02), every other parameter with two or more dimensions
            N(0, 0.5/√d), output projections of attention and MLP divided by √L. In both, the gate starts at
            `gate_init`, the read vectors at 1/n, the embedding convolution as repetition and hyper-connections as they always do.

    Raises:
        `ValueError`: at construction, for a value out of range, contradictory settings or an unknown field; the message
            names the field, the value and what is allowed.
        `StrictDataclassFieldValidationError`: at construction and assignment, for a wrong type.
    """

    model_type = "ddl"

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    residual_type: Literal[
        "delta",
        "write_only",
        "additive",
        "expanded_additive",
        "hyper_connections",
        "manifold_hyper_connections",
    ] = "delta"
    num_value_channels: int | None = None
    num_delta_steps: int = 1
    compressor: Literal["channel", "token"] | None = None
    compressor_kernel_size: int | None = None
    share_compressor: bool | None = None
    embedding_conv: bool | None = None
    embedding_conv_kernel_size: int | None = None
    gate_init: float | int = 0.1
    gate_hidden_size: int | None = None
    value_input: Literal["residual", "context"] = "residual"
    value_activation: Literal["sigmoid", "constant"] | None = "sigmoid"
    value_scale: float | int | None = None
    value_bias: bool | None = None
    value_anchor: float | int | None = None
    key_eps: float | int = 1e-5
    qk_norm: Literal["pre_rope", "post_rope"] | None = "pre_rope"
    logits_scale: float | int | None = None
    init_scheme: Literal["default", "authors"] = "default"

    def __post_init__(self, **kwargs):
        self._refuse_unknown_options(kwargs)
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"{name} must be the name of one of torch's, got {dtype!r}")

        self._check_positive("hidden_size", "num_attention_heads")
        if self.intermediate_size is None:
            self.intermediate_size = 8 * self.hidden_size // 3
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"head_dim must be given when hidden_size ({self.hidden_size}) is not a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )

        if self.num_value_channels is None:
            self.num_value_channels = 1 if self.residual_type == "additive" else 4
        if self.num_value_channels > 1:
            if self.compressor is None:
                self.compressor = "channel"
            if self.compressor_kernel_size is None:
                self.compressor_kernel_size = self.num_value_channels if self.compressor == "channel" else 4
            if self.share_compressor is None:
                self.share_compressor = True
            if self.embedding_conv is None:
                self.embedding_conv = not self.reads_by_residual
            if self.embedding_conv and self.embedding_conv_kernel_size is None:
                self.embedding_conv_kernel_size = 4

        if self.qk_norm is not None:
            # The norms are applied to every head alike, and a process has some of the heads
            norms = ("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm")
            self.base_model_tp_plan = self.base_model_tp_plan | dict.fromkeys(norms, "replicated_with_grad_allreduce")

        if self.value_scale is None:
            self.value_scale = {"sigmoid": 4.0, "constant": 2.0, None: 1.0}[self.value_activation]
        if self.value_bias is None:
            self.value_bias = self.value_activation == "sigmoid"

        super().__post_init__(**kwargs)
        # `@strict` calls the validators too, but wraps what they raise into messages of several lines.
        self.validate_architecture()
        self.validate_rope()
        self.validate_residual()

    def _refuse_unknown_options(self, options: dict):
        """Transformers keeps what it does not know as an attribute, so that a misspelt field would have no effect."""
        known = GENERIC_OPTIONS | {field.name for field in fields(self)}
        for name, value in options.items():
            if name in known or name.startswith("_"):
                continue
            # A configuration that was saved may hold attributes that were set on it
            if self.transformers_version is not None:
                logger.warning_once(f"{name}={value!r} is not a field of DDLConfig and has no effect")
                continue
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "DDLConfig's docstring lists what is allowed"
            raise ValueError(f"unknown field {name}={value!r}: {hint}")

    @property
    def layer_types(self) -> list[str]:
        """Per layer, what transformers' caches must hold: attention alone or also inputs of convolutions."""
        hybrid_layers = self.num_hidden_layers if self.compressor == "token" else int(bool(self.embedding_conv))
        return ["hybrid"] * hybrid_layers + ["full_attention"] * (self.num_hidden_layers - hybrid_layers)

    @property
    def has_gates(self) -> bool:
        """Whether the residual is a gated rank-1 write."""
        return self.residual_type in ("delta", "write_only")

    @property
    def reads_by_residual(self) -> bool:
        """Whether the residual also computes what a sublayer reads, in place of a compressor."""
        return self.residual_type in ("hyper_connections", "manifold_hyper_connections")

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]]:
        """
        Per child of the base model in order of execution, what goes in and what comes out. A stage of a pipeline hands on
        the state `[batch, sequence, n, hidden_size]` with the write that is still to be made into it (see
        `DDLDecoderLayer`), and the last stage makes the last write before the readout.
        """
        plan = {"embed_tokens": (["input_ids"], ["inputs_embeds"])}
        if self.embedding_conv:
            plan["embedding_conv"] = (["inputs_embeds"], ["state"])
        plan["layers"] = (["state", "write", "attention_mask"], ["state", "write"])
        plan["readout"] = (["state"], ["hidden_states"])
        plan["norm"] = (["hidden_states"], ["hidden_states"])
        return plan

    @property
    def logit_scale(self) -> float | int:
        """`logits_scale` under the name by which serving engines and TRL, which apply the head themselves, ask for it."""
        return 1.0 if self.logits_scale is None else self.logits_scale

    @property
    def num_hidden_states(self) -> int:
        """Entries of `hidden_states`: what every layer reads from the state, and the last hidden state."""
        return self.num_hidden_layers + 1

    @property
    def number_of_conv_states(self) -> int:
        """Convolution inputs cached by a hybrid layer, see `DDLTokenConvolution`."""
        return (3 if self.compressor == "token" else 0) + int(bool(self.embedding_conv))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Also saves the code, `*_ddl.py`, for `trust_remote_code`. `register_for_auto_class` would not do: it takes the file
        of a subclass or of an FSDP2 wrapper for the model's, and lets only the Auto class of the saved model load it.
        """
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        for file in Path(__file__).parent.glob("*_ddl.py"):
            shutil.copyfile(file, Path(save_directory, file.name))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As transformers', which sets overriding `kwargs` on the finished configuration: here they are part of it."""
        names = [field.name for field in fields(cls) if field.name in kwargs]
        overrides = {name: kwargs.pop(name) for name in names}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def _check_positive(self, *names: str):
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def validate_architecture(self):
        """Checks sizes. Unlike Llama's, `head_dim` need not be `hidden_size / num_attention_heads`."""
        self._check_positive(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "num_value_channels",
            "num_delta_steps",
            "compressor_kernel_size",
            "embedding_conv_kernel_size",
            "gate_hidden_size",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}"
            )
        if self.head_dim % 2 and "partial_rotary_factor" not in self.rope_parameters:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        if self.attention_dropout is None or not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be at least 0 and below 1, got {self.attention_dropout}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id must be below vocab_size ({self.vocab_size}) or None, got {self.pad_token_id}"
            )
        for name in ("rope_theta", "factor", "partial_rotary_factor"):
            value = self.rope_parameters.get(name, 1.0)
            if not isinstance(value, (float, int)) or not 0 < value < float("inf"):
                raise ValueError(f"rope_parameters' {name} must be a positive finite number, got {value!r}")
        rotary_dim = self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0)
        if not 2 <= rotary_dim <= self.head_dim or int(rotary_dim) % 2:
            raise ValueError(
                f"rope_parameters' partial_rotary_factor must turn an even number of the features of a head "
                f"(head_dim={self.head_dim}), got {self.rope_parameters}"
            )
        rope_types = ["default", *ROPE_INIT_FUNCTIONS]
        if self.rope_parameters.get("rope_type") not in rope_types:
            raise ValueError(f"rope_parameters' rope_type must be one of {rope_types}, got {self.rope_parameters}")

    def validate_rope(self):
        """Transformers', which raises `KeyError` where `rope_parameters` lack something."""
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def validate_residual(self):
        """Checks the options of the residual state, its gate and its target."""
        allowed = {"delta": "at least 1", "write_only": "at least 1", "additive": "1"}.get(
            self.residual_type, "at least 2"
        )
        if (allowed == "1") != (self.num_value_channels == 1) and allowed != "at least 1":
            raise ValueError(
                f"num_value_channels must be {allowed} for residual_type={self.residual_type!r}, "
                f"got {self.num_value_channels}"
            )
        if self.num_delta_steps > 1 and not self.has_gates:
            raise ValueError(
                f"num_delta_steps must be 1 for residual_type={self.residual_type!r}, got {self.num_delta_steps}"
            )
        if self.gate_hidden_size is not None and not self.has_gates:
            raise ValueError(
                f"gate_hidden_size must be None for residual_type={self.residual_type!r}, got {self.gate_hidden_size}"
            )
        if self.reads_by_residual and self.compressor == "token":
            raise ValueError(
                f"compressor must be None or 'channel' for residual_type={self.residual_type!r}, got 'token'"
            )
        if self.num_value_channels == 1:
            for name in (
                "compressor",
                "compressor_kernel_size",
                "share_compressor",
                "embedding_conv",
                "embedding_conv_kernel_size",
            ):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} must be None for num_value_channels=1 (there is nothing to expand or compress), "
                        f"got {getattr(self, name)!r}"
                    )
        else:
            required = ["compressor", "compressor_kernel_size", "share_compressor", "embedding_conv"]
            for name in required + ["embedding_conv_kernel_size"] * bool(self.embedding_conv):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} must be set for num_value_channels={self.num_value_channels}, got None")
        if self.compressor == "channel" and self.compressor_kernel_size > self.num_value_channels:
            raise ValueError(
                f"compressor_kernel_size must be at most num_value_channels ({self.num_value_channels}) for "
                f"compressor='channel', got {self.compressor_kernel_size}"
            )
        if not self.embedding_conv and self.embedding_conv_kernel_size is not None:
            raise ValueError(
                f"embedding_conv_kernel_size must be None without embedding_conv, "
                f"got {self.embedding_conv_kernel_size}"
            )
        if not 0 < self.gate_init < 2:
            raise ValueError(f"gate_init must lie strictly between 0 and 2, got {self.gate_init}")
        if self.value_activation == "constant" and self.value_bias:
            raise ValueError("value_bias must be False or None for value_activation='constant', got True")
        if self.value_anchor is not None and not 0 <= self.value_anchor <= 1:
            raise ValueError(f"value_anchor must lie between 0 and 1, got {self.value_anchor}")
        if self.value_anchor is not None and (self.residual_type, self.num_delta_steps) != ("delta", 1):
            raise ValueError(
                f"value_anchor must be None for residual_type={self.residual_type!r} with "
                f"num_delta_steps={self.num_delta_steps}, got {self.value_anchor}"
            )
        if self.key_eps < 1e-12:
            raise ValueError(
                f"key_eps must be at least 1e-12, for the gradient of the norm to be finite in float32 where the direction "
                f"vanishes, got {self.key_eps}"
            )
        for name in ("value_scale", "key_eps", "rms_norm_eps", "logits_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")


__all__ = ["DDLConfig"]
