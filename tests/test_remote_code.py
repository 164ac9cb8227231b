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
"""Saved models carry their code: they load where the package is not installed, and beside the package where it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_tokens, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_triton_available

import transformers_ddl


CODE = [
    "configuration_ddl.py",
    "liger_ddl.py",
    "modeling_ddl.py",
    "ops_ddl.py",
    "ops_triton_conv_ddl.py",
    "ops_triton_ddl.py",
]
CHECKPOINTS = {
    "scalar": "DDLForCausalLM",
    "cc": "DDLForCausalLM",
    "tc": "DDLForCausalLM",
    "base": "DDLModel",
    "sequence": "DDLForSequenceClassification",
    "token": "DDLForTokenClassification",
    "answer": "DDLForQuestionAnswering",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder of saved models with, in `expected.pt`, their inputs and outputs."""
    root = tmp_path_factory.mktemp("checkpoints")
    vocabulary = {word: token for token, word in enumerate(["<pad>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    input_ids = random_tokens(2, 9)

    outputs = []  # (name, Auto class or "generate", what it gives)
    for name, class_name in CHECKPOINTS.items():
        variant = name if class_name == "DDLForCausalLM" else "cc"
        model = tiny_model(variant, getattr(transformers_ddl, class_name), pad_token_id=0)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        with torch.no_grad():
            outputs.append(
                (name, class_name.replace("DDL", "Auto" if name == "base" else "AutoModel"), model(input_ids)[0])
            )
            if class_name == "DDLForCausalLM":
                outputs.append((name, "AutoModel", model.model(input_ids)[0]))
                outputs.append((name, "generate", model.generate(input_ids, max_new_tokens=8, do_sample=False)))
    torch.save(
        {"input_ids": input_ids, "tokens": tokenizer("a c j").input_ids, "outputs": outputs}, root / "expected.pt"
    )
    return root


def run_python(script: str, *arguments, path: list[Path], options: tuple[str, ...] = (), **environment):
    """Runs a script in a new process, with `path` in front of its module search path."""
    environment = {"PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    command = [sys.executable, *options, "-c", script, *map(str, arguments)]
    process = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def link_packages(site: Path, without: list[str]) -> Path:
    """A folder with all packages of this environment but some."""
    site.mkdir()
    for folder in map(Path, sys.path):
        for package in folder.iterdir() if folder.name in ("site-packages", "dist-packages") else ():
            is_left_out = package.suffix == ".pth" or package.name.startswith(tuple(without))
            if not is_left_out and not (site / package.name).exists():
                (site / package.name).symlink_to(package)
    return site


def make_hub_cache(cache: Path, checkpoints: Path) -> Path:
    """Folders as if the checkpoints had been downloaded from the Hub, where the imports of every file are checked."""
    for checkpoint in filter(Path.is_dir, checkpoints.iterdir()):
        repository, commit = cache / f"models--user--{checkpoint.name}", "0" * 40
        shutil.copytree(checkpoint, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return cache


CHECK = """
import sys
from importlib.util import find_spec

import torch
import transformers
from transformers.models.auto import modeling_auto

expected, location, resaved, *missing = sys.argv[1:]
assert not any(map(find_spec, missing)), missing
expected = torch.load(expected)
inputs = expected["input_ids"]


def check(name, kind, output):
    auto_class = "AutoModelForCausalLM" if kind == "generate" else kind
    model = getattr(transformers, auto_class).from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        generate = kind == "generate"
        actual = model.generate(inputs, max_new_tokens=8, do_sample=False) if generate else model(inputs)[0]
    assert torch.equal(actual, output), (name, kind)
    if kind == "AutoModelForCausalLM":  # or else pipelines say that they do not support it
        assert type(model).__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return model


for name, kind, output in expected["outputs"]:
    model = check(f"{location}/{name}", kind, output)
    if kind == "AutoModelForCausalLM":
        model.save_pretrained(f"{resaved}/{name}")
        check(f"{resaved}/{name}", kind, output)
        tokenizer = transformers.AutoTokenizer.from_pretrained(f"{location}/{name}", trust_remote_code=True)
        assert tokenizer("a c j").input_ids == expected["tokens"]
        config = transformers.AutoConfig.from_pretrained(f"{location}/{name}", trust_remote_code=True)
        assert type(config).__name__ == "DDLConfig"
"""


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_loads_where_the_package_is_not_installed(source, checkpoints, tmp_path):
    """From a folder; and from the Hub, which needs no Triton either."""
    missing = ["transformers_ddl"] if source == "folder" else ["transformers_ddl", "triton"]
    site = link_packages(tmp_path / "site", without=missing)
    location = checkpoints if source == "folder" else "user"
    hub_cache = make_hub_cache(tmp_path / "hub", checkpoints)
    run_python(
        CHECK,
        *[checkpoints / "expected.pt", location, tmp_path / "resaved", *missing],
        path=[site],
        options=("-S",),
        HF_HUB_CACHE=str(hub_cache),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )


COEXIST = """
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, changed, with_kernels = sys.argv[1:]
inputs = torch.arange(8).view(2, 4)


def loss_and_gradients(model):
    with FlopCounterMode(display=False):  # which wants to see operators
        loss = model(inputs, labels=inputs).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(remote).__module__.startswith("transformers_modules."), type(remote)
before = loss_and_gradients(remote)

import transformers_ddl

for trust_remote_code in (None, True):
    installed = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert type(installed) is transformers_ddl.DDLForCausalLM
    assert type(AutoModel.from_config(installed.config)) is transformers_ddl.DDLModel
assert type(transformers_ddl.DDLForTokenClassification(installed.config).model) is transformers_ddl.DDLModel

# Another version, whose kernels give something else
other = get_class_from_dynamic_module("modeling_ddl.DDLForCausalLM", changed).from_pretrained(changed)
assert type(other).__module__ not in (type(remote).__module__, type(installed).__module__)
if with_kernels == "True":
    try:
        loss_and_gradients(other)
    except RuntimeError as error:
        assert "another version" in str(error)
    else:
        raise AssertionError("the changed kernel did not run")

for model in (remote, installed):
    for actual, expected in zip(loss_and_gradients(model), before, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
"""


def test_remote_code_and_package_in_one_process(checkpoints, tmp_path):
    """Also their kernels, which run in Triton's interpreter here: operators of PyTorch are known by global names."""
    changed = shutil.copytree(checkpoints / "cc", tmp_path / "changed")
    with (changed / "ops_triton_ddl.py").open("a") as file:
        file.write(
            "\n\n@boundary_op.custom_op.register_kernel('cpu')\ndef _(*args):\n    raise RuntimeError('another version')\n"
        )
    run_python(
        COEXIST,
        *[checkpoints / "cc", changed, is_triton_available()],
        path=[Path(transformers_ddl.__file__).parents[1]],
        HF_MODULES_CACHE=str(tmp_path / "modules"),
        TRANSFORMERS_DDL_KERNELS="1",
        TRITON_INTERPRET="1",
    )


def test_package_is_preferred_and_asks_for_no_trust(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "cc")
    assert type(model) is transformers_ddl.DDLForCausalLM


def test_saves_its_code(tmp_path):
    """Whatever class is saved: a configuration, a subclass, or (as FSDP2 makes them) a class of nowhere."""
    model_class = type("FSDPDDLModel", (transformers_ddl.DDLModel,), {"__module__": "torch.distributed"})
    model_class(tiny_config()).save_pretrained(tmp_path / "model")
    tiny_config().save_pretrained(tmp_path / "config")
    for folder in (tmp_path / "model", tmp_path / "config"):
        assert sorted(file.name for file in folder.glob("*.py")) == CODE
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert {name.split(".")[0] + ".py" for name in auto_map.values()} <= set(CODE)
        assert {name.split(".")[1] for name in auto_map.values()} == {"DDLConfig", *CHECKPOINTS.values()}
