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
Achieved bandwidth of the fused boundary kernels, as share of a device copy's in the same run: medians, of the kernels in
replayed CUDA graphs, of the copy by itself.
Bytes counted are those of the state and of vectors of the hidden size, once each: forward reads X and k̃ and writes X' and c;
backward reads X, G, k̃ and two ∂c (of an MLP's maps) and writes ∂X and ∂k̃, and reads one k̃ more for each write from which it
rebuilds X. Compression over tokens takes more than one kernel each way, between which 2 vectors more move forward, and 7 backward.

    python benchmarks/bandwidth.py --output outputs/bandwidth.json
    TRITON_INTERPRET=1 TRANSFORMERS_DDL_KERNELS=1 python benchmarks/bandwidth.py --channels 1 4 --sizes 32 --tokens 8 --dtype float32
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from common import DEVICE, now, report

from transformers_ddl import DDLConfig
from transformers_ddl.modeling_ddl import DDLDecoderLayer
from transformers_ddl.ops_ddl import can_fuse, fused_boundary, num_replays


REPEATS = 20
CALLS = 10  # in a graph, which takes 9 µs even if a kernel takes 1


def seconds(function: Callable, as_graph: bool = True) -> float:
    """Median time of a call. On a GPU, of several in a replayed CUDA graph: without the time that it takes to launch kernels."""
    if DEVICE == "cpu":
        times = []
        for _ in range(3):
            start = now()
            function()
            times.append(now() - start)
        return statistics.median(times)
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    calls = CALLS if as_graph else 1
    if as_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                function()
        function = graph.replay
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times)


def copy_bandwidth(dtype: torch.dtype, num_bytes: int) -> float:
    """Bytes read and written per second. As part of a graph, a copy is not the fastest that there is: 2.7 instead of 4.2 TB/s."""
    source = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), as_graph=False)


def measure(compressor: str | None, n: int, d: int, num_tokens: int, dtype: torch.dtype) -> list[dict]:
    torch.manual_seed(0)
    config = DDLConfig(
        vocab_size=1,
        hidden_size=d,
        num_attention_heads=1,
        num_value_channels=n,
        num_hidden_layers=1,
        compressor=compressor,
    )
    layer = DDLDecoderLayer(config, 0).to(DEVICE)
    modules = (layer.post_attention_layernorm, layer.mlp_residual)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    mixing = layer.compressor.mixing().detach().requires_grad_() if n > 1 else None

    def random(*shape, dtype=torch.float32):
        return torch.randn(1, num_tokens, *shape, dtype=dtype, device=DEVICE).requires_grad_()

    def random_write():
        return random(d, dtype=dtype), random(n), random(1)

    state, write = random(n, d, dtype=dtype), random_write()
    if not can_fuse(config, state, layer.compressor, *modules):
        raise SystemExit("there are no kernels to measure here")

    with torch.no_grad():
        forward = seconds(lambda: fused_boundary(config, state, write, mixing, *modules, ()))
    state_bytes, vector_bytes = state.nbytes, write[0].nbytes
    between, between_backward = (2, 7) if compressor == "token" else (0, 0)
    measured = [("forward", forward, 2 * state_bytes + (2 + between) * vector_bytes)]

    inputs = [tensor for tensor in (state, *write, mixing) if tensor is not None]
    inputs += [parameter for module in modules for parameter in module.parameters()]
    num_readers = layer.mlp.forward.num_readers
    for replays in sorted({0, num_replays(n)}):
        history = ()
        for _ in range(replays):  # each of a write of its own, or its k̃ would be in the cache
            *_, history = fused_boundary(config, state, random_write(), mixing, *modules, history)
        new_state, contexts, weights, _ = fused_boundary(
            config, state, write, mixing, *modules, history, num_readers=num_readers
        )
        outputs = (new_state, *contexts, *weights)
        cotangents = [torch.randn_like(output) for output in outputs]
        backward = seconds(lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True))  # noqa: B023
        name = f"backward, {replays} replayed"
        measured.append(
            (name, backward, 3 * state_bytes + (2 + num_readers + between_backward + replays) * vector_bytes)
        )
    shape = {"compressor": str(compressor), "n": n, "d": d}
    return [
        {"kernel": name, **shape, "microseconds": 1e6 * time, "terabytes_per_second": num_bytes / time / 1e12}
        for name, time, num_bytes in measured
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--sizes", nargs="+", type=int, default=[768, 1024, 2048], help="hidden sizes")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    # CUDA graphs cannot be captured on the default stream, and autograd stays on the stream of the forward pass
    with torch.cuda.stream(torch.cuda.Stream() if DEVICE == "cuda" else None):
        copy = copy_bandwidth(dtype, 2**30 if DEVICE == "cuda" else 2**24) / 1e12
        results = [
            result
            for n in args.channels
            for compressor in (["channel", "token"] if n > 1 else [None])
            for d in args.sizes
            for result in measure(compressor, n, d, args.tokens, dtype)
        ]
    for result in results:
        result["share_of_copy"] = result["terabytes_per_second"] / copy
    columns = {"kernel": "", "compressor": "", "n": "", "d": "", "microseconds": ".1f", "terabytes_per_second": ".3f"}
    settings = {"tokens": args.tokens, "dtype": args.dtype, "copy_terabytes_per_second": round(copy, 3)}
    report(results, columns | {"share_of_copy": ".2f"}, args.output, **settings)


if __name__ == "__main__":
    main()
