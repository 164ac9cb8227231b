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
Evaluation: bits per byte of texts, as a metric of `evaluate`, and the paper's tasks, by lm-evaluation-harness.

    transformers-ddl evaluate MODEL --text FILE ...
    transformers-ddl evaluate MODEL --tasks paper
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import evaluate
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cli import InputError
from .data import IGNORE_INDEX
from .generation import load_model
from .inputs import read_texts
from .modeling_ddl import upcast


# Under the names of lm-evaluation-harness
PAPER_TASKS = [
    "arc_challenge",
    "arc_easy",
    "hellaswag",
    "openbookqa",
    "piqa",
    "sciq",
    "social_iqa",
    "winogrande",
]

DESCRIPTION = """
Bits per byte of texts under a causal language model, and its perplexity. Every token of a text is predicted exactly once,
the first one from the tokenizer's beginning-of-sequence token (end-of-sequence token if it has none). A text longer than
the context is read in windows of `max_length` tokens, a new one every `stride` tokens, and a token counts in the first
window it is predicted in.
"""
INPUTS_DESCRIPTION = """
Args:
    predictions (`list[str]`): the texts.
    model (`PreTrainedModel`): a causal language model, on any device.
    tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
    max_length (`int`, *optional*): tokens that the model sees at a time; its `max_position_embeddings` if None.
    stride (`int`, *optional*): tokens between the beginnings of two windows, at most `max_length`, of which all but the
        first one's tokens see at least `max_length - stride` before them; `max_length` (windows apart, the fastest) if None.
    batch_size (`int`, defaults to 8): windows in a batch.

Returns:
    `dict`:
        bits_per_byte (`float`): bits that all tokens cost, by the bytes of all texts in UTF-8.
        perplexity (`float`): e to the power of `nats_per_token`.
        nats_per_token (`float`): mean loss, every token of every text counting the same.
        num_tokens, num_bytes (`int`): of all texts, without special tokens.

Raises:
    `ValueError`: for texts without a token, a length, stride or batch size out of range, or a tokenizer without a token to
        begin with.
"""


class BitsPerByte(evaluate.Metric):
    """`BitsPerByte().compute(predictions=texts, model=model, tokenizer=tokenizer)`; needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    @torch.no_grad()
    def _compute(
        self,
        predictions: list[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
    ) -> dict[str, float]:
        max_length = model.config.max_position_embeddings if max_length is None else max_length
        stride = max_length if stride is None else stride
        for name, value in {"max_length": max_length, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= stride <= max_length:
            raise ValueError(f"stride must lie between 1 and max_length ({max_length}), got {stride}")
        first_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first_token is None:
            raise ValueError(
                "the tokenizer must have a bos_token or an eos_token, from which a text's first is predicted"
            )

        windows, num_tokens = [], 0
        for text in predictions:
            tokens = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            num_tokens += len(tokens)
            windows += split_windows(torch.tensor([first_token, *tokens]), max_length, stride)
        if num_tokens == 0:
            raise ValueError("predictions must hold text, got none")

        was_training = model.training
        model.eval()
        nats = 0.0
        try:
            for start in range(0, len(windows), batch_size):
                inputs, labels = zip(*windows[start : start + batch_size])
                masks = [torch.ones_like(window) for window in inputs]
                inputs, masks = (pad_sequence(rows, batch_first=True).to(model.device) for rows in (inputs, masks))
                labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
                logits = upcast(model(inputs, attention_mask=masks, use_cache=False).logits)
                losses = cross_entropy(
                    logits.transpose(1, 2), labels.to(logits.device), reduction="none", ignore_index=IGNORE_INDEX
                )
                nats += losses.sum(dtype=torch.float64).item()
        finally:
            model.train(was_training)

        num_bytes = sum(len(text.encode()) for text in predictions)
        return {
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "perplexity": math.exp(nats / num_tokens),
            "nats_per_token": nats / num_tokens,
            "num_tokens": num_tokens,
            "num_bytes": num_bytes,
        }


def split_windows(tokens: torch.Tensor, max_length: int, stride: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels (-100 where an earlier window predicts) of at most `max_length`, for all of `tokens` but the first."""
    inputs, labels = tokens[:-1], tokens[1:]
    for start in range(0, len(labels), stride):
        window = labels[start : start + max_length].clone()
        if start > 0:
            window[: max_length - stride] = IGNORE_INDEX
        if (window != IGNORE_INDEX).any():
            yield inputs[start : start + max_length], window


def main(arguments: list[str]):
    """Prints the results, and writes them to a file if asked to."""
    parser = argparse.ArgumentParser(
        prog="transformers-ddl evaluate",
        description="Measure a model's bits per byte on texts, or its accuracy on tasks of lm-evaluation-harness.",
    )
    parser.add_argument("model", help="folder or Hub name of a model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="FILE", help="text files in UTF-8, a document each")
    what.add_argument("--tasks", metavar="paper|NAME,...", help="the paper's eight tasks, or others by name")
    parser.add_argument("--stride", type=int, help="tokens between windows of a text (default: the model's context)")
    parser.add_argument("--num-fewshot", type=int, default=0, help="solved examples in front of a task (default: 0)")
    parser.add_argument("--limit", type=int, help="look at the first so many examples of each task only")
    parser.add_argument("--include-path", metavar="FOLDER", help="folder with YAML files of further tasks")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", metavar="JSON", help="file to write the results to")
    options = parser.parse_args(arguments)
    for name, least in {"stride": 1, "num_fewshot": 0, "limit": 1, "batch_size": 1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
    if options.output and not Path(options.output).parent.is_dir():
        raise InputError(
            f"--output: no folder {str(Path(options.output).parent)!r}; allowed: a file in a folder that exists"
        )
    if options.output and Path(options.output).is_dir():
        raise InputError(f"--output: {options.output!r} is a folder; allowed: a file")
    if options.output:
        check_writable(Path(options.output))
    results = evaluate_text(options) if options.text else evaluate_tasks(options)
    if options.output:
        Path(options.output).write_text(json.dumps({"model": options.model, **results}, indent=2) + "\n")


def check_writable(path: Path):
    """Before hours of evaluation; leaves what there is as it is."""
    try:
        if not path.exists():
            path = path.resolve()
            path.touch(exist_ok=False)
            path.unlink()
        elif not os.access(path, os.W_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        raise InputError(f"--output: cannot write {str(path)!r}: {error}") from error


def evaluate_text(options: argparse.Namespace) -> dict:
    texts = read_texts("--text", options.text)
    model, tokenizer = load_model(options.model, device_map="auto")
    if options.stride is not None and options.stride > (context := model.config.max_position_embeddings):
        raise InputError(f"--stride: must be at most the model's context, {context}, got {options.stride}")
    try:
        results = BitsPerByte(keep_in_memory=True).compute(
            predictions=texts, model=model, tokenizer=tokenizer, stride=options.stride, batch_size=options.batch_size
        )
    except ValueError as error:
        raise InputError(f"--text: {error}") from error
    print(
        f"{results['bits_per_byte']:.4f} bits per byte over {results['num_bytes']:,} bytes; perplexity "
        f"{results['perplexity']:.2f} over {results['num_tokens']:,} tokens"
    )
    return results


def evaluate_tasks(options: argparse.Namespace) -> dict:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(f"--tasks: needs pip install 'transformers_ddl[evaluate]': {error}") from error

    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise InputError(f"--include-path: no folder {options.include_path!r}; allowed: one with YAML files of tasks")
    manager = TaskManager(include_path=options.include_path)
    names = PAPER_TASKS if options.tasks == "paper" else options.tasks.split(",")
    tasks = []
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(
                f"--tasks: unknown task {name!r}; allowed: paper, or names that `lm_eval ls tasks` prints"
            )
        try:
            tasks += manager.load(name)["tasks"].values()
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"--tasks: cannot get the data of {name!r}: {error}") from error

    model, tokenizer = load_model(options.model, device_map="auto")
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        log_samples=False,
    )
    print(make_table(results))
    return {"num_fewshot": options.num_fewshot, "limit": options.limit, "tasks": results["results"]}
