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
Compiles the kernels of training steps for a Hopper GPU that need not be there, and prints what would be launched: for each kernel
and grid, a line of JSON. Run by `test_kernels.py` in a process of its own, where Triton does not interpret.
"""

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


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
H200 = SimpleNamespace(  # of torch's names for the properties of a GPU, those that grids depend on
    warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, multi_processor_count=132
)


class Utils:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers, spills, largest number of threads."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
        return None, (name, int(registers), int(stack)), int(registers), 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": H200.multi_processor_count, "warpSize": 32}


class Launcher:
    """Computes nothing."""

    def __init__(self, src, metadata):
        self.num_warps = metadata.num_warps

    def __call__(self, *args):
        *grid, _, (name, registers, stack) = args[:5]
        launch = {"kernel": name, "grid": grid, "warps": self.num_warps, "registers": registers, "stack": stack}
        print(json.dumps(launch), flush=True)


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
    with mock.patch("torch.cuda.get_device_properties", lambda device: H200), mock.patch("torch.version.cuda", "13.0"):
        for options in json.loads(sys.argv[1]):
            shape = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1} | options
            model = DDLForCausalLM(DDLConfig(vocab_size=8, **shape)).bfloat16()
            tokens = torch.zeros(8, 1024, dtype=torch.long)
            # The kernels' outputs hold anything; sums over it may be infinite
            model.model(tokens, use_cache=False).last_hidden_state.sum().backward()


if __name__ == "__main__":
    main()
