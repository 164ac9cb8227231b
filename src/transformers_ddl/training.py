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
"""Pretraining: a YAML file in; a folder with a model, its tokenizer, its evaluation and its model card out."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import HfApi
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, ProgressCallback, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .cards import pretrained_card
from .cli import InputError
from .data import IGNORE_INDEX, PackedText, pack, read_corpus, train_tokenizer
from .hub import push
from .modeling_ddl import DDLForCausalLM
from .settings import Run, blaming, read_settings


RUN_FILE = "run.yaml"
RESULTS_FILE = "eval_results.json"


def main(arguments: list[str]):
    """`transformers-ddl pretrain CONFIG [--section.field value ...]`."""
    parser = argparse.ArgumentParser(
        prog="transformers-ddl pretrain", description="Pretrain a Deep Delta Learning language model."
    )
    parser.add_argument("config", help="YAML file with the sections data, tokenizer, model and training")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--section.field value",
        help="any field of the file, for instance --model.hidden_size 256 or --training.learning_rate=1e-3",
    )
    options = parser.parse_args(arguments)
    run = Run.from_settings(read_settings(options.config, options.overrides))
    if is_finished(run):
        print(f"{run.training.output_dir} holds this very run, finished; delete the folder to repeat it.")
    else:
        pretrain(run)
    results = json.loads(Path(run.training.output_dir, RESULTS_FILE).read_text())
    print(
        f"held-out text: {results['bits_per_byte']:.3f} bits per byte, where the entropy of single bytes is "
        f"{results['unigram_bits_per_byte']:.3f}; loss {results['eval_loss']:.3f} nats per token, "
        f"perplexity {results['perplexity']:.1f}"
    )


def is_finished(run: Run) -> bool:
    """
    Whether the output folder holds the results of this very run. It is fine if it holds nothing, or an unfinished part
    of this run.

    Raises:
        `InputError`: if it holds anything else.
    """
    folder = Path(run.training.output_dir)
    allowed = "allowed: a new or empty folder, or one that holds this very run"
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"training.output_dir: {str(folder)!r} is a file; {allowed}")
        return False
    if not any(folder.iterdir()):
        return False
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"training.output_dir: {str(folder)!r} holds files of something else; {allowed}")

    recorded, given = (
        {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
        for settings in (read_settings(folder / RUN_FILE, []), run.settings)
    )
    names = (recorded.keys() | given.keys()) - {"training.output_dir"}  # the same folder has many paths
    different = sorted(name for name in names if recorded.get(name) != given.get(name))
    if different:
        raise InputError(
            f"training.output_dir: {str(folder)!r} holds a run with another {', '.join(different)}; {allowed}"
        )
    return (folder / RESULTS_FILE).is_file()


def pretrain(run: Run):
    """
    Trains a tokenizer and a model and fills the output folder; continues from its last checkpoint if it has one.

    Raises:
        `InputError`: if the data or the training arguments cannot be used; then nothing has been written.
    """
    corpus = read_corpus(run.data)
    print(f"data: {run.data.source}: {corpus}")
    tokenizer = train_tokenizer(corpus.train["text"], run.tokenizer.vocab_size)
    train, held_out = (
        pack(documents, tokenizer, block_size=run.model.max_position_embeddings)
        for documents in (corpus.train, corpus.held_out)
    )
    print(
        f"tokens: vocabulary of {len(tokenizer):,}; {train.num_tokens:,} to train on, {held_out.num_tokens:,} held out"
    )

    config = run.model
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    use_cache = config.use_cache
    set_seed(run.training.seed)
    model = DDLForCausalLM(config)
    print(f"model: {model.num_parameters():,} parameters")

    run.training.include_num_input_tokens_seen = "all"  # for the tokens/s of the progress bar and the model card
    with blaming("training"):
        trainer = Trainer(
            model=model,
            args=run.training,
            train_dataset=train.blocks,
            eval_dataset=held_out.blocks,
            processing_class=tokenizer,
            preprocess_logits_for_metrics=token_losses,
            compute_metrics=mean_loss,
        )
        if trainer.hub_model_id is not None:
            HfApi().auth_check(trainer.hub_model_id, write=True)  # Trainer is content with one that can be read
    if not run.training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SpeedProgressCallback)

    folder = Path(run.training.output_dir)
    (folder / RUN_FILE).write_text(yaml.safe_dump(run.settings, sort_keys=False))
    if trainer.hub_model_id is not None:
        config.save_pretrained(folder)  # with the code, which Trainer leaves out when it pushes a checkpoint
    checkpoint = get_last_checkpoint(folder)
    if checkpoint is not None:
        print(f"continuing from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    results = evaluate(trainer, held_out)

    config.use_cache = use_cache  # Trainer turned it off, and generating without is slow
    trainer.args.push_to_hub = False  # or `save_model` would, before the rest is there and with a card of its own
    trainer.save_model()
    plot_loss(trainer.state.log_history, folder / "loss.png")
    pretrained_card(run, corpus, train, trainer, results).save(folder / "README.md")
    trainer.save_metrics("eval", results, combined=False)  # RESULTS_FILE: the run is finished
    if trainer.hub_model_id is not None:
        push(folder, trainer.hub_model_id, revision=run.training.hub_revision)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of each predicted token, `[batch, sequence - 1]`, to gather in place of logits; 0 where nothing is predicted."""
    return cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORE_INDEX
    )


def mean_loss(losses: EvalPrediction) -> dict[str, float]:
    """
    The mean of [`token_losses`] over all predicted tokens. It replaces Trainer's `eval_loss`, a mean over batches of
    their means, which gives the tokens of a last, smaller batch and of a padded block a greater weight.
    """
    predicted = losses.label_ids[:, 1:] != IGNORE_INDEX
    return {"loss": losses.predictions[predicted].mean(dtype=np.float64)}


def evaluate(trainer: Trainer, held_out: PackedText) -> dict[str, float]:
    """Trainer's metrics, and those that can be compared between tokenizers."""
    results = trainer.evaluate()
    return {
        **results,
        "eval_tokens": held_out.num_tokens,
        "eval_bytes": held_out.num_bytes,
        "perplexity": math.exp(results["eval_loss"]),
        "bits_per_byte": held_out.bits_per_byte(results["eval_loss"]),
        "unigram_bits_per_byte": held_out.unigram_entropy,
    }


class SpeedProgressCallback(ProgressCallback):
    """Trainer's progress bar, which tells the time left, with the loss and the speed beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif state.is_world_process_zero:
            self.training_bar.set_postfix(
                {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{logs['train_tokens_per_second']:,.0f}"}
            )


def plot_loss(log_history: list[dict[str, float]], path: Path):
    """Draws the losses that Trainer logged."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
