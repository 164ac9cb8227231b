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
Tokens per second of `generate` (greedy, static cache, bf16), compiled with CUDA graphs on a GPU as Transformers does it there by
itself: of whole steps, and of the forward pass alone (the inputs' preparation included, choosing the token not), which is what
models differ in. Ratios are to the first model of the run. At every token, compiled models check that each of their modules and parameters is
what it was when they were compiled, unless `--skip_guards` says that nothing will change (docs/serving.md). A busy host changes results by
a third from one second to the next: each model is compiled in a process of its own, all take turns for so many `--rounds`, one at a time, and
the medians of all tokens' times are taken.

    python benchmarks/decode.py --output outputs/decode.json
    python benchmarks/decode.py --size toy --batch_sizes 1 3 --new_tokens 24     # on a CPU
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
from multiprocessing.connection import Connection, wait

import torch
from common import DEVICE, MODELS, SIZES, add_ratios, build, now, report
from transformers import CompileConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria


PROMPT_LENGTH = 16
WARMUP = 8  # steps, after a whole generation


class LogitsClock(LogitsProcessor):
    """Looks at the time when logits are there, which it leaves as they are."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.times.append(now())
        return scores


class TokenClock(StoppingCriteria):
    """Looks at the time when a token has been chosen, and stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.times.append(now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def build_in_bf16(name: str, size: str) -> PreTrainedModel:
    """As one loads a model to generate with: in bf16, but for what is kept in float32."""
    with tempfile.TemporaryDirectory() as folder:
        model = build(name, size)
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)


def generate(model: PreTrainedModel, batch_size: int, new_tokens: int, compile_config: CompileConfig, **options):
    prompt = torch.randint(model.config.vocab_size, (batch_size, PROMPT_LENGTH), device=DEVICE)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=new_tokens,
        cache_implementation="static",
        compile_config=compile_config,
        **options,
    )


def decode(connection: Connection, name: str, args: argparse.Namespace):
    """A process with a model: for each batch size, tells when it has compiled, then the times of a turn whenever asked for one."""
    model = build_in_bf16(name, args.size)
    compile_config = CompileConfig(fullgraph=True)  # CUDA graphs by default
    if args.skip_guards:
        skip_guards = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        compile_config.mode, compile_config.options = None, {"triton.cudagraphs": True, "guard_filter_fn": skip_guards}
    for batch_size in args.batch_sizes:
        torch.compiler.reset()  # or a second batch size would be compiled for any
        generate(model, batch_size, args.new_tokens, compile_config)
        connection.send(hasattr(model, "_compiled_call"))
        while connection.recv():
            logits_clock, token_clock = LogitsClock(), TokenClock()
            clocks = {"stopping_criteria": [token_clock], "logits_processor": [logits_clock]}
            generate(model, batch_size, args.new_tokens, compile_config, **clocks)
            tokens, logits = token_clock.times[WARMUP:], logits_clock.times[WARMUP:]
            steps = [1000 * (later - earlier) for earlier, later in zip(tokens, tokens[1:])]
            forwards = [1000 * (later - earlier) for earlier, later in zip(tokens, logits[1:])]
            connection.send({"step_ms": steps, "forward_ms": forwards})


def summarize(rounds: list[dict], batch_size: int) -> dict:
    """Medians of one model's times, of all tokens and of those of each round."""
    summary = {"rounds": {}}
    for name in ("step", "forward"):
        times = [times[f"{name}_ms"] for times in rounds]
        summary[f"{name}_ms"] = statistics.median(itertools.chain(*times))
        summary["rounds"][f"{name}_ms"] = [statistics.median(of_one) for of_one in times]
    summary["tokens_per_second"] = 1000 * batch_size / summary["step_ms"]
    summary["forward_tokens_per_second"] = 1000 * batch_size / summary["forward_ms"]
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["llama", "additive", "scalar", "cc", "tc"]
    parser.add_argument("--models", nargs="+", default=models, choices=list(MODELS))
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--new_tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    skip_help = "by `torch.compiler.skip_guard_on_all_nn_modules_unsafe`"
    parser.add_argument("--skip_guards", action="store_true", help=skip_help)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}; allowed: at least 1")

    context, models = multiprocessing.get_context("spawn"), {}
    for name in args.models:
        connection, theirs = context.Pipe()
        context.Process(target=decode, args=(theirs, name, args), daemon=True).start()
        theirs.close()  # theirs alone, so that the end of a process that fails is seen here
        models[connection] = name
    results = []
    for batch_size in args.batch_sizes:
        compiled, rounds = {}, {connection: [] for connection in models}
        while len(compiled) < len(models):
            for connection in wait(models.keys() - compiled.keys()):
                compiled[connection] = connection.recv()
        for connection in args.rounds * list(models):
            connection.send(True)
            rounds[connection].append(connection.recv())
        for connection, name in models.items():
            connection.send(False)
            model = {"batch_size": batch_size, "model": name, "compiled": compiled[connection]}
            results.append(model | summarize(rounds[connection], batch_size))
    add_ratios(results, "forward_tokens_per_second", within=("batch_size",))
    for result in results:
        result["forward_ratio"] = result["ratio"]
    add_ratios(results, "tokens_per_second", within=("batch_size",))
    columns = {"batch_size": "", "model": "", "compiled": "", "step_ms": ".3f", "tokens_per_second": ".1f"}
    columns |= {"ratio": ".3f", "forward_ms": ".3f", "forward_ratio": ".3f"}
    report(results, columns, args.output, size=args.size, new_tokens=args.new_tokens, skip_guards=args.skip_guards)


if __name__ == "__main__":
    main()
