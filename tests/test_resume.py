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
"""A run that is killed, whose checkpoints are damaged, or that fails: what is left, and that it ends where it would have."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from transformers_ddl import DDLConfig, DDLForCausalLM, checkpoints, training
from transformers_ddl.checkpoints import MANIFEST_FILE, find_damage, last_complete_checkpoint, seal
from transformers_ddl.cli import RunError, main
from transformers_ddl.data import reading
from transformers_ddl.settings import Run
from transformers_ddl.trainer import DDLTrainer


REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS = {
    "data": {"source": "corpus.txt", "held_out": 0.1},
    "tokenizer": {"vocab_size": 300},
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "training": {
        "output_dir": "out",
        "max_steps": 24,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 3,  # not a divisor of save_steps
        "save_steps": 4,
        "save_total_limit": 2,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    },
}


def write_inputs(folder: Path):
    (folder / "corpus.txt").write_text("\n".join(f"{i} green bottles, hanging on the wall." for i in range(64)))
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))


def pretrain(*overrides):
    return main(["pretrain", "config.yaml", *overrides])


def curve(folder: Path):
    """Step, loss, gradient norm and learning rate of every log."""
    state = json.loads((folder / "checkpoint-24" / "trainer_state.json").read_text())
    return [
        tuple(entry[name] for name in ("step", "loss", "grad_norm", "learning_rate"))
        for entry in state["log_history"]
        if "loss" in entry
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The output folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert pretrain() == 0
    assert [step for step, *_ in curve(folder / "out")] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21, 24]
    return folder / "out"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same_run(folder: Path, uninterrupted: Path):
    assert curve(folder) == curve(uninterrupted)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    losses = [json.loads((each / "eval_results.json").read_text())["eval_loss"] for each in (folder, uninterrupted)]
    assert losses[0] == losses[1]


# ---- kill -9 ----


def run_until(exists: Path, cwd: Path, *overrides: str):
    """Starts the command in a process, and kills it as soon as a file is there."""
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "scripts" / "pretrain.py", "config.yaml", *overrides],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while not exists.exists():
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(1e-4)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_killed_again_and_again(workplace, uninterrupted, capsys):
    """While a checkpoint is written, between two, and after training: the loss curve stays the same to the last bit."""
    out = workplace / "out"
    run_until(out / "checkpoint-8" / "model.safetensors", workplace)
    assert last_complete_checkpoint(out) == out / "checkpoint-4"
    assert find_damage(out / "checkpoint-8") == "saving it was interrupted"
    run_until(out / "checkpoint-16" / MANIFEST_FILE, workplace)
    assert last_complete_checkpoint(out) == out / "checkpoint-16"
    run_until(out / "model.safetensors", workplace)
    assert last_complete_checkpoint(out) == out / "checkpoint-24"
    assert not (out / "eval_results.json").exists()
    assert pretrain() == 0
    assert "continuing from out/checkpoint-24" in capsys.readouterr().out
    assert_same_run(out, uninterrupted)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-24"}


STREAMING = ("--data.streaming", "true", "--data.window", "25", "--data.packing", "documents")


def test_killed_while_streaming(workplace):
    """Continued by another number of processes that read data."""
    assert pretrain(*STREAMING, "--training.output_dir", "uninterrupted") == 0
    out = workplace / "out"
    run_until(out / "checkpoint-16" / "optimizer.pt", workplace, *STREAMING, "--training.dataloader_num_workers", "2")
    assert last_complete_checkpoint(out) == out / "checkpoint-12"
    assert pretrain(*STREAMING) == 0
    assert_same_run(out, workplace / "uninterrupted")

    counts, expected = (
        json.loads((each / "text_counts.json").read_text()) for each in (out, workplace / "uninterrupted")
    )
    assert counts == expected
    windows = [json.loads(line) for line in (out / "stream.jsonl").read_text().splitlines()]
    num_windows = sum(window["blocks"] < 24 * 4 for window in windows)
    assert num_windows > 5
    assert counts["documents"]["train"] + counts["documents"]["held_out"] == 25 * num_windows


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_continued_by_one(workplace, streaming):
    """The same sequences in every step, the last of an epoch included: the losses differ by the order of sums alone."""
    source = ("--data.streaming", streaming, "--data.window", "25")
    assert pretrain(*source, "--training.output_dir", "one") == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        REPOSITORY / "scripts" / "pretrain.py",
    ]
    accumulation = ("--training.gradient_accumulation_steps", "1")
    process = subprocess.run([*launch, "config.yaml", *source, *accumulation], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    two = curve(workplace / "out")
    shutil.rmtree(workplace / "out" / "checkpoint-24")
    (workplace / "out" / "eval_results.json").unlink()
    assert pretrain(*source) == 0
    for losses in (two, curve(workplace / "out")):
        for (step, loss, *_), (expected_step, expected, *_) in zip(losses, curve(workplace / "one"), strict=True):
            assert (step, loss) == (expected_step, pytest.approx(expected, rel=1e-4))


# ---- Damaged checkpoints ----


def with_callback(callback):
    """A constructor of trainers that have one more callback."""

    def construct(**kwargs):
        trainer = DDLTrainer(**kwargs)
        trainer.add_callback(callback)
        return trainer

    return construct


class Interruption(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 14:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(workplace, monkeypatch):
    """A workplace whose run was stopped at step 14, with the checkpoints of steps 8 and 12."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "DDLTrainer", with_callback(Interruption))
        pretrain()
    return workplace


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("optimizer.pt", truncate, "optimizer.pt has "),
        ("model.safetensors", flip_a_bit, "the content of model.safetensors has changed"),
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        (MANIFEST_FILE, Path.unlink, "saving it was interrupted"),
        (MANIFEST_FILE, truncate, f"{MANIFEST_FILE} cannot be read"),
    ],
)
def test_damaged_checkpoint(interrupted, uninterrupted, capsys, caplog, name, damage, message):
    damage(interrupted / "out" / "checkpoint-12" / name)
    logging.enable_propagation()
    assert pretrain() == 0
    logging.disable_propagation()
    (warning,) = [text for text in caplog.messages if "cannot be used" in text]
    assert warning.startswith(f"out/checkpoint-12 cannot be used: {message}")
    assert "continuing from out/checkpoint-8\n" in capsys.readouterr().out
    assert_same_run(interrupted / "out", uninterrupted)


def test_damaged_checkpoint_of_a_later_step(interrupted, monkeypatch):
    """It takes the place of none of the two that a run keeps."""
    out = interrupted / "out"
    (out / "checkpoint-12").rename(out / "checkpoint-20")
    truncate(out / "checkpoint-20" / "model.safetensors")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "DDLTrainer", with_callback(Interruption))
        pretrain()
    assert find_damage(out / "checkpoint-8") is None and find_damage(out / "checkpoint-12") is None
    assert pretrain() == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-24"}


@pytest.mark.parametrize(
    "limit, best, kept",
    [
        (None, None, [4, 8, 12, 20, 24]),
        (-1, None, [4, 8, 12, 20, 24]),
        (1, None, [12, 20, 24]),
        (1, 4, [4, 12, 20, 24]),
    ],
)
def test_checkpoints_that_are_kept(workplace, monkeypatch, limit, best, kept):
    """Those of steps 20 and 24, later than 12, are damaged."""
    settings = yaml.safe_load(Path("config.yaml").read_text())
    run = Run.from_settings(settings)
    trainer = DDLTrainer(DDLForCausalLM(DDLConfig(**settings["model"], vocab_size=8)), run.training)
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *args: Path("out/checkpoint-12").mkdir())
    for step in (4, 8, 20, 24):
        Path(f"out/checkpoint-{step}").mkdir(parents=True)
    trainer.args.save_total_limit, trainer.state.global_step = limit, 12
    trainer.state.best_model_checkpoint = best and f"out/checkpoint-{best}"
    trainer._save_checkpoint(trainer.model, trial=None)
    assert sorted(int(path.name.partition("-")[2]) for path in Path("out").glob("checkpoint-*")) == kept
    assert find_damage(Path("out/checkpoint-12")) is None


def test_best_model_of_a_run_that_was_killed_at_its_end(workplace):
    best = ("--training.load_best_model_at_end", "true", "--training.metric_for_best_model", "loss")
    best += ("--training.greater_is_better", "true", "--training.eval_strategy", "steps", "--training.eval_steps", "4")
    assert pretrain(*best) == 0
    model, last = Path("out/model.safetensors"), Path("out/checkpoint-24/model.safetensors")
    saved = model.read_bytes()
    assert saved != last.read_bytes()
    for output_dir in ("out", "moved", "moved"):
        if not Path(output_dir).exists():
            Path("out").rename(output_dir)
        model = Path(output_dir, "model.safetensors")
        model.unlink()
        Path(output_dir, "eval_results.json").unlink()
        assert pretrain(*best, "--training.output_dir", output_dir) == 0
        assert model.read_bytes() == saved

    # Without it, the last one's
    best_checkpoint = json.loads(Path("moved/checkpoint-24/trainer_state.json").read_text())["best_model_checkpoint"]
    truncate(Path("moved", Path(best_checkpoint).name, "model.safetensors"))
    model.unlink()
    Path("moved/eval_results.json").unlink()
    assert pretrain(*best, "--training.output_dir", "moved") == 0
    assert model.read_bytes() == Path("moved/checkpoint-24/model.safetensors").read_bytes()


def test_nothing_but_damaged_checkpoints(interrupted, uninterrupted):
    for step in (8, 12):
        truncate(interrupted / "out" / f"checkpoint-{step}" / "model.safetensors")
    assert pretrain() == 0
    assert_same_run(interrupted / "out", uninterrupted)


def test_killed_before_the_first_file_was_whole(workplace, uninterrupted):
    (workplace / "out").mkdir()
    (workplace / "out" / ".run.yaml.tmp").write_text("data: {sou")
    assert pretrain() == 0
    assert_same_run(workplace / "out", uninterrupted)


def test_manifest_covers_folders(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.distcp").write_text("weights")
    seal(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / "shards" / "0.distcp").write_text("weighty")
    assert find_damage(tmp_path) == "the content of shards/0.distcp has changed"


def test_disk_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "optimizer.pt").write_text("state")
    seal(tmp_path)

    def fail(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "sha_fileobj", fail)
    assert find_damage(tmp_path) == "optimizer.pt cannot be read: [Errno 5] Input/output error"
    (tmp_path / MANIFEST_FILE).unlink()
    (tmp_path / MANIFEST_FILE).mkdir()
    assert find_damage(tmp_path) == f"{MANIFEST_FILE} cannot be read"


def test_another_split_of_the_batch(interrupted, uninterrupted):
    """4 sequences a step, as before. Sums in another order round differently."""
    accumulation = "--training.gradient_accumulation_steps"
    assert pretrain("--training.per_device_train_batch_size", "1", accumulation, "4") == 0
    for (step, loss, *_), (expected_step, expected, *_) in zip(curve(interrupted / "out"), curve(uninterrupted)):
        assert (step, loss) == (expected_step, pytest.approx(expected, rel=1e-4))


def test_another_batch(interrupted, capsys):
    assert pretrain("--training.gradient_accumulation_steps", "3") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "it is 6; allowed: 4, with which the run in 'out' was begun" in error


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_other_data(workplace, monkeypatch, capsys, streaming):
    """They would be read in another order, and with a tokenizer that the model does not know."""
    source = ("--data.streaming", streaming, "--data.window", "25")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "DDLTrainer", with_callback(Interruption))
        pretrain(*source)
    corpus = workplace / "corpus.txt"
    text = corpus.read_text()
    corpus.write_text("\n".join(f"{i} red bottles, standing on the floor." for i in range(64)) + "\n" + text)
    assert pretrain(*source) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.source: holds other data than when the run in 'out' was begun; allowed: ")
    corpus.write_text(text)
    assert pretrain(*source) == 0


# ---- Failures ----


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_full_disk(interrupted, uninterrupted, capsys, name):
    full = interrupted / "out" / "checkpoint-16" / name
    full.parent.mkdir()
    full.symlink_to("/dev/full")
    assert pretrain() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "full" in error
    assert error.endswith("out/checkpoint-12 is complete")

    full.unlink()
    assert pretrain() == 0
    assert_same_run(interrupted / "out", uninterrupted)


class FullDisk(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_that_is_full_for_the_cache(tmp_path):
    with pytest.raises(RunError, match="the disk is full: data.source: .*; there is no complete checkpoint yet"):
        with training.explaining_failures(tmp_path), reading("corpus.txt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_that_is_full_for_the_process_that_reads_data():
    """In one line, without the traceback that torch puts into the message."""
    with pytest.raises(OSError) as raised:
        next(iter(torch.utils.data.DataLoader(FullDisk(), num_workers=1)))
    assert training.explain(raised.value) == "the disk is full: [Errno 28] No space left on device"


class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 14:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))


def test_loss_that_is_not_finite(workplace, monkeypatch, capsys):
    monkeypatch.setattr(training, "DDLTrainer", with_callback(Poison))
    assert pretrain() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: loss is nan at step 15; out/checkpoint-12 is complete"
    assert find_damage(workplace / "out" / "checkpoint-12") is None


def test_loss_that_is_not_finite_after_the_last_log(workplace, monkeypatch, capsys):
    monkeypatch.setattr(training, "DDLTrainer", with_callback(Poison))
    never = ("--training.save_strategy", "no", "--training.logging_steps", "10", "--training.max_steps", "16")
    assert pretrain(*never) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: loss is nan at step 16; there is no complete checkpoint yet"
    assert not (workplace / "out" / "eval_results.json").exists()


def test_held_out_loss_without_a_perplexity(workplace, capsys):
    diverging = ("--training.learning_rate", "1e3", "--training.max_grad_norm", "0", "--training.max_steps", "4")
    assert pretrain(*diverging) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: the loss on held-out data is [\d.]+: training has diverged; out/checkpoint-4 is complete", error
    )


class CrashingData(torch.utils.data.Dataset):
    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.blocks[index]


def test_worker_crash(workplace, monkeypatch, capsys, uninterrupted):
    def crashing(train_dataset, **kwargs):
        return DDLTrainer(train_dataset=CrashingData(train_dataset), **kwargs)

    workers = ("--training.dataloader_num_workers", "1", "--training.dataloader_prefetch_factor", "1")
    with monkeypatch.context() as patch:
        patch.setattr(training, "DDLTrainer", crashing)
        assert pretrain(*workers) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a process that reads data died: DataLoader worker")
    assert pretrain(*workers) == 0
    assert_same_run(workplace / "out", uninterrupted)
