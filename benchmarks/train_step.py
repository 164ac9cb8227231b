"""Training step of DDL and additive models: throughput and peak memory, as ratios to the additive model of the run."""

import argparse
import gc
import json
import statistics
from collections.abc import Callable

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_ddl import DDLConfig, DDLForCausalLM


SIZES = {
    "small": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 6},
    "medium": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 8},
}
MODELS = {
    "additive": {"residual_type": "additive"},
    "scalar": {"num_value_channels": 1},
    "cc": {},
    "cc_without_ec": {"embedding_conv": False},
    "tc": {"compressor": "token"},
    "tc_without_ec": {"compressor": "token", "embedding_conv": False},
}


def build(name: str, size: str):
    shape = {**SIZES[size], "head_dim": 128, "vocab_size": 50304, "max_position_embeddings": 1024, "use_cache": False}
    if name == "llama":
        shape |= {"intermediate_size": 8 * shape["hidden_size"] // 3, "tie_word_embeddings": True}
        return LlamaForCausalLM(LlamaConfig(**shape))
    return DDLForCausalLM(DDLConfig(**shape, **MODELS[name]))


def training_step(model: torch.nn.Module, tokens: torch.Tensor, compiled: bool) -> Callable[[], torch.Tensor]:
    """A function that makes a step (forward under bf16 autocast, backward, fused AdamW) and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def measure(name: str, size: str, batch_size: int, seq_length: int, compiled: bool, steps: int) -> dict:
    """Median milliseconds of a training step on random tokens, and the peak memory in GiB."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = build(name, size).cuda().train()
    tokens = torch.randint(0, model.config.vocab_size, (batch_size, seq_length), device="cuda")
    step = training_step(model, tokens, compiled)
    for _ in range(5):
        loss = step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss = step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    milliseconds = statistics.median(times)
    return {
        "model": name,
        "size": size,
        "compiled": compiled,
        "tokens": batch_size * seq_length,
        "milliseconds": milliseconds,
        "thousand_tokens_per_second": batch_size * seq_length / milliseconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": loss.item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["additive", "scalar", "cc", "tc"], choices=["llama", *MODELS])
    parser.add_argument("--sizes", nargs="+", default=["small"], choices=list(SIZES))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seq_length", type=int, default=1024)
    parser.add_argument("--eager", action="store_true", help="measure without torch.compile")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(torch.cuda.get_device_name(), versions)
    results = []
    for size in args.sizes:
        for name in args.models:
            result = measure(name, size, args.batch_size, args.seq_length, not args.eager, args.steps)
            results.append(result)
            gc.collect()
            torch.cuda.empty_cache()
            base = next((r for r in results if r["size"] == size), result)
            print(
                f"{size:7s} {name:14s} {result['milliseconds']:8.2f} ms {result['thousand_tokens_per_second']:8.1f} k tokens/s "
                f"{result['thousand_tokens_per_second'] / base['thousand_tokens_per_second']:6.3f} of {base['model']} "
                f"{result['peak_gib']:6.2f} GiB {result['peak_gib'] / base['peak_gib']:6.3f} loss {result['loss']:.3f}",
                flush=True,
            )
            if args.output:
                with open(args.output, "w") as file:
                    json.dump({"device": torch.cuda.get_device_name(), **versions, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
