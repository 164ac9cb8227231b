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
"""From sources of text to blocks: nothing lost, nothing leaked, always the same."""

import gzip
import json
import math
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import zstandard
from conftest import close, tiny_model
from datasets import Dataset
from transformers import AutoTokenizer, default_data_collator

from transformers_ddl import data
from transformers_ddl.cli import InputError
from transformers_ddl.data import DataArguments, pack, read_corpus
from transformers_ddl.streaming import DocumentStream
from transformers_ddl.tokenization import train_tokenizer


AWKWARD_TEXT = "  two\t\r\n<|endoftext|> <|pad|>\x00 naïve 中文 😀\u200d\n\n"


@pytest.fixture(autouse=True)
def datasets_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, the dog sat on the log"] * 3, vocab_size=270)


def sentences(count):
    return [f"This is sentence number {i}." for i in range(count)]


def all_texts(corpus):
    return [*corpus.train["text"], *corpus.held_out["text"]]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- Sources ----


def test_text_file_is_split_at_blank_lines(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\n".join(f"{text}\nIts second line.\n\n" for text in sentences(30)))
    corpus = read_corpus(DataArguments(str(file)))
    assert sorted(all_texts(corpus)) == sorted(f"{text}\nIts second line." for text in sentences(30))
    assert not corpus.skipped


def test_text_file_without_blank_lines_is_split_at_lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(sentences(30)) + "\n")
    assert sorted(all_texts(read_corpus(DataArguments(str(file))))) == sorted(sentences(30))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_table_column(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    rows = [{"body": text, "text": "not this column"} for text in [*sentences(30), None, " \n"]]
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        write_jsonl(file, rows)
    corpus = read_corpus(DataArguments(str(file), text_column="body"))
    assert sorted(all_texts(corpus)) == sorted(sentences(30))
    assert corpus.skipped == {"without text": 1, "empty": 1}
    assert str(corpus).startswith("32 documents read, 2 skipped (1 empty, 1 without text), ")


def test_folder_of_every_kind_of_file(tmp_path):
    texts = sentences(40)
    (tmp_path / "deeper").mkdir()
    for i, text in enumerate(texts[:10]):
        (tmp_path / "deeper" / f"{i}.md").write_text(f"{text}\n\nOne document.")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts[10:20]])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts[20:30]])
    Dataset.from_dict({"text": texts[30:]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("not looked at")

    corpus = read_corpus(DataArguments(str(tmp_path)))
    assert sorted(all_texts(corpus)) == sorted([f"{text}\n\nOne document." for text in texts[:10]] + texts[10:])
    assert corpus.skipped == {"not UTF-8": 1, "empty": 1}


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_files(tmp_path, compression):
    texts = sentences(30)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:20])
    compress = gzip.compress if compression == "gz" else zstandard.compress
    (tmp_path / f"rows.jsonl.{compression}").write_bytes(compress(lines.encode()))
    for i, text in enumerate(texts[20:]):
        (tmp_path / f"{i}.txt.{compression}").write_bytes(compress(text.encode()))
    corpus = read_corpus(DataArguments(str(tmp_path)))
    assert sorted(all_texts(corpus)) == sorted(texts)


def test_compressed_file_of_several_frames(tmp_path):
    lines = "\n".join(sentences(30)).encode()
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(lines[:99]) + zstandard.compress(lines[99:]))
    assert sorted(all_texts(read_corpus(DataArguments(str(tmp_path / "a.txt.zst"))))) == sorted(sentences(30))


def cut_off(content):
    return content[: len(content) // 2]


def invert_in_the_middle(content):
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 9]) + content[middle + 9 :]


@pytest.mark.parametrize("damage", [cut_off, invert_in_the_middle])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_compressed_file(tmp_path, name, damage, streaming):
    """What is before the damage is not taken for all there is."""
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    numbers = np.random.default_rng(0).integers(1 << 60, size=30_000)  # several blocks of zstandard
    content = compress("".join(json.dumps({"text": str(number)}) + "\n" for number in numbers).encode())
    (tmp_path / name).write_bytes(damage(content))
    args = DataArguments(str(tmp_path / name), window=40_000)
    with pytest.raises(InputError, match=f"data.source: cannot read .*{name}.*: ."):
        DocumentStream(args, seed=0).sample() if streaming else read_corpus(args)


def test_names_that_are_patterns(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl", "b?.jsonl"):
        write_jsonl(tmp_path / name, [{"text": f"{name} {i}"} for i in range(20)])
    texts = all_texts(read_corpus(DataArguments(str(tmp_path))))
    assert sorted(texts) == sorted(f"{path.name} {i}" for path in tmp_path.iterdir() for i in range(20))
    texts = all_texts(read_corpus(DataArguments(str(tmp_path / "a[1].jsonl"))))
    assert sorted(texts) == sorted(f"a[1].jsonl {i}" for i in range(20))


def test_pattern(tmp_path):
    (tmp_path / "deeper").mkdir()
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(20)])
    write_jsonl(tmp_path / "deeper" / "b.jsonl", [{"text": text} for text in sentences(40)[20:]])
    (tmp_path / "deeper" / "c.txt").write_text("not matched")
    corpus = read_corpus(DataArguments(f"{tmp_path}/**/*.jsonl"))
    assert sorted(all_texts(corpus)) == sorted(sentences(40))


def test_files_that_change_are_read_again(tmp_path):
    file = tmp_path / "lines.txt"
    for count in (30, 40):
        file.write_text("\n".join(sentences(count)))
        assert len(all_texts(read_corpus(DataArguments(str(file))))) == count


def test_mixture(tmp_path):
    """Documents are drawn by weight until both sources have been read, the shorter one several times."""
    write_jsonl(tmp_path / "a.jsonl", [{"body": f"a {i}"} for i in range(1000)])
    (tmp_path / "b.txt").write_text("\n".join(f"b {i}" for i in range(50)))
    mixture = [
        {"source": str(tmp_path / "a.jsonl"), "text_column": "body", "weight": 3},
        {"source": str(tmp_path / "b.txt"), "weight": 1.0},
    ]
    args = DataArguments(mixture)
    texts = all_texts(read_corpus(args))
    assert set(texts) == {f"a {i}" for i in range(1000)} | {f"b {i}" for i in range(50)}
    share = sum(text.startswith("a") for text in texts) / len(texts)
    assert share == pytest.approx(0.75, abs=0.05)  # four standard deviations of 1,300 draws
    assert texts == all_texts(read_corpus(args))


@pytest.mark.parametrize(
    "mixture, message",
    [
        ([], "source must name at least one"),
        ([{"weight": 1}], "must have the field source and no others but"),
        ([{"source": "a", "wait": 1}], "must have the field source and no others but"),
        ([{"source": "a", "weight": 0}], "weight must be a positive number, got 0"),
        ([{"source": "a", "weight": "heavy"}], "weight must be a positive number, got 'heavy'"),
        ([{"source": "a", "weight": True}], "weight must be a positive number, got True"),
        ([{"source": 5}], "source must be a string, got 5"),
        ([{"source": "a", "text_column": None}], "text_column must be a string, got None"),
    ],
)
def test_unusable_mixture(mixture, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(mixture)


def test_tokens_are_made_once_and_stay_on_disk(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(3000)])
    first = pack(read_corpus(DataArguments(str(tmp_path / "a.jsonl"))).train, tokenizer, 16)
    tokens = first.blocks.arguments[0]
    assert tokens.cache_files
    before = {file["filename"]: Path(file["filename"]).stat().st_mtime_ns for file in tokens.cache_files}
    second = pack(read_corpus(DataArguments(str(tmp_path / "a.jsonl"))).train, tokenizer, 16)
    after = second.blocks.arguments[0].cache_files
    assert before == {file["filename"]: Path(file["filename"]).stat().st_mtime_ns for file in after}
    # Blocks look into memory-mapped files instead of holding tokens
    assert sum(chunk.nbytes for chunk in first.blocks.chunks) > 10 * len(pickle.dumps(first.blocks))
    assert not any(chunk.flags.owndata for chunk in first.blocks.chunks)
    again = pickle.loads(pickle.dumps(first.blocks))
    assert all(torch.equal(again[7][name], first.blocks[7][name]) for name in ("input_ids", "labels"))


def test_processes(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(500)])
    blocks = []
    for num_proc in (None, 2):
        corpus = read_corpus(DataArguments(str(tmp_path / "a.jsonl"), num_proc=num_proc))
        blocks.append(pack(corpus.train, tokenizer, 16, num_proc=num_proc).blocks)
    assert len(blocks[0]) == len(blocks[1])
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*blocks))


def test_stdlib(tmp_path, monkeypatch):
    for name in ("os.py", "json/decoder.py", "site-packages/pip/main.py", "test/test_os.py", "asyncio/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "LICENSE.txt").write_text("not a source")
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = read_corpus(DataArguments("stdlib"))
    assert sorted(all_texts(corpus)) == ["# asyncio/__init__.py", "# json/decoder.py", "# os.py"]


def test_hub_dataset(monkeypatch):
    calls = []

    def load_dataset(path, split, streaming=False, num_proc=None, **options):
        calls.append((path, split, options))
        rows = Dataset.from_dict({"text": sentences(30)})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    corpus = read_corpus(DataArguments("owner/corpus-v1.1", subset="small"))
    assert sorted(all_texts(corpus)) == sorted(sentences(30))
    assert calls == [("owner/corpus-v1.1", "train", {"name": "small"})] * 2


@pytest.mark.parametrize(
    "source, message",
    [
        ("missing.txt", "no file or folder 'missing.txt'; allowed: 'stdlib', a file, a folder"),
        ("no/such/folder", "no file or folder 'no/such/folder'"),
        ("owner/dataset", "cannot read 'owner/dataset'"),
    ],
)
def test_missing_source(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        read_corpus(DataArguments(source))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", r"0 for training, 0 held out"),
        ("empty.jsonl", b"", r"1 skipped \(1 empty\), 0 for training, 0 held out"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "data.source: cannot read .*: no rows"),
        ("blank.txt", b" \n\n \n", r"0 for training, 0 held out"),
        ("single.txt", b"only one document", r"0 for training, 1 held out"),
        ("copies.txt", b"the same\n" * 50, r"0 for training, 50 held out"),
        ("latin.txt", "déjà vu".encode("latin-1"), r"1 skipped \(1 not UTF-8\)"),
        ("column.jsonl", b'{"body": "a", "id": 1}\n', "data.text_column: .* no column 'text'; allowed: body, id"),
        (
            "number.jsonl",
            b'{"text": 1}\n{"text": 2}\n',
            "data.text_column: .* holds int64; allowed: a column of strings",
        ),
        (
            "mixed.jsonl",
            b'{"text": "a"}\n{"text": [1]}\n',
            "data.text_column: .* holds Json; allowed: a column of str",
        ),
        ("broken.jsonl", b'{"text": "a"}\n{"text": oops\n', "data.source: cannot read .*broken.jsonl"),
        ("broken.parquet", b"not parquet", "data.source: cannot read .*broken.parquet"),
    ],
)
def test_unusable_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_corpus(DataArguments(str(tmp_path / name)))


def test_empty_parquet(tmp_path):
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="0 documents read"):
        read_corpus(DataArguments(str(tmp_path / "empty.parquet")))


# ---- Held-out split ----


def test_split_is_disjoint_complete_and_of_the_share_asked_for(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(sentences(2000)))
    corpus = read_corpus(DataArguments(str(file), held_out=0.1))
    train, held_out = set(corpus.train["text"]), set(corpus.held_out["text"])
    assert not train & held_out
    assert train | held_out == set(sentences(2000))
    assert 150 < len(held_out) < 250  # 200 ± 3.7 standard deviations


def test_split_depends_on_the_text_alone(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(200)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in sentences(250)[::-1] * 2])
    a, b = (read_corpus(DataArguments(str(tmp_path / name), held_out=0.2)) for name in ("a.jsonl", "b.jsonl"))
    assert len(set(b.held_out["text"])) * 2 == len(b.held_out)
    assert set(a.held_out["text"]) == set(b.held_out["text"]) & set(sentences(200))


def test_one_document_is_held_out_of_few(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(sentences(3)))
    corpus = read_corpus(DataArguments(str(file), held_out=1e-6))
    assert (len(corpus.train), len(corpus.held_out)) == (2, 1)


# ---- Tokenizer ----


def test_tokenizer_loses_nothing_and_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, reloaded):
        ids = each(AWKWARD_TEXT, split_special_tokens=True)["input_ids"]
        assert ids[0] == each.bos_token_id == each.eos_token_id != each.pad_token_id
        assert not {each.bos_token_id, each.pad_token_id} & {*ids[1:]}
        assert each.decode(ids[1:]) == AWKWARD_TEXT
    assert reloaded.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_learns_merges_and_always_the_same(tokenizer):
    texts = sentences(200)
    first, second = (train_tokenizer(texts, vocab_size=300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 300
    assert len(first(" sentence number")["input_ids"]) < len(tokenizer(" sentence number")["input_ids"])


# ---- Packing ----


@pytest.mark.parametrize("block_size", [2, 5, 16, 500])
def test_every_token_is_predicted_exactly_once(tokenizer, block_size):
    texts = [*sentences(7), AWKWARD_TEXT]
    packed = pack(Dataset.from_dict({"text": texts}), tokenizer, block_size)

    end = tokenizer.eos_token_id
    expected = []
    for text in texts:
        expected += [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], end]
    predicted, previous = [], end
    for block in packed.blocks:
        input_ids, labels = block["input_ids"].tolist(), block["labels"].tolist()
        assert len(input_ids) == len(labels) == block_size
        assert input_ids[0] == previous and labels[0] == -100
        targets = [label for label in labels if label != -100]
        assert input_ids[1 : 1 + len(targets)] == labels[1 : 1 + len(targets)] == targets
        assert set(input_ids[1 + len(targets) :]) <= {tokenizer.pad_token_id}
        predicted += targets
        previous = input_ids[-1]
    assert predicted == expected
    assert packed.num_tokens == len(expected)


@pytest.mark.parametrize("multiple", [1, 5, 100])
def test_number_of_blocks_is_a_multiple(tokenizer, multiple):
    """In those that are added nothing is predicted; the others are as without them."""
    texts = Dataset.from_dict({"text": sentences(7)})
    blocks = pack(texts, tokenizer, block_size=5, keep_documents_apart=True).blocks
    more = pack(texts, tokenizer, block_size=5, keep_documents_apart=True, multiple=multiple).blocks
    assert len(blocks) % 5 and len(blocks) < 100, "nothing to add"
    assert len(more) % multiple == 0 and len(blocks) <= len(more) < len(blocks) + multiple
    assert more.num_tokens == blocks.num_tokens
    for index, block in enumerate(more):
        if index < len(blocks):
            assert all(torch.equal(block[name], blocks[index][name]) for name in block)
        else:
            assert {*block["labels"].tolist()} == {-100} and {*block["input_ids"].tolist()} == {tokenizer.pad_token_id}


@pytest.mark.parametrize("block_size", [2, 5, 16, 500])
def test_documents_kept_apart(tokenizer, block_size):
    """The same blocks, with positions that count from each boundary, or from where the block cuts a document."""
    texts = Dataset.from_dict({"text": [*sentences(7), AWKWARD_TEXT]})
    plain = pack(texts, tokenizer, block_size).blocks
    apart = pack(texts, tokenizer, block_size, keep_documents_apart=True).blocks
    assert len(plain) == len(apart)
    for block, expected in zip(apart, plain):
        position, positions = -1, []
        for token in block["input_ids"].tolist():
            position = 0 if token == tokenizer.eos_token_id else position + 1
            positions.append(position)
        assert block.pop("position_ids").tolist() == positions
        assert all(torch.equal(block[name], expected[name]) for name in ("input_ids", "labels"))
        assert block.keys() == expected.keys()


def test_loss_of_documents_kept_apart(tokenizer):
    """Packed or alone: the same loss for every token of every document."""
    texts = sentences(5)
    (block,) = pack(Dataset.from_dict({"text": texts}), tokenizer, 500, keep_documents_apart=True).blocks
    model = tiny_model("tc", vocab_size=len(tokenizer))
    batch = {name: values[None] for name, values in block.items()}
    end = int((block["labels"] != -100).nonzero()[-1])
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, :end]
    alone = []
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        alone.append(model(input_ids=torch.tensor([ids])).logits[0])
    close(logits, torch.cat(alone))


def test_bytes_and_entropy(tokenizer):
    texts = ["aab", "é", "ab"]  # a, b and the two bytes of é
    packed = pack(Dataset.from_dict({"text": texts}), tokenizer, block_size=8)
    assert packed.num_bytes == 7
    expected = -sum(count / 7 * math.log2(count / 7) for count in (3, 2, 1, 1))
    assert packed.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_bits_per_byte_of_a_uniform_guess(tokenizer):
    """256 equally likely tokens of one byte each cost 8 bits per byte, and the ends of documents as much again."""
    packed = pack(Dataset.from_dict({"text": ["qz", "xj"]}), tokenizer, block_size=8)
    assert packed.num_tokens == 6
    assert packed.bits_per_byte(math.log(256)) == pytest.approx(8 * 6 / 4, rel=1e-12)


def test_blocks_feed_a_model(tokenizer):
    packed = pack(Dataset.from_dict({"text": sentences(9)}), tokenizer, block_size=8)
    batch = default_data_collator([packed.blocks[i] for i in range(3)])
    assert {name: (tuple(value.shape), str(value.dtype)) for name, value in batch.items()} == {
        "input_ids": ((3, 8), "torch.int64"),
        "labels": ((3, 8), "torch.int64"),
    }
    assert np.array_equal(batch["input_ids"][0, 1:], batch["labels"][0, 1:])
