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
"""Checkpoints of other models: the same logits and gradients, and clear refusals of what cannot be converted."""

import json
import os
import re
import subprocess
import sys
import textwrap

import official
import pytest
import torch
from conftest import all_gradients, random_tokens, relative_error
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from transformers_ddl import DDLForCausalLM, cli, conversion
from transformers_ddl.conversion import convert_official_checkpoint


# Checkpoints of the authors' research code

OPTIONS = {
    "scalar-linear-value": ("scalar", {"ddl_v_sigmoid": False}),
    "scalar-constant-value": ("scalar", {"ddl_v_dim1_constant": True, "ddl_v_dim1_constant_value": 1.5}),
    "cc-linear-value": ("cc", {"ddl_v_sigmoid": False, "ddl_v_sigmoid_scale": 3.0}),
    "cc-constant-value": ("cc", {"ddl_v_constant": True}),
    "cc-value-scale": ("cc-ec", {"ddl_v_sigmoid_scale": 3.0}),
    "cc-two-layer-gate": ("cc-ec", {"ddl_beta_single_linear": False, "ddl_beta_hidden_size": 5}),
    "cc-kernel-3": ("cc", {"ddl_state_shortconv_kernel_size": 3}),
    "tc-two-channels": ("tc-ec", {"ddl_value_channels": 2}),
    "key-eps": ("tc", {"ddl_k_eps": 0.5}),
    "partial-rotary": ("cc", {"rope_ratio": 0.75}),
    "partial-rotary-additive": ("additive", {"rope_ratio": 0.4}),
    "rope-base": ("scalar", {"rope_base": 500.0}),
    "scaled-logits": ("cc", {"mup": True, "hidden_size_base": 12}),
}
CASES = {**{variant: (variant, {}) for variant in official.VARIANTS}, **OPTIONS}
cases = pytest.mark.parametrize("case", CASES)
layouts = pytest.mark.parametrize("layout", ["first", "later"])


def official_checkpoint(case="cc-ec", layout="first", dtype=torch.float32):
    variant, options = CASES[case]
    config = {**official.SIZES, **official.VARIANTS[variant], **options}
    return official.random_parameters(variant, config, layout, dtype), config


def load(config, state_dict):
    model, info = DDLForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not any(info.values())
    return model


@cases
@layouts
def test_official_logits_and_gradients_in_fp64(case, layout):
    """Rounding is 1e-16 an operation: 1e-9 leaves no room for a different formula."""
    parameters, config = official_checkpoint(case, layout, torch.float64)
    model, tokens = load(*convert_official_checkpoint(parameters, config)), random_tokens(2, 7)
    logits = model(tokens).logits
    expected = official.logits(CASES[case][0], config, {n: p.requires_grad_() for n, p in parameters.items()}, tokens)
    assert logits.dtype == torch.float64
    assert relative_error(logits, expected) < 1e-9

    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = all_gradients((logits * cotangent).sum(), model)
    del parameters["lm_head.weight"]  # the embeddings
    names, leaves = zip(*parameters.items())
    expected_gradients = dict(zip(names, torch.autograd.grad((expected * cotangent).sum(), leaves)))
    # The conversion of parameters, which is linear, is that of gradients too
    _, expected_gradients = convert_official_checkpoint(expected_gradients, config)
    for name, expected_gradient in expected_gradients.items():
        if not name.endswith("beta_hidden_proj.bias"):  # of which they have none
            assert relative_error(gradients[name], expected_gradient) < 1e-9, name


@cases
@layouts
def test_official_logits_in_fp32(case, layout):
    """Of order 1 here; the bound is for logits of order 10."""
    parameters, config = official_checkpoint(case, layout)
    model, tokens = load(*convert_official_checkpoint(parameters, config)), random_tokens(2, 64)
    with torch.no_grad():
        expected = official.logits(CASES[case][0], config, parameters, tokens)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_official_fields_without_effect_on_logits():
    parameters, config = official_checkpoint("cc-ec", dtype=torch.bfloat16)
    options = {"block_size": 99, "ddl_beta_init": 0.5, "ddl_state_dv_shortconv_causal": True, "architectures": ["GPT"]}
    ddl_config, state_dict = convert_official_checkpoint(parameters, {**config, **options})
    assert (ddl_config.max_position_embeddings, ddl_config.gate_init, ddl_config.dtype) == (99, 0.5, torch.bfloat16)
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.bfloat16}
    ddl_config, _ = convert_official_checkpoint(parameters, {**config, "ddl_beta_init": 0.0})
    assert 0 < ddl_config.gate_init < 1e-5


def test_official_sizes_follow_from_the_parameters():
    parameters, config = official_checkpoint("tc-ec")
    expected, _ = convert_official_checkpoint(parameters, config)
    ddl_config, _ = convert_official_checkpoint(parameters, {"block_size": config["block_size"]})
    assert ddl_config.to_dict() == expected.to_dict()


def test_official_untied_head():
    parameters, config = official_checkpoint("scalar")
    parameters["lm_head.weight"] = 2 * parameters["lm_head.weight"]
    model, tokens = load(*convert_official_checkpoint(parameters, config)), random_tokens(2, 7)
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        expected = official.logits("scalar", config, parameters, tokens)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_official_names_with_prefixes(prefix):
    parameters, config = official_checkpoint()
    _, expected = convert_official_checkpoint(parameters, config)
    _, state_dict = convert_official_checkpoint({f"{prefix}{n}": p for n, p in parameters.items()}, config)
    assert state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


REFUSED_OPTIONS = [
    *[("cc", "first", {name: True}, name) for name in ("using_groupnorm", "use_output_gate", "use_k_shift")],
    ("scalar", "later", {"v_activation": "relu"}, "v_activation='relu'"),
    ("scalar", "later", {"residual_branch_mult": 0.5}, "residual_branch_mult=0.5"),
    ("scalar", "later", {"parameterization": "completeP", "num_hidden_layers_base": 4}, "num_hidden_layers_base=4"),
    ("cc", "later", {"ddl_state_dv_shortconv_causal": True}, "ddl_state_dv_shortconv_causal=True"),
    ("cc", "first", {"ddl_v_constant": True, "ddl_v_constant_value": -1.0}, "value_scale"),
    ("additive", "first", {"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
    ("scalar", "first", {"rope_ratio": 0.0}, "partial_rotary_factor"),
    ("scalar", "first", {"num_attention_heads": 9}, "num_attention_heads is 9"),
    ("cc", "first", {"ddl_value_channels": 2}, "ddl_value_channels is 2"),
    ("cc", "first", {"hidden_size": 21}, "hidden_size is 21"),
]


@pytest.mark.parametrize("case, layout, options, message", REFUSED_OPTIONS, ids=lambda value: str(value)[:40])
def test_official_options_that_cannot_be_converted(case, layout, options, message):
    parameters, config = official_checkpoint(case, layout)
    with pytest.raises(ValueError, match=message):
        convert_official_checkpoint(parameters, {**config, **options})


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_q.weight",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.attn.q_rms.weight",
        "transformer.h.1.ddl_mlp.v_proj.bias",
        "transformer.h.0.compress.weight",
        "transformer.h.1.compress.read",
        "readout.read",
        "ln_f.weight",
    ],
)
def test_official_missing_parameters(name):
    parameters, config = official_checkpoint()
    del parameters[name]
    with pytest.raises(ValueError, match=f"missing parameter {name}"):
        convert_official_checkpoint(parameters, config)


@pytest.mark.parametrize(
    "case, name",
    [
        ("cc", "transformer.h.0.attn.subln.weight"),
        ("cc", "transformer.h.0.attn.c_q.bias"),
        ("cc", "transformer.wpe.weight"),
        ("cc", "transformer.h.0.attn.o_proj.weight"),
        ("scalar", "transformer.h.1.compress.weight"),
        ("additive", "transformer.h.1.ddl_mlp.beta.weight"),
    ],
)
def test_official_unexpected_parameters(case, name):
    parameters, config = official_checkpoint(case)
    with pytest.raises(ValueError, match=f"unexpected parameter {name}"):
        convert_official_checkpoint({**parameters, name: torch.zeros(20, 20)}, config)


@pytest.mark.parametrize(
    "case, name, shape",
    [
        ("cc", "transformer.h.0.attn.c_k.weight", (20, 18)),
        ("cc", "transformer.h.1.ln_1.weight", (21,)),
        ("tc", "transformer.h.1.compress.shortconv.weight", (3, 80)),
        ("cc-ec", "input_embed.conv.weight", (80, 3, 1)),
    ],
)
def test_official_wrong_shapes(case, name, shape):
    parameters, config = official_checkpoint(case)
    with pytest.raises(ValueError, match=rf"{name} has the shape \({shape[0]},.* expected"):
        convert_official_checkpoint({**parameters, name: torch.zeros(shape)}, config)


# Files


def write_checkpoint(folder, kind, parameters, config):
    """Writes a checkpoint the way this kind of file is made; returns what to give to the command."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        tensors = {name: tensor for name, tensor in parameters.items() if name != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(parameters, folder / "pytorch_model.bin")
    elif kind == "file":
        torch.save(parameters, folder / "weights.pt")
        return folder / "weights.pt"
    elif kind == "training":
        (folder / "config.json").unlink()
        content = {"model": parameters, "optimizer": {"state": {}}, "config": config, "iter_num": 7}
        torch.save(content, folder / "ckpt.pt")
    else:
        names = [name for name in parameters if name != "lm_head.weight"]
        files = {name: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: parameters[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["safetensors", "bin", "file", "training", "sharded"])
@layouts
def test_official_files(kind, layout, tmp_path):
    parameters, config = official_checkpoint("tc-ec", layout)
    path, tokens = write_checkpoint(tmp_path / "theirs", kind, parameters, config), random_tokens(2, 7)
    assert convert("official", path, tmp_path / "ours") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = official.logits("tc-ec", config, parameters, tokens)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_sharded_output(tmp_path):
    path = write_checkpoint(tmp_path / "theirs", "safetensors", *official_checkpoint())
    assert convert("official", path, tmp_path / "ours", "--max-shard-size", "20KB") == 0
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "theirs", "bin", *official_checkpoint())
    torch.save({"trap": Trap(tmp_path / "executed")}, path / "pytorch_model.bin")
    assert convert("official", path, tmp_path / "ours") == 2
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"theirs"}


def spoil(folder, how):
    file = folder / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "missing shard":
        (folder / "model-00002-of-00003.safetensors").unlink()
    elif how == "no weights":
        file.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "config is cut":
        (folder / "config.json").write_text('{"vocab_size": ')
    elif how == "missing":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "model.safetensors is damaged"),
        ("missing shard", "no file .*model-00002-of-00003.safetensors"),
        ("no weights", "holds no checkpoint"),
        ("no config", "no config.json beside model.safetensors"),
        ("config is a list", "config.json holds no JSON object"),
        ("config is cut", "config.json is not JSON"),
        ("missing", "there is no file .*theirs"),
    ],
)
def test_files_that_cannot_be_read(how, message, tmp_path, capsys):
    kind = "sharded" if how == "missing shard" else "safetensors"
    path = write_checkpoint(tmp_path / "theirs", kind, *official_checkpoint())
    spoil(path, how)
    assert convert("official", path, tmp_path / "ours") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and re.search(message, line)
    assert not (tmp_path / "ours").exists()


def test_output_folder_is_never_overwritten(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "theirs", "safetensors", *official_checkpoint())
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    assert convert("official", path, tmp_path / "ours") == 2
    assert "ours exists" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["notes.txt"]

    (tmp_path / "ours" / "notes.txt").unlink()
    assert convert("official", path, tmp_path / "ours") == 0


def test_output_folder_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "theirs", "safetensors", *official_checkpoint())

    class Full:
        def save_pretrained(self, folder, **kwargs):
            raise OSError("no space left on device")

    model = DDLForCausalLM(convert_official_checkpoint(*official_checkpoint())[0])
    with pytest.raises(OSError, match="no space left"):
        conversion.save_converted(tmp_path / "ours", model, Full())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_of_a_conversion(kind, tmp_path):
    """Parameters go from file to file: the process itself never holds half of them."""
    parameters, config = official_checkpoint("cc")
    parameters["transformer.wte.weight"] = parameters["lm_head.weight"] = torch.randn(1_600_000, 20)
    path = write_checkpoint(tmp_path / "theirs", kind, parameters, {**config, "vocab_size": 1_600_000})
    program = """
        import pathlib, sys, threading, time
        from transformers_ddl import cli
        def anonymous_memory():
            status = pathlib.Path("/proc/self/status").read_text()
            return int(status.split("RssAnon:")[1].split()[0]) * 1024
        before, samples = anonymous_memory(), []
        def watch():
            while True:
                samples.append(anonymous_memory())
                time.sleep(1e-3)
        threading.Thread(target=watch, daemon=True).start()
        assert cli.main(["convert", "official", *sys.argv[1:]]) == 0
        print(max(samples) - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path), str(tmp_path / "ours")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout.splitlines()[-1]) < 1_600_000 * 20 * 4 / 2
