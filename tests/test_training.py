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
"""The pretraining command: what it writes, what it measures, and what it refuses."""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_ddl import DDLForCausalLM
from transformers_ddl.cli import InputError, main
from transformers_ddl.data import DataArguments, read_corpus
from transformers_ddl.flops import count_parameters, training_flops_per_token
from transformers_ddl.settings import Run, read_settings


REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK_SIZE = 32
SETTINGS = {
    "data": {"source": "corpus.txt", "held_out": 0.2},
    "tokenizer": {"vocab_size": 300},
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": BLOCK_SIZE,
    },
    "training": {
        "output_dir": "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    },
}


FINISHED_OVERRIDES = ("--training.max_steps", "30", "--training.save_strategy=steps", "--training.save_steps", "15")


def write_inputs(folder):
    """A corpus, the settings that name it, and a folder that somebody else uses."""
    (folder / "corpus.txt").write_text("\n".join(f"{i} green bottles, hanging on the wall." for i in range(300)))
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pretrain(*overrides):
    return main(["pretrain", "config.yaml", *overrides])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_script(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / name, *arguments], cwd=cwd, capture_output=True, text=True
    )


# ---- A run of the command, and everything it leaves ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workplace with the finished run in `out`, and what the command printed."""
    workplace = tmp_path_factory.mktemp("finished")
    write_inputs(workplace)
    (workplace / "deeper.yaml").write_text("{model: {num_hidden_layers: 2}, training: {report_to: tensorboard}}")
    process = run_script("pretrain.py", "config.yaml", "deeper.yaml", *FINISHED_OVERRIDES, cwd=workplace)
    assert process.returncode == 0, process.stderr
    return workplace, process


def test_output_folder(finished):
    workplace, _ = finished
    names = {path.name for path in (workplace / "out").iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "eval_results.json",
        "generation_config.json",
        "loss.png",
        "model.safetensors",
        "run.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (workplace / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")

    tokenizer = AutoTokenizer.from_pretrained(workplace / "out")
    config = json.loads((workplace / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == 300
    assert config["num_hidden_layers"] == 2
    assert config["use_cache"] is True
    for name in ("bos", "eos", "pad"):
        assert config[f"{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")


def test_what_the_command_shows(finished):
    workplace, process = finished
    results = json.loads((workplace / "out" / "eval_results.json").read_text())
    assert "data: corpus.txt: 300 documents read, 0 skipped, " in process.stdout
    assert f"{results['bits_per_byte']:.3f} bits per byte" in process.stdout
    assert f"{results['unigram_bits_per_byte']:.3f}; loss" in process.stdout
    # The bar: step of steps, time left, loss and speed
    assert re.search(r" 30/30 \[\d+:\d+<\d+:\d+, [^\r]*loss=\d\.\d+, tokens/s=[\d,]+\]", process.stderr)


def test_figures_against_a_computation_of_their_own(finished):
    """Every held-out token costs −log₂ p, one document after the other, in the model as it was saved."""
    workplace, _ = finished
    results = json.loads((workplace / "out" / "eval_results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(workplace / "out")
    model = AutoModelForCausalLM.from_pretrained(workplace / "out").double().eval()
    texts = read_corpus(DataArguments(str(workplace / "corpus.txt"), held_out=0.2)).held_out["text"]
    text_bytes = b"".join(text.encode() for text in texts)

    stream = [tokenizer.eos_token_id]
    for text in texts:
        stream += [*tokenizer(text)["input_ids"][1:], tokenizer.eos_token_id]
    bits, predicted = 0.0, 0
    for start in range(0, len(stream) - 1, BLOCK_SIZE - 1):
        block = torch.tensor([stream[start : start + BLOCK_SIZE]])
        with torch.no_grad():
            log_probabilities = model(input_ids=block).logits.log_softmax(-1)
        for position in range(block.shape[1] - 1):
            bits -= log_probabilities[0, position, block[0, position + 1]].item() / math.log(2)
            predicted += 1
    assert math.ceil(predicted / (BLOCK_SIZE - 1)) % 3, (
        "the last batch must be a smaller one, or a mean of means is right"
    )

    assert results["eval_tokens"] == predicted == len(stream) - 1
    assert results["eval_bytes"] == len(text_bytes)
    assert results["eval_loss"] == pytest.approx(bits * math.log(2) / predicted, rel=1e-5)
    assert results["perplexity"] == pytest.approx(2 ** (bits / predicted), rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(bits / len(text_bytes), rel=1e-5)
    entropy = -sum(n / len(text_bytes) * math.log2(n / len(text_bytes)) for n in Counter(text_bytes).values())
    assert results["unigram_bits_per_byte"] == pytest.approx(entropy, rel=1e-9)
    assert results["bits_per_byte"] < 0.8 * entropy, "nothing was learned"


def test_tensorboard(finished):
    workplace, _ = finished
    (folder,) = (workplace / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "flops_so_far"):
        steps = [event.step for event in events.Scalars(f"train/{name}")]
        assert steps == [*range(2 if name == "tokens_per_second" else 1, 31)]
    for place in ("00.attention", "00.mlp", "01.attention", "01.mlp"):
        assert [event.step for event in events.Scalars(f"train/gate/{place}")] == [1, 11, 21]
    config = AutoModelForCausalLM.from_pretrained(workplace / "out").config
    expected = 30 * 4 * BLOCK_SIZE * training_flops_per_token(config, BLOCK_SIZE)
    assert events.Scalars("train/flops_so_far")[-1].value == pytest.approx(expected, rel=1e-6)  # float32


FIGURES = {f"train/{name}" for name in ("loss", "grad_norm", "tokens_per_second", "flops_so_far", "gate/00.mlp")}


def test_wandb(workplace, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert pretrain("--training.report_to", "wandb") == 0
    assert FIGURES <= {*wandb.run.summary.keys()}
    wandb.finish()


def test_trackio(workplace, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(workplace / "trackio"))
    log, logged = trackio.Run.log, set()

    def listen(self, metrics, **options):
        logged.update(metrics)
        log(self, metrics, **options)

    monkeypatch.setattr(trackio.Run, "log", listen)
    assert pretrain("--training.report_to", "trackio", "--training.trackio_static_space_id", "false") == 0
    assert FIGURES <= logged


def test_samples(finished):
    workplace, _ = finished
    samples = {path.name: path.read_text() for path in (workplace / "out" / "samples").iterdir()}
    assert samples.keys() == {"step-00000015.txt", "step-00000030.txt"}
    assert all(0 < len(text) for text in samples.values())


def test_text_counts(finished):
    workplace, process = finished
    counts = json.loads((workplace / "out" / "text_counts.json").read_text())
    assert counts["documents"]["train"] + counts["documents"]["held_out"] == 300
    assert counts["documents"]["skipped"] == {}
    assert f"{counts['num_tokens']:,} to train on" in process.stdout


def test_dry_run(workplace, capsys):
    before = contents(workplace)
    assert pretrain("--dry-run", "--training.gradient_accumulation_steps", "2") == 0
    with_steps = capsys.readouterr().out
    assert contents(workplace) == before and not (workplace / "out").exists()
    config = Run.from_settings(read_settings(["config.yaml"], [])).model
    config.vocab_size = 300
    flops = training_flops_per_token(config, BLOCK_SIZE)
    assert f"parameters: {sum(count_parameters(config).values()):,} (embedding 9,600, " in with_steps
    assert f"FLOPs per token: {flops:,} in matrix products, forward and backward; " in with_steps
    assert "memory: " in with_steps and " GiB for activations" in with_steps
    assert f"steps: 4 of 8 sequences of {BLOCK_SIZE} tokens" in with_steps
    assert f"tokens: {4 * 8 * BLOCK_SIZE:,}, for {4 * 8 * BLOCK_SIZE * flops:.3g} FLOPs" in with_steps
    assert f"output: {workplace / 'out'}" in with_steps and "hub: " not in with_steps

    assert pretrain("--dry-run", "--training.push_to_hub", "true") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "hub: out"
    assert pretrain("--dry-run", "--training.max_steps", "-1", "--training.num_train_epochs", "2") == 0
    steps = int(re.search(r"steps: (\d+) of 4", capsys.readouterr().out)[1])
    overrides = ("--training.max_steps", "-1", "--training.num_train_epochs", "2", "--training.save_strategy", "epoch")
    assert pretrain(*overrides) == 0
    assert (workplace / "out" / f"checkpoint-{steps}").is_dir()
    assert len([*(workplace / "out").glob("checkpoint-*")]) == 2


def test_model_card(finished):
    workplace, _ = finished
    card = ModelCard.load(workplace / "out" / "README.md")
    results = json.loads((workplace / "out" / "eval_results.json").read_text())
    assert card.data.library_name == "transformers"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        name: results[name] for name in ("bits_per_byte", "perplexity")
    }
    assert "300 documents read" in card.text
    assert f"| bits per byte | {results['bits_per_byte']:.4f} |" in card.text
    assert yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])["training"]["max_steps"] == 30


def test_sampling_in_a_new_process(finished):
    workplace, _ = finished
    process = run_script("generate.py", "out", "7 green", "12", "--max-new-tokens", "5", cwd=workplace)
    assert process.returncode == 0, process.stderr
    assert re.search(r"=== '7 green'\n7 green.+\n\n=== '12'\n12.+", process.stdout, re.DOTALL)


def test_sampling_from_an_empty_prompt(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0] / "out", tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None  # which puts a token in front
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["generate", str(folder), ""]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: prompts: '' has no tokens")


def test_sampling_from_nothing(tmp_path):
    process = run_script("generate.py", "missing/model", cwd=tmp_path)
    assert process.returncode == 2
    assert "cannot load 'missing/model'" in process.stderr
    assert "Traceback" not in process.stderr


def test_metric_that_is_not_measured(workplace, capsys):
    best = ("--training.load_best_model_at_end", "true", "--training.metric_for_best_model", "banana")
    intervals = ("--training.eval_strategy", "steps", "--training.eval_steps", "4", "--training.save_steps", "4")
    assert pretrain(*best, *intervals, "--training.save_strategy", "steps") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: training.metric_for_best_model: ") and "eval_loss" in error


def test_weights_that_are_damaged(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0] / "out", tmp_path / "damaged")
    os.truncate(folder / "model.safetensors", 1000)
    assert main(["generate", str(folder)]) == 2
    settings = ["--data.source", "stdlib", "--training.output_dir", str(tmp_path / "out"), "--model.name", str(folder)]
    (tmp_path / "config.yaml").write_text("{training: {max_steps: 1}}")
    assert main(["pretrain", str(tmp_path / "config.yaml"), *settings]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all(error.startswith(f"error: model: cannot load '{folder}'") for error in errors)


def test_traceback(capsys):
    with pytest.raises(InputError):
        main(["generate", "missing/model", "--traceback", "--seed", "-1"])


@pytest.mark.parametrize(
    "option, value",
    [("--max-new-tokens", "0"), ("--temperature", "0.0"), ("--temperature", "nan"), ("--seed", "4294967296")],
)
def test_sampling_refuses_options(option, value, capsys):
    assert main(["generate", "missing/model", option, value]) == 2
    assert re.fullmatch(rf"error: {option} must be .*, got {value}\n", capsys.readouterr().err)


# ---- The same run again ----


def test_same_run_again_changes_nothing(finished, monkeypatch, capsys):
    workplace, _ = finished
    monkeypatch.chdir(workplace)
    before = contents(workplace)
    same_folder = str(workplace / "out")
    overrides = ("--model.num_hidden_layers", "2", "--training.output_dir", same_folder)
    assert pretrain(*FINISHED_OVERRIDES, *overrides) == 0
    output = capsys.readouterr().out
    assert f"{same_folder} holds this very run, finished" in output
    assert "bits per byte" in output
    assert contents(workplace) == before


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_no_masks_and_no_logits(workplace, monkeypatch, packing):
    """A mask, be it of ones, bars the fast kernels of attention and the recognition of packed documents."""
    seen, forward = set(), DDLForCausalLM.forward

    @functools.wraps(forward)
    def observed(self, **kwargs):
        seen.update(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        outputs = forward(self, **kwargs)
        if self.training:
            assert outputs.logits is None, "Accelerate would turn them into float32"
        return outputs

    monkeypatch.setattr(DDLForCausalLM, "forward", observed)
    pretrain("--training.max_steps", "2", "--data.packing", packing)
    columns = {"input_ids", "labels", "position_ids"} if packing == "documents" else {"input_ids", "labels"}
    assert seen - {"num_items_in_batch"} == columns


def test_runs_are_reproducible(workplace):
    for folder in ("a", "b"):
        assert pretrain("--training.output_dir", folder) == 0
    a, b = contents(workplace / "a"), contents(workplace / "b")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert a[Path(name)] == b[Path(name)]
    assert pretrain("--training.output_dir", "c", "--training.seed", "1") == 0
    assert contents(workplace / "c")[Path("model.safetensors")] != a[Path("model.safetensors")]


# ---- Input that cannot be used ----


@pytest.mark.parametrize(
    "overrides, message",
    [
        # Settings
        (["--models.hidden_size", "8"], "models: unknown section; allowed: data, tokenizer, model, training, card"),
        (["--data.sauce", "x"], "data.sauce: unknown field; allowed, among others: source"),
        (
            ["--training.learning_rat", "1"],
            "training.learning_rat: unknown field; allowed, among others: learning_rate",
        ),
        (["--model.hiden_size", "8"], "model: unknown field hiden_size=8: did you mean hidden_size?"),
        (["--model.hidden_size", "wide"], "'hidden_size' expected int, got str (value: 'wide')"),
        (["--model.gate_init", "3"], "model: gate_init must lie strictly between 0 and 2, got 3"),
        (
            ["--model.vocab_size", "9"],
            "model.vocab_size: cannot be set, the tokenizer decides it",
        ),
        (["--tokenizer.vocab_size", "100"], "tokenizer: vocab_size must be at least 258, got 100"),
        (["--tokenizer.vocab_size", "1e3"], "tokenizer.vocab_size: 1000.0 has the wrong type; allowed: int"),
        (["--data.source", "null"], "data.source: None has the wrong type; allowed: str"),
        (["--data.held_out", "1"], "data: held_out must lie strictly between 0 and 1, got 1"),
        (["--training.learning_rate", "fast"], "training.learning_rate: 'fast' has the wrong type; allowed: float"),
        (["--training.max_steps", "2.5"], "training.max_steps: 2.5 has the wrong type; allowed: int"),
        (["--training.use_cpu", "1"], "training.use_cpu: 1 has the wrong type; allowed: bool"),
        (["--training.do_train", "false"], "training.do_train: cannot be set, the command decides it"),
        (["--training.optim", "magic"], "training: magic is not a valid OptimizerNames"),
        (["--training.report_to", "abacus"], "training.report_to: abacus is not supported"),
        (["--training.save_only_model", "true"], "training.save_only_model: cannot be set, resuming, which needs the"),
        (
            [*"--training.lr_scheduler_type cosine_with_min_lr --training.lr_scheduler_kwargs.min_lr 1e-4".split()]
            + ["--training.learning_rate", "0"],
            "training.lr_scheduler_type: float division by zero",
        ),
        (["--training.optim", "adamw_anyprecision"], "training.optim: Please install"),
        (
            ["--training.lr_scheduler_type", "cosine_with_min_lr"],
            "training.lr_scheduler_type: One of min_lr or min_lr",
        ),
        (["--training.max_steps", "0"], "training.max_steps: 0; allowed: at least 1, or -1 for num_train_epochs"),
        (
            ["--training.max_steps=-1", "--training.num_train_epochs", "0"],
            "training.num_train_epochs: 0; allowed: mor",
        ),
        (["--training.per_device_train_batch_size", "0"], "per_device_train_batch_size: 0; allowed: at least 1"),
        (["--training.gradient_accumulation_steps", "0"], "gradient_accumulation_steps: 0; allowed: at least 1"),
        (["--training.dataloader_num_workers", "-1"], "training.dataloader_num_workers: -1; allowed: at least 0"),
        (["--training.learning_rate", ".nan"], "training.learning_rate: nan; allowed: at least 0"),
        (["--training.adam_beta2", "9.5"], "training.adam_beta2: 9.5; allowed: 0 to 0.99999"),
        (["--training.seed", "-1"], "training.seed: -1; allowed: 0 to 4294967295"),
        (["--training.output_dir", ""], "training.output_dir: missing; every run must say it"),
        (["--model.attn_implementation", "magic"], 'model: Specified `attn_implementation="magic"` is not supported'),
        (["--dry-run", "--model.attn_implementation", "magic"], 'model: Specified `attn_implementation="magic"` is'),
        (["--model.max_position_embeddings", "1"], "model.max_position_embeddings: 1 leaves no token to predict"),
        (
            ["--data.packing", "documents", "--model.attn_implementation", "flash_attention_2"],
            "model.attn_implementation: 'flash_attention_2' would not keep documents apart, as data.packing says;",
        ),
        # Command line
        (["--dry-run", "hidden_size", "8"], "unknown argument 'hidden_size'; allowed: --section.field value"),
        (["--hidden_size", "8"], "unknown argument '--hidden_size'; allowed: --section.field value"),
        (["--model.hidden_size"], "--model.hidden_size has no value"),
        (["--model.hidden_size", "--model.num_hidden_layers", "1"], "--model.hidden_size has no value"),
        (["--model.hidden_size.x", "1"], "--model.hidden_size.x: hidden_size is 32 and has no fields"),
        (["--model.hidden_size", "[1"], "--model.hidden_size: '[1' is not YAML"),
        # Data
        (
            ["--data.packing", "loose"],
            "data.packing: 'loose' has the wrong type; allowed: typing.Literal['concatenate',",
        ),
        (
            ["--data.source", "[{weight: 1}]"],
            "data: source: {'weight': 1} must have the field source and no others but",
        ),
        (["--data.source", "[{source: corpus.txt, weight: -1}]"], "data: weight must be a positive number, got -1"),
        (
            ["--data.source", "[{source: corpus.txt}]", "--data.subset", "small"],
            "data: text_column and subset are fields of each source of a mixture",
        ),
        (["--data.source", "*.missing"], "data.source: no file or folder '*.missing'"),
        (["--data.source", "[{source: corpus.txt}, {source: missing.txt}]"], "no file or folder 'missing.txt'"),
        (
            ["--data.streaming", "true", "--training.max_steps", "-1"],
            "training.max_steps: missing; with data.streaming",
        ),
        (
            ["--tokenizer.name", "gpt2"],
            "tokenizer: one of vocab_size (to train a tokenizer) and name (to load one) must",
        ),
        (["--tokenizer.vocab_size", "null", "--tokenizer.name", "no/where"], "tokenizer: cannot load 'no/where'"),
        (["--data.source", "missing.txt"], "data.source: no file or folder 'missing.txt'; allowed: 'stdlib', a file,"),
        (["--data.source", "owner/dataset"], "data.source: cannot read 'owner/dataset'"),
        (
            ["--data.subset", "small"],
            "data.subset: 'corpus.txt' has no subset 'small'; allowed: null, or a Hub dataset",
        ),
        (["--data.source", "empty.jsonl"], "data.source: 'empty.jsonl' holds too little text"),
        (["--data.source", "rows.jsonl"], "data.text_column: 'rows.jsonl' has no column 'text'; allowed: body, id"),
        # Output
        (
            ["--training.output_dir", "taken"],
            "training.output_dir: 'taken' holds files of something else; allowed: a new",
        ),
        (["--training.output_dir", "config.yaml"], "training.output_dir: 'config.yaml' is a file; allowed: a new"),
        (["--training.output_dir", "config.yaml/out"], "training: [Errno 20] Not a directory: 'config.yaml/out'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_input(workplace, capsys, overrides, message):
    (workplace / "empty.jsonl").touch()
    (workplace / "rows.jsonl").write_text('{"body": "a", "id": 1}\n')
    before = contents(workplace)
    assert pretrain(*overrides) == 2
    *bars, error = capsys.readouterr().err.splitlines()  # reading data has a progress bar
    assert error.startswith("error: ") and not any("rror" in line for line in bars)
    assert message in error
    assert contents(workplace) == before
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read 'other.yaml': [Errno 2] No such file or directory"),
        ("data: {source: [", "cannot read 'other.yaml': while parsing"),
        (
            "just text",
            "'other.yaml' has fields outside sections; allowed: sections, each with its fields",
        ),
        ("max_steps: 3", "'other.yaml' has fields outside sections"),
        ("{data: {source: corpus.txt}, training: {output_dir: out}}", "tokenizer: one of vocab_size (to train a"),
        ("{data: {source: corpus.txt}, tokenizer: {vocab_size: 300}}", "training.output_dir: missing"),
        ("{tokenizer: {vocab_size: 300}, training: {output_dir: out}}", "data.source: missing"),
    ],
)
def test_unusable_settings_file(workplace, capsys, content, message):
    if content is not None:
        (workplace / "other.yaml").write_text(content)
    assert main(["pretrain", "other.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (workplace / "out").exists()


def test_other_run_in_the_folder_of_a_finished_one(finished):
    workplace, _ = finished
    before = contents(workplace)
    process = run_script("pretrain.py", "config.yaml", "--training.max_steps", "31", cwd=workplace)
    assert process.returncode == 2
    # Libraries that are imported may say something before
    assert process.stderr.splitlines()[-1] == (
        "error: training.output_dir: 'out' holds a run with another model.num_hidden_layers, training.max_steps, "
        "training.save_steps, training.save_strategy; allowed: a new or empty folder, or one that holds this very run"
    )
    assert contents(workplace) == before


# ---- Settings ----


def test_overrides_reach_every_section_and_depth(workplace):
    settings = read_settings(
        ["config.yaml"],
        ["--data.text_column=body", "--tokenizer.vocab_size", "400", "--training.learning_rate=1e-3"]
        + ["--training.save_strategy", "no", "--training.warmup_steps", "7", "--training.eval_steps", "5"]
        + ["--model.rope_parameters", "{rope_type: default}", "--model.rope_parameters.rope_theta", "5000.0"]
        + ["--model.num_value_channels", "2", "--model.qk_norm", "null"],
    )
    run = Run.from_settings(settings)
    assert run.data == DataArguments("corpus.txt", text_column="body", held_out=0.2)
    assert run.tokenizer.vocab_size == 400
    assert run.model.rope_parameters["rope_theta"] == 5000.0
    assert (run.model.num_value_channels, run.model.qk_norm, run.model.hidden_size) == (2, None, 32)
    assert (run.training.learning_rate, run.training.warmup_steps, run.training.eval_steps) == (1e-3, 7, 5)
    assert run.training.save_strategy == "no"
    assert settings["training"]["per_device_train_batch_size"] == 4


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 0.001),
        ("-1.5E+2", -150.0),
        ("3", 3),
        ("0.1", 0.1),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("e5", "e5"),
    ],
)
def test_yaml_values(workplace, text, value):
    read = read_settings(["config.yaml"], ["--data.x", text])["data"]["x"]
    assert (read, type(read)) == (value, type(value))
