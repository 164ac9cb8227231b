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
Is it worth converting a Llama? For every seed, pretrains a small Llama and continues it with Trainer in several arms, from the
same weights, on the same batches, with a new optimiser:

    llama           as it is
    scalar, cc      converted, n = 1 and n = 4; the anchors are trained like everything else
    ..._annealed    the same, with anchors that are taken to the pure delta rule within the first half of the steps

Converted models train for as many tokens as the Llama and, in another run, for the seconds that the Llama took: for the steps
that their measured speed allows, so that the learning rate has come down at the end of both. Every arm tries the same
learning rates on the first seed and keeps its best for all. No batch is seen twice as long as the text is long enough.
Compilation is not timed, nor are evaluations.

    python benchmarks/convert_llama.py --data FOLDER_OF_THE_TEXTS --seconds 540

The grid says which texts, sizes and batches; its tokens are those of `transformers-ddl compare run`. Runs are added to
`results.jsonl` as they end and not repeated: a benchmark that was interrupted continues where it was. The last lines are a table,
also in `report.json`. In a few minutes on a CPU:

    python benchmarks/convert_llama.py --grid configs/compare/toy.yaml --data FOLDER_OF_THE_TEXTS --output outputs/toy_llama \
        --pretrain-steps 40 --steps 20
"""

import argparse
import json
import math
import time
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback, TrainingArguments, set_seed
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from transformers_ddl.comparison import PADDING, TokenBlocks, environment, prepare_tokens
from transformers_ddl.comparison_grid import Grid, digest
from transformers_ddl.conversion import AnchorAnnealingCallback, convert_llama
from transformers_ddl.trainer import ResumableTrainer


# Options of the conversion, and the share of the steps within which anchors are annealed
CONVERSIONS = {
    "scalar": ({"gate_init": 0.2}, None),
    "cc": ({"gate_init": 0.2, "num_value_channels": 4}, None),
    "scalar_annealed": ({"gate_init": 0.2}, 0.5),
    "cc_annealed": ({"gate_init": 0.2, "num_value_channels": 4}, 0.5),
}

# While compiling, transformers writes out even a plain causal mask, which bars sdpa's fast kernels: the Llama would be slower
# than it has to be
ALL_ATTENTION_FUNCTIONS.register("unmasked_sdpa", sdpa_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("unmasked_sdpa", lambda *args, **kwargs: None)

# Three architectures, in training and in evaluation, and a Llama again when other models have been made
torch._dynamo.config.recompile_limit = 32


class LogitlessLlamaForCausalLM(LlamaForCausalLM):
    """
    A Llama that leaves out logits where DDL models do: Accelerate would turn them into float32, and be timed at it. The name
    of its class ends like those by which transformers knows that the loss shifts labels.
    """

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, skip_logits: bool = False, **kwargs):
        outputs = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        return CausalLMOutputWithPast(loss=outputs.loss) if skip_logits else outputs


class TimedTrainer(ResumableTrainer):
    """Records held-out losses, in nats per token, against the seconds spent on training; the GPU is waited for at evaluations only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds, self.curve, self.begin = 0.0, [], None

    def evaluate(self, *args, **kwargs):
        if self.begin is not None:
            self.seconds += now() - self.begin
        metrics = super().evaluate(*args, **kwargs)
        self.curve.append({"step": self.state.global_step, "seconds": self.seconds, "loss": metrics["eval_loss"]})
        self.begin = now()
        return metrics


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def collate(blocks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = torch.stack(blocks)
    return {"input_ids": tokens.clamp(min=0), "labels": tokens.masked_fill(tokens == PADDING, -100)}


class OutOfTime(Exception):
    """No further run may begin."""


class Benchmark:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.deadline = time.monotonic() + options.seconds
        self.grid = Grid.from_yaml(options.grid)
        self.output = Path(options.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.results = self.output / "results.jsonl"
        self.models = {}  # one of each architecture, which is compiled once

        tokens = prepare_tokens(self.grid, Path(options.data))
        self.length, self.batch_size = self.grid.model["max_position_embeddings"], self.grid.training["batch_size"]
        # Blocks that overlap by a token, so that every token but the first is predicted
        self.train_blocks, held_out = (
            TokenBlocks(tokens / f"{name}.npy", self.length - 1, torch.device("cpu"))
            for name in ("train", "validation")
        )
        # Without the last block, which is padded, and in whole batches, as another size would be compiled once more
        num_held_out = (len(held_out) - 1) // self.batch_size * self.batch_size
        self.held_out = held_out[torch.arange(num_held_out)]
        settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
        self.settings = settings | {"model": self.grid.model, "batch_size": self.batch_size, "data": tokens.name}

    # Models

    def pretrained(self, seed: int) -> LogitlessLlamaForCausalLM:
        """The Llama to continue, from its folder if a call before this one has pretrained it."""
        folder = self.output / f"llama-{digest(json.dumps([self.settings, seed]).encode())}"
        if not folder.exists():
            set_seed(seed)
            model = self.compiled("llama", LogitlessLlamaForCausalLM(self.llama_config))
            lr, steps = self.options.pretrain_lr, self.options.pretrain_steps
            self.record("pretrained", seed, lr, "tokens", self.train_compiled(model, lr, steps, seed, first_step=0))
            model.save_pretrained(folder.with_suffix(".unfinished"))
            folder.with_suffix(".unfinished").rename(folder)
        return LogitlessLlamaForCausalLM.from_pretrained(folder, attn_implementation="unmasked_sdpa")

    @cached_property
    def llama_config(self) -> LlamaConfig:
        return LlamaConfig(
            **self.grid.model,
            vocab_size=self.grid.data["vocab_size"],
            intermediate_size=8 * self.grid.model["hidden_size"] // 3,
            tie_word_embeddings=True,
            attn_implementation="unmasked_sdpa",
        )

    def compiled(self, architecture: str, model: PreTrainedModel) -> PreTrainedModel:
        """The model of an architecture that is compiled, with the parameters of the given one."""
        if architecture in self.models:
            self.models[architecture].load_state_dict(model.state_dict())
        else:
            self.models[architecture] = model
            if self.grid.training.get("compile", True):
                model.compile(dynamic=False)
        return self.models[architecture]

    # Runs

    def train_compiled(
        self, model: PreTrainedModel, lr: float, steps: int, seed: int, first_step: int, *args
    ) -> TimedTrainer:
        """As `train`, with what is to be compiled, even once more, compiled before."""
        self.train(model, 0.0, 2, seed, first_step)  # changes no parameter
        return self.train(model, lr, steps, seed, first_step, *args)

    def train(
        self, model: PreTrainedModel, lr: float, steps: int, seed: int, first_step: int, callbacks: list | None = None
    ) -> TimedTrainer:
        """Trains a model on the batches of a seed from `first_step` on, unless time is up."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        order = self.train_blocks.order((first_step + steps) * self.batch_size, seed)[first_step * self.batch_size :]
        arguments = TrainingArguments(
            self.output / "trainer",
            max_steps=steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            train_sampling_strategy="sequential",
            learning_rate=lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=steps // 20,
            adam_beta2=0.95,
            weight_decay=0.1,
            bf16=torch.cuda.is_available(),  # many CPUs are several times slower in it
            use_cpu=not torch.cuda.is_available(),
            eval_strategy="steps",
            eval_steps=math.ceil(steps / 4),
            eval_on_start=True,
            prediction_loss_only=True,
            logging_steps=math.ceil(steps / 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = TimedTrainer(
            model,
            arguments,
            data_collator=collate,
            train_dataset=self.train_blocks[order],
            eval_dataset=self.held_out,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if trainer.curve[-1]["step"] < steps:
            trainer.evaluate()
        return trainer

    def identifier(self, arm: str, seed: int, lr: float, budget: str) -> str:
        return digest(json.dumps([self.settings, arm, seed, lr, budget]).encode())

    def finished(self) -> list[dict]:
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        return [json.loads(line) for line in lines]

    def record(self, arm: str, seed: int, lr: float, budget: str, trainer: TimedTrainer) -> dict:
        """Adds a run to the results; `budget` says whether it had the tokens or the seconds of the Llama."""
        steps, seconds, loss = trainer.curve[-1].values()
        tokens = steps * self.batch_size * self.length
        result = {
            "id": self.identifier(arm, seed, lr, budget),
            "arm": arm,
            "seed": seed,
            "lr": lr,
            "budget": budget,
            "steps": steps,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "loss": loss,
            "curve": trainer.curve,
            "settings": self.settings,
            **environment(),
        }
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(result, allow_nan=False) + "\n")
        print(
            f"seed {seed} {arm} lr {lr:g} equal {budget}: {trainer.curve[0]['loss']:.4f} -> {loss:.4f} nats, {steps} steps "
            f"in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s",
            flush=True,
        )
        return result

    def continued(self, arm: str, seed: int, lr: float, budget: str = "tokens", steps: int | None = None) -> dict:
        """The result of a run that continues the Llama of a seed, which is made if it is missing."""
        identifier = self.identifier(arm, seed, lr, budget)
        for result in self.finished():
            if result["id"] == identifier:
                return result
        steps, callbacks, architecture, model = steps or self.options.steps, [], arm, self.pretrained(seed)
        if arm != "llama":
            conversion, annealed_share = CONVERSIONS[arm]
            set_seed(seed)  # what the Llama has not starts at random
            architecture, model = json.dumps(conversion), convert_llama(model, **conversion)
            if annealed_share is not None:
                callbacks.append(AnchorAnnealingCallback(round(annealed_share * steps)))
        model = self.compiled(architecture, model)
        trainer = self.train_compiled(model, lr, steps, seed, self.options.pretrain_steps, callbacks)
        return self.record(arm, seed, lr, budget, trainer)

    def run(self):
        arms, seeds = ["llama", *self.options.arms], self.grid.seeds
        best = {}
        for arm in arms:
            trials = [self.continued(arm, seeds[0], lr) for lr in self.options.lrs]
            best[arm] = min(trials, key=lambda trial: trial["loss"])["lr"]
        results = []
        for seed in seeds:
            equal_tokens = {arm: self.continued(arm, seed, best[arm]) for arm in arms}
            results += equal_tokens.values()
            for arm in self.options.arms:
                speed = equal_tokens[arm]["tokens_per_second"] / equal_tokens["llama"]["tokens_per_second"]
                steps = round(speed * self.options.steps)
                results.append(self.continued(arm, seed, best[arm], "seconds", steps))
        self.report(results)

    def report(self, results: list[dict]):
        """Writes and prints means over seeds, with standard errors, and differences from the Llama of the same seed."""
        llama = {result["seed"]: result["loss"] for result in results if result["arm"] == "llama"}
        rows = []
        for arm, budget in dict.fromkeys((result["arm"], result["budget"]) for result in results):
            runs = [result for result in results if (result["arm"], result["budget"]) == (arm, budget)]
            differences = [run["loss"] - llama[run["seed"]] for run in runs]
            rows.append(
                {
                    "arm": arm,
                    "budget": budget,
                    "lr": runs[0]["lr"],
                    "seeds": [run["seed"] for run in runs],
                    "start_loss": mean(run["curve"][0]["loss"] for run in runs),
                    "loss": mean(run["loss"] for run in runs),
                    "loss_standard_error": standard_error([run["loss"] for run in runs]),
                    "difference": mean(differences),
                    "difference_standard_error": standard_error(differences),
                    "differences": differences,
                    "seconds": mean(run["seconds"] for run in runs),
                    "tokens": mean(run["tokens"] for run in runs),
                    "tokens_per_second": mean(run["tokens_per_second"] for run in runs),
                }
            )
        report = {"settings": self.settings, **environment(), "rows": rows}
        (self.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print("| arm | equal | lr | loss | difference | of each seed | seconds | Mtokens | thousand tokens/s |")
        print("|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['arm']} | {row['budget']} | {row['lr']:g} | {row['loss']:.4f} ± {row['loss_standard_error']:.4f} "
                f"| {row['difference']:+.4f} ± {row['difference_standard_error']:.4f} "
                f"| {', '.join(f'{difference:+.4f}' for difference in row['differences'])} "
                f"| {row['seconds']:.1f} | {row['tokens'] / 1e6:.1f} | {row['tokens_per_second'] / 1e3:,.0f} |"
            )


def standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


# Options that a result depends on
SETTINGS = ("pretrain_steps", "pretrain_lr", "steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="configs/compare/33m.yaml", help="of `transformers-ddl compare run`")
    parser.add_argument("--data", default=".", help="folder to which the grid's data files are relative")
    parser.add_argument("--output", default="outputs/convert_llama", help="folder of results and pretrained Llamas")
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--pretrain-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=200, help="of the continued Llama")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3], help="to try when continuing")
    parser.add_argument("--arms", nargs="*", default=["scalar", "cc"], choices=CONVERSIONS, help="beside the Llama")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further run begins")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        Benchmark(parser.parse_args()).run()
    except OutOfTime:
        print("time is up, to be continued", flush=True)


if __name__ == "__main__":
    main()
