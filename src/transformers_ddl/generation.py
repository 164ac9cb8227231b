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
"""Sampling: `transformers-ddl generate MODEL ["a prompt" ...]`."""

import argparse
import math

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .cli import InputError


def load_model(name: str, **options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A model, loaded with `options`, and its tokenizer.

    Raises:
        `InputError`: if there are none of that name, or they cannot be loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise InputError(f"model: cannot load {name!r}: {error}") from error


def main(arguments: list[str]):
    """Prints sampled continuations of prompts."""
    parser = argparse.ArgumentParser(
        prog="transformers-ddl generate", description="Print sampled continuations of prompts."
    )
    parser.add_argument("model", help="folder or Hub name of a model")
    parser.add_argument(
        "prompts", nargs="*", default=["import ", "class ", "def __init__(self"], help="texts to continue"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 < options.temperature < math.inf:
        raise InputError(f"--temperature must be positive and finite, got {options.temperature}")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed must be at least 0 and below 2**32, got {options.seed}")

    model, tokenizer = load_model(options.model)
    set_seed(options.seed)
    for prompt in options.prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:
            raise InputError(f"prompts: {prompt!r} has no tokens; allowed: at least one in each")
        output = model.generate(
            **inputs, do_sample=True, temperature=options.temperature, max_new_tokens=options.max_new_tokens
        )
        print(f"\n=== {prompt!r}\n{tokenizer.decode(output[0], skip_special_tokens=True)}")
