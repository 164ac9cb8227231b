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
"""Reading what users wrote: YAML files, and values that a class may refuse."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HTTPError, StrictDataclassError

from .cli import InputError


class YamlLoader(yaml.SafeLoader):
    """Reads `1e-3` as a number and `no` as a string, as YAML 1.2 does; PyYAML follows YAML 1.1, which does neither."""


YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF")
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


def read_yaml(path: str | Path) -> Any:
    """
    Raises:
        `InputError`: if the file cannot be read.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), YamlLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error


def read_texts(option: str, files: list[str]) -> list[str]:
    """
    Raises:
        `InputError`: if one of the files, given by `option`, cannot be read.
    """
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{option}: cannot read {file!r}: {error}; allowed: text files in UTF-8") from error
    return texts


@contextmanager
def blaming(section: str) -> Iterator[None]:
    """Turns what a class raises about the values of a section into an `InputError` that names the section."""
    try:
        yield
    except (ArithmeticError, HTTPError, ImportError, OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"{section}: {error}") from error
