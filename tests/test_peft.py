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

"""PEFT: adapters on every part of a layer, trained, saved, reloaded and merged."""

import copy

import pytest
import torch
from conftest import random_tokens, tiny_model
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_triton_available

import transformers_ddl  # noqa: F401


BACKBONE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADS = ["beta_proj", "value_proj"]
ADAPTERS = {
    "backbone": {"target_modules": BACKBONE},
    "heads": {"target_modules": HEADS},
    "all-linear": {"target_modules": "all-linear"},
    "compressors": {"target_modules": [], "target_parameters": ["compressor.weight"]},
    "saved-heads": {"target_modules": BACKBONE, "modules_to_save": HEADS},
    "saved-residuals": {"target_modules": BACKBONE, "modules_to_save": ["attn_residual", "mlp_residual"]},
    "saved-compressors": {"target_modules": BACKBONE, "modules_to_save": ["compressor", "readout", "embedding_conv"]},
}
# The baseline has neither gates nor targets, and a state of one channel is not compressed
COMBINATIONS = [
    (variant, adapter)
    for variant in ("scalar", "cc", "tc", "additive")
    for adapter in ADAPTERS
    if not (variant == "additive" and adapter in ("heads", "saved-heads", "saved-residuals"))
    and not (variant in ("scalar", "additive") and "compressors" in adapter)
]
# Which read the state by themselves, also where they are wrapped
COMBINATIONS += [(variant, adapter) for variant in ("hc", "mhc") for adapter in ("backbone", "saved-residuals")]


def adapt(model, adapter: str):
    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[adapter]))


def train(model, tokens, steps: int = 3) -> list[float]:
    """Losses before each step."""
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits_of(model, tokens) -> torch.Tensor:
    return model(tokens).logits


@pytest.mark.parametrize(("variant", "adapter"), COMBINATIONS)
def test_train_save_reload_and_merge(variant, adapter, tmp_path):
    base, tokens = tiny_model(variant), random_tokens(2, 9)
    base.save_pretrained(tmp_path / "base")
    frozen = {name: weight.clone() for name, weight in base.named_parameters()}
    base_logits = logits_of(base, tokens)

    model = adapt(base, adapter)
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    logits = logits_of(model, tokens)
    assert (logits - base_logits).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, tokens), base_logits, rtol=0, atol=0)

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(reloaded, tokens), logits, rtol=0, atol=0)

    logits = logits_of(reloaded.double(), tokens)  # or rounding would hide what merging changes
    merged = reloaded.merge_and_unload()
    assert {name: weight.shape for name, weight in merged.named_parameters()} == {
        name: weight.shape for name, weight in frozen.items()
    }
    torch.testing.assert_close(logits_of(merged, tokens), logits, rtol=1e-9, atol=1e-9)
    merged.float().save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(saved, tokens), logits_of(merged, tokens), rtol=0, atol=0)


@pytest.mark.parametrize(("variant", "adapter"), COMBINATIONS)
def test_what_is_trained(variant, adapter):
    """Every adapter weight and copy takes part in the forward pass, and nothing else gets a gradient."""
    model, tokens = adapt(tiny_model(variant), adapter).train(), random_tokens(2, 9)
    model(tokens, labels=tokens).loss.backward()
    for name, weight in model.named_parameters():
        is_adapter = "lora_" in name or "modules_to_save" in name
        assert weight.requires_grad == is_adapter, name
        if is_adapter:
            assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.mark.skipif(not is_triton_available(), reason="needs Triton")
@pytest.mark.parametrize(
    ("variant", "adapter"), [combination for combination in COMBINATIONS if combination[0] in ("scalar", "cc")]
)
def test_adapted_models_with_kernels(variant, adapter, monkeypatch):
    """The kernels read weights of modules that are not wrapped, and leave the others to PyTorch."""
    model, tokens = adapt(tiny_model(variant), adapter), random_tokens(1, 5)
    expected = logits_of(model, tokens)
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        fused = logits_of(model, tokens)
        monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "0")
        torch.testing.assert_close(fused, logits_of(model, tokens), rtol=1e-4, atol=1e-4)


def test_heads_can_be_left_out_of_all_linear():
    everything, without = (
        {name.rpartition(".")[2] for name in get_peft_model(tiny_model("cc"), config).targeted_module_names}
        for config in (
            LoraConfig(target_modules="all-linear"),
            LoraConfig(target_modules="all-linear", exclude_modules=HEADS),
        )
    )
    assert everything == {*BACKBONE, *HEADS} and without == {*BACKBONE}


def test_adapters_of_transformers_itself(tmp_path):
    """`load_adapter` and `add_adapter`, which put adapters into the model instead of around it."""
    model, tokens = tiny_model("cc"), random_tokens(2, 9)
    adapted = adapt(copy.deepcopy(model), "backbone")
    adapted.save_pretrained(tmp_path)
    model.load_adapter(tmp_path)
    torch.testing.assert_close(logits_of(model, tokens), logits_of(adapted, tokens), rtol=0, atol=0)


def prefix_tuned(variant):
    return get_peft_model(tiny_model(variant), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize("variant", ["scalar", "cc-repeat", "additive"])
def test_prefix_tuning(variant, tmp_path):
    """Keys and values in front of a text, for attention alone."""
    model, tokens = prefix_tuned(variant), random_tokens(2, 9)
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(variant), tmp_path)
    assert torch.equal(logits_of(reloaded, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("variant", ["cc", "tc"])
def test_prefix_tuning_refuses_convolutions(variant):
    with pytest.raises(ValueError, match="no room for convolutions"):
        prefix_tuned(variant)(random_tokens(2, 9))
