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
Examples to fine-tune on: rows of tables, of which some are held out.

As with documents, every row is accounted for: it is used for training, held out, or counted as skipped with the reason.
"""

import glob
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from datasets import ClassLabel, Dataset, load_dataset

from .cli import InputError
from .data import Corpus, file_type, hash_fraction, list_files, reading, split


@dataclass
class ExampleArguments:
    """
    Where examples come from, and what they are examples of.

    Args:
        source (`str`):
            A JSON (lines) or Parquet file, also compressed (`.gz`, `.zst`), a folder of files of one of these types, a
            pattern such as `chats/*.jsonl`, or the name of a dataset on the Hub, whose `train` split is read.
        task (`"sft"` or `"classification"`, defaults to `"sft"`):
            `sft`: to answer. Rows have a column `messages`, a conversation of `{"role": ..., "content": ...}`, or the columns
            `prompt` and `completion`, both texts or both conversations. `classification`: to label a text.
        text_column (`str`, defaults to `"text"`), label_column (`str`, defaults to `"label"`):
            The columns for `classification`. Labels are strings or integers, by whose order the model numbers them.
        subset (`str`, *optional*):
            The configuration of a Hub dataset that has several.
        held_out (`float`, defaults to 0.05):
            Share of the examples to hold out, in (0, 1).
        num_proc (`int`, *optional*):
            Processes that read; one if None.
    """

    source: str
    task: Literal["sft", "classification"] = "sft"
    text_column: str = "text"
    label_column: str = "label"
    subset: str | None = None
    held_out: float = 0.05
    num_proc: int | None = None

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie strictly between 0 and 1, got {self.held_out}")
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"num_proc must be at least 1, got {self.num_proc}")


def read_examples(args: ExampleArguments) -> Corpus:
    """
    Reads all rows of `args.source` and splits them by a hash of each, so that copies of one fall on the same side.

    Returns:
        With the columns `messages`, or `prompt` and `completion`, or `text` and `label`, a `ClassLabel`.

    Raises:
        `InputError`: if the source does not exist, cannot be read, has not the columns of the task, or holds fewer than
            two different examples.
    """
    rows = select_columns(read_rows(args), args)
    corpus = split(rows, partial(check_examples, task=args.task), args.held_out, args.num_proc)
    if not len(corpus.train) or not len(corpus.held_out):
        raise InputError(
            f"data.source: {args.source!r} holds too few examples ({corpus}); "
            "allowed: at least two different ones, of which data.held_out leaves one for training"
        )
    return corpus


def read_rows(args: ExampleArguments) -> Dataset:
    files = list_files(args.source)
    with reading(args.source):
        if files is None:
            return load_dataset(args.source, args.subset, split="train", num_proc=args.num_proc)
        types = {file_type(file) for file in files}
        if types not in ({"json"}, {"parquet"}):
            raise InputError(
                f"data.source: {args.source!r} holds files of type {', '.join(sorted(types))}; "
                "allowed: either JSON (.json, .jsonl) or Parquet (.parquet)"
            )
        paths = [glob.escape(path) for path in sorted(map(str, files))]  # `datasets` takes them for patterns
        return load_dataset(types.pop(), data_files=paths, split="train", num_proc=args.num_proc)


def select_columns(rows: Dataset, args: ExampleArguments) -> Dataset:
    """The columns of the task, under the names that are the same for all data."""
    if args.task == "classification":
        columns = {args.text_column: "text", args.label_column: "label"}
    elif "messages" in rows.column_names:
        columns = {"messages": "messages"}
    else:
        columns = {"prompt": "prompt", "completion": "completion"}
    if not columns.keys() <= set(rows.column_names):
        wanted = "messages, or prompt and completion" if args.task == "sft" else " and ".join(columns)
        raise InputError(
            f"data.source: {args.source!r} has the columns {', '.join(rows.column_names)}; "
            f"for data.task {args.task} it must have {wanted}"
        )
    rows = rows.select_columns([*columns]).rename_columns(columns)
    if args.task == "classification" and not isinstance(rows.features["label"], ClassLabel):
        if (dtype := getattr(rows.features["label"], "dtype", "")).startswith("float"):
            raise InputError(f"data.label_column: {args.label_column!r} holds {dtype}; allowed: strings or integers")
        with reading(args.source):
            rows = rows.class_encode_column("label")
        if "int" in dtype:  # which are encoded in the order of their digits
            labels = sorted(rows.features["label"].names, key=int)
            rows = rows.align_labels_with_mapping({label: index for index, label in enumerate(labels)}, "label")
    return rows


def check_examples(rows: dict[str, list], task: str) -> dict[str, list]:
    """Why an example is skipped, if it is, and a hash of it as a fraction of 1."""
    examples = [dict(zip(rows, values)) for values in zip(*rows.values())]
    find_problem = {"sft": problem_to_answer, "classification": problem_to_label}[task]
    return {
        "problem": [find_problem(example) for example in examples],
        "hash": [hash_fraction(json.dumps(example, sort_keys=True)) for example in examples],
    }


def problem_to_label(example: dict[str, Any]) -> str | None:
    if not isinstance(example["text"], str) or not example["text"].strip():
        return "without text"
    return "without a label" if example["label"] is None else None


def problem_to_answer(example: dict[str, Any]) -> str | None:
    if "messages" in example:
        conversation = example["messages"]
    else:
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return None if completion.strip() else "without an answer"
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return "without prompt or completion"
        conversation = prompt + completion
    if not conversation:
        return "without messages"
    if not isinstance(conversation, list) or any(
        not isinstance(message, dict) or not isinstance(message.get("content"), str) or not message.get("role")
        for message in conversation
    ):
        return "with a message without role or content"
    answers = conversation if "messages" in example else completion
    return None if any(message["role"] == "assistant" for message in answers) else "without an answer"
