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
Checkpoints that are known to be complete.

A manifest with the size and the SHA-256 of every file of a checkpoint is the last thing written into it. A checkpoint
without one was interrupted while it was written; one that differs from it has been damaged since.
"""

import json
import os
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"


def write_atomically(path: Path, text: str):
    """Writes a file that is there entirely or not at all, whenever the process is killed or the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def seal(checkpoint: Path):
    """Writes the manifest of a checkpoint that has been saved."""
    manifest = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST_FILE:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                sha256 = sha_fileobj(file).hex()
            manifest[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "sha256": sha256}
    write_atomically(checkpoint / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was sealed."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "saving it was interrupted"
    except (OSError, ValueError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        try:
            with open(path, "rb") as file:
                sha256 = sha_fileobj(file).hex()
        except OSError as error:  # of a disk that fails
            return f"{name} cannot be read: {error}"
        if sha256 != expected["sha256"]:
            return f"the content of {name} has changed"
    return None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in a folder, if any, with a warning for each newer one that is damaged."""
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning(f"{checkpoint} cannot be used: {damage}; looking for an earlier checkpoint")
    return None
