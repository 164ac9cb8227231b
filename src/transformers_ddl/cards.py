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
"""Model cards: templates filled with what was run and measured, and the metadata that the Hub reads."""

import platform
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer

from . import __version__
from .configuration_ddl import DDLConfig
from .data import STDLIB, TextCounts


if TYPE_CHECKING:
    from .settings import Run

# In a checkout they lie beside `src`, in an installed package inside it (setup.cfg)
TEMPLATES = next(folder / "model_cards" for folder in Path(__file__).parents if (folder / "model_cards").is_dir())
TASKS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


@dataclass
class CardArguments:
    """
    What a model card says that follows from no other setting.

    Args:
        license (`str`, *optional*):
            The model's license, one of the identifiers in https://huggingface.co/docs/hub/repositories-licenses.
        language (`str` or `list[str]`, *optional*):
            ISO 639 codes of the languages of the text, or `code` or `multilingual`.
    """

    license: str | None = None
    language: str | list[str] | None = None

    def __post_init__(self):
        check_metadata(ModelCardData(license=self.license, language=self.language))


def check_metadata(data: ModelCardData):
    """
    Checks, without a network, the form of the fields that the Hub refuses a card for.

    Raises:
        `ValueError`: names the field and what is allowed. `datasets`, `base_model` and the data sets of `model-index` must be
            possible names of repositories: the Hub refuses paths.
    """
    for language in _as_list(data.language):
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", str(language)):
            raise ValueError(
                f"language must be ISO 639 codes of two or three letters, code or multilingual, got {language!r}"
            )
    if data.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(data.license)):
        raise ValueError(
            f"license must be an identifier of https://huggingface.co/docs/hub/repositories-licenses, got {data.license!r}"
        )
    repositories = {
        "base_model": _as_list(data.base_model),
        "datasets": _as_list(data.datasets),
        "model-index": [result.dataset_type for result in data.eval_results or []],
    }
    for field, names in repositories.items():
        for name in names:
            if not _is_repository_name(name):
                raise ValueError(f"{field} must name repositories of the Hub, got {name!r}")


def pretrained_card(run: "Run", train: TextCounts, trainer: Trainer, results: dict[str, float]) -> ModelCard:
    """The card of a model trained from scratch; `results` are those of [`~transformers_ddl.training.evaluate`]."""
    return _render(
        "pretrained.md",
        trainer,
        sources=[source.source for source in run.data.sources],
        subset=run.data.subset,
        metrics={name: results[name] for name in ("bits_per_byte", "perplexity")},
        arguments=run.card,
        block_size=run.model.max_position_embeddings,
        results=results,
        settings=yaml.safe_dump(run.settings, sort_keys=False),
        train=train,
    )


def finetuned_card(
    trainer: Trainer, source: str, metrics: dict[str, float], arguments: CardArguments | None = None
) -> ModelCard:
    """
    The card of a model that a `Trainer` (TRL's are some) fine-tuned from a saved one.

    Args:
        trainer: After training.
        source: The data set that it was trained on: its name on the Hub, or a file or folder.
        metrics: Results on held-out data, by name.
    """
    base_model = trainer.model.config.name_or_path
    return _render(
        "finetuned.md",
        trainer,
        sources=[source],
        metrics=metrics,
        arguments=arguments or CardArguments(),
        base_model=_published(base_model),
        base_name=_published(base_model) or Path(base_model).name,
        hyperparameters=extract_hyperparameters_from_trainer(trainer),
        method=type(trainer).__name__,
    )


def _render(
    template: str,
    trainer: Trainer,
    sources: list[str],
    metrics: dict[str, float],
    arguments: CardArguments,
    subset: str | None = None,
    base_model: str | None = None,
    **values,
) -> ModelCard:
    name = Path(trainer.args.output_dir).resolve().name
    task = next(task for suffix, task in TASKS.items() if type(trainer.model).__name__.endswith(suffix))
    published = [_published(source) for source in sources]
    dataset_name = " + ".join(name or Path(source).name for name, source in zip(published, sources))
    metadata = ModelCardData(
        license=arguments.license,
        language=arguments.language,
        library_name="transformers",
        pipeline_tag=task,
        tags=["deep-delta-learning"],
        base_model=base_model,
        datasets=[name for name in published if name] or None,
        metrics=list(metrics),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=(published[0] if len(sources) == 1 else None) or "text",
                dataset_config=subset,
                dataset_name=f"{dataset_name} (held out)",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ],
    )
    return ModelCard.from_template(
        card_data=metadata,
        template_path=TEMPLATES / template,
        architecture=describe_architecture(trainer.model.config),
        environment=describe_environment(trainer),
        measured=metrics,
        name=name,
        num_parameters=trainer.model.num_parameters(),
        source=dataset_name,
        state=trainer.state,
        task=task,
        **values,
    )


def _published(source: str) -> str | None:
    """The name of a repository on the Hub; None for what is only here."""
    is_local = source == STDLIB or Path(source).exists()
    return None if is_local or not _is_repository_name(source) else source


def _is_repository_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def describe_architecture(config: DDLConfig) -> str:
    """The settings that tell one member of the family from another."""
    description = (
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, residual type `{config.residual_type}`"
    )
    if config.num_value_channels > 1:
        description += f", {config.num_value_channels} value channels"
    if config.num_delta_steps > 1:
        description += f", {config.num_delta_steps} delta steps"
    if config.compressor is not None:
        description += f", {config.compressor} compressor"
    if config.embedding_conv:
        description += ", embedding convolution"
    return description


def describe_environment(trainer: Trainer) -> dict[str, str]:
    """Where and for how long a model was trained."""
    environment = {
        "hardware": describe_hardware(trainer.args),
        "software": f"transformers_ddl {__version__}, Transformers {transformers.__version__}, PyTorch {torch.__version__}",
    }
    seconds = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    if seconds:
        environment["training time, after the last interruption if there was one"] = str(
            timedelta(seconds=round(seconds[-1]))
        )
    return environment


def describe_hardware(args: TrainingArguments) -> str:
    """Number and name of the devices."""
    device = args.device
    if device.type == "cuda":
        return f"{args.world_size * args.n_gpu} × {torch.cuda.get_device_name(device)}"
    return f"{args.world_size} × {device.type} ({platform.machine()}, threads: {torch.get_num_threads()})"


def _as_list(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
