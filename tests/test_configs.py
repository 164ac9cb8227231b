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
"""The files in `configs`: every size with every residual, by the numbers of the paper."""

from pathlib import Path

import pytest

from transformers_ddl.flops import count_parameters
from transformers_ddl.settings import Run, read_settings


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GPT2_TOKENS = 50257
# Parameters without those of the residual, in millions; width
SIZES = {"small": (124, 768), "medium": (353, 1024), "1b": (1031, 2048), "7b": (7392, 4096)}
RESIDUALS = {path.stem for path in (CONFIGS / "residuals").glob("*.yaml")}


def load(*names):
    files = [CONFIGS / f"{name}.yaml" for name in names]
    run = Run.from_settings(read_settings(files, ["--training.bf16", "false", "--training.use_cpu", "true"]))
    run.model.vocab_size = run.tokenizer.num_embeddings(GPT2_TOKENS)
    return run


def test_every_residual_is_there():
    assert RESIDUALS == {"additive", "scalar", "cc", "cc-repeat", "tc", "tc-repeat"}
    assert {path.stem for path in (CONFIGS / "sizes").glob("*.yaml")} == {*SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residual", sorted(RESIDUALS))
def test_parameter_counts(size, residual):
    run = load("paper", f"sizes/{size}", f"residuals/{residual}")
    config = run.model
    millions, width = SIZES[size]
    counts = count_parameters(config)
    conv = counts.pop("embedding_conv")
    compressors = counts.pop("compressors")
    heads = counts.pop("residual")
    assert sum(counts.values()) / 1e6 == pytest.approx(millions, abs=0.6)

    n = {"additive": 0, "scalar": 1}.get(residual, 4)
    taps = {"cc": 1, "cc-repeat": 1, "tc": 4, "tc-repeat": 4}.get(
        residual, 0
    )  # of n·d weights, or of d if over channels
    assert config.hidden_size == width
    assert conv == (4 * 4 * width if residual in ("cc", "tc") else 0)
    per_compressor = 4 * width * taps + 4 if taps else 0
    assert compressors == (config.num_hidden_layers + 1) * per_compressor
    # A gate and n targets with their biases, for both sublayers
    assert heads == (2 * config.num_hidden_layers * (n + 1) * (width + 1) if n else 0)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_recipe_of_the_paper(size):
    """Spec §4, one by one."""
    run = load("paper", f"sizes/{size}")
    config, args = run.model, run.training
    expected = {"small": (12, 6, 2048), "medium": (24, 8, 2730)}[size]
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == expected
    assert config.head_dim == 128 and config.num_key_value_heads == config.num_attention_heads
    assert (config.vocab_size, config.max_position_embeddings) == (50304, 1024)
    assert config.rope_parameters["rope_theta"] == 10000 and config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings and not config.attention_bias and not config.mlp_bias
    assert config.attention_dropout == 0
    assert (config.residual_type, config.num_value_channels, config.compressor) == ("delta", 4, "channel")
    assert config.embedding_conv and config.embedding_conv_kernel_size == 4
    assert run.data.source == "HuggingFaceFW/fineweb-edu" and run.data.packing == "concatenate"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 480
    assert (args.max_steps, args.warmup_steps, args.lr_scheduler_type) == (100_000, 2000, "cosine")
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-3, 0.1, 1.0)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95) and args.optim.startswith("adamw")
    assert run.settings["training"]["bf16"] is False, "turned off for a test on a CPU"
    assert read_settings([CONFIGS / "paper.yaml"], [])["training"]["bf16"] is True
    tokens = args.max_steps * 480 * config.max_position_embeddings
    assert round(tokens / 1e9, 2) == 49.15


def test_quickstart():
    run = load("quickstart")
    run.model.vocab_size = run.tokenizer.vocab_size
    assert (run.model.residual_type, run.model.num_value_channels, run.model.compressor) == ("delta", 4, "channel")
    assert run.model.embedding_conv
    assert 1e6 < sum(count_parameters(run.model).values()) < 3e6
