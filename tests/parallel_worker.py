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
Trains small models and saves their losses and parameters: `parallel_worker.py data|fsdp|tensor FOLDER RESULT`, started
by `accelerate launch` (see test_parallel.py). FOLDER holds a saved model per variant.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from conftest import random_tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import transformers_ddl  # noqa: F401


def train(folder: Path, accelerator: Accelerator, parallelism: str) -> dict:
    """Five steps of gradient descent, which unlike Adam shows a gradient that is off by a factor."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto" if parallelism == "tensor" else None)
    # Five steps of random weights make differences of 1e-4 out of float32's rounding, which is left to the loss
    model = model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if parallelism != "tensor":
        model, optimizer = accelerator.prepare(model, optimizer)

    tokens, losses = random_tokens(4, 12), []
    if parallelism != "tensor":
        tokens = tokens.chunk(accelerator.num_processes)[accelerator.process_index]
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())

    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    sharded = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
    for name in sharded:
        parameters[name] = parameters[name].full_tensor()
    return {
        "losses": losses,
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "sharded": sharded,
    }


if __name__ == "__main__":
    parallelism, folder, result = sys.argv[1:]
    state = PartialState(cpu=True)
    if parallelism == "fsdp":
        # accelerate shards on accelerators only, though all that it calls runs on a CPU
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator()
    results = {path.name: train(path, accelerator, parallelism) for path in sorted(Path(folder).iterdir())}
    if accelerator.is_main_process:
        torch.save(results, result)
    accelerator.end_training()
