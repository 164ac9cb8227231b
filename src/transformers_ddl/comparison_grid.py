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
"""The grid of a comparison: a YAML file, checked before anything is run, and the runs it stands for."""

import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from .cli import InputError
from .configuration_ddl import DDLConfig
from .inputs import blaming, read_yaml


# Fields that decide where the parameters start and nothing else: models that differ in them alone share a compilation
INITIALISATION = {"gate_init", "initializer_range", "init_scheme"}


@strict
@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """
    How a run is trained: AdamW (0.9, 0.95), gradients clipped at 1.0, linear warm-up and cosine decay to a tenth.

    Args:
        steps (`int`): Number of optimiser steps of a final run.
        batch_size (`int`): Sequences per step; their length is the model's `max_position_embeddings`.
        warmup_steps (`int`): Steps of the warm-up, of trials too.
        eval_steps (`int`): Validate after every so many steps and after the last one.
        lr (`float`): Peak learning rate.
        branch_lr_factor (`float`): Factor on the learning rate of gates, targets and connections between channels.
        weight_decay (`float`): That of the weights of linear maps, embeddings excepted.
        compile (`bool`): Whether the model is compiled.
    """

    steps: int
    batch_size: int
    warmup_steps: int
    eval_steps: int
    lr: float | int
    branch_lr_factor: float | int = 1.0
    weight_decay: float | int = 0.1
    compile: bool = True

    def __post_init__(self):
        for name, lowest in {"steps": 1, "batch_size": 1, "eval_steps": 1, "warmup_steps": 0}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("lr", "branch_lr_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


TRAINING_FIELDS = {field.name for field in fields(TrainingSettings)}


@dataclass
class Run:
    """One training run. `model` and `training` hold the fields that the grid gives, `tuned` those of them on axes."""

    method: str
    stage: str  # "tune" or "final"
    seed: int
    tuned: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]

    @cached_property
    def config(self) -> DDLConfig:
        return DDLConfig(**self.model)

    @cached_property
    def training_settings(self) -> TrainingSettings:
        return TrainingSettings(**self.training)

    @property
    def architecture(self) -> str:
        """What of the run goes into a compiled model."""
        fields = {name: value for name, value in describe(self.config).items() if name not in INITIALISATION}
        settings = self.training_settings
        return json.dumps([fields, settings.batch_size, settings.compile], sort_keys=True)

    def identifier(self, data: str) -> str:
        """Hash of all settings, for data of the hash `data`."""
        return digest(json.dumps([asdict(self), data], sort_keys=True).encode())


def describe(config: DDLConfig) -> dict[str, Any]:
    """All fields of a configuration as JSON has them."""
    return json.loads(config.to_json_string(use_diff=False))


def digest(*contents: bytes) -> str:
    sha256 = hashlib.sha256()
    for content in contents:
        sha256.update(content)
    return sha256.hexdigest()[:16]


@dataclass
class Grid:
    """
    The methods to compare, as a YAML file says. Its sections:

        output    folder of results and tokens
        data      train, validation (Parquet files), text_column, vocab_size
        model     fields of [`DDLConfig`] that the methods share; `max_position_embeddings` is the length of sequences
        training  fields of [`TrainingSettings`] that the methods share
        methods   name: its own fields of either kind
        tune      fraction (of the steps), seed, and axes (name of a method: field: values to try, all combinations; or a list
                  of such axes, one after another); may be left out
        seeds     of the final runs
    """

    output: Path
    data: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    tune: dict[str, Any] | None = None

    @classmethod
    def from_yaml(cls, path: str | Path, output: str | None = None, methods: list[str] | None = None) -> "Grid":
        """
        Reads a grid; `output` replaces the file's, `methods` selects some of its methods.

        Raises:
            `InputError`: if the file cannot be read, a section or field is missing, unknown or not allowed, or the methods
                do not have the same number of trials.
        """
        settings = read_yaml(path)
        kinds = {"output": str, "data": dict, "model": dict, "training": dict, "methods": dict, "seeds": list}
        _check_section("", settings, kinds, optional={"tune": dict})
        _check_section(
            "data", settings["data"], {"train": str, "validation": str, "text_column": str, "vocab_size": int}
        )
        if not 258 <= settings["data"]["vocab_size"] <= 2**16:
            raise InputError(
                f"data.vocab_size: got {settings['data']['vocab_size']}; allowed: 258 to {2**16}, tokens being stored in 16 bits"
            )
        if "vocab_size" in settings["model"]:
            raise InputError("model.vocab_size: cannot be set, data.vocab_size decides it")
        for name in settings["training"].keys() - TRAINING_FIELDS:
            raise InputError(f"training.{name}: unknown field; allowed: {', '.join(sorted(TRAINING_FIELDS))}")
        for name, values in settings["methods"].items():
            if not isinstance(values, dict):
                raise InputError(f"methods.{name}: got {values!r}; allowed: fields of the model or the training")
        seeds = settings["seeds"]
        if not seeds or not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < len(seeds):
            raise InputError(f"seeds: got {seeds!r}; allowed: a list of different integers")

        grid = cls(**settings | {"output": Path(output or settings["output"])})
        grid._check_tuning()
        for name in methods or []:
            if name not in grid.methods:
                raise InputError(f"--methods: unknown method {name!r}; allowed: {', '.join(grid.methods)}")
        grid.methods = {name: values for name, values in grid.methods.items() if not methods or name in methods}
        for method in grid.methods:
            for run in grid.trials(method) or grid.final_runs(method, {}):
                with blaming(f"methods.{method}"):
                    run.config, run.training_settings
        return grid

    def _check_tuning(self):
        if self.tune is None:
            return
        _check_section("tune", self.tune, {"fraction": (float, int), "seed": int, "axes": dict})
        if not 0 < self.tune["fraction"] <= 1:
            raise InputError(f"tune.fraction: got {self.tune['fraction']}; allowed: above 0, at most 1")
        _check_section("tune.axes", self.tune["axes"], dict.fromkeys(self.methods, (dict, list)))
        for method in self.methods:
            for axes in self._axes(method):
                if not isinstance(axes, dict):
                    raise InputError(f"tune.axes.{method}: got {axes!r}; allowed: fields with lists of values to try")
                for name, values in axes.items():
                    if not isinstance(values, list) or not values:
                        raise InputError(
                            f"tune.axes.{method}.{name}: got {values!r}; allowed: a list of values to try"
                        )
        numbers = {method: len(self.trials(method)) for method in self.methods}
        if len(set(numbers.values())) > 1:
            counts = ", ".join(f"{method} {number}" for method, number in numbers.items())
            raise InputError(f"tune.axes: the number of trials must be the same for every method, got {counts}")

    def _axes(self, method: str) -> list[dict[str, list]]:
        axes = self.tune["axes"][method]
        return axes if isinstance(axes, list) else [axes]

    def trials(self, method: str) -> list[Run]:
        if self.tune is None:
            return []
        return [
            self._run(method, "tune", self.tune["seed"], dict(zip(axes, values)))
            for axes in self._axes(method)
            for values in itertools.product(*axes.values())
        ]

    def final_runs(self, method: str, tuned: dict[str, Any]) -> list[Run]:
        return [self._run(method, "final", seed, tuned) for seed in self.seeds]

    def _run(self, method: str, stage: str, seed: int, tuned: dict[str, Any]) -> Run:
        given = {**self.methods[method], **tuned}
        training = self.training | {name: given.pop(name) for name in TRAINING_FIELDS & given.keys()}
        if stage == "tune" and isinstance(training.get("steps"), int):
            training["steps"] = round(training["steps"] * self.tune["fraction"])
        return Run(method, stage, seed, tuned, self.model | given | {"vocab_size": self.data["vocab_size"]}, training)


def _check_section(section: str, values: Any, kinds: dict[str, Any], optional: dict[str, type] | None = None):
    """Checks that the fields of a section are there, known, and of the given types."""
    prefix = f"{section}." if section else ""
    allowed = kinds | (optional or {})
    if not isinstance(values, dict):
        raise InputError(f"{section or 'grid'}: got {values!r}; allowed: the fields {', '.join(allowed)}")
    for name in kinds.keys() - values.keys():
        raise InputError(f"{prefix}{name}: missing")
    for name, value in values.items():
        if name not in allowed:
            raise InputError(f"{prefix}{name}: unknown field; allowed: {', '.join(allowed)}")
        if not isinstance(value, allowed[name]):
            kinds = allowed[name] if isinstance(allowed[name], tuple) else (allowed[name],)
            kind = "number" if float in kinds else " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{prefix}{name}: {value!r} has the wrong type; allowed: {kind}")
