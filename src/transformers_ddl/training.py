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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from huggingface_hub import HfApi, ModelCard
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .cards import pretrained_card
from .checkpoints import find_damage, last_complete_checkpoint, write_atomically
from .cli import InputError, RunError
from .configuration_ddl import DDLConfig
from .conversion import AnchorAnnealingCallback
from .data import (
    IGNORE_INDEX,
    DocumentCounts,
    PackedText,
    TextCounts,
    pack,
    read_corpus,
)
from .flops import activation_bytes, count_parameters, state_flops_per_token, training_flops_per_token
from .hub import push
from .inputs import blaming
from .modeling_ddl import DDLForCausalLM
from .settings import CheckedSettings, Run, TokenizerArguments, read_settings
from .streaming import DocumentStream, StreamedText
from .tokenization import load_tokenizer, train_tokenizer
from .trainer import DDLTrainer, Layout, ResumableTrainer, sequences_per_step


logger = logging.get_logger(__name__)

RUN_FILE = "run.yaml"
RESULTS_FILE = "eval_results.json"
COUNTS_FILE = "text_counts.json"
JOURNAL_FILE = "stream.jsonl"
# Another value may be given to continue a run: it changes nothing about what is trained. Of the batch sizes the product counts,
# with the number of processes: `Layout` keeps it.
FREE_FIELDS = {
    "data.num_proc",
    "training.dataloader_num_workers",
    "training.dataloader_persistent_workers",
    "training.dataloader_prefetch_factor",
    "training.dataset_num_proc",
    "training.disable_tqdm",
    "training.gradient_accumulation_steps",
    "training.output_dir",  # the same folder has many paths
    "training.per_device_train_batch_size",
    "training.report_to",
}


def main(arguments: list[str]):
    """`transformers-ddl pretrain CONFIG ... [--dry-run] [--section.field value ...]`."""
    parser = settings_parser("pretrain", "Pretrain a Deep Delta Learning language model, or continue to.")
    options, overrides = parser.parse_known_args(arguments)
    run = Run.from_settings(read_settings(options.config, overrides))
    if options.dry_run:
        is_finished(run)  # or the folder cannot be used
        print(describe(run))
        return
    results = complete(run, pretrain)
    if run.training.process_index == 0:
        print(
            f"held-out text: {results['bits_per_byte']:.3f} bits per byte, where the entropy of single bytes is "
            f"{results['unigram_bits_per_byte']:.3f}; loss {results['eval_loss']:.3f} nats per token, "
            f"perplexity {results['perplexity']:.1f}"
        )


def settings_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command that does what YAML files say."""
    parser = argparse.ArgumentParser(
        prog=f"transformers-ddl {command}",
        usage="%(prog)s [options] CONFIG [CONFIG ...] [--section.field value ...]",
        description=f"{description} Started again after it was interrupted, the same command continues from the last "
        "complete checkpoint.",
        epilog="--section.field value sets any field of the files, for instance --training.learning_rate=1e-3.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG",
        help="YAML files made of sections, as those in configs; later ones override earlier ones",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the run would cost, and write nothing")
    return parser


def complete(run: CheckedSettings, train: Callable[[CheckedSettings], str | None]) -> dict[str, float]:
    """
    Does a run, unless it is finished already.

    Args:
        train: Fills the output folder and returns the repository on the Hub that it is then to be pushed to, if any; by
            the main process alone.

    Returns:
        The results.

    Raises:
        `InputError`, `RunError`: see [`is_finished`] and [`explaining_failures`].
    """
    folder = Path(run.training.output_dir)
    if is_finished(run):
        print(f"{folder} holds this very run, finished; delete the folder to repeat it.")
    else:
        with explaining_failures(folder):
            repo_id = train(run)
        if repo_id is not None:
            push(folder, repo_id, revision=run.training.hub_revision)
    return json.loads((folder / RESULTS_FILE).read_text()) if run.training.process_index == 0 else {}


def is_finished(run: CheckedSettings) -> bool:
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
        for settings in (read_settings([folder / RUN_FILE], []), run.settings)
    )
    names = (recorded.keys() | given.keys()) - FREE_FIELDS
    different = sorted(name for name in names if recorded.get(name) != given.get(name))
    if different:
        raise InputError(
            f"training.output_dir: {str(folder)!r} holds a run with another {', '.join(different)}; {allowed}"
        )
    return (folder / RESULTS_FILE).is_file()


def describe(run: Run) -> str:
    """
    What a run costs and where it goes. Data are read only if their amount decides the number of steps.

    Raises:
        `InputError`: if data or a tokenizer that are needed cannot be read.
    """
    args, config = run.training, run.model
    block_size = config.max_position_embeddings
    if run.tokenizer.name is not None:
        set_vocabulary(config, load_tokenizer(run.tokenizer.name), run.tokenizer)
    else:
        config.vocab_size = run.tokenizer.num_embeddings(run.tokenizer.vocab_size)
    steps = args.max_steps
    if steps < 1:
        text = read_text(run)
        set_vocabulary(config, text.tokenizer, run.tokenizer)
        steps = number_of_steps(args, len(text.train))
    return describe_costs(
        run,
        num_trained=sum(count_parameters(config).values()),
        flops_per_token=partial(training_flops_per_token, config),
        steps=steps,
        mean_length=block_size,
        max_length=block_size,
    )


def number_of_steps(args: TrainingArguments, num_sequences: int) -> int:
    """Optimizer steps of a run over so many sequences."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(math.ceil(num_sequences / sequences_per_step(args)) * args.num_train_epochs)


def describe_costs(
    run: CheckedSettings,
    num_trained: int,
    flops_per_token: Callable[[int], int],
    steps: int,
    mean_length: int,
    max_length: int,
) -> str:
    """
    Args:
        num_trained: Number of parameters that are trained.
        flops_per_token: FLOPs of forward and backward pass for a token, by the length of its sequence.
        mean_length, max_length: Tokens of a sequence.
    """
    args, config = run.training, run.model
    parameters = count_parameters(config)
    batch_size = sequences_per_step(args)
    flops, tokens = flops_per_token(mean_length), steps * batch_size * mean_length
    autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    activations = args.train_batch_size * activation_bytes(
        config, max_length, autocast_dtype, args.gradient_checkpointing
    )
    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    return "\n".join(
        (
            f"parameters: {sum(parameters.values()):,} ("
            + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in parameters.items() if count)
            + f"), {num_trained:,} of them trained",
            f"FLOPs per token: {flops:,} in matrix products, forward and backward; "
            f"{sum(state_flops_per_token(config).values()):,} element-wise on the residual state, forward alone",
            f"memory: {(4 * sum(parameters.values()) + 12 * num_trained) / 2**30:,.2f} GiB for parameters, gradients and "
            f"AdamW's moments in float32 if they are not sharded, {activations / 2**30:,.2f} GiB for activations on each "
            "device (eager PyTorch)",
            f"steps: {steps:,} of {batch_size:,} sequences of {mean_length:,} tokens",
            f"tokens: {tokens:,}, for {flops * tokens:.3g} FLOPs",
            f"output: {Path(args.output_dir).resolve()}",
            *([f"hub: {repository}"] if args.push_to_hub else []),
        )
    )


@dataclass
class Text:
    """What a model is trained and evaluated on."""

    tokenizer: PreTrainedTokenizerBase
    train: torch.utils.data.Dataset
    held_out: PackedText
    counts: TextCounts | None  # with streaming, they are known after training


def read_text(run: Run) -> Text:
    """
    Raises:
        `InputError`: if the data or the tokenizer cannot be used.
    """
    stream = DocumentStream(run.data, run.training.seed) if run.data.streaming else None
    corpus = stream.sample() if stream else read_corpus(run.data)
    if run.tokenizer.name is not None:
        tokenizer = load_tokenizer(run.tokenizer.name)
    else:
        tokenizer = train_tokenizer(corpus.train["text"], run.tokenizer.vocab_size)
    options = {
        "block_size": run.model.max_position_embeddings,
        "keep_documents_apart": run.data.packing == "documents",
    }
    held_out = pack(corpus.held_out, tokenizer, num_proc=run.data.num_proc, **options)
    if stream:
        journal = Path(run.training.output_dir, JOURNAL_FILE)
        return Text(tokenizer, StreamedText(stream, tokenizer, journal, **options), held_out, None)
    train = pack(
        corpus.train, tokenizer, multiple=sequences_per_step(run.training), num_proc=run.data.num_proc, **options
    )
    return Text(tokenizer, train.blocks, held_out, TextCounts(corpus.counts, train.num_tokens, train.num_bytes))


def set_vocabulary(config: DDLConfig, tokenizer: PreTrainedTokenizerBase, arguments: TokenizerArguments | None = None):
    """Gives a new model the embeddings that a tokenizer needs; a model to start from has its own."""
    if not config.name_or_path:
        config.vocab_size = arguments.num_embeddings(len(tokenizer))
    elif len(tokenizer) > config.vocab_size:
        raise InputError(f"model.name: its tokenizer has {len(tokenizer):,} tokens, the model {config.vocab_size:,}")
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def load_base_model(
    model_class: type[PreTrainedModel], config: DDLConfig, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """
    The model `config.name_or_path`, with that configuration; only its head may be new. Where `config.dtype` is None, its
    parameters are of `dtype`: by default float32, as most steps of an optimizer would be rounded away in bfloat16.

    Raises:
        `InputError`: if it cannot be loaded, or has not all weights.
    """
    name = config.name_or_path
    try:
        model, loaded = model_class.from_pretrained(
            name, config=config, dtype=config.dtype or dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise InputError(f"model: cannot load {name!r} with these settings: {error}") from error
    missing = sorted(key for key in loaded["missing_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if missing:
        raise InputError(
            f"model: {name!r} lacks {len(missing)} weights that these settings ask for, the first is {missing[0]}"
        )
    return model


def pretrain(run: Run) -> str | None:
    """
    Makes or loads a tokenizer, makes or loads a model, trains it and fills the output folder; continues from its last complete checkpoint if it
    has one. The process may be killed at any moment: the same call then goes on from there.

    Returns:
        The repository on the Hub that the output folder is still to be pushed to, if any; by the main process alone.

    Raises:
        `InputError`: if the data or the training arguments cannot be used; then nothing has been written.
        `RunError`: if the loss is not finite any more. The complete checkpoints are left, as after any other failure.
    """
    report = print if run.training.process_index == 0 else lambda *_: None
    with run.training.main_process_first(desc="reading text"):  # the others find it in the cache
        text = read_text(run)
    if text.counts is None:
        report(f"data: {run.data.name}: streamed, {len(text.held_out.documents):,} held-out documents to evaluate on")
    else:
        report(f"data: {run.data.name}: {text.counts.documents}")
    trained_on = "" if text.counts is None else f"{text.counts.num_tokens:,} to train on, "
    report(f"tokens: vocabulary of {len(text.tokenizer):,}; {trained_on}{text.held_out.num_tokens:,} held out")

    config, tokenizer = run.model, text.tokenizer
    set_vocabulary(config, tokenizer, run.tokenizer)
    set_seed(run.training.seed)
    model = load_base_model(DDLForCausalLM, config) if config.name_or_path else DDLForCausalLM(config)
    report(f"model: {model.num_parameters():,} parameters")

    if run.data.streaming:
        run.training.ignore_data_skip = True  # `StreamedText` itself begins where it must
        run.training.dataloader_num_workers = min(1, run.training.dataloader_num_workers)
    with blaming("training"):
        trainer = DDLTrainer(
            model=model,
            args=run.training,
            train_dataset=text.train,
            eval_dataset=text.held_out.blocks,
            # A tokenizer's collator adds a mask of ones, which bars attention's fast kernels and hides packed documents
            data_collator=default_data_collator,
            audited_inputs=default_data_collator([text.held_out.blocks[0]]),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=token_losses,
            compute_metrics=mean_loss,
            callbacks=[SampleCallback([tokenizer.eos_token_id])],
        )
        check_repository(trainer)

    amounts = [len(tokenizer), text.held_out.num_tokens, text.held_out.num_bytes]
    if text.counts is not None:
        amounts += [text.counts.num_tokens, text.counts.num_bytes]
    results = comparable(train_and_evaluate(run, trainer, amounts), text.held_out)
    trainer.save_model()
    if trainer.is_world_process_zero():
        if text.counts is None:
            text.counts = text.train.count_text(blocks_seen(trainer))
            report(f"data: {run.data.name}: {text.counts.documents}")
        write_results(run, trainer, text.counts, results, pretrained_card(run, text.counts, trainer, results))
    return trainer.hub_model_id


def check_repository(trainer: Trainer):
    """Raises the Hub's error if the repository to push to, if any, cannot be written to."""
    if trainer.hub_model_id is not None:
        HfApi().auth_check(trainer.hub_model_id, write=True)  # Trainer is content with one that can be read


def train_and_evaluate(run: CheckedSettings, trainer: ResumableTrainer, amounts: list[int]) -> dict[str, float]:
    """
    Trains from the last complete checkpoint to the end; the model can then be saved. Returns Trainer's metrics.

    Args:
        amounts: Of the data; see [`Layout`].

    Raises:
        `InputError`: if the checkpoint is of a run that this cannot continue.
        `RunError`: if a loss is not finite, or that on held-out data is too large for a perplexity.
    """
    trainer.layout.data = amounts
    if run.anchor.annealing_steps is not None:
        if trainer.is_deepspeed_enabled:  # which would undo it: it has copies of the parameters
            raise InputError("anchor.annealing_steps: cannot be set with DeepSpeed")
        trainer.add_callback(AnchorAnnealingCallback(run.anchor.annealing_steps))
    config = trainer.model.config
    if trainer.is_world_process_zero():
        folder = Path(run.training.output_dir)
        write_atomically(folder / RUN_FILE, yaml.safe_dump(run.settings, sort_keys=False))
        if trainer.hub_model_id is not None:
            config.save_pretrained(folder)  # with the code, which Trainer leaves out when it pushes a checkpoint
    with speed_in_progress_bar(trainer):
        train_from_last_checkpoint(trainer)
        metrics = trainer.evaluate()
    if not metrics["eval_loss"] < 700:  # not a number, or the perplexity is none
        raise RunError(f"the loss on held-out data is {metrics['eval_loss']}: training has diverged")
    config.use_cache = True  # Trainer turned it off, and generating without is slow
    trainer.args.push_to_hub = False  # or `save_model` would, before the rest is there and with a card of its own
    return metrics


def write_results(
    run: CheckedSettings,
    trainer: Trainer,
    counts: TextCounts | DocumentCounts,
    results: dict[str, float],
    card: ModelCard,
):
    """Writes what there is to read beside the saved model; with the last file the run is finished."""
    folder = Path(run.training.output_dir)
    write_atomically(folder / COUNTS_FILE, json.dumps(asdict(counts), indent=4))
    plot_loss(trainer.state.log_history, folder / "loss.png")
    card.save(folder / "README.md")
    write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=4, sort_keys=True))


def blocks_seen(trainer: Trainer) -> int:
    return trainer.state.num_input_tokens_seen // trainer.model.config.max_position_embeddings


def train_from_last_checkpoint(trainer: ResumableTrainer):
    """Trains up to the last step, or loads the checkpoint of the last step if that is already there."""
    is_main_process = trainer.is_world_process_zero()
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir)) if is_main_process else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    if checkpoint is None:
        trainer.train()
        return
    if is_main_process:
        print(f"continuing from {checkpoint}")
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    begun = trainer.state.stateful_callbacks[Layout.__name__]["args"]
    if trainer.layout.sequences_per_step != begun["sequences_per_step"]:
        raise InputError(
            f"training.per_device_train_batch_size: times gradient_accumulation_steps and the number of processes it is "
            f"{trainer.layout.sequences_per_step}; allowed: {begun['sequences_per_step']}, with which the run in "
            f"{trainer.args.output_dir!r} was begun"
        )
    if trainer.layout.sharding != begun["sharding"]:
        raise InputError(
            f"accelerate: this is {trainer.layout.sharding}; allowed: {begun['sharding']}, with which the run in "
            f"{trainer.args.output_dir!r} was begun"
        )
    if trainer.layout.data != begun["data"]:
        raise InputError(
            f"data.source: holds other data than when the run in {trainer.args.output_dir!r} was begun; allowed: the same, "
            "or another training.output_dir"
        )
    if isinstance(trainer.train_dataset, StreamedText):
        trainer.train_dataset.first_block = blocks_seen(trainer)
    if trainer.state.global_step < trainer.state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # Trainer might make one step more
        trainer._load_from_checkpoint(str(checkpoint))
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            load_best_model(trainer)


def load_best_model(trainer: Trainer):
    """The best checkpoint's model, in the folder that may have been moved since; the last one's, with a warning, if it is damaged."""
    best = Path(trainer.args.output_dir, Path(trainer.state.best_model_checkpoint).name)
    if damage := find_damage(best):
        logger.warning(f"{best}, the best, cannot be used: {damage}; the last one is used instead")
    else:
        trainer.state.best_model_checkpoint = str(best)
        trainer._load_best_model()


@contextmanager
def explaining_failures(folder: Path) -> Iterator[None]:
    """Turns failures that a user can do something about into a `RunError` that says what is left in `folder`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, KeyError) and "metric_for_best_model" in str(error):
            raise InputError(f"training.metric_for_best_model: {error.args[0]}") from error
        reason = message(error) if isinstance(error, RunError) else explain(error)
        if reason is None and isinstance(error, InputError):
            raise InputError(message(error)) from error
        if reason is None:
            raise
        checkpoint = last_complete_checkpoint(folder)
        left = "there is no complete checkpoint yet" if checkpoint is None else f"{checkpoint} is complete"
        raise RunError(f"{reason}; {left}") from error


def message(error: BaseException) -> str:
    """What an error says; if it comes from a process that reads data, without the traceback in which it says so."""
    text = str(error)
    return text.strip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def explain(error: BaseException | None) -> str | None:
    """What went wrong, if it is the disk, the memory or another process."""
    if error is None:
        return None
    text = message(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return f"the disk is full: {text}"
    if isinstance(error, RuntimeError) and "inline_container" in text:  # all that `torch.save` says
        return f"a checkpoint could not be written, the disk may be full: {text}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}"
    if isinstance(error, RuntimeError) and ("DataLoader worker" in text or "subprocesses has abruptly died" in text):
        return f"a process that reads data died: {text}"
    if isinstance(error, RuntimeError) and "gloo" in text:
        return f"another process of this run does not answer: {text}"
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


def comparable(metrics: dict[str, float], held_out: PackedText) -> dict[str, float]:
    """Adds to Trainer's metrics those that can be compared between tokenizers."""
    return {
        **metrics,
        "eval_tokens": held_out.num_tokens,
        "eval_bytes": held_out.num_bytes,
        "perplexity": math.exp(metrics["eval_loss"]),
        "bits_per_byte": held_out.bits_per_byte(metrics["eval_loss"]),
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


@contextmanager
def speed_in_progress_bar(trainer: Trainer) -> Iterator[None]:
    """Puts [`SpeedProgressCallback`] in the place of Trainer's progress bar, and ends its line also if training fails."""
    if trainer.pop_callback(ProgressCallback) is None:
        yield
        return
    progress = SpeedProgressCallback()
    trainer.add_callback(progress)
    try:
        yield
    finally:
        if progress.training_bar is not None:
            progress.training_bar.close()


class SampleCallback(TrainerCallback):
    """Writes a continuation of the tokens of a prompt at every checkpoint to `samples/step-....txt`."""

    def __init__(self, prompt: list[int]):
        self.prompt = prompt

    def on_save(self, args, state, control, model=None, processing_class=None, **kwargs):
        sharded = AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if not (sharded or state.is_world_process_zero):
            return
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # training goes on as if there had been no sample
            torch.manual_seed(args.seed)
            model.eval()
            tokens = model.generate(
                input_ids=torch.tensor([self.prompt], device=args.device),
                do_sample=True,
                max_length=min(len(self.prompt) + 127, model.config.max_position_embeddings),
                pad_token_id=processing_class.eos_token_id,
                use_cache=True,
            )
        if state.is_world_process_zero:
            folder = Path(args.output_dir, "samples")
            folder.mkdir(exist_ok=True)
            text = processing_class.decode(tokens[0, len(self.prompt) :], skip_special_tokens=True)
            (folder / f"step-{state.global_step:08d}.txt").write_text(text, encoding="utf-8")


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
