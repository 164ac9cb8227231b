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
"""What the gates of a model do on a text, as a table, plots and a page: `transformers-ddl inspect MODEL --text FILE`."""

import argparse
import base64
import json
import math
import os
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from .cli import InputError
from .delta_stats import QUANTITIES, SUBLAYERS, DeltaStats, record_delta_stats
from .generation import load_model
from .inputs import read_texts


# Columns of the table and their headings
COLUMNS = {
    "gate": "β",
    "gate_05": "β 5 %",
    "gate_50": "β 50 %",
    "gate_95": "β 95 %",
    "near_0": "near 0",
    "near_1": "near 1",
    "near_2": "near 2",
    "eigenvalue": "1 − β",
    "readout": "readout",
    "discrepancy_before": "before",
    "discrepancy_after": "after",
    "key_norm": "‖k̃‖",
    "relative_step": "step",
    "cosine": "cosine",
    "effective_rank": "rank",
}
EXPLANATIONS = {
    "β": "mean gate over tokens, then its quantiles",
    "near 0, 1, 2": "share of tokens whose gate is less than 0.1 away",
    **{COLUMNS[name]: text for name, text in QUANTITIES.items() if name != "gate"},
}
NUM_TOKENS_SHOWN = 64  # in the heat map

STYLE = """
body { font-family: sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 0.85rem } th, td { border: none; padding: 0.2rem 0.5rem; text-align: right }
tr:nth-child(even) { background: #f2f2f2 } dt { font-weight: bold } img { max-width: 100% } div { overflow-x: auto }
"""


def main(arguments: list[str]):
    """Prints the table and writes the report."""
    parser = argparse.ArgumentParser(
        prog="transformers-ddl inspect",
        description="Show what the gates of a model do on a text: how much each sublayer erases and writes, and where.",
    )
    parser.add_argument("model", help="folder or Hub name of a model")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="text files in UTF-8, a document each"
    )
    parser.add_argument("--output", default="inspection", metavar="DIR", help="default: inspection")
    parser.add_argument("--max-tokens", type=int, default=8192, help="look at the first so many only (default: 8192)")
    options = parser.parse_args(arguments)
    if options.max_tokens < 1:
        raise InputError(f"--max-tokens: must be at least 1, got {options.max_tokens}")
    folder = Path(options.output)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"--output: cannot make {options.output!r}; allowed: a folder that can be written to")
    texts = read_texts("--text", options.text)
    model, tokenizer = load_model(options.model, device_map="auto")

    windows, left = [], options.max_tokens
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[:left]
        left -= len(tokens)
        windows += [
            tokens[start : start + model.config.max_position_embeddings]
            for start in range(0, len(tokens), model.config.max_position_embeddings)
        ]
    if not windows:
        raise InputError("--text: must hold text, got none")
    try:
        with torch.no_grad(), record_delta_stats(model) as stats:
            for window in windows:
                model(torch.tensor([window], device=model.device), use_cache=False)
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: cannot make {options.output!r}: {error}") from error

    shown = [tokenizer.decode(token) for token in windows[0][:NUM_TOKENS_SHOWN]]
    num_tokens = options.max_tokens - left
    print(make_table(stats).to_string())
    report = write_report(stats, shown, f"{options.model}: {num_tokens:,} tokens of {', '.join(options.text)}", folder)
    print(f"\n{report} explains the columns and has the plots; read the first {num_tokens:,} tokens")


def make_table(stats: DeltaStats) -> pd.DataFrame:
    """A line per rewrite, as texts."""
    rows = pd.DataFrame(stats.summary()).set_index(["layer", "sublayer", "step"])
    if stats.config.num_delta_steps == 1:
        rows = rows.droplevel("step")
    for name in rows:
        template = "{:.1%}" if name.startswith("near") else "{:.3g}"
        rows[name] = [template.format(value) for value in rows[name]]
    return rows[list(COLUMNS)].rename(columns=COLUMNS).replace("nan", "")  # nothing precedes the first rewrite


def write_report(stats: DeltaStats, tokens: list[str], title: str, folder: Path) -> Path:
    """
    Writes `statistics.json`, the plots, and `report.html` with all of it, which refers to no other file.

    Args:
        tokens: The first ones, as texts.

    Returns:
        The path of the report.
    """
    # JSON has no NaN
    rows = [{name: None if value != value else value for name, value in row.items()} for row in stats.summary()]
    (folder / "statistics.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    images = []
    for name, caption, figure in (
        ("gates", "Gate β of every rewrite (rows, in order of depth) at the first tokens", plot_gates(stats, tokens)),
        ("histograms", "Gates of all tokens, by layer", plot_histograms(stats)),
        ("discrepancy", "Discrepancy between target and readout, mean over tokens", plot_discrepancy(stats)),
    ):
        figure.savefig(folder / f"{name}.png", dpi=100)
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        images.append(f'<h2>{caption}</h2>\n<img alt="{caption}" src="data:image/png;base64,{data}">')
    terms = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in EXPLANATIONS.items())
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>A sublayer rewrites the state by X' = X + β k (vᵀ − kᵀX). Norms, cosines and ranks are means over tokens.</p>\n"
        f"<div>{make_table(stats).to_html(border=0)}</div>\n<dl>\n{terms}\n</dl>\n"
        + "\n".join(images)
        + "\n</body>\n</html>\n"
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def rewrite_labels(stats: DeltaStats) -> list[str]:
    layers, _, steps, _ = stats["gate"].shape
    return [
        f"{layer} {sublayer}" + (f" {step}" if steps > 1 else "")
        for layer in range(layers)
        for sublayer in SUBLAYERS
        for step in range(steps)
    ]


def plot_gates(stats: DeltaStats, tokens: list[str]) -> Figure:
    gates = stats["gate"].flatten(0, 2)[:, : len(tokens)].numpy()
    figure = Figure(figsize=(2.5 + 0.16 * len(tokens), 1.6 + 0.2 * len(gates)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
    axes.set_yticks(range(len(gates)), rewrite_labels(stats), fontsize=7)
    labels = [repr(token)[1:-1] for token in tokens]
    axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=7, family="monospace", parse_math=False)
    figure.colorbar(image, label="β")
    return figure


def plot_histograms(stats: DeltaStats) -> Figure:
    gates = stats["gate"].numpy()
    columns = min(4, len(gates))
    rows = math.ceil(len(gates) / columns)
    figure = Figure(figsize=(2.8 * columns, 1.9 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    for axes in list(grid)[len(gates) :]:
        axes.remove()
    for layer, axes in enumerate(grid[: len(gates)]):
        for sublayer, name in enumerate(SUBLAYERS):
            axes.hist(gates[layer, sublayer].ravel(), bins=np.linspace(0, 2, 81), alpha=0.6, label=name)
        axes.set(title=f"layer {layer}", xlabel="β", yticks=[])
    grid[0].legend()
    return figure


def plot_discrepancy(stats: DeltaStats) -> Figure:
    labels = rewrite_labels(stats)
    figure = Figure(figsize=(max(5, 1.5 + 0.3 * len(labels)), 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("discrepancy_before", "before the rewrite"), ("discrepancy_after", "after")):
        axes.plot(stats[name].flatten(0, 2).mean(-1).numpy(), "o-", label=label)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set(ylabel="mean of ‖v − Xᵀk‖", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
