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
Training step (forward, backward, fused AdamW) of DDL and additive models on random tokens: throughput, as ratio to the first
model's, and peak memory. In bf16 autocast on a GPU, where models are measured one after another, and in float32 on a CPU, where
they take steps in turn.

    python benchmarks/train_step.py --sizes small medium --output outputs/train_step.json
    python benchmarks/train_step.py --sizes small --models llama additive cc --eager --liger cc
    python benchmarks/train_step.py --sizes small --cuda_graphs
    python benchmarks/train_step.py --sizes quickstart --eager --steps 40     # on a CPU
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from common import DEVICE, MODELS, SIZES, add_ratios, build, free_memory, mark, report, seconds_between, synchronize
from transformers.integrations.liger import apply_liger_kernel

from transformers_ddl import DDLForCausalLM


# Sequences, and tokens in each of them
BATCHES = {"toy": (2, 32), "quickstart": (4, 256), "small": (32, 1024), "medium": (16, 1024), "1b": (8, 2048)}
WARMUP = 5
# Under `torch.compile` the rest is fused anyway
LOSS_ALONE = {"rope": False, "rms_norm": False, "swiglu": False}


def training_step(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    compiled: bool,
    max_grad_norm: float | None = None,
    compile_mode: str | None = None,
) -> Callable[[], torch.Tensor]:
    """
    A function that makes a step (forward under bf16 autocast on a GPU, backward, clipping if there is a norm to clip to, fused
    AdamW) and returns its loss. The mode is `torch.compile`'s.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, mode=compile_mode) if compiled else model
    options = {"skip_logits": True} if isinstance(model, DDLForCausalLM) else {}  # as `DDLTrainer`

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False, **options).loss
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def measure(names: list[str], size: str, batch: tuple[int, int], args: argparse.Namespace) -> list[dict]:
    """
    Median milliseconds of a step of each model, all of which are in memory, and its peak in GiB on a GPU, unless it lies in the
    pools of CUDA graphs.
    """
    steps = {}
    measures_memory = DEVICE == "cuda" and not args.cuda_graphs
    compile_mode = "reduce-overhead" if args.cuda_graphs else None
    tokens = torch.randint(SIZES[size]["vocab_size"], batch, device=DEVICE)
    for name in names:
        model = build(name, size).to(DEVICE).train()
        if name in args.liger:
            apply_liger_kernel(model, {} if args.eager else LOSS_ALONE)
        steps[name] = training_step(model, tokens, compiled=not args.eager, compile_mode=compile_mode)
    for _ in range(WARMUP):
        for step in steps.values():
            step()
    if measures_memory:
        torch.cuda.reset_peak_memory_stats()
    # As in training, steps are launched while the device is still at those before
    marks, losses = {name: [] for name in names}, {}
    for _ in range(args.steps):
        for name, step in steps.items():
            start = mark()
            losses[name] = step()
            marks[name].append((start, mark()))
    synchronize()
    times = {name: [seconds_between(*each) for each in marks[name]] for name in names}
    return [
        {
            "size": size,
            "model": name,
            "compiled": not args.eager,
            "cuda_graphs": args.cuda_graphs,
            "liger": name in args.liger,
            "tokens": tokens.numel(),
            "milliseconds": 1000 * statistics.median(times[name]),
            "thousand_tokens_per_second": tokens.numel() / statistics.median(times[name]) / 1000,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if measures_memory else None,
            "loss": losses[name].item(),
        }
        for name in names
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["additive", "scalar", "cc", "tc"], choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", default=["small"], choices=list(SIZES))
    parser.add_argument("--batch_size", type=int, help="sequences, instead of the size's")
    parser.add_argument("--seq_length", type=int, help="tokens in each, instead of the size's")
    parser.add_argument("--eager", action="store_true", help="measure without torch.compile")
    graphs_help = "forward and backward in CUDA graphs, so that the host does not matter"
    parser.add_argument("--cuda_graphs", action="store_true", help=graphs_help)
    liger_help = "these models with Liger's kernels; compiled, with its loss alone"
    parser.add_argument("--liger", nargs="+", default=[], choices=list(MODELS), help=liger_help)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    if args.cuda_graphs and (args.eager or DEVICE == "cpu"):
        parser.error("--cuda_graphs: for compiled steps on a GPU; allowed: without --eager, where there is a GPU")
    if not set(args.liger) <= set(args.models):
        parser.error(f"--liger: {args.liger}; allowed: some of --models")

    results = []
    for size in args.sizes:
        batch = args.batch_size or BATCHES[size][0], args.seq_length or BATCHES[size][1]
        for names in [[name] for name in args.models] if DEVICE == "cuda" else [args.models]:
            results += measure(names, size, batch, args)
            free_memory()
    add_ratios(results, "thousand_tokens_per_second", within=("size",))
    columns = {"size": "", "model": "", "milliseconds": ".2f", "thousand_tokens_per_second": ".1f", "ratio": ".3f"}
    if DEVICE == "cuda" and not args.cuda_graphs:
        columns |= {"peak_gib": ".2f"}
    report(results, columns | {"loss": ".4f"}, args.output, steps=args.steps)


if __name__ == "__main__":
    main()
