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
"""Text that is read while training: the same blocks whoever reads them, from wherever they are read."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from transformers_ddl.cli import InputError, RunError
from transformers_ddl.data import DataArguments
from transformers_ddl.streaming import DocumentStream, StreamedText, ahead
from transformers_ddl.tokenization import train_tokenizer


NUM_A, NUM_B = 53, 17


@pytest.fixture
def args(tmp_path):
    rows = [None, " "] + [f"sentence number {i}" for i in range(NUM_A)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "b.txt").write_text("\n".join(f"line {i}" for i in range(NUM_B)))
    mixture = [{"source": str(tmp_path / "a.jsonl"), "weight": 3}, {"source": str(tmp_path / "b.txt")}]
    return DataArguments(mixture, streaming=True, window=20, held_out=0.1)


@pytest.fixture
def tokenizer():
    return train_tokenizer(["sentence number line 0 1 2 3 4 5"], vocab_size=280)


def streamed(args, tokenizer, journal, seed=0):
    return StreamedText(DocumentStream(args, seed), tokenizer, journal, block_size=16)


def read(text, first_block, count, num_workers=0):
    text.first_block = first_block
    loader = DataLoader(text, batch_size=2, num_workers=num_workers)
    return torch.cat([batch["input_ids"] for batch in itertools.islice(loader, count // 2)])


def test_blocks_do_not_depend_on_where_and_by_whom_they_are_read(args, tokenizer, tmp_path):
    everything = read(streamed(args, tokenizer, tmp_path / "journal"), 0, 200)
    journal = (tmp_path / "journal").read_text()
    boundaries = [json.loads(line)["blocks"] for line in journal.splitlines()]
    assert boundaries[5] < 200, "several windows, and sources that have ended, must be among them"
    for first_block in (0, 1, 3, boundaries[1] - 1, boundaries[1], boundaries[1] + 1, 131):
        for num_workers in (0, 1):
            text = streamed(args, tokenizer, tmp_path / "journal")
            assert torch.equal(read(text, first_block, 20, num_workers), everything[first_block : first_block + 20])
    assert (tmp_path / "journal").read_text() == journal
    # Without the journal it takes longer
    text = streamed(args, tokenizer, tmp_path / "lost")
    assert torch.equal(read(text, 131, 20), everything[131:151])
    assert (tmp_path / "lost").read_text() == journal[: len((tmp_path / "lost").read_text())]
    assert not torch.equal(read(streamed(args, tokenizer, tmp_path / "other", seed=1), 0, 200), everything)


def test_next_window_is_made_while_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def windows():
        for number, event in enumerate(made):
            event.set()
            yield number

    with ThreadPoolExecutor() as pool:
        for number in ahead(windows(), pool):
            assert number == 2 or made[number + 1].wait(timeout=10)
        assert number == 2


def test_reading_can_be_given_up(args, tokenizer, tmp_path):
    """Without a thread that reads on from the sources that others read."""
    text = streamed(args, tokenizer, tmp_path / "journal")
    everything = read(text, 0, 60)
    threads = threading.active_count()
    blocks = iter(text)
    next(blocks)
    assert threading.active_count() > threads
    blocks.close()
    assert threading.active_count() == threads
    assert torch.equal(read(text, 0, 60), everything)


def test_torn_journal(args, tokenizer, tmp_path):
    everything = read(streamed(args, tokenizer, tmp_path / "journal"), 0, 100)
    journal = (tmp_path / "journal").read_text()
    (tmp_path / "journal").write_text(journal[: len(journal) // 2])
    assert torch.equal(read(streamed(args, tokenizer, tmp_path / "journal"), 20, 80), everything[20:100])
    assert (tmp_path / "journal").read_text() == journal
    # What the worker of a killed process adds
    lines = journal.splitlines(keepends=True)
    (tmp_path / "journal").write_text("".join([*lines[:3], lines[4], lines[2], lines[3]]))
    assert torch.equal(read(streamed(args, tokenizer, tmp_path / "journal"), 20, 80), everything[20:100])
    assert (tmp_path / "journal").read_text() == journal


def test_every_document_is_read_once_before_a_source_begins_again(args):
    stream = DocumentStream(args, seed=0)
    drawn = {"sentence": [], "line": []}
    skipped = {"without text": 0, "empty": 0}
    for train, held_out, reasons, state in stream.windows(stream.start):
        for text in [*train, *held_out]:
            drawn[text.split()[0]].append(text)
        for reason, count in reasons.items():
            skipped[reason] += count
        assert len(train) + len(held_out) + sum(reasons.values()) == 20
        if state["passes"][0] == 1:
            break
    # The last window may hold the beginning of the next pass
    assert NUM_A <= len(drawn["sentence"]) < NUM_A + 20
    assert {*drawn["sentence"]} == {f"sentence number {i}" for i in range(NUM_A)}
    assert all(1 <= skipped[reason] <= 2 for reason in skipped)
    assert {*drawn["line"]} == {f"line {i}" for i in range(NUM_B)}


def test_held_out_documents_are_never_trained_on(args, tokenizer, tmp_path):
    stream = DocumentStream(args, seed=0)
    held_out = {*stream.sample().held_out["text"]}
    assert held_out
    for train, others, _, _ in itertools.islice(stream.windows(stream.start), 12):
        assert not held_out & {*train}
        assert {*others} <= held_out
    args.held_out_documents = 2
    assert {*DocumentStream(args, seed=0).sample().held_out["text"]} < held_out


def test_counts(args, tokenizer, tmp_path):
    text = streamed(args, tokenizer, tmp_path / "journal")
    read(text, 0, 60)
    windows = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    counts = text.count_text(windows[2]["blocks"])
    expected = list(itertools.islice(text.stream.windows(text.stream.start), 2))
    assert counts.documents.train == sum(len(train) for train, *_ in expected)
    assert counts.documents.held_out == sum(len(held_out) for _, held_out, *_ in expected)
    assert counts.num_bytes == sum(len(document.encode()) for train, *_ in expected for document in train)
    assert counts.num_tokens > counts.documents.train


@pytest.mark.parametrize("num_workers", [0, 1])
def test_source_that_breaks_off(tokenizer, tmp_path, num_workers):
    """A run cannot go on then, but has begun: the rest of what is there has been read."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"sentence {i}"}) + "\n" for i in range(3000)))
    (tmp_path / "b.jsonl").write_text('{"text": oops}\n')
    args = DataArguments(str(tmp_path), streaming=True, window=500, held_out=0.1, held_out_documents=3)
    text = streamed(args, tokenizer, tmp_path / "journal")
    assert text.stream.sample().counts.held_out == 3
    with pytest.raises(RunError, match="data.source: cannot read .*: JSON parse error"):
        read(text, 0, 100_000, num_workers)
    assert len((tmp_path / "journal").read_text().splitlines()) > 2


@pytest.mark.parametrize("content", ["", '{"text": " "}\n'])
def test_source_without_text(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match="window of documents without any to train on"):
        DocumentStream(DataArguments(str(tmp_path / "a.jsonl"), streaming=True, window=5), seed=0).sample()


def test_table_without_rows(tmp_path):
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="holds no documents"):
        DocumentStream(DataArguments(str(tmp_path / "a.parquet"), streaming=True, window=5), seed=0)
