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
"""bitsandbytes, on a GPU where there is one: what is quantised, what it computes, and adapters trained on top of it."""

import pytest
import torch
from conftest import VARIANTS, random_tokens, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import transformers_ddl  # noqa: F401


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUANTISATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
BACKBONE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def logits_of(model, tokens) -> torch.Tensor:
    return model(tokens).logits.float()


def save_tiny(variant, folder):
    """Blocks of 64 weights share a scale in nf4."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = tiny_model(variant, **sizes).to(DEVICE)
    model.save_pretrained(folder)
    return model


def load(folder, quantisation, dtype=torch.float32):
    config = BitsAndBytesConfig(**QUANTISATIONS[quantisation], bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=DEVICE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_quantised_model(quantisation, variant, tmp_path):
    """Attention and MLP are quantised, all else is as it was; the logits are those of the rounded weights."""
    model, tokens = save_tiny(variant, tmp_path / "model"), random_tokens(2, 9).to(DEVICE)
    original = dict(model.named_parameters())
    quantised = load(tmp_path / "model", quantisation)
    for name, parameter in quantised.named_parameters():
        if name.split(".")[-2] in BACKBONE:
            assert parameter.dtype in (torch.uint8, torch.int8), name
        else:
            assert torch.equal(parameter, original[name]), name

    # Before anything is computed: for that, bitsandbytes rearranges weights on some CPUs, and then saves wrong ones
    quantised.save_pretrained(tmp_path / "quantised")
    logits, generate = logits_of(quantised, tokens), {"max_new_tokens": 6, "do_sample": False}
    generated = quantised.generate(tokens, **generate)
    assert torch.equal(quantised.generate(tokens, use_cache=False, **generate), generated)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map=DEVICE)
    assert torch.equal(logits_of(again, tokens), logits)
    assert torch.equal(again.generate(tokens, **generate), generated)

    dequantised = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map=DEVICE).dequantize()
    for name, parameter in dequantised.named_parameters():
        loss = (0.15 if quantisation == "nf4" else 0.02) if name.split(".")[-2] in BACKBONE else 0
        assert (parameter - original[name]).norm() <= loss * original[name].norm(), name
    model.load_state_dict(dequantised.state_dict())
    # On some CPUs, nf4 is computed in bfloat16; int8 also rounds what goes into a layer, to 1/254 of its largest feature
    tolerance = 0.03 if quantisation == "nf4" else 0.1
    assert (logits - logits_of(model, tokens)).norm() / logits.norm() < tolerance


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gates_and_targets_stay_in_float32(dtype, quantisation, tmp_path):
    model, tokens = save_tiny("cc", tmp_path), random_tokens(2, 9).to(DEVICE)
    quantised = load(tmp_path, quantisation, dtype)
    dtypes = {
        name: parameter.dtype for name, parameter in quantised.named_parameters() if parameter.is_floating_point()
    }
    assert dtypes == {name: torch.float32 if "_residual." in name else dtype for name in dtypes}
    assert any("embedding_conv" in name for name in dtypes) and any("compressor" in name for name in dtypes)
    expected = logits_of(model, tokens)
    assert (logits_of(quantised, tokens) - expected).norm() / expected.norm() < 0.5


@pytest.mark.parametrize("variant", ["scalar", "cc", "tc", "multi-step", "additive"])
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_adapter_on_a_quantised_model(quantisation, variant, tmp_path):
    """QLoRA, with checkpointing, while gates and targets are trained themselves: it learns, and is the same again when loaded."""
    save_tiny(variant, tmp_path / "model")
    tokens = random_tokens(2, 9).to(DEVICE)
    saved = None if variant == "additive" else ["attn_residual", "mlp_residual"]
    config = LoraConfig(r=4, target_modules=list(BACKBONE), modules_to_save=saved, task_type="CAUSAL_LM")
    base = prepare_model_for_kbit_training(load(tmp_path / "model", quantisation, torch.bfloat16))
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    logits = logits_of(model.eval(), tokens)
    model.save_pretrained(tmp_path / "adapter")
    base = prepare_model_for_kbit_training(load(tmp_path / "model", quantisation, torch.bfloat16))
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter"), tokens), logits)
