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
"""A dataset of the Hub, read by name over HTTP while a model is trained on it."""

import hashlib
import io
import json
import subprocess
import sys

import pytest
from datasets import Dataset
from hub_server import Handler, LoopbackHub
from test_resume import REPOSITORY, assert_same_run, run_until, write_inputs

from transformers_ddl.checkpoints import last_complete_checkpoint


NAME = "user/web"
CARD = """\
---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample
  data_files: [{split: train, path: sample/*}]
---
"""


def entry(path: str, content: bytes | None) -> dict:
    """What the Hub tells of a file, or of a folder."""
    if content is None:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class DatasetHandler(Handler):
    """What `datasets` asks a Hub for."""

    name = r"(?P<name>[^/]+/[^/]+)"
    routes = [
        ("GET", rf"/api/datasets/{name}(/revision/(?P<revision>\w+))?", "info"),
        ("GET", rf"/api/datasets/{name}/tree/(?P<revision>\w+)(/(?P<path>.+))?", "tree"),
        ("POST", rf"/api/datasets/{name}/paths-info/(?P<revision>\w+)", "paths_info"),
        ("GET|HEAD", rf"/datasets/{name}/resolve/(?P<revision>\w+)/(?P<path>.+)", "resolve"),
    ]

    def tree(self, name, revision, path):
        """What lies directly in a folder."""
        prefix = f"{path}/" if path else ""
        entries = {}
        for file, content in self.server.files(name).items():
            if file.startswith(prefix):
                child, *deeper = file.removeprefix(prefix).split("/")
                entries[child] = entry(prefix + child, None if deeper else content)
        self.answer(list(entries.values()))

    def paths_info(self, name, revision):
        files = self.server.files(name)
        paths = [path for path in json.loads(self.content)["paths"] if any(file.startswith(path) for file in files)]
        self.answer([entry(path, files.get(path)) for path in paths])

    def answer(self, content, status=200, headers=None):
        """Also a part of a file."""
        if self.headers.get("Range") and isinstance(content, bytes):
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            content_range = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            content, status, headers = part, 206, {**(headers or {}), "Content-Range": content_range}
        super().answer(content, status, headers)


def parquet(columns) -> bytes:
    buffer = io.BytesIO()
    Dataset.from_dict(columns).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        hub.RequestHandlerClass = DatasetHandler
        files = {"README.md": CARD.encode(), "data/urls.parquet": parquet({"url": ["http://localhost"] * 60})}
        for shard in range(2):
            texts = [f"{shard} {i} green bottles, hanging on the wall." for i in range(30)]
            files[f"sample/{shard}.parquet"] = parquet({"text": texts, "score": [4.0] * 30})
        hub.repositories[NAME] = {"private": False, "commits": [files]}
        yield hub


@pytest.mark.slow
def test_streamed_by_name_killed_and_continued(hub, tmp_path, monkeypatch):
    """With another number of processes that read: the same losses and counts as without an interruption."""
    write_inputs(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "*")
    options = ["--data.source", NAME, "--data.subset", "sample", "--data.streaming", "true", "--data.window", "25"]

    def pretrain(*arguments):
        command = [sys.executable, REPOSITORY / "scripts" / "pretrain.py", "config.yaml", *options, *arguments]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr

    pretrain("--training.output_dir", "uninterrupted")
    out = tmp_path / "out"
    workers = ("--training.dataloader_num_workers", "1")
    run_until(out / "checkpoint-16" / "optimizer.pt", tmp_path, *options, *workers)
    assert last_complete_checkpoint(out) == out / "checkpoint-12"
    pretrain()
    assert_same_run(out, tmp_path / "uninterrupted")
    counts = (out / "text_counts.json").read_text()
    assert counts == (tmp_path / "uninterrupted" / "text_counts.json").read_text()
    assert {*hub.not_understood} <= {"GET /api/agent-harnesses"}  # of `huggingface_hub`, for people's statistics
    card = (out / "README.md").read_text()
    assert f"- {NAME}" in card and "sample" in card
