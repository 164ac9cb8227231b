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
How training and inference scale with the number of GPUs of one host, by `accelerate launch` with configs/accelerate:

    ddp/SIZE       training steps of whole models
    fsdp2/SIZE     training steps of sharded models, with activation checkpointing
    tensor/SIZE    `tp_plan="auto"`: a forward pass over a batch, and greedy decoding after short prompts

Every process trains on a batch of its own (weak scaling), inference has one for all. Before that come 20 steps on one batch,
the same whatever the number of processes, whose losses are compared. Efficiencies and losses are relative to the first number of
processes; one process has a plain model in `ddp` and `tensor`, and one that is sharded over itself in `fsdp2`.

    python benchmarks/scaling.py --output outputs/scaling.json
    python benchmarks/scaling.py --processes 1 2 --workloads ddp/toy fsdp2/toy tensor/toy --eager     # on a CPU, with gloo
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from common import DEVICE, SIZES, add_ratios, build, free_memory, report, synchronize
from torch.distributed.tensor import DTensor
from train_step import BATCHES, WARMUP

from transformers_ddl import DDLForCausalLM
from transformers_ddl.trainer import keep_dtypes


CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
# How the work is shared: the configuration of accelerate
PARALLELISMS = {"ddp": "ddp", "fsdp2": "fsdp2", "tensor": "ddp"}
MODELS = ["additive", "cc"]
WITHOUT_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
COMPARED_STEPS = 20
PROMPT_LENGTH, NEW_TOKENS = 16, 64


def now(accelerator: Accelerator) -> float:
    """Seconds, when all processes and their devices have done all their work."""
    synchronize()
    accelerator.wait_for_everyone()
    return time.perf_counter()


def measure(step: Callable, tokens: int, steps: int, accelerator: Accelerator) -> dict[str, float]:
    """Of a step over so many tokens of all processes: its time, tokens per second and process, and the highest peak of memory."""
    for _ in range(WARMUP):
        step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = now(accelerator)
    for _ in range(steps):
        step()
    seconds = (now(accelerator) - start) / steps
    figures = {"milliseconds": 1000 * seconds, "tokens_per_second": tokens / seconds / accelerator.num_processes}
    if DEVICE == "cuda":
        peak = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], device=accelerator.device)
        figures["peak_gib"] = accelerator.gather(peak).max().item()
    return figures


def num_local_parameters(model: torch.nn.Module) -> int:
    """Of which this process holds all or, where they are sharded, its part."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def train(name: str, workload: str, accelerator: Accelerator, args: argparse.Namespace) -> list[dict]:
    parallelism, size = workload.split("/")
    batch_size, seq_length = BATCHES[size]
    tokens = torch.randint(SIZES[size]["vocab_size"], (max(args.processes) * batch_size, seq_length))
    shares = tokens.to(accelerator.device).split(batch_size)[accelerator.process_index :: accelerator.num_processes]
    with accelerator.device:
        model = build(name, size).train()
    if parallelism == "fsdp2":
        model.gradient_checkpointing_enable()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))

    def step(micro_batches: tuple[torch.Tensor, ...]) -> torch.Tensor:
        losses = []
        for tokens in micro_batches:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False, skip_logits=True).loss  # as `DDLTrainer`
            accelerator.backward(loss / len(micro_batches))
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean()

    losses = torch.stack([step(shares) for _ in range(COMPARED_STEPS)])
    losses = accelerator.reduce(losses, "mean").tolist()
    tokens_per_step = shares[0].numel() * accelerator.num_processes
    figures = measure(lambda: step(shares[:1]), tokens_per_step, args.steps, accelerator)
    parameters = num_local_parameters(model)
    accelerator.free_memory(model, optimizer)
    return [{"phase": "train", **figures, "parameters": parameters, "losses": losses}]


@torch.no_grad()
def infer(name: str, workload: str, accelerator: Accelerator, args: argparse.Namespace) -> list[dict]:
    _, size = workload.split("/")
    tokens = torch.randint(SIZES[size]["vocab_size"], BATCHES[size]).to(accelerator.device)
    folder = args.worker / name / size
    if accelerator.is_main_process:
        build(name, size).save_pretrained(folder)
    accelerator.wait_for_everyone()
    model = DDLForCausalLM.from_pretrained(
        folder,
        tp_plan="auto" if accelerator.num_processes > 1 else None,
        dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32,
    ).to(accelerator.device)

    def forward() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False, skip_logits=True).loss

    def generate():
        prompts = tokens[:, :PROMPT_LENGTH]
        length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0, **length)

    shared = {"parameters": num_local_parameters(model), "losses": [forward().item()]}
    return [
        {"phase": "forward", **measure(forward, tokens.numel(), args.steps, accelerator), **shared},
        {"phase": "decode", **measure(generate, len(tokens) * NEW_TOKENS, args.steps, accelerator), **shared},
    ]


def work(args: argparse.Namespace):
    """What each of the processes does; the main one writes the results."""
    state = PartialState(cpu=DEVICE == "cpu")
    if DEVICE == "cpu" and args.workloads[0].startswith("fsdp2"):
        # Accelerate shards on accelerators only, though all that it calls runs on a CPU
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch._dynamo.config.optimize_ddp = not args.whole_programs
    kwargs_handlers = [DistributedDataParallelKwargs(bucket_cap_mb=args.bucket_cap_mb)]
    accelerator, results = Accelerator(kwargs_handlers=kwargs_handlers), []
    keep_dtypes(accelerator)
    for workload in args.workloads:
        for name in MODELS:
            torch.manual_seed(0)
            function = infer if workload.startswith("tensor") else train
            shared = {"workload": workload, "model": name, "processes": accelerator.num_processes}
            results += [shared | result for result in function(name, workload, accelerator, args)]
            free_memory()
    if accelerator.is_main_process:
        (args.worker / "results.json").write_text(json.dumps(results))
    accelerator.end_training()


def launch(config: str, num_processes: int, workloads: list[str], args: argparse.Namespace) -> list[dict]:
    """Has processes do workloads that share a configuration of accelerate."""
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    settings.update(num_processes=num_processes, main_process_port=0)
    if DEVICE == "cpu":
        settings.update(use_cpu=True, mixed_precision="no")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{folder}/config.yaml"]
        command += ["--dynamo_backend", "no" if args.eager else "inductor", __file__]
        command += ["--processes", *map(str, args.processes), "--steps", str(args.steps)]
        command += ["--workloads", *workloads, "--worker", folder, "--bucket_cap_mb", str(args.bucket_cap_mb)]
        command += ["--whole_programs"] if args.whole_programs else []
        subprocess.run(command, env={**os.environ, **WITHOUT_MULTICAST}, check=True)
        return json.loads(Path(folder, "results.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4, 8], help="each a divisor of the largest")
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=["ddp/small", "fsdp2/medium", "fsdp2/1b", "tensor/1b"],
        choices=[f"{parallelism}/{size}" for parallelism in PARALLELISMS for size in SIZES],
        metavar="PARALLELISM/SIZE",
    )
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    bucket_help = "size of what DDP exchanges at a time; by default, that of configs/paper.yaml"
    parser.add_argument("--bucket_cap_mb", type=int, default=200, help=bucket_help)
    whole_programs_help = "do not cut what is compiled into one program per exchange of DDP"
    parser.add_argument("--whole_programs", action="store_true", help=whole_programs_help)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the folder of the launched processes
    args = parser.parse_args()
    if any(max(args.processes) % number for number in args.processes):
        parser.error(f"--processes: {args.processes}; allowed: divisors of the largest of them")
    if args.worker is not None:
        return work(args)

    results = []
    try:
        for config in dict.fromkeys(PARALLELISMS.values()):
            workloads = [each for each in args.workloads if PARALLELISMS[each.partition("/")[0]] == config]
            for num_processes in args.processes if workloads else []:
                results += launch(config, num_processes, workloads, args)
    finally:  # or a failure would take along what was measured before
        results.sort(key=lambda result: (args.workloads.index(result["workload"]), result["phase"]))
        add_ratios(results, "tokens_per_second", within=("workload", "phase", "processes"))
        firsts = {}
        for result in results:
            first = firsts.setdefault((result["workload"], result["phase"], result["model"]), result)
            result["efficiency"] = result["tokens_per_second"] / first["tokens_per_second"]
            result["loss_difference"] = max(abs(a - b) for a, b in zip(result["losses"], first["losses"], strict=True))
        columns = {"workload": "", "phase": "", "processes": "", "model": "", "parameters": ",", "milliseconds": ".2f"}
        columns |= {"tokens_per_second": ".0f", "efficiency": ".3f", "ratio": ".3f", "loss_difference": ".1e"}
        if DEVICE == "cuda":
            columns |= {"peak_gib": ".2f"}
        settings = {"compiled": not args.eager, "bucket_cap_mb": args.bucket_cap_mb, "steps": args.steps}
        report(results, columns, args.output, **settings, whole_programs=args.whole_programs)


if __name__ == "__main__":
    main()
