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
Comparisons of residual connections: every method is tuned with the same number of trials, then trained with several seeds.

    grid (YAML) → runs → results.jsonl → report

A method's trials are runs on a fraction of the tokens, one for each combination of the values of its axes. The values of the
trial with the lowest validation loss are those of its final runs. All runs of a seed read the same tokens in the same order. A
run is known by a hash of its settings, and what `results.jsonl` holds is not run again: a comparison that was interrupted
continues where it was.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerFast, get_cosine_with_min_lr_schedule_with_warmup

from .checkpoints import write_atomically
from .cli import InputError, RunError
from .comparison_grid import Grid, Run, TrainingSettings, describe, digest
from .flops import count_parameters, part_of, training_flops_per_token
from .inputs import blaming
from .modeling_ddl import DDLForCausalLM
from .tokenization import BOUNDARY_TOKEN, train_tokenizer
from .trainer import decay_parameter_names


RESULTS_FILE = "results.jsonl"
# What a report needs of a result
RESULT_FIELDS = {
    "id",
    "method",
    "stage",
    "seed",
    "tuned",
    "config",
    "training",
    "curve",
    "validation_loss",
    "diverged",
    "parameters",
    "flops_per_token",
    "tokens_per_second",
    "peak_memory_gib",
    "hardware",
    "versions",
    "git_commit",
}
PADDING = -1


def main(arguments: list[str]):
    """`transformers-ddl compare run GRID` and `transformers-ddl compare report RESULTS FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="transformers-ddl compare", description="Compare residual connections, each of them tuned alike."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing of a grid")
    run.add_argument("grid", help="YAML file, see configs/compare")
    run.add_argument("--data", default=".", help="folder to which the grid's data files are relative")
    run.add_argument("--output", help="folder of results and tokens, instead of the grid's")
    run.add_argument("--methods", nargs="+", metavar="METHOD", help="these methods only")
    run.add_argument("--tune-only", action="store_true", help="trials only, no final runs")
    run.add_argument(
        "--workers", type=int, default=1, help="processes that compile at the same time and train in turn"
    )
    run.add_argument("--seconds", type=float, default=math.inf, help="begin no run that would not be finished by then")
    report = commands.add_parser("report", help="make tables and plots of results")
    report.add_argument("results", help=f"a {RESULTS_FILE}")
    report.add_argument("folder", help="where to write the report")
    report.add_argument("--baseline", default="additive", help="method with which the others are compared")
    options = parser.parse_args(arguments)
    if options.command == "run":
        if options.workers < 1:
            raise InputError(f"--workers must be at least 1, got {options.workers}")
        deadline = time.time() + options.seconds
        grid = Grid.from_yaml(options.grid, options.output, options.methods)
        run_grid(grid, Path(options.data), options.workers, options.tune_only, deadline)
    else:
        from .comparison_report import write_report

        write_report(Path(options.results), Path(options.folder), options.baseline)


# Data


def prepare_tokens(grid: Grid, root: Path) -> Path:
    """
    Trains the tokenizer on the training documents and tokenises both files, where that has not been done: the returned folder
    holds `tokenizer.json`, `train.npy` and `validation.npy`, streams of uint16 tokens with a boundary before every document and
    after the last. Its name has a hash of the texts and settings.

    Raises:
        `InputError`: if a file cannot be read or has no such column.
    """
    files = {name: root / grid.data[name] for name in ("train", "validation")}
    with blaming("data"):
        contents = [path.read_bytes() for path in files.values()]
    column, vocab_size = grid.data["text_column"], grid.data["vocab_size"]
    folder = grid.output / f"tokens-{digest(*contents, column.encode(), str(vocab_size).encode())}"
    if all((folder / f"{name}.npy").exists() for name in files):
        return folder

    import pyarrow.parquet

    with blaming("data"):
        texts = {
            name: pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
            for name, path in files.items()
        }
    for name, documents in texts.items():
        if not documents or not all(isinstance(document, str) for document in documents):
            raise InputError(
                f"data.{name}: {column!r} of {str(files[name])!r} is empty or holds more than texts; allowed: texts"
            )
    with blaming("output"):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        write_atomically(
            folder / "tokenizer.json", train_tokenizer(texts["train"], vocab_size).backend_tokenizer.to_str()
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=BOUNDARY_TOKEN)
    for name, documents in texts.items():
        stream = tokenize(documents, tokenizer)
        print(f"{name}: {len(documents):,} documents, {len(stream):,} tokens", flush=True)
        np.save(folder / f".{name}.npy", stream)
        os.replace(folder / f".{name}.npy", folder / f"{name}.npy")
    return folder


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """A boundary before every document and after the last, uint16."""
    stream = []
    for start in range(0, len(documents), 1000):
        batch = documents[start : start + 1000]
        encoded = tokenizer(batch, split_special_tokens=True, return_attention_mask=False)["input_ids"]
        stream += [np.array(ids, dtype=np.uint16) for ids in encoded]
    return np.concatenate([*stream, np.array([tokenizer.eos_token_id], dtype=np.uint16)])


class TokenBlocks:
    """
    A stream of tokens on a device, in blocks of `length + 1`: the last token of one is the first, unpredicted, of the next. The
    last block is padded with -1.
    """

    def __init__(self, path: Path, length: int, device: torch.device):
        stream = torch.from_numpy(np.load(path).astype(np.int32))
        self.num_tokens = len(stream) - 1  # predicted ones
        self.length = length
        self.stream = F.pad(stream, (0, len(self) * length - self.num_tokens), value=PADDING).to(device)
        self.places = torch.arange(length + 1, device=device)

    def __len__(self) -> int:
        return math.ceil(self.num_tokens / self.length)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Blocks `[len(indices), length + 1]`, int64."""
        return self.stream[indices.unsqueeze(1) * self.length + self.places].long()

    def order(self, number: int, seed: int) -> torch.Tensor:
        """Indices of the first `number` blocks to train on: all blocks once, shuffled, then all again, ..."""
        generator = torch.Generator().manual_seed(seed)
        epochs = math.ceil(number / len(self))
        order = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(epochs)])[:number]
        return order.to(self.stream.device)


# Training


def next_token_loss(model: PreTrainedModel, blocks: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in float32, in nats, of the tokens of blocks `[batch, length + 1]` after the first of each."""
    logits = model(input_ids=blocks[:, :-1].clamp(min=0), use_cache=False).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), blocks[:, 1:].flatten(), ignore_index=PADDING, reduction=reduction
    )


def parameter_groups(model: PreTrainedModel, settings: TrainingSettings) -> list[dict]:
    """Groups for AdamW by weight decay and learning rate."""
    decayed = set(decay_parameter_names(model))
    groups = {}
    for name, parameter in model.named_parameters():
        lr = settings.lr * (settings.branch_lr_factor if part_of(name) == "residual" else 1)
        weight_decay = settings.weight_decay if name in decayed else 0.0
        group = groups.setdefault((lr, weight_decay), {"params": [], "lr": lr, "weight_decay": weight_decay})
        group["params"].append(parameter)
    return list(groups.values())


def initial_weights(run: Run) -> dict[str, torch.Tensor]:
    """Those of a model made with the run's seed, on the CPU so that they are the same everywhere."""
    torch.manual_seed(run.seed)
    return DDLForCausalLM(run.config).state_dict()


class Bench:
    """A model of one architecture and the data, on a device: compiled once, and trained anew for every run."""

    def __init__(self, run: Run, tokens: Path):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        length = run.config.max_position_embeddings
        self.train_blocks, self.validation_blocks = (
            TokenBlocks(tokens / f"{name}.npy", length, self.device) for name in ("train", "validation")
        )
        self.model = DDLForCausalLM(run.config).to(self.device)
        self.batch_size = run.training_settings.batch_size
        self.loss = next_token_loss
        if run.training_settings.compile:
            self.loss = torch.compile(next_token_loss, dynamic=False)
            for _ in range(2):
                self.backward(self.train_blocks.order(self.batch_size, seed=0))
            self.model.zero_grad()
            self.synchronize()

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def backward(self, indices: torch.Tensor) -> torch.Tensor:
        """Adds the gradients for blocks of the training data; the mean loss, in nats."""
        with self.autocast():
            loss = self.loss(self.model, self.train_blocks[indices])
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per token of the validation data."""
        # Not compiled: without gradients that would be another compilation, which takes longer than it saves
        self.model.eval()
        indices = torch.arange(len(self.validation_blocks), device=self.device)
        with self.autocast():
            losses = [
                next_token_loss(self.model, self.validation_blocks[batch], reduction="sum")
                for batch in indices.split(self.batch_size)
            ]
        self.model.train()
        return torch.stack(losses).double().sum().item() / self.validation_blocks.num_tokens

    def train(self, run: Run, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Trains a run of the bench's architecture from the given weights and returns what was measured."""
        settings = run.training_settings
        self.model.load_state_dict(weights)
        optimizer = torch.optim.AdamW(parameter_groups(self.model, settings), betas=(0.9, 0.95), fused=True)
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, settings.warmup_steps, settings.steps, min_lr_rate=0.1
        )
        batches = self.train_blocks.order(settings.steps * self.batch_size, run.seed).split(self.batch_size)

        tokens_per_step = self.batch_size * self.train_blocks.length

        curve, seconds, peak_memory = [], 0.0, 0
        for first in range(0, settings.steps, settings.eval_steps):
            # Inside of a segment, the GPU is never waited for
            self.synchronize()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start, losses = time.perf_counter(), []
            for batch in batches[first : first + settings.eval_steps]:
                losses.append(self.backward(batch))
                clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            self.synchronize()
            seconds += time.perf_counter() - start
            if self.device.type == "cuda":
                peak_memory = max(peak_memory, torch.cuda.max_memory_allocated())

            step = first + len(losses)
            train_loss, validation_loss = torch.stack(losses).mean().item(), self.validate()
            diverged = not math.isfinite(train_loss + validation_loss)
            if diverged:
                break
            point = {"step": step, "tokens": step * tokens_per_step, "seconds": seconds}
            curve.append(point | {"train_loss": train_loss, "validation_loss": validation_loss})
        return {
            "diverged": diverged,
            "validation_loss": None if diverged else validation_loss,
            "curve": curve,
            "tokens": step * tokens_per_step,
            "training_seconds": seconds,
            "tokens_per_second": step * tokens_per_step / seconds,
            "peak_memory_gib": peak_memory / 2**30 if peak_memory else None,
        }


@cache
def environment() -> dict[str, Any]:
    """What measurements depend on beside the settings."""
    commit = os.environ.get("GIT_COMMIT")
    if commit is None and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    packages = [name for name in ("torch", "transformers", "triton") if find_spec(name)]
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "git_commit": commit or None,
    }


# Results


def read_results(path: Path) -> list[dict[str, Any]]:
    """
    Raises:
        `InputError`: if the file cannot be read or a line is not a result.
    """
    try:
        results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    for number, result in enumerate(results, start=1):
        if not isinstance(result, dict) or not RESULT_FIELDS <= result.keys():
            raise InputError(f"{str(path)!r}: line {number} is not a result")
    return results


class OutOfTime(Exception):
    """The next run would not be finished by the deadline."""


class MethodRuns:
    """The runs of one method, which share benches; those of other methods train in other processes, in turn."""

    def __init__(self, grid: Grid, tokens: Path, deadline: float):
        self.grid = grid
        self.tokens = tokens
        self.deadline = deadline
        self.results = grid.output / RESULTS_FILE
        self.lock = FileLock(grid.output / ".lock")
        self.benches = {}
        # Before its first result, a method is taken to be as slow as the slowest so far
        results = read_results(self.results) if self.results.exists() else []
        self.tokens_per_second = min((result["tokens_per_second"] for result in results), default=math.inf)

    def complete(self, method: str, tune_only: bool):
        """
        Trains the trials and final runs of a method that are missing.

        Raises:
            `OutOfTime`: if the deadline leaves some of them for later.
            `RunError`: if all trials diverged.
        """
        trials = [(self.result(run), run) for run in self.grid.trials(method)]
        if tune_only:
            return
        tuned = best_trial([result for result, _ in trials])["tuned"] if trials else {}
        for run in self.grid.final_runs(method, tuned):
            self.result(run)

    def result(self, run: Run) -> dict[str, Any]:
        """The result of a run, which is trained if it is missing."""
        identifier = run.identifier(self.tokens.name)
        result = self.find(identifier, run) or self.train(identifier, run)
        self.tokens_per_second = result["tokens_per_second"]
        return result

    def check_time(self, run: Run):
        settings = run.training_settings
        seconds = settings.steps * settings.batch_size * run.config.max_position_embeddings / self.tokens_per_second
        if time.time() + 1.2 * seconds > self.deadline:  # a fifth is for validations
            raise OutOfTime

    def train(self, identifier: str, run: Run) -> dict[str, Any]:
        """Trains a run, when it is its turn, and adds its result to the file."""
        self.check_time(run)
        if run.architecture not in self.benches:
            start = time.perf_counter()
            self.benches[run.architecture] = Bench(run, self.tokens)
            print(f"{run.method}: prepared in {time.perf_counter() - start:.0f} s", flush=True)
        bench, weights = self.benches[run.architecture], initial_weights(run)
        with self.lock:
            self.check_time(run)
            result = {
                "id": identifier,
                "method": run.method,
                "stage": run.stage,
                "seed": run.seed,
                "tuned": run.tuned,
                **bench.train(run, weights),
                "parameters": sum(count_parameters(run.config).values()),
                "flops_per_token": training_flops_per_token(run.config, bench.train_blocks.length),
                "data": self.tokens.name,
                "config": describe(run.config),
                "training": asdict(run.training_settings),
                **environment(),
            }
            lines = self.results.read_text(encoding="utf-8") if self.results.exists() else ""
            write_atomically(self.results, lines + json.dumps(result, allow_nan=False) + "\n")
        loss = "diverged" if result["diverged"] else f"validation loss {result['validation_loss']:.4f}"
        print(
            f"{run.method} {run.stage} seed {run.seed} {json.dumps(run.tuned)}: {loss}, "
            f"{result['training_seconds']:.1f} s, {result['tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )
        return result

    def find(self, identifier: str, run: Run) -> dict[str, Any] | None:
        """
        The finished run, if there is one.

        Raises:
            `InputError`: if a field that the grid does not give had another default when it was run.
        """
        results = read_results(self.results) if self.results.exists() else []
        result = next((result for result in results if result["id"] == identifier), None)
        if result is None:
            return None
        without_effect = {"transformers_version"} | (set() if run.config.has_gates else {"gate_init"})
        for then, now in (
            (result["config"], describe(run.config)),
            (result["training"], asdict(run.training_settings)),
        ):
            for name in sorted(then.keys() & now.keys() - without_effect):
                if then[name] != now[name]:
                    raise InputError(
                        f"output: {str(self.results)!r} has run {run.method} with {name}={then[name]!r}, which is "
                        f"{now[name]!r} by default now; allowed: another folder, or a grid that says which"
                    )
        return result


def best_trial(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """
    The trial with the lowest validation loss, the first of them if several have it.

    Raises:
        `RunError`: if all of them diverged.
    """
    finite = [trial for trial in trials if not trial["diverged"]]
    if not finite:
        raise RunError(f"all trials of {trials[0]['method']} diverged")
    return min(finite, key=lambda trial: trial["validation_loss"])


def complete_method(grid: Grid, method: str, tokens: Path, tune_only: bool, deadline: float) -> bool:
    """Trains what is missing of a method; False if there was not time enough."""
    # What was compiled for other methods counts towards a limit, and its models take memory
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        MethodRuns(grid, tokens, deadline).complete(method, tune_only)
    except OutOfTime:
        return False
    return True


def run_grid(grid: Grid, root: Path, workers: int, tune_only: bool, deadline: float):
    """
    Trains what is missing of a grid.

    Args:
        root: Folder to which the data files are relative.
        workers: Processes to which methods are dealt out. They share a device: they prepare models at the same time and train
            in turn, so that times are those of a run that has the device to itself.
        tune_only: Whether to leave out the final runs.
        deadline: Unix time in seconds after which no run begins, nor one that would not be finished by then.

    Raises:
        `InputError`: if data files cannot be read, or results were made with other defaults.
        `RunError`: if all trials of a method diverged.
    """
    tokens = prepare_tokens(grid, root)
    if workers == 1:
        finished = [complete_method(grid, method, tokens, tune_only, deadline) for method in grid.methods]
    else:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, os.cpu_count() // workers)))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
            futures = [
                executor.submit(complete_method, grid, method, tokens, tune_only, deadline) for method in grid.methods
            ]
        finished = [future.result() for future in futures]
    missing = [method for method, is_finished in zip(grid.methods, finished) if not is_finished]
    print(f"time is up, to be continued: {', '.join(missing)}" if missing else "all runs are finished", flush=True)
