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
"""What the benchmarks share: models, the clock, tables and files of results."""

import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from transformers_ddl import DDLConfig, DDLForCausalLM
from transformers_ddl.comparison import environment


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Of the paper, of configs/quickstart.yaml and configs/sizes/1b.yaml, and to try a benchmark out
SIZES = {
    "toy": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 512},
    "quickstart": {"num_hidden_layers": 4, "hidden_size": 160, "num_attention_heads": 5, "vocab_size": 2048},
    "small": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 6, "vocab_size": 50304},
    "medium": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 50304},
    "1b": {"num_hidden_layers": 20, "hidden_size": 2048, "num_attention_heads": 16, "vocab_size": 50304}
    | {"num_key_value_heads": 8, "intermediate_size": 5504, "max_position_embeddings": 2048},
}
MODELS = {
    "llama": None,  # transformers' own
    "additive": {"residual_type": "additive"},
    "scalar": {"num_value_channels": 1},
    "cc": {},
    "cc_without_ec": {"embedding_conv": False},
    "tc": {"compressor": "token"},
    "tc_without_ec": {"compressor": "token", "embedding_conv": False},
}


def build(name: str, size: str) -> PreTrainedModel:
    """One of `MODELS` in one of `SIZES`, with random weights, on the CPU."""
    torch.manual_seed(0)
    shape = SIZES[size]
    if name == "llama":
        shape = {"intermediate_size": 8 * shape["hidden_size"] // 3} | shape
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    return DDLForCausalLM(DDLConfig(**shape, **MODELS[name]))


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def now() -> float:
    """Seconds, when the device has done all its work; on a CPU those of this process, whatever else runs there."""
    synchronize()
    return time.perf_counter() if DEVICE == "cuda" else time.process_time()


def mark() -> torch.cuda.Event | float:
    """A point in the device's time, for which nobody waits; see `seconds_between`."""
    if DEVICE == "cpu":
        return now()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """To be asked for when the device has done all its work."""
    return end - start if DEVICE == "cpu" else start.elapsed_time(end) / 1000


def free_memory():
    """Of models that nothing refers to any more, compiled ones included."""
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def add_ratios(results: list[dict[str, Any]], figure: str, within: tuple[str, ...]):
    """Adds to every result its figure's ratio to that of the first result that is equal in `within`."""
    for result in results:
        base = next(other for other in results if all(other[name] == result[name] for name in within))
        result["ratio"] = result[figure] / base[figure]
        result["ratio_to"] = base["model"]


def report(results: list[dict[str, Any]], columns: dict[str, str], output: str | None, **settings):
    """
    Prints results as a table and writes them as JSON.

    Args:
        results: All of them with the same fields.
        columns: The fields to print, each with its format.
        output: File to write, none if None.
        settings: What else is to be known of the run; device, versions and commit are added.
    """
    settings = environment() | settings
    print(json.dumps(settings))
    cells = [[format(result[name], layout) for name, layout in columns.items()] for result in results]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    for row in [list(columns), *cells]:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)))
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(settings | {"results": results}, indent=1) + "\n")
