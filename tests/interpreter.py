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
"""Makes Triton's interpreter, which runs the kernels where there is no GPU, twice as fast, and round as a GPU does."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, ReduceOps


convert_float = interpreter._convert_float


def round_float(values, dtype, new_dtype, rounding_mode):
    """To bfloat16 as to all other types: the interpreter truncates."""
    if (dtype, new_dtype) != (tl.float32, tl.bfloat16):
        return convert_float(values, dtype, new_dtype, rounding_mode)
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    return rounded.view(torch.uint16).numpy().reshape(values.shape)


def reduce_by_halves(self, inputs):
    """Combines all pairs of elements at once, as a GPU does, instead of element after element."""
    while (size := inputs[0].shape[self.axis]) > 1:
        left, right = (
            [self.to_tensor(np.take(value.handle.data, range(*half), self.axis), value.dtype) for value in inputs]
            for half in ((0, size // 2), (size // 2, size))
        )
        inputs = self.combine_fn.fn(*left, *right)
    return [self.to_tensor(value.handle.data.squeeze(self.axis), value.dtype) for value in inputs]


def accelerate_interpreter():
    interpreter._convert_float = round_float
    ReduceOps.generic_reduce = reduce_by_halves
    replace_operations_and_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton."):
            return replace_operations_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)  # the kernel that calls it has replaced Triton's operations already

    InterpretedFunction.__call__ = call
