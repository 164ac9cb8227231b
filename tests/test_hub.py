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

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import LoopbackHub
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers import __version__ as transformers_version

from transformers_ddl import DDLForCausalLM, DDLForSequenceClassification
from transformers_ddl.cards import CardArguments, finetuned_card
from transformers_ddl.cli import main


REPOSITORY = Path(__file__).resolve().parents[1]
CODE = {
    "configuration_ddl.py",
    "liger_ddl.py",
    "modeling_ddl.py",
    "ops_ddl.py",
    "ops_triton_conv_ddl.py",
    "ops_triton_ddl.py",
}
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", *CODE}
SETTINGS = {
    "data": {"source": "corpus.txt", "held_out": 0.2},
    "tokenizer": {"vocab_size": 300},
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
    "training": {
        "output_dir": "bottles",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "use_cpu": True,
        "push_to_hub": True,
        "hub_always_push": True,
        "hub_model_id": "user/pretrained",
    },
    "card": {"license": "apache-2.0", "language": ["en"]},
}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub
        assert hub.not_understood == []


def run_python(*arguments, cwd: Path, hub: LoopbackHub):
    """A new process that has the Hub on loopback and nothing in its caches."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cwd / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_writer",
        "NO_PROXY": "*",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory) -> Path:
    """The output of a pretraining that also pushed it, at two checkpoints and at its end."""
    workplace = tmp_path_factory.mktemp("workplace")
    (workplace / "corpus.txt").write_text("\n".join(f"{i} green bottles, hanging on the wall." for i in range(300)))
    (workplace / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    process = run_python(REPOSITORY / "scripts" / "pretrain.py", "config.yaml", cwd=workplace, hub=hub)
    assert process.returncode == 0, process.stderr
    return workplace / "bottles"


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process has the Hub on loopback, and the right to write there."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setenv("NO_PROXY", "*")
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, *arguments) -> str:
    """The error that a push ends with: one line, and no success."""
    capsys.readouterr()
    assert main(["push", *map(str, arguments)]) in (1, 2)
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and output.err.endswith(errors[0] + "\n")
    assert "pushed: " not in output.out
    return errors[0]


# ---- Uploading, and loading what was uploaded ----


LOAD = """
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

expected, *names = sys.argv[1:]
expected = torch.load(expected)
for name in names:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        assert torch.equal(model(expected["input_ids"]).logits, expected["logits"]), name
tokenizer = AutoTokenizer.from_pretrained(names[0])
assert tokenizer("12 green bottles").input_ids == expected["input_ids"][0].tolist()
assert "transformers_ddl" not in sys.modules
"""

PUSH_BY_TRANSFORMERS = """
import sys

from transformers import AutoTokenizer

from transformers_ddl import DDLConfig, DDLForCausalLM

model = DDLForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("user/pushed", private=True)
model.save_pretrained("saved", push_to_hub=True, repo_id="user/saved")
model.config.push_to_hub("user/config")
"""


def test_uploads_are_loaded_again(hub, folder, tmp_path):
    """By `push`, by the pretraining, and by transformers' own methods: code and weights arrive, and give the same logits."""
    (folder / "notes.log").write_text("left out")
    process = run_python(REPOSITORY / "scripts" / "push_to_hub.py", folder, "user/copied", cwd=tmp_path, hub=hub)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith(f"pushed: {hub.url}/user/copied/commit/{hub.sha('user/copied')}\n")
    process = run_python("-c", PUSH_BY_TRANSFORMERS, folder, cwd=tmp_path, hub=hub)
    assert process.returncode == 0, process.stderr

    for name in ("user/pretrained", "user/copied", "user/pushed", "user/saved", "user/config"):
        files = hub.files(name)
        assert {file for file in files if file.endswith(".py")} == CODE, name
        assert "transformers_ddl" not in files["config.json"].decode()
    assert [hub.repositories[name]["private"] for name in ("user/copied", "user/pushed")] == [False, True]
    assert len(hub.repositories["user/copied"]["commits"]) == 1
    assert hub.files("user/copied").keys() >= MODEL | {"eval_results.json", "loss.png", "run.yaml"}
    assert not any(
        file.startswith("checkpoint") or file.endswith((".log", ".bin")) for file in hub.files("user/copied")
    )

    model = DDLForCausalLM.from_pretrained(folder)
    input_ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("12 green bottles").input_ids])
    with torch.no_grad():
        torch.save({"input_ids": input_ids, "logits": model(input_ids).logits}, tmp_path / "expected.pt")
    names = ["user/copied", "user/pretrained", "user/pushed", "user/saved"]
    process = run_python("-c", LOAD, tmp_path / "expected.pt", *names, cwd=tmp_path, hub=hub)
    assert process.returncode == 0, process.stderr


def test_pretraining_pushes_checkpoints_and_its_result(hub, folder):
    commits = hub.repositories["user/pretrained"]["commits"]
    assert len(commits) in (
        2,
        3,
    )  # the first may find the files of step 4 already, and the second then has nothing new
    for files in commits[:-1]:
        assert files.keys() >= {*CODE, "config.json", "model.safetensors", "tokenizer.json"}
        assert "README.md" not in files, "another card than the one of the end"
    files, local = hub.files("user/pretrained"), contents(folder)
    for name in MODEL - {"README.md"} | {"eval_results.json", "loss.png"}:
        assert files[name] == local[name], name
    assert files["README.md"].decode() == local["README.md"].decode().replace('"bottles"', '"user/pretrained"')
    assert 'from_pretrained("user/pretrained", trust_remote_code=True)' in files["README.md"].decode()


def test_dry_run_lists_all_and_needs_no_network(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = shutil.copytree(folder, tmp_path / "model")
    for name in (
        *("optimizer.pt", "rng_state.pth", "runs/events.out.tfevents.1", "train.log"),
        *(".cache/x", "__pycache__/x.pyc"),
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x" * 1234)
    assert main(["push", str(model), "user/nowhere", "--dry-run"]) == 0

    pushed, left_out = capsys.readouterr().out.split("left out:\n")
    first, *lines, total = pushed.splitlines()
    assert first == f"would push {model} to user/nowhere:"
    sizes = {name: int(size.replace(",", "")) for size, name in map(str.split, lines)}
    assert sizes.keys() == MODEL | {
        "eval_results.json",
        "loss.png",
        "run.yaml",
        "text_counts.json",
        "tokenizer_config.json",
    }
    local = {name: len(content) for name, content in contents(model).items()}
    grown = 2 * (len("user/nowhere") - len("bottles"))  # the name in the card's two examples
    assert sizes == {name: local[name] + (grown if name == "README.md" else 0) for name in sizes}
    assert total.split()[0] == f"{sum(sizes.values()):,}"
    left_out = {name: int(size.replace(",", "")) for size, name in map(str.split, left_out.splitlines())}
    assert left_out == {name: size for name, size in local.items() if name not in sizes}
    assert left_out["optimizer.pt"] == 1234 and "checkpoint-2/optimizer.pt" in left_out


def test_nothing_is_sent_twice(online, folder, capsys):
    assert main(["push", str(folder), "user/twice"]) == 0
    before = online.seen["PUT upload"]
    assert main(["push", str(folder), "user/twice"]) == 0
    assert online.seen["PUT upload"] == before
    assert len(online.repositories["user/twice"]["commits"]) == 1


def test_other_weights_are_replaced(online, folder, tmp_path):
    """Those of an earlier push in other files: a loader would prefer `model.safetensors` to the new shards."""
    shards = shutil.copytree(folder, tmp_path / "model")
    (shards / "model.safetensors").unlink()
    DDLForCausalLM.from_pretrained(folder).save_pretrained(shards, max_shard_size="10KB")
    weights = [{file for file in contents(path) if file.startswith("model")} - CODE for path in (folder, shards)]
    assert len(weights[1]) > 3
    for path, files in zip((folder, shards, folder), (weights[0], weights[1], weights[0])):
        assert main(["push", str(path), "user/replaced"]) == 0
        assert {file for file in online.files("user/replaced") if "safetensors" in file} == files


# ---- Uploads that fail ----


def test_without_a_token(online, folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no token found" in fails(capsys, folder, "user/anonymous")
    monkeypatch.setenv("HF_TOKEN", "hf_invented")
    assert "Invalid credentials" in fails(capsys, folder, "user/anonymous")
    assert "user/anonymous" not in online.repositories


def test_without_permission(online, folder, capsys, monkeypatch):
    error = fails(capsys, folder, "somebody/else")
    assert "403 Forbidden: You don't have the rights to create a model under the namespace 'somebody'" in error
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    online.repositories["user/readable"] = {"private": False, "commits": []}
    assert "403 Forbidden: You don't have the rights to write" in fails(capsys, folder, "user/readable")
    assert online.repositories["user/readable"]["commits"] == []


def test_offline(online, folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in fails(capsys, folder, "user/offline")


def test_private_is_never_public(online, folder, capsys):
    online.repositories["user/public"] = {"private": False, "commits": []}
    assert "user/public exists and is public" in fails(capsys, folder, "user/public", "--private")
    assert online.repositories["user/public"]["commits"] == []
    assert main(["push", str(folder), "user/private", "--private"]) == 0
    assert online.repositories["user/private"]["private"]


def test_dropped_connection(online, folder, capsys, monkeypatch):
    """Once: it is tried again. For good: one line, no commit, nothing changed here; the next push completes it."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    online.objects.clear()
    online.uploads_to_break = 1
    assert main(["push", str(folder), "user/unsteady"]) == 0
    assert online.uploads_to_break == 0
    assert online.files("user/unsteady")["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    online.objects.clear()
    online.uploads_to_break = 10**9
    before = contents(folder)
    error = fails(capsys, folder, "user/dropped")
    assert error.startswith(f"error: cannot push {folder} to user/dropped: Error while uploading '")
    assert online.repositories["user/dropped"]["commits"] == []
    assert contents(folder) == before

    online.uploads_to_break = 0
    assert main(["push", str(folder), "user/dropped"]) == 0
    assert len(online.repositories["user/dropped"]["commits"]) == 1
    assert online.files("user/dropped")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_reason_of_a_failed_upload_to_xet(online, folder, capsys, monkeypatch):
    """Xet, which the Hub on loopback does not speak, raises errors that have no cause."""

    def fail(*args, **kwargs):
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setattr(HfApi, "create_commit", fail)
    error = fails(capsys, folder, "user/xet")
    assert error.endswith("to user/xet: Data processing error: CAS service error; `transformers-ddl push` tries again")


def test_card_that_only_the_hub_refuses(online, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: my-own"))
    uploads = online.seen["PUT upload"]
    assert 'Invalid metadata in README.md. - "license" with value "my-own"' in fails(
        capsys, tmp_path / "model", "user/refused"
    )
    assert online.seen["PUT upload"] == uploads


def test_pretraining_that_cannot_push_ends_before_it_trains(online, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("\n".join(f"{i} green bottles" for i in range(300)))
    Path("config.yaml").write_text(yaml.safe_dump(SETTINGS))
    online.repositories["user/readable"] = {"private": False, "commits": []}

    def error(name, *overrides):
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        assert main(["pretrain", "config.yaml", "--training.hub_model_id", name, *overrides]) == 2
        return capsys.readouterr().err

    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "error: training: 403 Forbidden" in error("user/readable")
    monkeypatch.setenv("HF_TOKEN", "hf_invented")
    assert "Invalid credentials" in error("user/new")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert "error: training: " in error("user/new")
    assert "training.hub_token: cannot be set" in error("user/new", "--training.hub_token", "hf_secret")
    assert not list(Path("bottles").glob("*"))


# ---- Folders that are not complete ----


def without_tensor(folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def truncated(folder: Path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def edited(name: str, old: str, new: str):
    def edit(folder: Path):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return edit


INCOMPLETE = {
    "no-folder": (shutil.rmtree, "no folder"),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "other-model": (edited("config.json", '"model_type": "ddl"', '"model_type": "llama"'), "config.json was not written by"),
    "no-auto-map": (edited("config.json", "auto_map", "map"), "config.json was not written by"),
    "unknown-architecture": (edited("config.json", '"DDLForCausalLM"', '"Other"'), "architectures must name a DDL model"),
    "bad-config": (edited("config.json", '"gate_init": 0.1', '"gate_init": 7'), "gate_init must lie strictly between"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "truncated-weights": (truncated, "incomplete metadata"),
    "missing-weight": (without_tensor, "weights: missing keys model."),
    "other-size": (edited("config.json", '"hidden_size": 16', '"hidden_size": 18'), "does not hold a complete model"),
    "no-code": (lambda folder: (folder / "modeling_ddl.py").unlink(), "modeling_ddl.py"),
    "no-imported-code": (lambda folder: (folder / "ops_triton_ddl.py").unlink(), "ops_triton_ddl.py"),
    "no-tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "does not hold a complete model"),
    "no-card": (lambda folder: (folder / "README.md").unlink(), "README.md"),
    "card-without-metadata": (lambda folder: (folder / "README.md").write_text("# A model"), "library_name must be"),
    "card-not-yaml": (edited("README.md", "license: apache-2.0", "license: ["), "README.md: "),
    "license": (edited("README.md", "license: apache-2.0", "license: Apache License"), "license must be"),
    "language": (edited("README.md", "language:\n- en", "language: English"), "language must be ISO 639"),
    "dataset": (edited("README.md", "metrics:\n- bits", "datasets:\n- /data/corpus\nmetrics:\n- bits"), "datasets must name"),
    "base-model": (edited("README.md", "metrics:\n- bits", "base_model: ./out/\nmetrics:\n- bits"), "base_model must name"),
    "model-index": (edited("README.md", "    metrics:\n", "    measures:\n"), "README.md: Invalid `model_index`"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_folder(online, folder, tmp_path, capsys, damage, message):
    copy = shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    damage(copy)
    seen = dict(online.seen)
    assert message in fails(capsys, copy, "user/incomplete", "--dry-run")
    assert message in fails(capsys, copy, "user/incomplete")
    assert online.seen == seen, "nothing may be sent"


@pytest.mark.parametrize(
    "repo_id", ["bottles", "user/two/parts", "user/sp ace", "user/a--b", "user/name.git", "/bottles"]
)
def test_invalid_name(folder, capsys, repo_id):
    assert main(["push", str(folder), repo_id, "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: repo_id: ")


# ---- Model cards ----


def validate(card: ModelCard):
    """As `ModelCard.validate`, whose address is fixed in some releases."""
    HfApi()._validate_yaml(str(card), repo_type="model")


def test_card_of_a_pretraining(online, folder):
    card = ModelCard.load(folder / "README.md")
    results = json.loads((folder / "eval_results.json").read_text())
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.datasets is None, "a file is no data set of the Hub"
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {name: results[name] for name in ("bits_per_byte", "perplexity")}
    assert {result.dataset_type for result in card.data.eval_results} == {"text"}
    assert f"Transformers {transformers_version}, PyTorch {torch.__version__}" in card.text
    assert (
        "1 layers of width 16, residual type `delta`, 4 value channels, channel compressor, embedding conv"
        in card.text
    )
    assert "1 × cpu (" in card.text and "| training time, " in card.text

    index = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert model_index_to_eval_results(index) == (card.data.model_name, card.data.eval_results)
    validate(card)
    card.data.datasets = ["/data/corpus"]
    with pytest.raises(ValueError, match="datasets"):
        validate(card)


@pytest.fixture(scope="module")
def finetuning(folder, tmp_path_factory) -> Trainer:
    model = DDLForSequenceClassification.from_pretrained(folder)
    examples = [{"input_ids": [5 + i, 6, 7], "labels": i % 2} for i in range(8)]
    output = tmp_path_factory.mktemp("finetuning") / "classifier"
    arguments = TrainingArguments(str(output), max_steps=2, use_cpu=True, save_strategy="no", report_to="none")
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    return trainer


@pytest.mark.parametrize("published", [True, False])
def test_card_of_a_finetuning(online, finetuning, folder, published):
    base_model = "user/pretrained" if published else str(folder)
    finetuning.model.config.name_or_path = base_model
    source = "user/reviews" if published else str(folder.parent / "corpus.txt")
    card = finetuned_card(finetuning, source, {"accuracy": 0.75}, CardArguments(license="mit", language="en"))
    validate(card)
    assert (card.data.base_model, card.data.datasets) == (
        ("user/pretrained", ["user/reviews"]) if published else (None, None)
    )
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-classification", "accuracy", 0.75)
    assert result.dataset_type == ("user/reviews" if published else "text")
    assert str(folder.parent) not in str(card), "paths of this machine tell a reader nothing"
    assert 'pipeline("text-classification", model="classifier", trust_remote_code=True)' in card.text
    assert f"fine-tuned on {'user/reviews' if published else 'corpus.txt'} with `Trainer`" in card.text
    assert "| accuracy | 0.7500 |" in card.text
    assert "| learning_rate | 5e-05 |" in card.text
    assert "| training time, " in card.text


def test_any_trainer_pushes_the_code(online, finetuning, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    finetuning.args.hub_model_id = "user/classifier"
    finetuning.push_to_hub()
    assert online.files("user/classifier").keys() >= {*CODE, "config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"license": "Apache License 2.0"}, "license must be an identifier"),
        ({"language": "English"}, "language must be ISO 639"),
        (
            {"language": ["en", "x"]},
            "language must be ISO 639 codes of two or three letters, code or multilingual, got 'x'",
        ),
    ],
)
def test_card_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        CardArguments(**arguments)
    CardArguments("cc-by-sa-4.0", ["en", "deu", "code"])
