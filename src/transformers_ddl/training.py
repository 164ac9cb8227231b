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
import errno
import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, ProgressCallback, Trainer, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import last_complete_checkpoint, write_atomically
from .cli import InputError, RunError
from .data import IGNORE_INDEX, Corpus, PackedText, pack, read_corpus, train_tokenizer
from .modeling_ddl import DDLForCausalLM
from .settings import Run, blaming, read_settings
from .trainer import DDLTrainer


# In a checkout they lie beside `src`, in an installed package inside it (setup.cfg)
CARD_TEMPLATES = next(folder / "model_cards" for folder in Path(__file__).parents if (folder / "model_cards").is_dir())
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
    if all(file.name.startswith(".") for file in folder.iterdir()):
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
    Trains a tokenizer and a model and fills the output folder; continues from its last complete checkpoint if it has one.
    The process may be killed at any moment: the same call then goes on from there.

    Raises:
        `InputError`: if the data or the training arguments cannot be used; then nothing has been written.
        `RunError`: if training fails for want of disk space or memory, with a loss that is not finite, or because a process
            that reads data died. The complete checkpoints are left.
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
        trainer = DDLTrainer(
            model=model,
            args=run.training,
            train_dataset=train.blocks,
            eval_dataset=held_out.blocks,
            processing_class=tokenizer,
            preprocess_logits_for_metrics=token_losses,
            compute_metrics=mean_loss,
        )
    progress = SpeedProgressCallback()
    if not run.training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)

    folder = Path(run.training.output_dir)
    with explaining_failures(folder), closing(progress):
        write_atomically(folder / RUN_FILE, yaml.safe_dump(run.settings, sort_keys=False))
        train_from_last_checkpoint(trainer)
        results = evaluate(trainer, held_out)

        config.use_cache = use_cache  # Trainer turned it off, and generating without is slow
        trainer.save_model()
        plot_loss(trainer.state.log_history, folder / "loss.png")
        write_model_card(folder / "README.md", run, corpus, train, trainer, results)
        write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=4, sort_keys=True))  # the run is finished


def train_from_last_checkpoint(trainer: DDLTrainer):
    """Trains up to the last step, or loads the checkpoint of the last step if that is already there."""
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is None:
        trainer.train()
        return
    print(f"continuing from {checkpoint}")
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # Trainer might make one step more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state


@contextmanager
def explaining_failures(folder: Path) -> Iterator[None]:
    """Turns failures that a user can do something about into a `RunError` that says what is left in `folder`."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, RunError) else explain(error)
        if reason is None:
            raise
        checkpoint = last_complete_checkpoint(folder)
        left = "there is no complete checkpoint yet" if checkpoint is None else f"{checkpoint} is complete"
        raise RunError(f"{reason}; {left}") from error


def explain(error: BaseException | None) -> str | None:
    """What went wrong, if it is the disk, the memory or a worker."""
    if error is None:
        return None
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return f"the disk is full: {text}"
    if isinstance(error, RuntimeError) and "inline_container" in text:  # all that `torch.save` says
        return f"a checkpoint could not be written, the disk may be full: {text}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}"
    if isinstance(error, RuntimeError) and ("DataLoader worker" in text or "subprocesses has abruptly died" in text):
        return f"a process that reads data died: {text}"
    return explain(error.__cause__ or error.__context__)


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
            tokens_per_second = logs.get("tokens_per_second", logs["train_tokens_per_second"])
            figures = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{tokens_per_second:,.0f}"}
            if "mfu" in logs:
                figures["MFU"] = f"{logs['mfu']:.1%}"
            self.training_bar.set_postfix(figures)

    def close(self):
        """Ends the line of the bar of a training that failed."""
        if self.training_bar is not None:
            self.training_bar.close()


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


def write_model_card(
    path: Path,
    run: Run,
    corpus: Corpus,
    train: PackedText,
    trainer: Trainer,
    results: dict[str, float],
):
    """Renders the template of model cards with what was run and measured."""
    name = path.resolve().parent.name
    eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=run.data.source,
            dataset_name=f"{run.data.source} (held-out documents)",
            metric_type=metric,
            metric_value=results[metric],
        )
        for metric in ("bits_per_byte", "perplexity")
    ]
    card = ModelCard.from_template(
        card_data=ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["deep-delta-learning"],
            model_name=name,
            eval_results=eval_results,
        ),
        template_path=CARD_TEMPLATES / "pretrained.md",
        block_size=run.model.max_position_embeddings,
        corpus=corpus,
        name=name,
        num_parameters=trainer.model.num_parameters(),
        results=results,
        settings=yaml.safe_dump(run.settings, sort_keys=False),
        source=run.data.source,
        state=trainer.state,
        train=train,
    )
    card.save(path)
