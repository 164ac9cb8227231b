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
"""Fine-tuning: a YAML file in; a folder with a model that answers or labels, its evaluation and its model card out."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer, is_conversational

from .cards import CardArguments, finetuned_card
from .cli import InputError
from .configuration_ddl import DDLConfig
from .data import IGNORE_INDEX, Corpus
from .examples import ExampleArguments, read_examples
from .inputs import blaming
from .modeling_ddl import DDLForCausalLM, DDLForSequenceClassification
from .settings import AnchorArguments, CheckedSettings, Settings, build_sections, check_model, read_settings
from .tokenization import load_tokenizer
from .trainer import ResumableTrainer
from .training import (
    SampleCallback,
    check_repository,
    complete,
    describe_costs,
    is_finished,
    load_base_model,
    mean_loss,
    number_of_steps,
    set_vocabulary,
    settings_parser,
    token_losses,
    train_and_evaluate,
    write_results,
)


ADAPTER_FOLDER = "adapter"

# For models whose tokenizer has none. It needs no token of its own: a message ends with the eos token.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + eos_token }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}"""


@dataclass
class FinetuningRun(CheckedSettings):
    """Settings of a fine-tuning; `training` is an `SFTConfig` for `sft`."""

    data: ExampleArguments
    lora: LoraConfig | None  # None: all weights are trained

    @staticmethod
    def check(settings: Settings) -> dict[str, Any]:
        """The sections as objects; see [`CheckedSettings.from_settings`]."""
        if "name" not in settings.get("model", {}):
            raise InputError("model.name: missing; every fine-tuning must say which model it starts from")
        is_classification = settings.get("data", {}).get("task") == "classification"
        classes = {
            "data": ExampleArguments,
            "model": DDLConfig,
            "training": TrainingArguments if is_classification else SFTConfig,
            "lora": LoraConfig,
            "card": CardArguments,
            "anchor": AnchorArguments,
        }
        sections = build_sections(settings, classes)
        check_model(sections["model"], sections["training"])
        if "lora" not in settings:
            sections["lora"] = None
        elif sections["anchor"].annealing_steps is not None:
            raise InputError("anchor.annealing_steps: cannot be set with lora, which leaves the model as it is")
        if not is_classification:
            training, context = sections["training"], sections["model"].max_position_embeddings
            if "max_length" not in settings["training"]:
                training.max_length = context
            elif training.max_length is not None and training.max_length > context:
                raise InputError(
                    f"training.max_length: {training.max_length}; allowed: up to model.max_position_embeddings, {context}"
                )
        return sections


def main(arguments: list[str]):
    """`transformers-ddl finetune CONFIG ... [--dry-run] [--section.field value ...]`."""
    parser = settings_parser("finetune", "Fine-tune a Deep Delta Learning model, or an adapter of it.")
    options, overrides = parser.parse_known_args(arguments)
    run = FinetuningRun.from_settings(read_settings(options.config, overrides))
    if options.dry_run:
        is_finished(run)  # or the folder cannot be used
        print(describe(run))
        return
    results = complete(run, finetune)
    if run.training.process_index == 0:
        print("held-out examples: " + ", ".join(f"{name} {value:.3f}" for name, value in measured(results).items()))


def describe(run: FinetuningRun) -> str:
    """
    What a run costs and where it goes; the examples are read for it.

    Raises:
        `InputError`: if the model, the data or the training arguments cannot be used.
    """
    output_dir, push_to_hub = run.training.output_dir, run.training.push_to_hub
    run.training.push_to_hub = False
    with TemporaryDirectory() as run.training.output_dir:  # Trainer makes the folder
        trainer, _ = prepare(run)
    run.training.output_dir, run.training.push_to_hub = output_dir, push_to_hub
    lengths = [len(tokens) for tokens in trainer.train_dataset["input_ids"]]
    return describe_costs(
        run,
        num_trained=trainer.get_num_trainable_parameters(),
        flops_per_token=trainer.flops_per_token,
        steps=number_of_steps(run.training, len(lengths)),
        mean_length=round(sum(lengths) / len(lengths)),
        max_length=max(lengths),
    )


def finetune(run: FinetuningRun) -> str | None:
    """
    Trains a model on examples and fills the output folder; continues from its last complete checkpoint if it has one.

    Returns:
        The repository on the Hub that the output folder is still to be pushed to, if any; by the main process alone.

    Raises:
        `InputError`: if the model, the data or the training arguments cannot be used; then nothing has been written.
        `RunError`: if the loss is not finite any more. The complete checkpoints are left, as after any other failure.
    """
    trainer, corpus = prepare(run)
    if trainer.is_world_process_zero():
        print(f"data: {run.data.source}: {corpus}")
        print(f"model: {trainer.get_num_trainable_parameters():,} parameters are trained")

    results = train_and_evaluate(run, trainer, [len(corpus.train), len(corpus.held_out)])
    if run.data.task == "sft":
        results["perplexity"] = math.exp(results["eval_loss"])
    else:
        (_, most), *_ = Counter(corpus.held_out["label"]).most_common()
        results["commonest_label"] = most / len(corpus.held_out)
    save(run, trainer)
    if trainer.is_world_process_zero():
        card = finetuned_card(trainer, run.data.source, measured(results), run.card)
        write_results(run, trainer, corpus.counts, results, card)
    return trainer.hub_model_id


def prepare(run: FinetuningRun) -> tuple[ResumableTrainer, Corpus]:
    """A trainer with the model and the tokenised examples, and the examples."""
    with run.training.main_process_first(desc="reading examples"):  # the others find them in the cache
        corpus = read_examples(run.data)
    tokenizer = load_tokenizer(run.model.name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_vocabulary(run.model, tokenizer)
    set_seed(run.training.seed)
    make_trainer = classification_trainer if run.data.task == "classification" else sft_trainer
    return make_trainer(run, corpus, tokenizer), corpus


def measured(results: dict[str, float]) -> dict[str, float]:
    """Of the results, those about the model."""
    names = ("eval_loss", "perplexity", "eval_token_accuracy", "eval_accuracy", "commonest_label")
    return {name.removeprefix("eval_"): results[name] for name in names if name in results}


def load_trained_model(
    run: FinetuningRun, model_class: type[PreTrainedModel], task_type: str
) -> PreTrainedModel | PeftModel:
    """
    The model, or one around it whose adapters are trained. What is trained is in float32: for adapters alone, the model
    itself may stay in the dtype that it is stored in.

    Raises:
        `InputError`: if there can be no such adapters.
    """
    if run.lora is None:
        return load_base_model(model_class, run.model)
    run.lora.task_type = task_type
    for dtype in ("auto", torch.float32):
        model = load_base_model(model_class, run.model, dtype)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head is not None and head.weight is embeddings.weight
        with blaming("lora"):
            model = get_peft_model(model, run.lora)
        adapted = (model.get_input_embeddings(), model.get_output_embeddings())
        if is_tied and any(isinstance(module, BaseTunerLayer | TrainableTokensWrapper) for module in adapted):
            # What is merged for the one, the other gets too; and TRL cannot train tokens of a head
            raise InputError(
                "lora: an adapter of embed_tokens or lm_head, which share their weight (tie_word_embeddings), cannot be merged; "
                "allowed: neither of them, or modules_to_save: [embed_tokens]"
            )
        if all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad):
            break
    return model


class DDLSFTTrainer(ResumableTrainer, SFTTrainer):
    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None) -> tuple:
        # TRL's would first compute what it logs in training
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits
        loss = token_losses(logits, labels).sum() / (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)


def token_losses_and_hits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[`token_losses`], and which tokens are the likeliest; both `[batch, sequence - 1]`."""
    return token_losses(logits, labels), logits[:, :-1].argmax(-1) == labels[:, 1:]


def means_over_tokens(results: EvalPrediction) -> dict[str, float]:
    """
    The means of [`token_losses_and_hits`] over all predicted tokens, whatever the batches: TRL's are means of the
    batches' means.
    """
    losses, hits = results.predictions
    predicted = results.label_ids[:, 1:] != IGNORE_INDEX
    return {"token_accuracy": hits[predicted].mean(), **mean_loss(EvalPrediction(losses, results.label_ids))}


def sft_trainer(run: FinetuningRun, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> DDLSFTTrainer:
    """Trains to answer; the loss is over completions, and over the assistant's words alone if `assistant_only_loss` says so."""
    if tokenizer.chat_template is None and is_conversational(corpus.train[0]):
        tokenizer.chat_template = CHAT_TEMPLATE
    model = load_trained_model(run, DDLForCausalLM, "CAUSAL_LM")
    with blaming("training"):
        trainer = DDLSFTTrainer(
            model=model,
            args=run.training,
            train_dataset=corpus.train,
            eval_dataset=corpus.held_out,
            processing_class=tokenizer,
            preprocess_logits_for_metrics=token_losses_and_hits,
            compute_metrics=means_over_tokens,
        )
        check_repository(trainer)
    leave_out_unanswered(corpus, trainer)
    shown, labels = trainer.eval_dataset[0]["input_ids"], trainer.eval_dataset[0]["labels"]
    audit(trainer, shown)
    prompt = shown[: next((index for index, label in enumerate(labels) if label != -100), 0)]
    if 0 < len(prompt) < run.model.max_position_embeddings:
        trainer.add_callback(SampleCallback(prompt))
    return trainer


def leave_out_unanswered(corpus: Corpus, trainer: DDLSFTTrainer):
    """
    Counts the examples of which `max_length` has cut off all answers as skipped: TRL leaves them out, or, where it packs, they
    are read and nothing is learned from them.

    Raises:
        `InputError`: if none are left.
    """
    args, before = trainer.args, len(corpus.train) + len(corpus.held_out)
    packs_held_out = args.packing if args.eval_packing is None else args.eval_packing
    # Other strategies than "bfd" cut off nothing
    if not args.packing or args.packing_strategy == "bfd":
        corpus.train = answered(trainer.train_dataset)
    if not packs_held_out or args.packing_strategy == "bfd":
        corpus.held_out = answered(trainer.eval_dataset)
    if left_out := before - len(corpus.train) - len(corpus.held_out):
        corpus.skipped["without an answer in the first training.max_length tokens"] = left_out
    if not len(corpus.train) or not len(corpus.held_out):
        raise InputError(f"training.max_length: {args.max_length} leaves too few examples ({corpus}); allowed: more")


def answered(prepared: Dataset) -> Dataset:
    """The examples with a token to learn, of those that TRL has prepared and may have packed into rows."""
    if "seq_lengths" not in prepared.column_names:
        return prepared
    examples = (
        labels[end - length : end]
        for lengths, labels in zip(prepared["seq_lengths"], prepared["labels"])
        for length, end in zip(lengths, accumulate(lengths))
    )
    return Dataset.from_dict({"labels": [labels for labels in examples if any(label != -100 for label in labels)]})


def classification_trainer(run: FinetuningRun, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> ResumableTrainer:
    """Trains to label texts, of which it reads as many tokens as the model's context holds."""
    names = corpus.train.features["label"].names
    if len(names) < 2:
        raise InputError(f"data.label_column: all labels are {', '.join(names)}; allowed: at least two")
    run.model.id2label = dict(enumerate(names))
    run.model.label2id = {name: index for index, name in enumerate(names)}

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        tokens = tokenizer(rows["text"], truncation=True, max_length=run.model.max_position_embeddings)
        return {**tokens, "labels": rows["label"]}

    train, held_out = (
        part.map(tokenize, batched=True, remove_columns=part.column_names, num_proc=run.data.num_proc)
        for part in (corpus.train, corpus.held_out)
    )
    model = load_trained_model(run, DDLForSequenceClassification, "SEQ_CLS")
    with blaming("training"):
        trainer = ResumableTrainer(
            model=model,
            args=run.training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        check_repository(trainer)
    audit(trainer, held_out[0]["input_ids"])
    return trainer


def audit(trainer: ResumableTrainer, tokens: list[int]):
    """Has the gates logged that the model has on these tokens."""
    trainer.audited_inputs = {"input_ids": torch.tensor([tokens])}


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def save(run: FinetuningRun, trainer: ResumableTrainer):
    """Saves the model. Adapters are also saved by themselves, and merged into the model that they were made for."""
    if run.lora is None:
        trainer.save_model()
        return
    folder = Path(run.training.output_dir)
    trainer.save_model(folder / ADAPTER_FOLDER)
    if trainer.is_world_process_zero():
        # The model that was trained may be in pieces on several devices
        trained = trainer.model.get_base_model()
        base = load_base_model(type(trained), run.model, trained.dtype)
        model = PeftModel.from_pretrained(base, folder / ADAPTER_FOLDER)
        model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
