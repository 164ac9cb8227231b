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
"""Publishing: a folder that holds a finished model becomes one commit of a repository on the Hugging Face Hub."""

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

import transformers_ddl

from .cards import check_metadata
from .cli import InputError, RunError
from .configuration_ddl import DDLConfig


# What training leaves beside a model: checkpoints, states of data, optimizer and Trainer, logs, samples, and hidden files
LEFT_OUT = [
    "checkpoint-*/",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "stream.jsonl",
    "samples/",
    "*training_args.bin",
    "runs/",
    "logs/",
    "*.log",
    "*.tfevents.*",
    "*__pycache__/",
    ".*",
    "*/.*",
    "*/README.md",
]


def main(arguments: list[str]):
    """`transformers-ddl push FOLDER REPO_ID [--private] [--dry-run]`."""
    parser = argparse.ArgumentParser(
        prog="transformers-ddl push",
        description="Upload a finished model to the Hugging Face Hub, in one commit. Needs a token with the right to write: "
        "`hf auth login`, or the environment variable HF_TOKEN.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="what `transformers-ddl pretrain` or `finetune` wrote, or another model with its tokenizer and a card",
    )
    parser.add_argument("repo_id", help="USER/NAME or ORGANISATION/NAME; made if there is none")
    parser.add_argument("--private", action="store_true", help="only you or the organisation may see the repository")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, without a network")
    options = parser.parse_args(arguments)
    push(options.folder, options.repo_id, private=options.private, dry_run=options.dry_run)


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None, dry_run: bool = False):
    """
    Uploads a model with its code, tokenizer and model card, and the folder's other files but for `LEFT_OUT`. The
    repository is made if there is none. It gets one commit with everything, or none if anything fails;
    weights that it has in files of other names are removed.

    Args:
        revision: The branch to commit to, `main` if None.
        dry_run: Whether only to print what would be uploaded, which needs neither network nor token.

    Raises:
        `InputError`: if `repo_id` is no name, the folder does not hold a complete model, or a repository that should be
            private is public.
        `RunError`: if the Hub refuses, or the connection fails in spite of retries.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"repo_id: {error}") from error
    if "/" not in repo_id:
        raise InputError(f"repo_id: {repo_id!r} does not say whose it is; allowed: USER/NAME or ORGANISATION/NAME")
    check_model(folder)

    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    chosen = list(filter_repo_objects(files, ignore_patterns=LEFT_OUT))
    additions = [
        CommitOperationAdd(file, named_card(folder, repo_id) if file == "README.md" else folder / file)
        for file in chosen
    ]
    print(f"{'would push' if dry_run else 'pushing'} {folder} to {repo_id}:")
    for addition in additions:
        print(f"{addition.upload_info.size:>15,}  {addition.path_in_repo}")
    size = sum(addition.upload_info.size for addition in additions)
    print(f"{size:>15,}  bytes in {len(additions)} files; left out:")
    for file in files:
        if file not in chosen:
            print(f"{(folder / file).stat().st_size:>15,}  {file}")
    if dry_run:
        return

    try:
        hub = HfApi(token=True, library_name="transformers_ddl", library_version=transformers_ddl.__version__)
        hub.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not hub.model_info(repo_id).private:
            raise InputError(
                f"--private: {repo_id} exists and is public; allowed: a new name, or a private repository"
            )
        # Weights of an earlier commit in other files might be loaded instead
        stale = [
            CommitOperationDelete(file)
            for file in hub.list_repo_files(repo_id, revision=revision)
            if fnmatch(file, "model*.safetensors*") and file not in chosen
        ]
        # `upload_folder` may split what it uploads into several commits
        commit = hub.create_commit(repo_id, additions + stale, commit_message="Upload model", revision=revision)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # Uploads over HTTP that fail raise a `RuntimeError` that leaves the reason to its cause, those to Xet one without
        reason = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else error
        raise RunError(f"cannot push {folder} to {repo_id}: {reason}; `transformers-ddl push` tries again") from error
    print(f"pushed: {commit.commit_url}")


def named_card(folder: Path, repo_id: str) -> bytes:
    """The model card; its examples load the model by the name of its folder, and here by that of the repository."""
    card = ModelCard.load(folder / "README.md")
    card.text = card.text.replace(f'"{card.data.model_name}"', f'"{repo_id}"')
    return str(card).encode()


def check_model(folder: Path):
    """
    Checks that a model, its code and its tokenizer can be loaded from a folder alone, and that it has a model card whose
    metadata the Hub can read. Weights are looked up by name and shape and not read.

    Raises:
        `InputError`: for the first thing that is missing.
    """
    if not folder.is_dir():
        raise InputError(f"folder: no folder {str(folder)!r}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != DDLConfig.model_type or not config.get("auto_map"):
            raise ValueError("config.json was not written by the `save_pretrained` of a DDL model")
        for name in config["auto_map"].values():
            get_relative_import_files(folder / f"{name.split('.')[0]}.py")  # raises an error if one is missing
        check_weights(folder, config)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) > config["vocab_size"]:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, the model {config['vocab_size']}")
        check_card(folder / "README.md")
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise InputError(f"folder: {str(folder)!r} does not hold a complete model: {error}") from error


def check_weights(folder: Path, config: dict):
    """Checks that the weights are those of the model that `config` names."""
    architectures = config.get("architectures") or []
    if not architectures or not hasattr(transformers_ddl, architectures[0]):
        raise ValueError(f"config.json: architectures must name a DDL model, got {architectures}")
    model_class = getattr(transformers_ddl, architectures[0])
    _, loaded = model_class.from_pretrained(folder, device_map="meta", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys"):
        if loaded[problem]:
            raise ValueError(f"weights: {problem.replace('_', ' ')} {', '.join(sorted(loaded[problem]))}")


def check_card(path: Path):
    """Checks the metadata of a model card."""
    if not path.is_file():
        raise ValueError(f"its model card, {path.name}, is missing; `save_pretrained` and `convert` write none")
    try:
        data = ModelCard.load(path).data
        if data.library_name != "transformers":
            raise ValueError(f"library_name must be transformers, got {data.library_name!r}")
        check_metadata(data)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: {error}") from error
