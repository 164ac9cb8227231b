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
Is it worth converting a Llama? Pretrains a small Llama, converts it, and continues the DDL models and, on the same batches
with the same optimiser, the Llama: for the same number of tokens, and for as many as it reads in the seconds that the DDL
model took. The held-out losses are recorded against tokens and seconds.

    python benchmarks/convert_llama.py --source my_corpus.parquet --seeds 0 1 2 --output results.json

The default sizes run on a CPU within minutes.
"""

import argparse
import copy
import json
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from transformers_ddl.conversion import AnchorAnnealingCallback, convert_llama
from transformers_ddl.data import DataArguments, pack, read_corpus, train_tokenizer


# Options of the conversion, and the share of the continued training in which anchors are annealed
CONVERSIONS = {
    "scalar": ({}, None),
    "scalar-annealed": ({}, 0.5),
    "cc": ({"num_value_channels": 4}, None),
    "cc-annealed": ({"num_value_channels": 4}, 0.5),
}


class Curve(TrainerCallback):
    """Held-out losses of a training, by tokens and by seconds spent on its steps."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.seconds, self.points = 0.0, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += now() - self.begin

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        tokens = state.global_step * self.tokens_per_step
        self.points.append({"tokens": tokens, "seconds": self.seconds, "loss": metrics["eval_loss"]})


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(model, steps: int, learning_rate: float, seed: int, blocks, args, callbacks=()) -> Curve:
    """Trains a model in place, from a new optimiser state; `seed` decides the order of batches."""
    curve = Curve(args.batch_size * args.block_size)
    training = TrainingArguments(
        args.work_dir,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    Trainer(
        model, training, train_dataset=blocks["train"], eval_dataset=blocks["held_out"], callbacks=[curve, *callbacks]
    ).train()
    return curve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="text, as for `transformers-ddl pretrain`")
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--num_hidden_layers", type=int, default=3)
    parser.add_argument("--num_attention_heads", type=int, default=3)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--eval_blocks", type=int, default=64, help="largest number of held-out blocks to evaluate on")
    parser.add_argument("--pretrain_steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="of the continued training")
    parser.add_argument("--pretrain_learning_rate", type=float, default=3e-3)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the continued training")
    parser.add_argument("--models", nargs="+", default=list(CONVERSIONS), choices=CONVERSIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work_dir", default="outputs/convert_llama")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()

    corpus = read_corpus(DataArguments(args.source))
    tokenizer = train_tokenizer(corpus.train["text"], args.vocab_size)
    blocks = {
        name: pack(documents, tokenizer, block_size=args.block_size).blocks
        for name, documents in (("train", corpus.train), ("held_out", corpus.held_out))
    }
    blocks["held_out"] = blocks["held_out"].select(range(min(args.eval_blocks, len(blocks["held_out"]))))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=args.block_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        use_cache=False,
    )

    results = []

    def record(name: str, seed: int, curve: Curve):
        first, last = curve.points[0], curve.points[-1]
        print(
            f"seed {seed} {name:32s} loss {first['loss']:.4f} -> {last['loss']:.4f} "
            f"after {last['tokens']:,} tokens and {last['seconds']:.1f} s",
            flush=True,
        )
        results.append({"seed": seed, "model": name, "curve": curve.points})
        if args.output:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            with open(args.output, "w") as file:
                json.dump({"device": device, **versions, "settings": vars(args), "results": results}, file, indent=1)

    for seed in args.seeds:
        set_seed(seed)
        llama = LlamaForCausalLM(config)
        record(
            "pretrained llama",
            seed,
            train(llama, args.pretrain_steps, args.pretrain_learning_rate, seed, blocks, args),
        )

        def continue_training(model, steps=args.steps, callbacks=()):
            return train(model, steps, args.learning_rate, seed + 1, blocks, args, callbacks)

        baseline = continue_training(copy.deepcopy(llama))
        record("llama", seed, baseline)
        for name in args.models:
            options, annealed = CONVERSIONS[name]
            callbacks = [] if annealed is None else [AnchorAnnealingCallback(int(annealed * args.steps))]
            curve = continue_training(convert_llama(llama, **options), callbacks=callbacks)
            record(name, seed, curve)
            equal_time_steps = round(args.steps * curve.seconds / baseline.seconds)
            record(f"llama for the time of {name}", seed, continue_training(copy.deepcopy(llama), equal_time_steps))


if __name__ == "__main__":
    main()
