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

The YAML has a section per concern, whose fields are those of a class: for pretraining `data` ([`DataArguments`]), `tokenizer`
([`TokenizerArguments`]), `model` ([`DDLConfig`]), `training` ([`~transformers.TrainingArguments`]) and, if wanted, `card`
([`CardArguments`]) and `anchor` ([`AnchorArguments`]). `model.name`, the folder or name on the Hub of a model to start
from, gives the other fields of the model the values that they have there.
"""

import difflib
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, get_args, get_type_hints

import torch
import yaml
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from .cards import CardArguments
from .cli import InputError
from .configuration_ddl import DDLConfig
from .data import DataArguments
from .inputs import YamlLoader, blaming, read_yaml
from .modeling_ddl import DDLForCausalLM


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


@dataclass
class AnchorArguments:
    """
    What becomes of the anchors of a model with `value_anchor`, a converted Llama for instance.

    Args:
        annealing_steps (`int`, *optional*):
            Number of steps within which they are taken to 0, to the pure delta rule, to stay there. If None, they are
            parameters like others.
    """

    annealing_steps: int | None = None

    def __post_init__(self):
        if self.annealing_steps is not None and self.annealing_steps < 1:
            raise ValueError(f"annealing_steps must be at least 1, got {self.annealing_steps}")


SECTIONS = {
    "data": DataArguments,
    "tokenizer": TokenizerArguments,
    "model": DDLConfig,
    "training": TrainingArguments,
    "card": CardArguments,
    "anchor": AnchorArguments,
}
REQUIRED_FIELDS = {"data": "source", "training": "output_dir"}
# The least and the largest value of fields of `training` for which the library would fail only once the run has begun.
LIMITS = {
    "adam_beta1": (0, 0.99999),
    "adam_beta2": (0, 0.99999),
    "adam_epsilon": (0, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "learning_rate": (0, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "seed": (0, 2**32 - 1),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
}
# Fields that would have no effect, or contradict what a command does, and who decides instead.
RESERVED_FIELDS = {
    "data": {},
    "tokenizer": {},
    "model": dict.fromkeys(("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer")
    | dict.fromkeys(("num_labels", "id2label", "label2id"), "the data")
    | {"use_cache": "the command"},
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
        "the command",
    )
    | {"save_only_model": "resuming, which needs the rest,"}
    | dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), "the tokenizer")
    | dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "model.name")
    | {"hub_token": "`hf auth login` or HF_TOKEN"},  # settings go into files that are pushed
    "lora": dict.fromkeys(("task_type", "inference_mode"), "the task"),
    "card": {},
    "anchor": {},
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
            raise InputError(f"{str(path)!r} has fields outside sections; allowed: sections, each with its fields")
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
            # A pattern of files may begin with what begins an alias, of which there are none
            values[field] = value if value.startswith("*") else yaml.load(value, YamlLoader)
        except yaml.YAMLError as error:
            raise InputError(f"{name}: {value!r} is not YAML: {error}") from error
    return settings


@dataclass
class CheckedSettings:
    """
    What the settings of every run have, as objects, and the settings as they were given. A subclass adds its sections, and
    `check`, which makes them.
    """

    model: DDLConfig
    training: TrainingArguments
    card: CardArguments
    anchor: AnchorArguments
    settings: Settings

    @classmethod
    def from_settings(cls, settings: Settings) -> "CheckedSettings":
        """
        Checks settings.

        Raises:
            `InputError`: for an unknown section or field, a missing field, a wrong type or a value that is not allowed.
        """
        return cls(**cls.check(settings), settings=settings)


@dataclass
class Run(CheckedSettings):
    """Settings of a pretraining."""

    data: DataArguments
    tokenizer: TokenizerArguments

    @staticmethod
    def check(settings: Settings) -> dict[str, Any]:
        """The sections as objects; see [`CheckedSettings.from_settings`]."""
        if name := settings.get("model", {}).get("name"):
            if "tokenizer" in settings:
                raise InputError("tokenizer: cannot be set, model.name decides it")
            settings = settings | {"tokenizer": {"name": name}}
        sections = build_sections(settings, SECTIONS)
        block_size = sections["model"].max_position_embeddings
        if block_size < 2:
            raise InputError(
                f"model.max_position_embeddings: {block_size} leaves no token to predict; allowed: at least 2"
            )
        if sections["data"].streaming and sections["training"].max_steps < 1:
            raise InputError("training.max_steps: missing; with data.streaming, a run must say it")
        attention = sections["model"]._attn_implementation
        if sections["data"].packing == "documents" and "flash" in (attention or ""):
            # Transformers recognises packed documents there only in batches of one sequence
            raise InputError(
                f"model.attn_implementation: {attention!r} would not keep documents apart, as data.packing says; "
                "allowed: sdpa, eager or flex_attention"
            )
        check_model(sections["model"], sections["training"])
        return sections


def build_sections(settings: Settings, classes: dict[str, type]) -> dict[str, Any]:
    """
    Makes, of each section, an object of its class.

    Raises:
        `InputError`: for an unknown section or field, a missing field, a wrong type or a value that is not allowed.
    """
    for section in settings:
        if section not in classes:
            raise InputError(f"{section}: unknown section; allowed: {', '.join(classes)}")
    sections = {}
    for section, section_class in classes.items():
        values = settings.get(section, {})
        for name in values:
            if decider := RESERVED_FIELDS[section].get(name):
                raise InputError(f"{section}.{name}: cannot be set, {decider} decides it")
        if section_class is DDLConfig:
            section_class = read_config  # the configuration checks its fields itself
        else:
            _check_fields(section, section_class, values)
        with blaming(section):
            sections[section] = section_class(**values)
    _check_training(sections["training"])
    if sections["anchor"].annealing_steps is not None and sections["model"].value_anchor is None:
        raise InputError("anchor.annealing_steps: the model has no anchors; allowed: a model with value_anchor")
    return sections


def check_model(config: DDLConfig, training: TrainingArguments):
    """
    Raises:
        `InputError`: if there can be no such model, for its attention is not there for instance, or no such optimizer for it.
    """
    with blaming("model"), torch.device("meta"):
        model = DDLForCausalLM(config)
    with blaming("training.optim"):
        Trainer.get_optimizer_cls_and_kwargs(training, model)


def _check_training(args: TrainingArguments):
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if not least <= value <= most:
            allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise InputError(f"training.{name}: {value}; allowed: {allowed}")
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (RuntimeError, ValueError) as error:  # it is not installed, or not known
        raise InputError(f"training.report_to: {error}") from error
    with blaming("training.lr_scheduler_type"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10**6, args.lr_scheduler_kwargs)
    if args.max_steps == 0 or args.max_steps < -1:
        raise InputError(f"training.max_steps: {args.max_steps}; allowed: at least 1, or -1 for num_train_epochs")
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise InputError(f"training.num_train_epochs: {args.num_train_epochs}; allowed: more than 0")


def read_config(name: str | None = None, **fields) -> DDLConfig:
    """The configuration of a new model, or of the model `name` with other values of some fields."""
    if name is None:
        return DDLConfig(**fields)
    try:
        saved, _ = DDLConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    if saved.get("model_type") != DDLConfig.model_type:
        raise ValueError(f"{name!r} does not hold a DDL model")
    saved.pop("transformers_version", None)  # or unknown fields would be accepted, as in a file
    for field in ("dtype", "torch_dtype"):  # of the file, not of the training
        saved.pop(field, None)
    return DDLConfig(**saved | fields, name_or_path=name)


def _check_fields(section: str, section_class: type, values: dict[str, Any]):
    """Checks the names and types of fields; unlike `@strict`, an int may stand for a float."""
    names = [field.name for field in fields(section_class) if field.init]
    hints = get_type_hints(section_class)
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
    if required is not None and not values.get(required):
        raise InputError(f"{section}.{required}: missing; every run must say it")
