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
"""The report of a comparison: tables in Markdown and plots, made from `results.jsonl` alone."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .checkpoints import write_atomically
from .cli import InputError
from .comparison import best_trial, read_results


Result = dict[str, Any]  # one line of results.jsonl

# What a validation curve is drawn against, and how much of it a run had used at a point of its curve
RESOURCES: dict[str, Callable[[Result, dict], float]] = {
    "tokens": lambda result, point: point["tokens"],
    "FLOPs": lambda result, point: point["tokens"] * result["flops_per_token"],
    "seconds": lambda result, point: point["seconds"],
}

EXPLANATION = """
Losses are nats per token of the validation data, over all of it. "±" is the standard error of the mean over seeds. Differences are
taken between runs of the same seed, which read the same tokens in the same order, and then averaged: negative is better than
{baseline}. They compare the two runs at the end of the one that used less of the resource; the loss of the other is interpolated
linearly between the two validations around that point. There its learning rate has not decayed all the way, which counts against
the method with the higher cost per token: "at equal FLOPs" and "at equal seconds" understate it. FLOPs are those of matrix
products, forward and backward; seconds are those of training steps, without compilation and validation.
""".strip()


def write_report(results: Path, folder: Path, baseline: str):
    """
    Writes `report.md`, and a plot `loss_*.png` of the validation loss against each of tokens, FLOPs and seconds.

    Raises:
        `InputError`: if the results cannot be read or have no finished final run of the baseline.
    """
    trials, finals = select_results(read_results(results))
    if baseline not in finals:
        raise InputError(
            f"--baseline: no final run of {baseline!r} in {str(results)!r}; allowed: {', '.join(finals) or 'none yet'}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for resource in RESOURCES:
        plot_curves(finals, resource, folder / f"loss_{resource}.png")
    sections = [
        "# Comparison",
        EXPLANATION.format(baseline=baseline),
        "## Final runs",
        summary_table(finals, baseline),
        *[f"![Validation loss against {resource}](loss_{resource}.png)" for resource in RESOURCES],
        "### Every seed",
        seed_table(finals),
        "## Tuning",
        "The lowest loss of a method is in bold; its values are those of the final runs.",
        *[f"### {method}\n\n{tuning_table(of_method)}" for method, of_method in trials.items()],
        "## Conditions",
        conditions(trials, finals),
    ]
    write_atomically(folder / "report.md", "\n\n".join(sections) + "\n")


def select_results(results: list[Result]) -> tuple[dict[str, list[Result]], dict[str, list[Result]]]:
    """
    Trials and final runs by method. Final runs with values that later trials turned out to be worse are left out.

    Raises:
        `InputError`: if a method has several final runs of a seed: then they are of different grids.
    """
    trials, finals = {}, {}
    for result in results:
        of_stage = trials if result["stage"] == "tune" else finals
        of_stage.setdefault(result["method"], []).append(result)
    for method in list(finals):
        if any(not trial["diverged"] for trial in trials.get(method, [])):
            tuned = best_trial(trials[method])["tuned"]
            finals[method] = [result for result in finals[method] if result["tuned"] == tuned]
        seeds = [result["seed"] for result in finals[method]]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"results: {method} has several final runs of a seed; allowed: the results of one grid")
        if not seeds:
            del finals[method]
    return trials, finals


def loss_at(result: Result, resource: str, amount: float) -> float:
    """The validation loss when `amount` of a resource had been used, interpolated linearly."""
    points = result["curve"]
    used = [RESOURCES[resource](result, point) for point in points]
    return float(np.interp(amount, used, [point["validation_loss"] for point in points]))


def paired_differences(runs: list[Result], baseline: list[Result], resource: str) -> list[float]:
    """For every seed that both have, the loss minus the baseline's where the one that used less of a resource ends."""
    baseline_of = {result["seed"]: result for result in baseline if not result["diverged"]}
    differences = []
    for result in runs:
        other = baseline_of.get(result["seed"])
        if other is not None and not result["diverged"]:
            amount = min(RESOURCES[resource](run, run["curve"][-1]) for run in (result, other))
            differences.append(loss_at(result, resource, amount) - loss_at(other, resource, amount))
    return differences


def mean_and_error(values: list[float], sign: str = "") -> str:
    """The mean ± its standard error; "–" stands for what too few values do not tell."""
    if not values:
        return "–"
    error = f"{statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else "–"
    return f"{statistics.fmean(values):{sign}.4f} ± {error}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def values_of(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in fields.items()) or "–"


def summary_table(finals: dict[str, list[Result]], baseline: str) -> str:
    header = ["method", "tuned values", "seeds", "validation loss", *[f"Δ at equal {name}" for name in RESOURCES]]
    header += ["parameters (M)", "MFLOPs per token", "thousand tokens/s", "peak GiB"]
    rows = []
    for method, runs in finals.items():
        first, finished = runs[0], [result for result in runs if not result["diverged"]]
        diverged = len(runs) - len(finished)
        row = [method, values_of(first["tuned"]), f"{len(runs)}" + f" ({diverged} diverged)" * (diverged > 0)]
        row.append(mean_and_error([result["validation_loss"] for result in finished]))
        for resource in RESOURCES:
            differences = paired_differences(runs, finals[baseline], resource)
            row.append("" if method == baseline else mean_and_error(differences, sign="+"))
        row += [f"{first['parameters'] / 1e6:.2f}", f"{first['flops_per_token'] / 1e6:.1f}"]
        row.append(f"{statistics.median(result['tokens_per_second'] for result in runs) / 1e3:.1f}")
        memory = first["peak_memory_gib"]
        rows.append([*row, "–" if memory is None else f"{memory:.2f}"])
    return table(header, rows)


def seed_table(finals: dict[str, list[Result]]) -> str:
    seeds = sorted({result["seed"] for runs in finals.values() for result in runs})
    rows = []
    for method, runs in finals.items():
        loss_of = {result["seed"]: format_loss(result) for result in runs}
        rows.append([method, *[loss_of.get(seed, "–") for seed in seeds]])
    return table(["method", *[f"seed {seed}" for seed in seeds]], rows)


def tuning_table(trials: list[Result]) -> str:
    finite = [trial for trial in trials if not trial["diverged"]]
    best = best_trial(trials) if finite else None
    axes = list(dict.fromkeys(name for trial in trials for name in trial["tuned"]))
    rows = []
    for trial in trials:
        loss = format_loss(trial)
        values = [json.dumps(trial["tuned"][name]) if name in trial["tuned"] else "" for name in axes]
        rows.append([*values, f"**{loss}**" if trial is best else loss])
    return table([*axes, "validation loss"], rows)


def format_loss(result: Result) -> str:
    return "diverged" if result["diverged"] else f"{result['validation_loss']:.4f}"


def conditions(trials: dict[str, list[Result]], finals: dict[str, list[Result]]) -> str:
    """What all runs were made with: one line for each stage, and one for each environment."""
    lines = {}  # in the order of their first run
    for stage, of_stage in (("trial", trials), ("final run", finals)):
        for result in sum(of_stage.values(), []):
            training = result["training"]
            line = f"{stage}: {training['steps']:,} steps of {training['batch_size']} × "
            line += f"{result['config']['max_position_embeddings']} tokens, {training['warmup_steps']} of them warm-up"
            lines[line] = lines.get(line, 0) + 1
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            line = f"{result['hardware']}, {versions}, commit {result['git_commit'] or 'unknown'}"
            lines[line] = lines.get(line, 0) + 1
    return "\n".join(f"- {line} ({count} runs)" for line, count in lines.items())


def plot_curves(finals: dict[str, list[Result]], resource: str, path: Path):
    """Draws the validation loss of every seed, leaving out the first fifth of each run."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, (method, runs) in enumerate(finals.items()):
        for number, result in enumerate(runs):
            points = [point for point in result["curve"] if 5 * point["step"] >= result["training"]["steps"]]
            axes.plot(
                [RESOURCES[resource](result, point) for point in points],
                [point["validation_loss"] for point in points],
                color=f"C{index}",
                linewidth=1,
                label=method if number == 0 else None,
            )
    axes.set(xlabel=resource, ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
