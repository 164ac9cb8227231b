"""
What reading text and Trainer cost: the speed of `transformers-ddl pretrain` as a share of that of the bare training step.

For every residual the bare compiled step is timed on random tokens, the recipe of the paper's small model is run on text, and the
bare step is timed again. Tokenising before training, evaluating and saving are not part of it.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from pyarrow.parquet import read_table
from train_step import training_step
from transformers import DefaultFlowCallback, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from transformers_ddl import DDLForCausalLM
from transformers_ddl.comparison import environment
from transformers_ddl.settings import Run, read_settings
from transformers_ddl.tokenization import load_tokenizer, train_tokenizer
from transformers_ddl.training import RESULTS_FILE, pretrain, set_vocabulary


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, when the device has done all its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(TrainerCallback):
    def __init__(self, interval: int):
        self.interval = interval
        self.times = []  # at the end of every `interval`-th step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.interval == 0:
            self.times.append(now())


def read_run(residual: str, args: argparse.Namespace, overrides: list[str]) -> Run:
    """The recipe, with one optimizer step for every batch as in the bare step."""
    settings = read_settings(
        [CONFIGS / "paper.yaml", CONFIGS / "sizes" / "small.yaml", CONFIGS / "residuals" / f"{residual}.yaml"],
        [
            f"--data.source={args.text}",
            "--data.subset=null",
            f"--data.streaming={str(args.streaming).lower()}",
            f"--tokenizer.name={args.output_dir / 'tokenizer'}",
            f"--training.output_dir={args.output_dir / residual}-{'streaming' if args.streaming else 'packed'}",
            f"--training.max_steps={args.steps}",
            "--training.gradient_accumulation_steps=1",
            "--training.warmup_steps=100",
            "--training.eval_strategy=no",
            "--training.save_strategy=no",
            *overrides,
        ],
    )
    return Run.from_settings(settings)


def measure(run: Run, interval: int, bare_steps: int) -> dict:
    """Milliseconds of the bare step before and after the run, and of a step of the run between its `interval`-th and its last."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch_size, block_size = run.training.train_batch_size, run.model.max_position_embeddings
    set_vocabulary(run.model, load_tokenizer(run.tokenizer.name), run.tokenizer)
    run.model.use_cache = False  # as Trainer does
    model = DDLForCausalLM(run.model).to(DEVICE).train()
    tokens = torch.randint(run.model.vocab_size, (batch_size, block_size), device=DEVICE)
    step = training_step(model, tokens, run.training.torch_compile, run.training.max_grad_norm)

    def bare_milliseconds() -> float:
        for _ in range(5):
            step()
        start = now()
        for _ in range(bare_steps):
            step()
        return (now() - start) / bare_steps * 1e3

    before = bare_milliseconds()
    stopwatch = Stopwatch(interval)
    DEFAULT_CALLBACKS[:] = [DefaultFlowCallback, stopwatch]
    start = now()
    pretrain(run)
    gc.collect()
    after = bare_milliseconds()

    times = stopwatch.times
    trainer = (times[-1] - times[0]) / ((len(times) - 1) * interval) * 1e3
    bare = (before + after) / 2
    return {
        "bare_milliseconds": bare,
        "bare_milliseconds_before_and_after": [before, after],
        "trainer_milliseconds": trainer,
        "trainer_milliseconds_by_interval": [(b - a) / interval * 1e3 for a, b in zip(times, times[1:])],
        "seconds_to_first_interval": times[0] - start,
        "bare_tokens_per_second": batch_size * block_size / bare * 1e3,
        "trainer_tokens_per_second": batch_size * block_size / trainer * 1e3,
        "share_lost": 1 - bare / trainer,
        "evaluation": json.loads(Path(run.training.output_dir, RESULTS_FILE).read_text(encoding="utf-8")),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Further arguments: --section.field value, as for pretrain."
    )
    parser.add_argument("text", help="Parquet file with a column `text`")
    parser.add_argument("--residuals", nargs="+", default=["additive", "scalar", "cc"])
    parser.add_argument("--streaming", action="store_true", help="tokenise while training, as the recipe does")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument(
        "--interval", type=int, default=50, help="steps between two looks at the clock, of which the first starts it"
    )
    parser.add_argument("--bare_steps", type=int, default=50)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/data_path"))
    args, overrides = parser.parse_known_args()

    if not (args.output_dir / "tokenizer").exists():
        texts = read_table(args.text, columns=["text"]).column("text").to_pylist()
        train_tokenizer(texts[::8], vocab_size=50257).save_pretrained(args.output_dir / "tokenizer")
    report = environment() | {"streaming": args.streaming, "steps": args.steps}
    results = {}
    for residual in args.residuals:
        run = read_run(residual, args, overrides)
        results[residual] = measure(run, args.interval, args.bare_steps)
        Path(f"{run.training.output_dir}.json").write_text(
            json.dumps(report | {"residual": residual, "overrides": overrides} | results[residual], indent=1) + "\n",
            encoding="utf-8",
        )
    print(f"{'':10s} {'bare':>11s} {'Trainer':>11s}   tokens/s {'':10s} lost")
    for residual, result in results.items():
        print(
            f"{residual:10s} {result['bare_milliseconds']:8.2f} ms {result['trainer_milliseconds']:8.2f} ms "
            f"{result['bare_tokens_per_second']:10,.0f} {result['trainer_tokens_per_second']:10,.0f} {result['share_lost']:7.2%}"
        )


if __name__ == "__main__":
    main()
