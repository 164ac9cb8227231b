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
Text to blocks of tokens: read documents, hold some out, pack.

Every document is accounted for: it is used for training, held out, or counted as skipped with the reason. Everything here is
deterministic. Tables of documents and tokens are Arrow files in the cache of `datasets`, mapped into memory: they are made once
and need not fit.
"""

import glob
import hashlib
import math
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np
import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedTokenizerBase

from .cli import InputError


# `problem` says why there is no text
DOCUMENTS = Features({"text": Value("string"), "problem": Value("string")})
STDLIB = "stdlib"
# How `datasets` reads a file; one with any other suffix is text.
FILE_TYPES = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = {".gz", ".zst"}
# Not part of the standard library, or not installed with every Python.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

IGNORE_INDEX = -100


@dataclass
class TextSource:
    """
    Where text comes from.

    Args:
        source (`str`):
            `stdlib` (the sources of the Python standard library), a text, JSON (lines) or Parquet file, also compressed
            (`.gz`, `.zst`), a folder of such files, a pattern such as `texts/**/*.jsonl.zst`, or the name of a dataset on the
            Hub, whose `train` split is read. Each row of a table is a document, each text file of several is one, and a
            text file by itself is split at blank lines, or at every line if it has no blank ones. Hidden files are not
            looked at.
        text_column (`str`, defaults to `"text"`):
            The column that holds the text in JSON, Parquet and Hub data.
        subset (`str`, *optional*):
            The configuration of a Hub dataset that has several.
        weight (`float`, defaults to 1):
            In a mixture, how often a document is drawn from this source, relative to the others.
    """

    source: str
    text_column: str = "text"
    subset: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        for name in ("source", "text_column", "subset"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "subset" and value is None):
                raise ValueError(f"{name} must be a string, got {value!r}")
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not is_number or not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be a positive number, got {self.weight!r}")


@dataclass
class DataArguments:
    """
    Where text comes from, which part of it is held out, and how it is made into blocks.

    Args:
        source (`str` or `list[dict]`):
            See [`TextSource`]; or a mixture, a list of such sources, each with its fields: documents are drawn from them
            in proportion to their weights, until each has been read once; the shorter ones begin again.
        text_column (`str`, defaults to `"text"`), subset (`str`, *optional*):
            See [`TextSource`]; for a mixture they are fields of its sources.
        held_out (`float`, defaults to 0.05):
            Share of the documents to hold out, in (0, 1).
        packing (`"concatenate"` or `"documents"`, defaults to `"concatenate"`):
            Whether a token attends to all tokens before it in its block, as in the paper, or to those of its document alone;
            then positions count from the document's start (`position_ids`).
        streaming (`bool`, defaults to False):
            Whether to tokenise documents while training, instead of reading and tokenising all of them first. Needs
            `training.max_steps`.
        window (`int`, defaults to 10,000):
            With `streaming`, the number of documents that are shuffled among each other. The tokenizer is trained on the first
            of them.
        held_out_documents (`int`, defaults to 1,000):
            With `streaming`, how many of the held-out documents are evaluated on, at most.
        num_proc (`int`, *optional*):
            Processes that read and tokenise, without `streaming`; one, with all threads, if None.
    """

    source: str | list[dict]
    text_column: str = "text"
    subset: str | None = None
    held_out: float = 0.05
    packing: Literal["concatenate", "documents"] = "concatenate"
    streaming: bool = False
    window: int = 10_000
    held_out_documents: int = 1_000
    num_proc: int | None = None

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie strictly between 0 and 1, got {self.held_out}")
        for name in ("window", "held_out_documents", "num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.source:
            raise ValueError("source must name at least one source")
        if not isinstance(self.source, str):
            if self.text_column != "text" or self.subset is not None:
                raise ValueError(
                    "text_column and subset are fields of each source of a mixture; none may be set beside it"
                )
            allowed = {field.name for field in fields(TextSource)}
            for each in self.source:
                if "source" not in each or not each.keys() <= allowed:
                    raise ValueError(f"source: {each} must have the field source and no others but {sorted(allowed)}")
        _ = self.sources  # checks them

    @property
    def sources(self) -> list[TextSource]:
        if isinstance(self.source, str):
            return [TextSource(self.source, self.text_column, self.subset)]
        return [TextSource(**each) for each in self.source]

    @property
    def name(self) -> str:
        """The sources, for people."""
        return " + ".join(each.source for each in self.sources)


@dataclass
class DocumentCounts:
    """What has become of the documents read."""

    train: int = 0
    held_out: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason: number of documents

    def __str__(self):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
        num_skipped = sum(self.skipped.values())
        return (
            f"{self.train + self.held_out + num_skipped:,} documents read, "
            f"{num_skipped:,} skipped{f' ({reasons})' if reasons else ''}, "
            f"{self.train:,} for training, {self.held_out:,} held out"
        )


@dataclass
class TextCounts:
    """What a model is trained on."""

    documents: DocumentCounts
    num_tokens: int  # of the documents for training, with one boundary each
    num_bytes: int  # of their UTF-8 text


@dataclass
class Corpus:
    """The documents of a source, in datasets with the columns `text` and `problem` (None)."""

    train: Dataset
    held_out: Dataset
    skipped: dict[str, int] = field(default_factory=dict)  # reason: number of documents

    @property
    def counts(self) -> DocumentCounts:
        return DocumentCounts(len(self.train), len(self.held_out), self.skipped)

    def __str__(self):
        return str(self.counts)


def read_corpus(args: DataArguments) -> Corpus:
    """
    Reads all documents of `args.source` and splits them.

    A document is held out when a hash of its text says so, whatever its place or name: the split does not move when
    files are renamed or added, and copies of a document fall on the same side. The document with the lowest hash is
    held out in any case.

    Raises:
        `InputError`: if the source does not exist, cannot be read, has no column `text_column` of text, or holds
            fewer than two different documents.
    """
    sources = args.sources
    tables = [load_documents(source, num_proc=args.num_proc) for source in sources]
    if len(tables) == 1:
        (documents,) = tables
    elif empty := [source.source for source, table in zip(sources, tables) if not len(table)]:
        raise InputError(f"data.source: {', '.join(empty)}: no documents to mix")
    else:
        weights = np.array([source.weight for source in sources])
        documents = interleave_datasets(
            tables, probabilities=list(weights / weights.sum()), seed=0, stopping_strategy="all_exhausted"
        )
    corpus = split(documents, check_documents, args.held_out, args.num_proc)
    if not len(corpus.train) or not len(corpus.held_out):
        raise InputError(
            f"data.source: {args.name!r} holds too little text ({corpus}); "
            "allowed: at least two different documents, of which data.held_out leaves one for training"
        )
    return corpus


def split(
    documents: Dataset, check: Callable[[dict[str, list]], dict[str, list]], held_out: float, num_proc: int | None
) -> Corpus:
    """
    Args:
        check: Gives for a batch of rows, under `problem`, why each is skipped, or None, and a `hash` of it in [0, 1).
        held_out: Rows whose hash is not above it are held out, and the row of the lowest hash in any case.
    """
    if not len(documents):
        return Corpus(documents, documents)
    checked = documents.map(
        check,
        batched=True,
        remove_columns=documents.column_names,
        features=Features({"problem": Value("string"), "hash": Value("float64")}),
        num_proc=num_proc,
        desc="checking documents",
    )
    problems, hashes = checked.data.column("problem"), checked.data.column("hash").to_numpy()
    usable = problems.is_null().to_numpy()
    threshold = max(held_out, min(hashes[usable], default=0))
    return Corpus(
        train=documents.select(np.flatnonzero(usable & (hashes > threshold))),
        held_out=documents.select(np.flatnonzero(usable & (hashes <= threshold))),
        skipped={each["values"]: each["counts"] for each in problems.drop_null().value_counts().to_pylist()},
    )


def check_documents(documents: dict[str, list]) -> dict[str, list]:
    """Why a document is skipped, if it is, and a hash of its text as a fraction of 1."""
    problems, hashes = [], []
    for text, problem in zip(documents["text"], documents["problem"]):
        if problem is None and text is None:
            problem = "without text"
        elif problem is None and not text.strip():
            problem = "empty"
        problems.append(problem)
        hashes.append(hash_fraction(text or ""))
    return {"problem": problems, "hash": hashes}


def hash_fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def load_documents(
    source: TextSource, streaming: bool = False, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """
    All documents of a source, those without text included, with the columns `text` and `problem`.

    Raises:
        `InputError`: if the source does not exist, cannot be read or has no column `text_column` of text.
    """
    files = list_files(source.source)
    if files is None:
        return _load_table(source, source.source, streaming, num_proc, name=source.subset)
    if source.subset is not None:
        raise InputError(
            f"data.subset: {source.source!r} has no subset {source.subset!r}; allowed: null, or a Hub dataset"
        )
    texts, tables = [], {}
    for file in sorted(files):
        stat = file.stat()
        if file_type(file) == "text" or stat.st_size == 0:
            texts.append((str(file), stat.st_size, stat.st_mtime_ns))  # the key to the cached table
        else:
            tables.setdefault(file_type(file), []).append(glob.escape(str(file)))  # `datasets` takes it for a pattern

    parts = []
    if texts:
        from_generator = (IterableDataset if streaming else Dataset).from_generator
        with reading(source.source):
            parts.append(
                from_generator(_read_texts, gen_kwargs={"files": texts, "split": len(files) == 1}, features=DOCUMENTS)
            )
    for type_of_files, paths in sorted(tables.items()):
        parts.append(_load_table(source, type_of_files, streaming, num_proc, data_files=paths))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


@contextmanager
def reading(source: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what parsers and decompressors raise has no base of its own
        reason = str(error.__cause__ or error) or "no rows"  # a bare StopIteration, from the reader of JSON
        raise InputError(f"data.source: cannot read {source!r}: {reason}") from error


def file_type(path: Path) -> str:
    """How `datasets` reads a file."""
    return FILE_TYPES.get(_suffix(path), "text")


def _suffix(path: Path) -> str:
    """The suffix that tells the type of a file, whether it is compressed or not."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def list_files(source: str) -> list[Path] | None:
    """The files of a local source; None for the name of a dataset on the Hub."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return [file for file in root.rglob("*.py") if not STDLIB_EXCLUDED & {*file.relative_to(root).parts}]
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
        if not files:
            raise InputError(f"data.source: folder {source!r} holds no files")
        return files
    if path.is_file():
        return [path]
    if files := [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]:
        return files
    try:
        validate_repo_id(source)
        is_hub_name = _suffix(path) not in FILE_TYPES
    except HFValidationError:
        is_hub_name = False
    if not is_hub_name:
        raise InputError(
            f"data.source: no file or folder {source!r}; "
            f"allowed: {STDLIB!r}, a file, a folder, a pattern or the name of a dataset on the Hub"
        )
    return None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_texts(files: list[tuple[str, int, int]], split: bool) -> Iterator[dict[str, str | None]]:
    """The documents of text files, each of which is one or is split into several."""
    for path, *_ in files:
        try:
            text = _read_text(path)
        except UnicodeDecodeError:
            yield {"text": None, "problem": "not UTF-8"}
            continue
        texts = [text]
        if split:
            texts = re.split(r"\n\s*\n", text.strip())
            if len(texts) == 1:
                texts = text.strip().split("\n")
        for text in texts:
            yield {"text": text, "problem": None}


def _read_text(path: str) -> str:
    with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
        text = file.read()
    if path.lower().endswith(".zst"):  # of a file that is cut off, the reader would take what is there
        import zstandard

        rest = Path(path).read_bytes()
        while rest:
            frame = zstandard.ZstdDecompressor().decompressobj()
            frame.decompress(rest)
            if not frame.eof:
                raise EOFError(f"{path} ends before its content does")
            rest = frame.unused_data
    return text


def _load_table(
    source: TextSource, path: str, streaming: bool, num_proc: int | None, **options
) -> Dataset | IterableDataset:
    """The text column of what `load_dataset(path, **options)` finds, under the name `text`."""
    column = source.text_column
    with reading(source.source):
        # The first row tells whether the column is there, before a large dataset is downloaded and converted.
        table = load_dataset(path, split="train", streaming=True, **options)
        row = next(iter(table), None)
        if row is not None and column not in row:
            raise InputError(
                f"data.text_column: {source.source!r} has no column {column!r}; allowed: {', '.join(row)}"
            )
        if row is None and streaming:
            raise InputError(f"data.source: {source.source!r} holds no documents")
        if row is None:
            return Dataset.from_dict({"text": [], "problem": []}, features=DOCUMENTS)
        if not streaming:
            table = load_dataset(path, split="train", num_proc=num_proc, **options)

    if table.features:
        feature = table.features[column]
        dtype = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    else:
        dtype = type(row[column]).__name__  # JSON has no schema
    if dtype not in ("string", "large_string", "str", "NoneType"):
        raise InputError(
            f"data.text_column: column {column!r} of {source.source!r} holds {dtype}; allowed: a column of strings"
        )
    return table.select_columns(column).map(
        partial(_as_documents, column=column), batched=True, features=DOCUMENTS, remove_columns=[column]
    )


def _as_documents(rows: dict[str, list], column: str) -> dict[str, list]:
    return {"text": rows[column], "problem": [None] * len(rows[column])}


class Blocks(torch.utils.data.Dataset):
    """
    Blocks `[block_size]` of the token stream `boundary, document, boundary, document, ..., boundary`: `input_ids`, `labels`
    (-100 where nothing is predicted) and, if documents are kept apart, `position_ids`, all int64.

    Neighbouring blocks overlap by one token, the last of one being the first, unpredicted, of the next, so that every token of
    the stream but its first is predicted exactly once: all tokens of all documents and one boundary after each. The last block is
    padded on the right.

    Args:
        tokens: A dataset whose column `input_ids` has, for each document, a boundary and its tokens. It is read in place.
        tokenizer: Its eos token is the boundary.
        block_size: At least 2.
        keep_documents_apart: Whether positions begin anew at every boundary.
        multiple: What the number of blocks is a multiple of; the last ones may be nothing but padding. If it is the number of
            sequences of a step, no process has to see a block twice for all to have equally many.
    """

    def __init__(
        self,
        tokens: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        keep_documents_apart: bool = False,
        multiple: int = 1,
    ):
        self.arguments = tokens, tokenizer, block_size, keep_documents_apart, multiple
        self.block_size = block_size
        self.keep_documents_apart = keep_documents_apart
        self.multiple = multiple
        self.boundary = tokenizer.eos_token_id
        self.padding = self.boundary if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.chunks = [chunk.flatten().to_numpy() for chunk in tokens.data.column("input_ids").chunks]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks])
        self.num_tokens = int(self.ends[-1])

    def __reduce__(self):
        return Blocks, self.arguments  # to spawned workers go the names of files instead of what they hold

    def __len__(self) -> int:
        return math.ceil(self.num_tokens / (self.block_size - 1) / self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self.block_size - 1)
        block = np.full(self.block_size, self.padding, dtype=np.int64)
        position, chunk = start, int(np.searchsorted(self.ends, start, side="right"))
        while position < min(start + self.block_size, self.num_tokens):
            offset = position - (self.ends[chunk] - len(self.chunks[chunk]))
            piece = self.chunks[chunk][offset : offset + start + self.block_size - position]
            block[position - start : position - start + len(piece)] = piece
            position, chunk = position + len(piece), chunk + 1

        places = np.arange(self.block_size)
        end = self.num_tokens - start  # place of the last boundary, if it is in this block
        if 0 <= end < self.block_size:
            block[end] = self.boundary
        item = {"input_ids": block, "labels": np.where((places > 0) & (places <= end), block, IGNORE_INDEX)}
        if self.keep_documents_apart:
            starts = np.where(block == self.boundary, places, 0)
            item["position_ids"] = places - np.maximum.accumulate(starts)
        return {name: torch.from_numpy(values) for name, values in item.items()}


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """`input_ids` (a boundary and the text's tokens) and the number of bytes of each text."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return {
        "input_ids": [[tokenizer.eos_token_id, *ids] for ids in encoded["input_ids"]],
        "num_bytes": [len(text.encode()) for text in texts],
    }


TOKENS = Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64")})


@dataclass
class PackedText:
    """Documents as blocks of tokens, and what it takes to express a loss in bits per byte."""

    documents: Dataset
    blocks: Blocks
    num_bytes: int  # of the documents' UTF-8 text; boundaries have none

    @property
    def num_tokens(self) -> int:
        """Predicted tokens: those of the documents, and one boundary per document."""
        return self.blocks.num_tokens

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of the bytes, in bits per byte."""
        counts = np.zeros(256, dtype=np.int64)
        for batch in self.documents.iter(batch_size=1000):
            counts += np.bincount(np.frombuffer("".join(batch["text"]).encode(), dtype=np.uint8), minlength=256)
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * np.log2(frequencies)).sum())

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Bits per byte of text at a mean loss over `num_tokens`: the cost of the boundaries is included."""
        return nats_per_token * self.num_tokens / self.num_bytes / math.log(2)


def pack(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    keep_documents_apart: bool = False,
    multiple: int = 1,
    num_proc: int | None = None,
) -> PackedText:
    """Tokenises the column `text` of documents and concatenates them into [`Blocks`]."""
    tokens = documents.map(
        partial(tokenize, tokenizer=tokenizer),
        input_columns="text",
        batched=True,
        remove_columns=documents.column_names,
        features=TOKENS,
        num_proc=num_proc,
        desc="tokenising",
    )
    return PackedText(
        documents=documents,
        blocks=Blocks(tokens, tokenizer, block_size, keep_documents_apart, multiple),
        num_bytes=int(tokens.data.column("num_bytes").to_numpy().sum()),
    )
