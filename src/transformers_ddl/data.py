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
Text to blocks of tokens: read documents, hold some out, train a tokenizer, pack.

Every document is accounted for: it is in the training split, in the held-out split, or counted in `Corpus.skipped` with
the reason. Everything here is deterministic.
"""

import hashlib
import math
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .cli import InputError


TEXT = Features({"text": Value("string")})
STDLIB = "stdlib"
# How `datasets` reads a file; one with any other suffix is text.
FILE_TYPES = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Not part of the standard library, or not installed with every Python.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# Precedes every document and follows the last one, so it is both the bos and the eos token.
BOUNDARY_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
IGNORE_INDEX = -100


@dataclass
class DataArguments:
    """
    Where text comes from and which part of it is held out.

    Args:
        source (`str`):
            `stdlib` (the sources of the Python standard library), a text, JSON (lines) or Parquet file, a folder of such
            files, or the name of a dataset on the Hub, whose `train` split is read. Each row of a table is a document,
            each text file of a folder is one, and a text file by itself is split at blank lines, or at every line
            if it has no blank ones. Hidden files are not looked at.
        text_column (`str`, defaults to `"text"`):
            The column that holds the text in JSON, Parquet and Hub data.
        subset (`str`, *optional*):
            The configuration of a Hub dataset that has several.
        held_out (`float`, defaults to 0.05):
            Share of the documents to hold out, in (0, 1).
    """

    source: str
    text_column: str = "text"
    subset: str | None = None
    held_out: float = 0.05

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie strictly between 0 and 1, got {self.held_out}")


@dataclass
class Corpus:
    """The documents of a source, in datasets with the one column `text`."""

    train: Dataset
    held_out: Dataset
    skipped: Counter[str] = field(default_factory=Counter)  # reason: number of documents

    def __str__(self):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
        return (
            f"{len(self.train) + len(self.held_out) + self.skipped.total():,} documents read, "
            f"{self.skipped.total():,} skipped{f' ({reasons})' if reasons else ''}, "
            f"{len(self.train):,} for training, {len(self.held_out):,} held out"
        )


def read_corpus(args: DataArguments) -> Corpus:
    """
    Reads all documents of `args.source` and splits them.

    A document is held out when a hash of its text says so, whatever its place or name: the split does not move when
    files are renamed or added, and copies of a document fall on the same side. The document with the lowest hash is
    held out in any case.

    Raises:
        `InputError`: if the source does not exist, cannot be read, has no column `args.text_column` of text, or holds
            fewer than two different documents.
    """
    documents, skipped = _load_documents(args)

    hashes = {}  # index: hash as a fraction of 1
    for index, text in enumerate(documents["text"]):
        if text is None:
            skipped["without text"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        else:
            hashes[index] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    threshold = max(args.held_out, min(hashes.values(), default=0))
    corpus = Corpus(
        train=documents.select([index for index, value in hashes.items() if value > threshold]),
        held_out=documents.select([index for index, value in hashes.items() if value <= threshold]),
        skipped=skipped,
    )
    if not len(corpus.train) or not len(corpus.held_out):
        raise InputError(
            f"data.source: {args.source!r} holds too little text ({corpus}); "
            "allowed: at least two different documents, of which data.held_out leaves one for training"
        )
    return corpus


def _load_documents(args: DataArguments) -> tuple[Dataset, Counter[str]]:
    """Returns the documents and, by reason, the number of those that could not be read."""
    files = _list_files(args.source)
    if files is None:
        return _load_table(args, args.source, name=args.subset), Counter()
    if args.subset is not None:
        raise InputError(
            f"data.subset: {args.source!r} has no subset {args.subset!r}; allowed: null, or a Hub dataset"
        )
    return _load_files(args, files)


def _list_files(source: str) -> list[Path] | None:
    """The files of a local source; None for the name of a dataset on the Hub."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return [file for file in root.rglob("*.py") if not STDLIB_EXCLUDED & {*file.relative_to(root).parts}]
    path = Path(source).expanduser()
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
    if path.is_file():
        return [path]
    try:
        validate_repo_id(source)
        is_hub_name = path.suffix not in FILE_TYPES
    except HFValidationError:
        is_hub_name = False
    if not is_hub_name:
        raise InputError(
            f"data.source: no file or folder {source!r}; "
            f"allowed: {STDLIB!r}, a file, a folder or the name of a dataset on the Hub"
        )
    return None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _load_files(args: DataArguments, files: list[Path]) -> tuple[Dataset, Counter[str]]:
    texts, tables, skipped = [], {}, Counter()
    for file in sorted(files):
        file_type = FILE_TYPES.get(file.suffix.lower(), "text")
        if file.stat().st_size == 0:
            skipped["empty"] += 1
        elif file_type == "text":
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
        else:
            tables.setdefault(file_type, []).append(str(file))

    if len(files) == 1 and texts:
        (text,) = texts
        texts = re.split(r"\n\s*\n", text.strip())
        if len(texts) == 1:
            texts = text.strip().split("\n")
    datasets = [Dataset.from_dict({"text": texts}, features=TEXT)]
    datasets += [_load_table(args, file_type, data_files=paths) for file_type, paths in sorted(tables.items())]
    return concatenate_datasets(datasets), skipped


def _load_table(args: DataArguments, path: str, **options) -> Dataset:
    """The text column of what `load_dataset(path, **options)` finds, under the name `text`."""
    try:
        # The first row tells whether the column is there, before a large dataset is downloaded and converted.
        row = next(iter(load_dataset(path, split="train", streaming=True, **options)), None)
        if row is None:
            return Dataset.from_dict({"text": []}, features=TEXT)
        if args.text_column not in row:
            raise InputError(
                f"data.text_column: {args.source!r} has no column {args.text_column!r}; allowed: {', '.join(row)}"
            )
        table = load_dataset(path, split="train", **options)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"data.source: cannot read {args.source!r}: {error.__cause__ or error}") from error

    dtype = table.features[args.text_column].dtype
    if dtype not in ("string", "large_string"):
        raise InputError(
            f"data.text_column: column {args.text_column!r} of {args.source!r} holds {dtype}; allowed: a column of strings"
        )
    table = table.select_columns(args.text_column).rename_columns({args.text_column: "text"})
    return table if table.features == TEXT else table.cast(TEXT)  # casting copies


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer, which encodes any text without loss.

    It puts the boundary token, `bos` and `eos` in one, before a text; pass `split_special_tokens=True` to encode text that
    may itself contain the special tokens' names.

    Args:
        texts: What to learn merges from.
        vocab_size: Tokens including the 256 bytes and the 2 special ones; there are fewer if `texts` offers no more merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARY_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY_TOKEN} $A", special_tokens=[(BOUNDARY_TOKEN, tokenizer.token_to_id(BOUNDARY_TOKEN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOUNDARY_TOKEN, eos_token=BOUNDARY_TOKEN, pad_token=PAD_TOKEN
    )


@dataclass
class PackedText:
    """
    Documents as fixed-length blocks of one token stream, and what it takes to express a loss in bits per byte.

    The stream is `boundary, document, boundary, document, ..., boundary`. Neighbouring blocks overlap by one token, the
    last of one being the first, unpredicted, of the next, so that every token of the stream but its first is predicted
    exactly once: all tokens of all documents and one boundary after each.
    """

    blocks: Dataset  # `input_ids`, `labels` (-100 where nothing is predicted): [block_size] each
    num_tokens: int  # predicted tokens: those of the documents, and one boundary per document
    num_bytes: int  # of the documents' UTF-8 text; boundaries have none
    unigram_entropy: float  # of these bytes, in bits per byte

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Bits per byte of text at a mean loss over `num_tokens`: the cost of the boundaries is included."""
        return nats_per_token * self.num_tokens / self.num_bytes / math.log(2)


def pack(documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PackedText:
    """
    Tokenises documents and concatenates them into blocks of `block_size` tokens; the last one is padded on the right.

    Args:
        documents: A dataset with the column `text`.
        tokenizer: One that puts a boundary token before each text, as those of [`train_tokenizer`] do.
        block_size: At least 2.
    """
    stream, byte_counts = [], np.zeros(256, dtype=np.int64)
    for batch in documents.iter(batch_size=1000):
        encoded = tokenizer(batch["text"], split_special_tokens=True, return_attention_mask=False)["input_ids"]
        stream += [np.array(ids, dtype=np.int32) for ids in encoded]
        byte_counts += np.bincount(np.frombuffer("".join(batch["text"]).encode(), dtype=np.uint8), minlength=256)
    stream = np.concatenate([*stream, np.array([tokenizer.eos_token_id], dtype=np.int32)])

    num_tokens = len(stream) - 1
    num_blocks = math.ceil(num_tokens / (block_size - 1))
    padding = num_blocks * (block_size - 1) - num_tokens
    starts = np.arange(num_blocks)[:, None] * (block_size - 1)
    windows = starts + np.arange(block_size)
    input_ids = np.pad(stream, (0, padding), constant_values=tokenizer.pad_token_id)[windows]
    labels = np.pad(stream, (0, padding), constant_values=IGNORE_INDEX)[windows]
    labels[:, 0] = IGNORE_INDEX

    frequencies = byte_counts[byte_counts > 0] / byte_counts.sum()
    return PackedText(
        blocks=Dataset.from_dict({"input_ids": input_ids, "labels": labels}).with_format("torch"),
        num_tokens=num_tokens,
        num_bytes=int(byte_counts.sum()),
        unigram_entropy=float(-(frequencies * np.log2(frequencies)).sum()),
    )
