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
Blocks of tokens made while training, in an order that depends on nothing but the settings.

Documents are drawn in windows, shuffled, tokenised and packed window by window. A journal keeps, for every window, the number of
blocks before it and where its documents begin in the sources: a run that continues at some block begins at the window that
holds it.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .checkpoints import write_atomically
from .cli import InputError, RunError
from .data import (
    DOCUMENTS,
    TOKENS,
    Blocks,
    Corpus,
    DataArguments,
    DocumentCounts,
    TextCounts,
    check_documents,
    load_documents,
    reading,
    tokenize,
)


Item = TypeVar("Item")


class DocumentStream:
    """
    The documents of a mixture without end: a source that has been read to its end begins again.

    Raises:
        `InputError`: if a source does not exist, cannot be read, has no column of text or no document to train on.
    """

    def __init__(self, args: DataArguments, seed: int):
        self.args = args
        self.seed = seed
        self.sources = [load_documents(source, streaming=True) for source in args.sources]
        weights = np.array([source.weight for source in args.sources])
        self.probabilities = weights / weights.sum()
        self.beginnings = [copy.deepcopy(source.state_dict()) for source in self.sources]

    @property
    def start(self) -> dict:
        """Where the stream begins: the number of a window, and for each source its position and how often it has ended."""
        return {"window": 0, "positions": self.beginnings, "passes": [0] * len(self.sources)}

    def windows(self, state: dict) -> Iterator[tuple[list[str], list[str], Counter[str], dict]]:
        """
        From `state` on, for each window: the texts to train on, shuffled, those that are held out, the number of skipped
        documents by reason, and the state after it.

        Raises:
            `InputError`: if a source cannot be read any further, or has nothing to train on.
        """
        passes = list(state["passes"])
        for source, position in zip(self.sources, state["positions"]):
            source.load_state_dict(copy.deepcopy(position))
        iterators = [iter(source) for source in self.sources]
        names = [source.source for source in self.args.sources]
        for window in count(state["window"]):
            generator = np.random.default_rng([self.seed, window])
            documents = {"text": [], "problem": []}
            for drawn in generator.choice(len(self.sources), size=self.args.window, p=self.probabilities):
                with reading(names[drawn]):
                    document = next(iterators[drawn], None)
                if document is None:
                    passes[drawn] += 1
                    self.sources[drawn].load_state_dict(copy.deepcopy(self.beginnings[drawn]))
                    iterators[drawn] = iter(self.sources[drawn])
                    document = next(iterators[drawn])
                for name, values in documents.items():
                    values.append(document[name])

            checked = check_documents(documents)
            train, held_out, skipped = [], [], Counter()
            for text, problem, fraction in zip(documents["text"], checked["problem"], checked["hash"]):
                if problem is not None:
                    skipped[problem] += 1
                else:
                    (held_out if fraction <= self.args.held_out else train).append(text)
            if not train:
                raise InputError(f"data.source: {self.args.name!r} has a window of documents without any to train on")
            generator.shuffle(train)
            positions = [copy.deepcopy(source.state_dict()) for source in self.sources]
            yield train, held_out, skipped, {"window": window + 1, "positions": positions, "passes": list(passes)}

    def sample(self) -> Corpus:
        """
        The documents to train on of the first window, and the first `args.held_out_documents` different ones that are held
        out, or as many as there are.
        """
        train, held_out = None, {}
        for texts, others, _, state in self.windows(self.start):
            train = train or texts
            held_out.update(dict.fromkeys(others))
            if len(held_out) >= self.args.held_out_documents or all(state["passes"]):
                break
        held_out = [*held_out][: self.args.held_out_documents]
        if not held_out:
            raise InputError(
                f"data.held_out: {self.args.held_out} of {self.args.name!r} leaves no document to evaluate on"
            )
        return Corpus(*(_as_dataset(texts) for texts in (train, held_out)))


def _as_dataset(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts, "problem": [None] * len(texts)}, features=DOCUMENTS)


@dataclass
class Window:
    """The training documents of a window, packed."""

    blocks: Blocks
    num_bytes: int  # of their UTF-8 text
    documents: DocumentCounts
    state: dict  # of the stream before it

    @property
    def number(self) -> int:
        return self.state["window"]


def ahead(items: Iterator[Item], pool: Executor) -> Iterator[Item]:
    """The same items, each of which is made while the one before it is used."""
    upcoming = pool.submit(next, items, None)
    while (item := upcoming.result()) is not None:
        upcoming = pool.submit(next, items, None)
        yield item


class StreamedText(torch.utils.data.IterableDataset):
    """
    The [`Blocks`] of each window of a stream, one after the other.

    One process reads it, the main one or the only worker of a data loader. It raises a `RunError` where a source cannot be read
    any further.

    Args:
        journal: File in which the windows are recorded. It may go beyond the block to begin at, and end in half a line.
        tokenizer, block_size, keep_documents_apart: As for [`Blocks`].
    """

    def __init__(
        self,
        stream: DocumentStream,
        tokenizer: PreTrainedTokenizerBase,
        journal: Path,
        block_size: int,
        keep_documents_apart: bool = False,
    ):
        self.stream = stream
        self.tokenizer = tokenizer
        self.journal = journal
        self.block_size = block_size
        self.keep_documents_apart = keep_documents_apart
        self.first_block = 0  # to begin at

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        entries = self.read_journal()
        write_atomically(self.journal, "".join(json.dumps(entry) + "\n" for entry in entries))
        num_recorded = len(entries)
        begun = [entry for entry in entries if entry["blocks"] <= self.first_block]
        num_blocks, state = (begun[-1]["blocks"], begun[-1]["state"]) if begun else (0, self.stream.start)

        pool = ThreadPoolExecutor()
        try:
            for window in ahead(self.tokenized(state, pool), pool):
                if window.number >= num_recorded:
                    entry = {
                        "blocks": num_blocks,
                        "state": window.state,
                        "documents": asdict(window.documents),
                        "num_tokens": window.blocks.num_tokens,
                        "num_bytes": window.num_bytes,
                    }
                    with open(self.journal, "a", encoding="utf-8") as file:
                        file.write(json.dumps(entry) + "\n")
                for index in range(max(0, self.first_block - num_blocks), len(window.blocks)):
                    yield window.blocks[index]
                num_blocks += len(window.blocks)
        except InputError as error:
            raise RunError(str(error)) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def tokenized(self, state: dict, pool: Executor) -> Iterator[Window]:
        """The windows from `state` on, tokenised in several threads: one alone can be slower than the model is trained."""
        to_tokens = partial(tokenize, tokenizer=self.tokenizer)
        for train, held_out, skipped, next_state in self.stream.windows(state):
            parts = pool.map(to_tokens, (train[start : start + 100] for start in range(0, len(train), 100)))
            tokens = concatenate_datasets([Dataset.from_dict(part, features=TOKENS) for part in parts])
            blocks = Blocks(tokens, self.tokenizer, self.block_size, self.keep_documents_apart)
            num_bytes = sum(tokens["num_bytes"])
            yield Window(blocks, num_bytes, DocumentCounts(len(train), len(held_out), dict(skipped)), state)
            state = next_state

    def read_journal(self) -> list[dict]:
        """
        An entry for each window that has been read: the number of blocks before it, the state of the stream before it, and
        the documents, tokens and bytes in it.
        """
        entries = []
        for line in self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the process was killed while it wrote this line
                continue
            # The worker of a process that was killed lives some seconds longer and may write a window once more
            if entry["state"]["window"] == len(entries):
                entries.append(entry)
        return entries

    def count_text(self, num_blocks: int) -> TextCounts:
        """What is in the windows that hold the first `num_blocks` blocks."""
        total = Counter()
        skipped = Counter()
        for entry in self.read_journal():
            if entry["blocks"] < num_blocks:
                total.update({name: entry["documents"][name] for name in ("train", "held_out")})
                total.update({name: entry[name] for name in ("num_tokens", "num_bytes")})
                skipped.update(entry["documents"]["skipped"])
        documents = DocumentCounts(total["train"], total["held_out"], dict(skipped))
        return TextCounts(documents, total["num_tokens"], total["num_bytes"])
