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
"""The configuration: what defaults resolve to, what is refused and how, and that files keep every setting."""

import copy
import json
import re

import pytest
import torch
from conftest import TINY, VARIANTS, tiny_config
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from transformers_ddl import DDLConfig, DDLForCausalLM


# Defaults


def settings(config, *names):
    return tuple(getattr(config, name) for name in names)


def test_default_is_the_papers_model_with_a_small_gate():
    config = DDLConfig()
    assert settings(config, "residual_type", "num_value_channels", "gate_init") == ("delta", 4, 0.1)
    assert settings(config, "compressor", "compressor_kernel_size", "share_compressor") == ("channel", 4, True)
    assert settings(config, "embedding_conv", "embedding_conv_kernel_size") == (True, 4)
    assert settings(config, "value_input", "value_activation", "value_scale", "value_bias") == (
        *("residual", "sigmoid"),
        *(4.0, True),
    )
    assert settings(config, "qk_norm", "rms_norm_eps", "key_eps") == ("pre_rope", 1e-5, 1e-5)
    assert settings(config, "gate_hidden_size", "logits_scale", "tie_word_embeddings") == (None, None, True)


@pytest.mark.parametrize("options", [{"num_value_channels": 1}, {"residual_type": "additive"}], ids=str)
def test_one_channel_needs_no_compressor(options):
    config = DDLConfig(**options)
    assert config.num_value_channels == 1
    assert settings(config, "compressor", "compressor_kernel_size", "share_compressor") == (None, None, None)
    assert settings(config, "embedding_conv", "embedding_conv_kernel_size") == (None, None)


@pytest.mark.parametrize(
    "options, resolved",
    [
        ({"num_value_channels": 6}, {"compressor": "channel", "compressor_kernel_size": 6}),
        ({"num_value_channels": 6, "compressor": "token"}, {"compressor_kernel_size": 4}),
        ({"embedding_conv": False}, {"embedding_conv_kernel_size": None}),
        ({"value_activation": None}, {"value_scale": 1.0, "value_bias": False}),
        ({"value_activation": "constant"}, {"value_scale": 2.0, "value_bias": False}),
        ({"value_activation": None, "value_scale": 3.0, "value_bias": True}, {"value_scale": 3.0, "value_bias": True}),
        ({"hidden_size": 100, "num_attention_heads": 2}, {"intermediate_size": 266, "head_dim": 50}),
        ({"num_attention_heads": 6}, {"num_key_value_heads": 6, "head_dim": 128}),
        ({"head_dim": 32}, {"head_dim": 32}),
    ],
    ids=str,
)
def test_resolution(options, resolved):
    config = DDLConfig(**options)
    assert {name: getattr(config, name) for name in resolved} == resolved


def test_layers_with_convolutions_are_hybrid():
    """What transformers builds caches from."""
    assert tiny_config("scalar").layer_types == ["full_attention"] * 2
    assert tiny_config("additive").layer_types == ["full_attention"] * 2
    assert tiny_config("cc-repeat").layer_types == ["full_attention"] * 2
    assert tiny_config("cc").layer_types == ["hybrid", "full_attention"]
    assert tiny_config("tc").layer_types == ["hybrid", "hybrid"]


# Files


OPTIONS = {
    **VARIANTS,
    "all-None": {"value_activation": None, "qk_norm": None, "pad_token_id": None},
    "no-default": {
        "num_value_channels": 5,
        "compressor": "token",
        "compressor_kernel_size": 3,
        "share_compressor": False,
        "embedding_conv_kernel_size": 2,
        "gate_init": 1.5,
        "gate_hidden_size": 8,
        "value_input": "context",
        "value_activation": "constant",
        "value_scale": 0.5,
        "value_anchor": 0.25,
        "key_eps": 1e-3,
        "qk_norm": "post_rope",
        "logits_scale": 0.25,
        "init_scheme": "authors",
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        "pad_token_id": 0,
        "eos_token_id": [1, 2],
    },
}


@pytest.fixture(params=OPTIONS)
def config(request):
    return DDLConfig(**{**TINY, **OPTIONS[request.param]})


def test_save_and_load(config, tmp_path):
    config.save_pretrained(tmp_path)
    for loaded in (DDLConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is DDLConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert loaded.layer_types == config.layer_types
        assert loaded.number_of_conv_states == config.number_of_conv_states


def test_file_holds_every_field(config, tmp_path):
    """Also those at their default, so that a checkpoint does not depend on the defaults of the version that reads it."""
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in DDLConfig.__annotations__:
        if name not in ("model_type", "layer_types", "number_of_conv_states"):
            assert name in saved and saved[name] == getattr(config, name), name
    assert saved["model_type"] == "ddl"


def test_dictionaries_and_copies(config):
    assert DDLConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_null_in_a_file_is_kept(tmp_path):
    """Where the default is not None: null is a setting, not the absence of one."""
    (tmp_path / "config.json").write_text('{"model_type": "ddl", "value_activation": null, "qk_norm": null}')
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.value_activation is None and config.value_scale == 1.0
    assert config.qk_norm is None


def test_loading_can_override_a_field(tmp_path):
    DDLConfig(**TINY).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, qk_norm="post_rope").qk_norm == "post_rope"
    with pytest.raises(ValueError, match="gate_init .* got 3"):
        AutoConfig.from_pretrained(tmp_path, gate_init=3)


@pytest.mark.parametrize(
    "extra",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"auto_map": {"AutoConfig": "configuration_ddl.DDLConfig"}},
        {"_attn_implementation": "eager"},
        {"attn_implementation": "eager"},
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"architectures": ["DDLForCausalLM"], "transformers_version": "5.17.0"},
        {"_name_or_path": "somewhere", "_commit_hash": "0" * 40},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "problem_type": "regression"},
        {"num_labels": 5},
        {"output_hidden_states": True, "return_dict": True},
        {"classifier_dropout": 0.1},
        {"temperature": 0.7, "max_length": 20, "do_sample": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"is_encoder_decoder": False, "chunk_size_feed_forward": 0},
        {"pretraining_tp": 1},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_file_with_keys_of_transformers(extra, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ddl", **TINY, **extra}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.hidden_size == TINY["hidden_size"]
    if "torch_dtype" in extra or "dtype" in extra:
        assert config.dtype == torch.bfloat16
    if "id2label" in extra:
        assert config.num_labels == 2
    if "num_labels" in extra:
        assert config.num_labels == 5


def test_legacy_rope_keys(tmp_path):
    """Of configurations from before transformers 5."""
    assert DDLConfig(rope_theta=5e5).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "ddl", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    )
    parameters = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (parameters["rope_type"], parameters["rope_theta"], parameters["factor"]) == ("linear", 5e5, 2.0)


# Refusals


OUT_OF_RANGE = [
    *[("gate_init", value) for value in (0, 2, -0.1, 2.5, float("nan"))],
    *[("value_scale", value) for value in (0, -4.0, float("inf"), float("nan"))],
    *[("logits_scale", value) for value in (0, -1.0, float("inf"), float("nan"))],
    *[("rms_norm_eps", value) for value in (0.0, -1e-5, float("nan"))],
    # The cube of 1e13 is infinite in float32, so that the gradient of a direction of zeros would be NaN
    *[("key_eps", value) for value in (0, -1e-5, float("inf"), float("nan"), 1e-30, 1e-13)],
    *[("value_anchor", value) for value in (-0.1, 1.5, float("nan"))],
    *[("num_value_channels", value) for value in (0, -1)],
    *[("compressor_kernel_size", value) for value in (0, -1, 5)],
    *[("embedding_conv_kernel_size", value) for value in (0, -1)],
    *[("gate_hidden_size", value) for value in (0, -1)],
    *[("hidden_size", 0), ("intermediate_size", 0), ("vocab_size", 0), ("max_position_embeddings", 0)],
    *[("num_hidden_layers", 0), ("num_attention_heads", 0), ("num_key_value_heads", 0), ("num_key_value_heads", 4)],
    *[("head_dim", 0), ("head_dim", 7)],
    *[("attention_dropout", value) for value in (-0.1, 1.5, None)],
    *[("hidden_act", "swiglu"), ("dtype", "float17"), ("dtype", "load"), ("torch_dtype", "float17")],
    ("pad_token_id", 50304),
]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must .*{re.escape(str(value))}"):
        DDLConfig(**{name: value})


CONTRADICTIONS = [
    ({"residual_type": "additive", "gate_hidden_size": 64}, "gate_hidden_size must be None.*'additive'.*64"),
    ({"num_value_channels": 1, "compressor": "channel"}, "compressor must be None.*'channel'"),
    ({"num_value_channels": 1, "compressor_kernel_size": 1}, "compressor_kernel_size must be None.*1"),
    ({"num_value_channels": 1, "share_compressor": True}, "share_compressor must be None.*True"),
    ({"num_value_channels": 1, "embedding_conv": True}, "embedding_conv must be None.*True"),
    ({"num_value_channels": 1, "embedding_conv_kernel_size": 4}, "embedding_conv_kernel_size must be None.*4"),
    ({"embedding_conv": False, "embedding_conv_kernel_size": 3}, "embedding_conv_kernel_size must be None.*3"),
    ({"num_value_channels": 3, "compressor_kernel_size": 4}, r"compressor_kernel_size .*num_value_channels \(3\).*4"),
    ({"residual_type": "additive", "num_value_channels": 4}, "num_value_channels must be 1.*4"),
    ({"residual_type": "additive", "compressor": "token"}, "compressor must be None.*'token'"),
    ({"value_activation": "constant", "value_bias": True}, "value_bias .*True"),
    ({"residual_type": "additive", "value_anchor": 1.0}, "value_anchor must be None.*'additive'.*1.0"),
    ({"num_delta_steps": 2, "value_anchor": 1.0}, "value_anchor must be None.*num_delta_steps=2.*1.0"),
    ({"hidden_size": 100, "num_attention_heads": 3}, r"head_dim .*100.*3"),
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, r"num_key_value_heads must divide .*6.*4"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type must be one of .*default.*spiral"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    *[
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": value}}, f"partial_rotary_factor.*{value}")
        for value in (0.0, -0.5, 1.5, 7 / 128, "half", None)
    ],
    *[({"rope_parameters": {"rope_theta": value}}, f"rope_theta.*{value}") for value in (0, -1e4, "x", float("nan"))],
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor.*0"),
]


@pytest.mark.parametrize("options, message", CONTRADICTIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_refuses_contradictions(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DDLConfig(**options)


WRONG_TYPES = [
    *[("num_value_channels", "4"), ("num_value_channels", 2.0), ("num_value_channels", True)],
    *[("compressor", "conv"), ("residual_type", "Delta"), ("residual_type", None), ("init_scheme", "xavier")],
    *[("value_input", None), ("value_activation", "tanh"), ("value_activation", True), ("value_bias", "no")],
    *[("qk_norm", True), ("qk_norm", "pre"), ("embedding_conv", 4), ("share_compressor", "yes")],
    *[("gate_init", "1"), ("gate_init", None), ("key_eps", None), ("gate_hidden_size", 128.0), ("hidden_size", "768")],
]


@pytest.mark.parametrize("name, value", WRONG_TYPES)
def test_refuses_wrong_types_and_names(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"(?s){name}.*{value}"):
        DDLConfig(**{name: value})


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("num_value_channel", "num_value_channels"),
        ("compresor", "compressor"),
        ("embedding_convolution", "embedding_conv"),
        ("value_activation_", "value_activation"),
        ("hidden_sise", "hidden_size"),
        ("rope_parameter", "rope_parameters"),
    ],
)
def test_refuses_misspelt_fields(misspelt, meant, tmp_path):
    with pytest.raises(ValueError, match=f"{misspelt}='token'.* {meant}"):
        DDLConfig(**{misspelt: "token"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ddl", misspelt: "token"}))
    with pytest.raises(ValueError, match=f"{misspelt}='token'.* {meant}"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["layer_types", "number_of_conv_states", "sliding_window"])
def test_refuses_what_follows_from_other_fields_or_does_not_exist(name):
    with pytest.raises(ValueError, match=f"{name}=7"):
        DDLConfig(**{name: 7})


def test_refuses_wrong_types_on_assignment():
    config = DDLConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="(?s)compressor.*sum"):
        config.compressor = "sum"


def test_model_checks_fields_that_were_assigned():
    config = tiny_config("scalar")
    config.num_value_channels = 4
    with pytest.raises(ValueError, match="compressor must be set"):
        DDLForCausalLM(config)
    config = tiny_config("cc")
    config.gate_init = 5.0
    with pytest.raises(ValueError, match="gate_init"):
        DDLForCausalLM(config)


def test_overrides_are_part_of_a_loaded_configuration(tmp_path):
    tiny_config("cc").save_pretrained(tmp_path)
    config = DDLConfig.from_pretrained(tmp_path, compressor="token", compressor_kernel_size=None)
    assert (config.compressor, config.compressor_kernel_size) == ("token", 4)


def test_subclass_of_the_configuration():
    class OtherConfig(DDLConfig):
        model_type = "other"

    config = OtherConfig(**tiny_config("cc").to_diff_dict())
    assert type(DDLForCausalLM(config).config) is OtherConfig
