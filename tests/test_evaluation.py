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
"""Bits per byte against a float64 reference, and tasks of lm-evaluation-harness on saved models, by all ways to run it."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from lm_eval.__main__ import cli_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from transformers_ddl.cli import main
from transformers_ddl.evaluation import BitsPerByte
from transformers_ddl.tokenization import train_tokenizer


ROOT = Path(__file__).parents[1]
TASKS = ROOT / "tests" / "tasks"
EXAMPLES = [json.loads(line) for line in (TASKS / "opposites.jsonl").read_text().splitlines()]
# Of one token, of less than a context, of several, and none; with characters of up to four bytes
TEXTS = ["a", "naïve café", "the cat sat on the mat 🐈 and the dog sat on the cat, " * 5, ""]
VARIANTS = ["scalar", "cc", "tc", "additive"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, "The opposite of hot is cold"], vocab_size=290)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Runs in the root of the repository, and reads no cache of datasets."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


@pytest.fixture
def only_local_tasks(monkeypatch):
    """Spares lm_eval the reading of thousands of YAML files."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


def make_model(variant, tokenizer, **options):
    return tiny_model(variant, vocab_size=len(tokenizer), **options)


def make_metric(path) -> BitsPerByte:
    return BitsPerByte(cache_dir=str(path))


@torch.no_grad()
def reference_nats(model, tokens: list[int], max_length: int, stride: int) -> float:
    """Token by token: the n-th (from 1) is predicted in the first window, beginning at k·stride, that reaches it."""
    nats = 0.0
    for n in range(1, len(tokens)):
        start = stride * max(0, math.ceil((n - max_length) / stride))
        logits = model(torch.tensor([tokens[start:n]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[tokens[n]].item()
    return nats


@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (16, None), (16, 5), (7, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_per_byte(variant, max_length, stride, tokenizer, tmp_path):
    model = make_model(variant, tokenizer, dtype=torch.float64)
    results = make_metric(tmp_path).compute(
        predictions=TEXTS, model=model, tokenizer=tokenizer, max_length=max_length, stride=stride, batch_size=3
    )
    max_length = max_length or model.config.max_position_embeddings
    texts = [tokenizer(text).input_ids for text in TEXTS]  # with the token that the first one is predicted from
    assert len(texts[2]) > max_length
    nats = sum(reference_nats(model, tokens, max_length, stride or max_length) for tokens in texts)
    num_tokens, num_bytes = sum(map(len, texts)) - len(texts), 1 + 12 + 5 * 56
    assert (results["num_tokens"], results["num_bytes"]) == (num_tokens, num_bytes)
    for name, expected in {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "perplexity": math.exp(nats / num_tokens),
        "nats_per_token": nats / num_tokens,
    }.items():
        assert math.isclose(results[name], expected, rel_tol=1e-12), name


def test_bits_per_byte_of_names_of_special_tokens(tokenizer, tmp_path):
    """They are text like any other, of as many tokens as it takes."""
    text = tokenizer.eos_token
    results = make_metric(tmp_path).compute(predictions=[text], model=make_model("cc", tokenizer), tokenizer=tokenizer)
    assert results["num_tokens"] > 1 and results["num_bytes"] == len(text)


def test_bits_per_byte_leaves_the_mode_of_the_model(tokenizer, tmp_path):
    model = make_model("cc", tokenizer, attention_dropout=0.5)
    evaluated = make_metric(tmp_path).compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert not model.training
    model.train()
    assert make_metric(tmp_path).compute(predictions=TEXTS, model=model, tokenizer=tokenizer) == evaluated
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": ["", ""]}, "must hold text"),
        ({"stride": 65}, r"between 1 and max_length \(64\), got 65"),
        ({"stride": -1}, "got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"stride": 0}, "got 0"),
    ],
)
def test_unusable_input_of_bits_per_byte(options, message, tokenizer, tmp_path):
    options = {"predictions": TEXTS, "model": make_model("cc", tokenizer), "tokenizer": tokenizer, **options}
    with pytest.raises(ValueError, match=message):
        make_metric(tmp_path).compute(**options)


# ---- Commands ----


@torch.no_grad()
def accuracy(model, tokenizer) -> float:
    """The share of examples whose answer has the highest probability: what `acc` should be."""
    correct = 0
    for example in EXAMPLES:
        context = tokenizer(f"The opposite of {example['question']} is").input_ids
        scores = []
        for choice in example["choices"]:
            tokens = tokenizer(f"The opposite of {example['question']} is {choice}").input_ids
            assert tokens[: len(context)] == context
            scores.append(-reference_nats(model, tokens, 64, 64) + reference_nats(model, context, 64, 64))
        correct += max(range(len(scores)), key=scores.__getitem__) == example["answer"]
    return correct / len(EXAMPLES)


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_lm_eval_with_remote_code(tokenizer, workplace):
    """The command `lm_eval`, in a process that never imports the package."""
    model = make_model("cc", tokenizer)
    folder = save(model, tokenizer, workplace / "model")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "opposites", "--include_path", str(TASKS)]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--device", "cpu"]
    process = subprocess.run(
        [*command, "--output_path", str(workplace / "results.json")],
        env={**os.environ, "HF_HOME": str(workplace), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    (file,) = workplace.glob("results*.json")
    assert json.loads(file.read_text())["results"]["opposites"]["acc,none"] == accuracy(model, tokenizer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lm_eval_with_the_package(variant, tokenizer, workplace, only_local_tasks, monkeypatch):
    """The same command, in a process that has imported the package."""
    model = make_model(variant, tokenizer)
    folder = save(model, tokenizer, workplace / "model")
    monkeypatch.setattr(
        "sys.argv",
        ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}", "--device", "cpu", "--tasks", "opposites"]
        + ["--include_path", str(TASKS), "--output_path", str(workplace / "results.json")],
    )
    cli_evaluate()
    (file,) = workplace.glob("results*.json")
    assert json.loads(file.read_text())["results"]["opposites"]["acc,none"] == accuracy(model, tokenizer)


def test_command_on_tasks(tokenizer, workplace, only_local_tasks, monkeypatch, capsys):
    model = make_model("cc", tokenizer)
    folder = save(model, tokenizer, workplace / "model")
    loglikelihood, contexts = HFLM.loglikelihood, []

    def record(self, requests, **kwargs):
        contexts.extend(request.args[0] for request in requests)
        return loglikelihood(self, requests, **kwargs)

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    command = ["evaluate", folder, "--tasks", "opposites", "--include-path", str(TASKS)]
    output = workplace / "results.json"
    for num_fewshot in (0, 1):
        options = ["--num-fewshot", str(num_fewshot), "--output", str(output)]
        assert main([*command, *options]) == 0
        assert "opposites" in capsys.readouterr().out
        results = json.loads(output.read_text())
        assert results["num_fewshot"] == num_fewshot
        assert {context.count("The opposite of") for context in contexts} == {1 + num_fewshot}
        contexts.clear()
        if num_fewshot == 0:
            assert results["tasks"]["opposites"]["acc,none"] == accuracy(model, tokenizer)


def test_command_on_text(tokenizer, workplace, capsys):
    model = make_model("cc", tokenizer)
    folder = save(model, tokenizer, workplace / "model")
    files = [workplace / f"{i}.txt" for i in range(len(TEXTS))]
    for file, text in zip(files, TEXTS):
        file.write_text(text, encoding="utf-8")
    output = workplace / "results.json"
    assert main(["evaluate", folder, "--text", *map(str, files), "--stride", "16", "--output", str(output)]) == 0
    expected = make_metric(workplace).compute(predictions=TEXTS, model=model, tokenizer=tokenizer, stride=16)
    assert json.loads(output.read_text()) == {"model": folder, **expected}
    assert (
        f"{expected['bits_per_byte']:.4f} bits per byte over {expected['num_bytes']} bytes" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "opposite"], "--tasks: unknown task 'opposite'"),
        (["--text", "missing.txt"], "--text: cannot read 'missing.txt'"),
        (["--text", "setup.cfg"], "model: cannot load 'nowhere'"),
        (["--text", "setup.cfg", "--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--text", "setup.cfg", "--stride", "0"], "--stride: must be at least 1, got 0"),
        (["--tasks", "opposites", "--include-path", "nowhere"], "--include-path: no folder 'nowhere'"),
        (["--tasks", "opposites", "--num-fewshot", "-1"], "--num-fewshot: must be at least 0, got -1"),
        (["--tasks", "opposites", "--limit", "0"], "--limit: must be at least 1, got 0"),
        (["--text", "setup.cfg", "--output", "missing/results.json"], "--output: no folder 'missing'"),
        (["--text", "setup.cfg", "--output", "tests"], "--output: 'tests' is a folder"),
        (["--text", "setup.cfg", "--output", "/proc/results.json"], "--output: cannot write '/proc/results.json'"),
    ],
)
def test_unusable_input_of_the_command(options, message, workplace, only_local_tasks, capsys):
    assert main(["evaluate", "nowhere", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_stride_beyond_the_context(workplace, tokenizer, capsys):
    folder = save(make_model("cc", tokenizer), tokenizer, workplace / "model")
    assert main(["evaluate", folder, "--text", "setup.cfg", "--stride", "65"]) == 2
    assert capsys.readouterr().err.endswith("error: --stride: must be at most the model's context, 64, got 65\n")


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "link", "dangling link"])
def test_failed_evaluation_leaves_the_output_as_it_was(kind, workplace, tmp_path):
    output, target = tmp_path / "results.json", tmp_path / "target.json"
    if kind.endswith("link"):
        output.symlink_to(target)
    if kind in ("file", "empty", "link"):
        output.write_text("" if kind == "empty" else "earlier results")
    before = {path.name: path.exists() and path.read_text() for path in tmp_path.iterdir()}
    assert main(["evaluate", "nowhere", "--text", "setup.cfg", "--output", str(output)]) == 2
    assert {path.name: path.exists() and path.read_text() for path in tmp_path.iterdir()} == before


def test_script_in_a_checkout(tmp_path):
    """It has the name of a library that it imports."""
    (tmp_path / "text.txt").write_text("text")
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", "nowhere", "--text", "text.txt"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: model: cannot load 'nowhere'")


def test_paper_tasks_need_their_data(workplace, capsys):
    """Tests run without a network; the models are not even looked for."""
    assert main(["evaluate", "nowhere", "--tasks", "paper"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --tasks: cannot get the data of 'arc_challenge'")
