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
Compiles the kernels of training steps and of single tokens for a Hopper GPU that need not be there, and prints what would be launched: for each kernel
and grid, a line of JSON. Run by `test_kernels.py` in a process of its own, where Triton does not interpret.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from transformers_ddl import DDLConfig, DDLForCausalLM


BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
H200 = SimpleNamespace(  # of torch's names for the properties of a GPU, those that grids depend on
    warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, multi_processor_count=132
)


class Utils:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers, spills, largest number of threads."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = subprocess.check_output([BINARIES / "cuobjdump", "-res-usage", file.name], text=True)
            code = subprocess.check_output([BINARIES / "nvdisasm", file.name], text=True)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        function = {"kernel": name, "registers": registers, "stack": stack, "prefetches": code.count("UBLKPF.L2")}
        return None, function, registers, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": H200.multi_processor_count, "warpSize": 32}


class Launcher:
    """Computes nothing."""

    num_tokens: int  # of the batch

    def __init__(self, src, metadata):
        self.num_warps = metadata.num_warps

    def __call__(self, *args):
        *grid, _, function = args[:5]
        shared = {"grid": grid, "warps": self.num_warps, "num_tokens": self.num_tokens}
        print(json.dumps(function | shared), flush=True)


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main():
    os.environ["TRANSFORMERS_DDL_KERNELS"] = "1"
    driver.set_active(Driver())
    # Beside kernels, nothing is computed either
    stubs = {
        "torch.cuda.get_device_properties": lambda device: H200,
        "torch.version.cuda": "13.0",
        "torch.nn.functional.linear": lambda x, weight, bias=None: x[..., :1].expand(*x.shape[:-1], len(weight)),
        "torch.nn.functional.scaled_dot_product_attention": lambda query, key, value, **kwargs: query + key + value,
    }
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch(name, stub))
        for options in json.loads(sys.argv[1]):
            shape = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1} | options
            model = DDLForCausalLM(DDLConfig(vocab_size=8, **shape)).bfloat16()
            tokens = torch.zeros(8, 1024, dtype=torch.long)
            Launcher.num_tokens = tokens.numel()
            # The kernels' outputs hold anything; sums over it may be infinite
            model.model(tokens, use_cache=False).last_hidden_state.sum().backward()
            Launcher.num_tokens = 1
            with torch.no_grad():
                model.model(tokens[:1, :1], use_cache=False)


if __name__ == "__main__":
    main()
