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
Where the time of a training step, or of a new token, goes: milliseconds of each GPU kernel, those of most time first, and of
each kind of kernel. What a step takes longer than all its kernels, the GPU is idle.

    python benchmarks/profile_step.py --models additive cc --output outputs/profile.json
    python benchmarks/profile_step.py --models llama cc --decode 1 --output outputs/profile_decode.json
"""

import argparse
import collections
import re
from collections.abc import Callable
from functools import partial

import torch
from common import DEVICE, MODELS, SIZES, build, free_memory, mark, report, seconds_between
from decode import build_in_bf16, generate
from torch.profiler import ProfilerActivity, profile
from train_step import BATCHES, WARMUP, training_step
from transformers import CompileConfig


STEPS = 3
NEW_TOKENS = 100
# The first pattern that a kernel's name has decides; Inductor's own kernels are named after what they fuse
KINDS = {
    "boundaries": r"^boundary_|^convolution_",
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|sm90|splitK|cublas",
    "optimizer": r"adam|multi_tensor",
    "Inductor": r"^triton_",
    "copies": r"^Mem",
    "others": r"",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def trained(name: str, size: str, compiled: bool) -> Callable:
    """Makes a training step."""
    tokens = torch.randint(SIZES[size]["vocab_size"], BATCHES[size], device=DEVICE)
    return training_step(build(name, size).to(DEVICE).train(), tokens, compiled)


def decoded(name: str, size: str, batch_size: int) -> Callable:
    """Generates so many tokens, of which the prefill is shared out among them."""
    return partial(generate, build_in_bf16(name, size), batch_size, NEW_TOKENS, CompileConfig(fullgraph=True))


def measure(name: str, step: Callable, steps: int) -> tuple[float, list[dict]]:
    """Milliseconds of one of the `steps` that a call makes, by the clock and, beside its launches, for each kernel."""
    for _ in range(WARMUP):
        step()
    start = mark()
    for _ in range(STEPS):
        step()
    end = mark()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    steps *= STEPS
    return 1000 * seconds_between(start, end) / steps, sorted(
        (
            {
                "model": name,
                "kind": kind_of(event.key),
                "kernel": event.key,
                "milliseconds": event.self_device_time_total / 1000 / steps,
                "launches": event.count / steps,
            }
            for event in profiler.key_averages()
            if event.self_device_time_total > 0
        ),
        key=lambda result: -result["milliseconds"],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["additive", "cc"], choices=list(MODELS))
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    parser.add_argument("--decode", type=int, metavar="BATCH_SIZE", help="profile decoding, not training")
    parser.add_argument("--kernels", type=int, default=25, help="number of kernels to report of each model")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    if DEVICE == "cpu":
        parser.error("there is no GPU to profile")
    if args.eager and args.decode is not None:
        parser.error("--eager is for training: decoding is always compiled")

    results, totals = [], {}
    for name in args.models:
        if args.decode is None:
            milliseconds, kernels = measure(name, trained(name, args.size, not args.eager), 1)
        else:
            milliseconds, kernels = measure(name, decoded(name, args.size, args.decode), NEW_TOKENS)
        results += kernels[: args.kernels]
        total = collections.Counter()
        for result in kernels:
            total[result["kind"]] += result["milliseconds"]
        totals[name] = {"by the clock": milliseconds, "all kernels": total.total(), **total}
        free_memory()
    columns = {"model": "", "kind": "", "milliseconds": ".3f", "launches": ".0f", "kernel": ".90"}
    conditions = {"size": args.size, "compiled": not args.eager, "decoded_batch_size": args.decode}
    report(results, columns, args.output, **conditions, milliseconds=totals)


if __name__ == "__main__":
    main()
