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
The settings of a run: a YAML file and command-line overrides, checked before any data is read or anything written.

The YAML has a section per concern, `data` ([`DataArguments`]), `tokenizer` ([`TokenizerArguments`]), `model`
([`DDLConfig`]), `training` ([`~transformers.TrainingArguments`]) and, if wanted, `card` ([`CardArguments`]), whose fields are
those classes' own.
"""

import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, get_args, get_type_hints

import yaml
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import TrainingArguments

from .cards import CardArguments
from .cli import InputError
from .configuration_ddl import DDLConfig
from .data import DataArguments
from .inputs import YamlLoader, blaming, read_yaml


@dataclass
class TokenizerArguments:
    """
    The tokenizer: a byte-level BPE tokenizer that is trained on the training documents, or one that exists.

    Args:
        vocab_size (`int`, *optional*):
            Number of tokens to train, at least 258: 256 bytes and 2 special tokens.
        name (`str`, *optional*):
            The folder or name on the Hub of an existing tokenizer instead.
        pad_to_multiple_of (`int`, defaults to 1):
            What the rows of the model's embedding are a multiple of; those beyond the tokenizer's tokens are never used.
    """

    vocab_size: int | None = None
    name: str | None = None
    pad_to_multiple_of: int = 1

    def __post_init__(self):
        if (self.vocab_size is None) == (self.name is None):
            raise ValueError("one of vocab_size (to train a tokenizer) and name (to load one) must be given")
        if self.vocab_size is not None and self.vocab_size < 258:
            raise ValueError(f"vocab_size must be at least 258, got {self.vocab_size}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, got {self.pad_to_multiple_of}")

    def num_embeddings(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of


SECTIONS = {
    "data": DataArguments,
    "tokenizer": TokenizerArguments,
    "model": DDLConfig,
    "training": TrainingArguments,
    "card": CardArguments,
}
REQUIRED_FIELDS = {"data": "source", "training": "output_dir"}
# Fields that would have no effect, or contradict what the pretraining does, and who decides instead.
RESERVED_FIELDS = {
    "data": {},
    "tokenizer": {},
    "model": dict.fromkeys(
        ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer (section tokenizer)"
    ),
    "training": dict.fromkeys(
        (
            "batch_eval_metrics",
            "do_eval",
            "do_predict",
            "do_train",
            "eval_do_concat_batches",
            "ignore_data_skip",
            "include_num_input_tokens_seen",
            "logging_nan_inf_filter",
            "prediction_loss_only",
            "resume_from_checkpoint",
        ),
        "the pretraining",
    )
    | {"hub_token": "`hf auth login` or HF_TOKEN"},  # settings go into files that are pushed
    "card": {},
}

Settings = dict[str, dict[str, Any]]  # section: field: value


def read_settings(paths: list[str | Path], overrides: list[str]) -> Settings:
    """
    Reads YAML files, of which the later ones add fields to those before or replace them, and sets the fields named by
    `overrides`, `["--section.field", "value", ...]` or `["--section.field=value", ...]`, whose values are YAML too.

    Raises:
        `InputError`: if a file cannot be read, is not made of sections, or an override is not of that form.
    """
    settings = {}
    for path in paths:
        sections = read_yaml(path)
        if not isinstance(sections, dict) or not all(isinstance(values, dict) for values in sections.values()):
            raise InputError(f"{str(path)!r} has fields outside sections; allowed: the sections {', '.join(SECTIONS)}")
        for section, values in sections.items():
            settings.setdefault(section, {}).update(values)

    overrides = iter(overrides)
    for argument in overrides:
        name, equals, value = argument.partition("=")
        if not re.fullmatch(r"--\w+(\.\w+)+", name):
            raise InputError(f"unknown argument {argument!r}; allowed: --section.field value")
        if not equals:
            value = next(overrides, "--")
            if value.startswith("--"):
                raise InputError(f"{name} has no value; allowed: --section.field value")
        *parents, field = name.removeprefix("--").split(".")
        values = settings
        for parent in parents:
            values = values.setdefault(parent, {})
            if not isinstance(values, dict):
                raise InputError(f"{name}: {parent} is {values!r} and has no fields")
        try:
            values[field] = yaml.load(value, YamlLoader)
        except yaml.YAMLError as error:
            raise InputError(f"{name}: {value!r} is not YAML: {error}") from error
    return settings


@dataclass
class Run:
    """A run's settings as objects, and as they were given."""

    data: DataArguments
    tokenizer: TokenizerArguments
    model: DDLConfig
    training: TrainingArguments
    card: CardArguments
    settings: Settings

    @classmethod
    def from_settings(cls, settings: Settings) -> "Run":
        """
        Checks settings.

        Raises:
            `InputError`: for an unknown section or field, a missing field, a wrong type or a value that is not allowed.
        """
        for section in settings:
            if section not in SECTIONS:
                raise InputError(f"{section}: unknown section; allowed: {', '.join(SECTIONS)}")
        sections = {}
        for section, section_class in SECTIONS.items():
            values = settings.get(section, {})
            for name in values:
                if decider := RESERVED_FIELDS[section].get(name):
                    raise InputError(f"{section}.{name}: cannot be set, {decider} decides it")
            if section_class is not DDLConfig:  # which checks its fields itself
                _check_fields(section, values)
            with blaming(section):
                sections[section] = section_class(**values)
        block_size = sections["model"].max_position_embeddings
        if block_size < 2:
            raise InputError(
                f"model.max_position_embeddings: {block_size} leaves no token to predict; allowed: at least 2"
            )
        if sections["data"].streaming and sections["training"].max_steps < 1:
            raise InputError("training.max_steps: missing; with data.streaming, a run must say it")
        return cls(**sections, settings=settings)


def _check_fields(section: str, values: dict[str, Any]):
    """Checks the names and types of fields; unlike `@strict`, an int may stand for a float."""
    names = [field.name for field in fields(SECTIONS[section]) if field.init]
    hints = get_type_hints(SECTIONS[section])
    for name, value in values.items():
        if name not in names:
            closest = difflib.get_close_matches(str(name), names, n=4, cutoff=0)
            raise InputError(f"{section}.{name}: unknown field; allowed, among others: {', '.join(closest)}")
        hint = hints[name]
        accepted = hint | int if float in (hint, *get_args(hint)) else hint
        try:
            validate_typed_dict(TypedDict(section, {name: accepted}), {name: value})
        except StrictDataclassFieldValidationError as error:
            allowed = hint.__name__ if isinstance(hint, type) else hint
            raise InputError(f"{section}.{name}: {value!r} has the wrong type; allowed: {allowed}") from error
    required = REQUIRED_FIELDS.get(section)
    if required is not None and required not in values:
        raise InputError(f"{section}.{required}: missing; every run must say it")
