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
"""Pretraining on two processes, killed and continued; but for DDP, they hold pieces of parameters, gradients and optimizer states."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from test_resume import SETTINGS, curve, pretrain, write_inputs
from transformers import AutoModelForCausalLM

from transformers_ddl.checkpoints import MANIFEST_FILE, find_damage


REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs" / "accelerate"
pytestmark = pytest.mark.slow
# The configuration of accelerate: what only a sharded model has in its checkpoints
CONFIGURATIONS = {"fsdp2": "pytorch_model_fsdp.bin", "zero3": "zero_to_fp32.py"}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The output folder of one process."""
    folder = tmp_path_factory.mktemp("single")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert pretrain() == 0
    return folder / "out"


def launch(config: str, num_processes: int, folder: Path, *overrides: str) -> subprocess.Popen:
    """Starts `pretrain` by `accelerate launch`, with as many sequences in a step whatever the number of processes."""
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    settings.update(mixed_precision="no", num_processes=num_processes, main_process_port=0)
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    accumulation = SETTINGS["training"]["gradient_accumulation_steps"] // num_processes
    sharded_worker = [Path(__file__).with_name("sharded_worker.py"), "pretrain"]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
        + (sharded_worker if config in CONFIGURATIONS else [REPOSITORY / "scripts" / "pretrain.py"])
        + ["config.yaml", "--training.gradient_accumulation_steps", str(accumulation), *overrides],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments):
    process = launch(*arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def kill(process: subprocess.Popen):
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()


def wait_for(path: Path, process: subprocess.Popen):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(1e-3)


def kill_when(exists: Path, process: subprocess.Popen):
    try:
        wait_for(exists, process)
    finally:
        kill(process)


@pytest.fixture(params=CONFIGURATIONS)
def config(request):
    if request.param == "zero3":
        pytest.importorskip("deepspeed")
    return request.param


def test_killed_and_continued(config, single, tmp_path, monkeypatch, capsys):
    """The losses are those of one process that nothing happened to, but for the order of sums."""
    write_inputs(tmp_path)
    out = tmp_path / "out"
    kill_when(out / "checkpoint-12" / "model.safetensors", launch(config, 2, tmp_path))
    assert find_damage(out / "checkpoint-12") is not None
    assert (out / "checkpoint-8" / CONFIGURATIONS[config]).exists(), "the model was not sharded"

    # Another way to shard would not find the optimizer's state
    monkeypatch.chdir(tmp_path)
    assert pretrain() == 2
    assert "accelerate: this is no sharding; allowed: " in capsys.readouterr().err.splitlines()[-1]

    code, output = run(config, 2, tmp_path)
    assert code == 0, output
    assert "continuing from out/checkpoint-8" in output
    for (step, loss, *_), (expected_step, expected, *_) in zip(curve(out), curve(single), strict=True):
        assert (step, loss) == (expected_step, pytest.approx(expected, rel=1e-4))
    assert (out / "checkpoint-24" / MANIFEST_FILE).exists()

    # What the main process alone could not make
    state, expected = (
        json.loads((each / "checkpoint-24" / "trainer_state.json").read_text()) for each in (out, single)
    )
    gates = {name: value for name, value in state["log_history"][0].items() if name.startswith("gate/")}
    assert gates == {name: pytest.approx(expected["log_history"][0][name], rel=1e-5) for name in gates} != {}
    assert len([*(out / "samples").iterdir()]) == 6
    results, expected = (json.loads((each / "eval_results.json").read_text()) for each in (out, single))
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    model, expected = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (out, single))
    assert model.keys() == expected.keys()


def test_continued_on_another_number_of_processes(config, single, tmp_path):
    """FSDP's checkpoints hold the whole model; of DeepSpeed's, each process reads the part that it wrote."""
    write_inputs(tmp_path)
    out = tmp_path / "out"
    kill_when(out / "checkpoint-12" / MANIFEST_FILE, launch(config, 2, tmp_path))
    code, output = run(config, 1, tmp_path)
    if config == "zero3":
        assert code != 0
        assert "this is DeepSpeed on 1 processes; allowed: DeepSpeed on 2 processes" in output
    else:
        assert code == 0, output
        for (step, loss, *_), (expected_step, expected, *_) in zip(curve(out), curve(single), strict=True):
            assert (step, loss) == (expected_step, pytest.approx(expected, rel=1e-4))


def test_bfloat16_losses_are_not_rounded(tmp_path):
    """At the end of a run, steps between losses of bfloat16 would be 2 ** -7 or more, halved by the mean of two processes."""
    write_inputs(tmp_path)
    # Layers that are computed again must be given what they were given before
    overrides = ["--training.bf16", "true", "--training.gradient_checkpointing", "true"]
    code, output = run("fsdp2", 2, tmp_path, *overrides, "--training.logging_steps", "1")
    assert code == 0, output
    losses = [loss for _, loss, *_ in curve(tmp_path / "out")]
    assert 1 < min(losses) and any(not (2**8 * loss).is_integer() for loss in losses), losses


def test_one_process_killed(single, tmp_path):
    """The other stops by itself and says why, and one process goes on from their last checkpoint."""
    write_inputs(tmp_path)
    out = tmp_path / "out"
    launcher = launch("ddp", 2, tmp_path)
    try:
        wait_for(out / "checkpoint-8" / MANIFEST_FILE, launcher)
        ranks = {each.environ().get("LOCAL_RANK"): each for each in psutil.Process(launcher.pid).children()}
        launcher.send_signal(signal.SIGSTOP)  # or it might stop the other process first
        ranks["1"].kill()
        deadline = time.monotonic() + 60
        while ranks["0"].status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the other process goes on"
            time.sleep(0.1)
        launcher.send_signal(signal.SIGCONT)
        output, _ = launcher.communicate(timeout=60)
    except BaseException:
        kill(launcher)
        raise
    assert launcher.returncode != 0
    assert re.search(r"error: another process of this run does not answer: .*; out/checkpoint-\d+ is complete", output)
    assert "local_rank: 1" in output and "Signal 9 (SIGKILL)" in output

    code, output = run("ddp", 1, tmp_path)
    assert code == 0, output
    assert "continuing from out/checkpoint-" in output
    for (step, loss, *_), (expected_step, expected, *_) in zip(curve(out), curve(single), strict=True):
        assert (step, loss) == (expected_step, pytest.approx(expected, rel=1e-4))
