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
"""What `DDLTrainer` does that Trainer does not."""

from types import SimpleNamespace

import pytest
import torch
from conftest import VARIANTS, tiny_config, tiny_model
from torch.utils.data import Dataset
from transformers import TrainingArguments

from transformers_ddl import DDLForCausalLM
from transformers_ddl import trainer as trainer_module
from transformers_ddl.flops import training_flops_per_token
from transformers_ddl.trainer import DDLTrainer


# ---- Weight decay ----

MATRICES = {
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
}
DELTA_MATRICES = {
    "attn_residual.beta_proj.weight",
    "attn_residual.value_proj.weight",
    "mlp_residual.beta_proj.weight",
    "mlp_residual.value_proj.weight",
}
NOT_DECAYED = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.k_norm.weight",
}
DELTA_BIASES = {
    "model.layers.0.attn_residual.beta_proj.bias",
    "model.layers.0.attn_residual.value_proj.bias",
    "model.layers.0.mlp_residual.beta_proj.bias",
    "model.layers.0.mlp_residual.value_proj.bias",
}
COMPRESSORS = {
    "model.layers.0.compressor.weight",
    "model.layers.0.compressor.read",
    "model.readout.weight",
    "model.readout.read",
}
READOUT = {"model.readout.weight", "model.readout.read"}
EXPANSION = {"model.embedding_conv.weight"}
MLP_COMPRESSOR = {"model.layers.0.mlp_compressor.weight", "model.layers.0.mlp_compressor.read"}


def of_residuals(*names):
    return {f"model.layers.0.{sublayer}_residual.{name}" for sublayer in ("attn", "mlp") for name in names}


NOT_DECAYED_IN = {
    "scalar": DELTA_BIASES,
    "cc": DELTA_BIASES | COMPRESSORS | EXPANSION,
    "cc-repeat": DELTA_BIASES | COMPRESSORS,
    "tc": DELTA_BIASES | COMPRESSORS | EXPANSION,
    "tc-repeat": DELTA_BIASES | COMPRESSORS,
    "tc-separate": DELTA_BIASES | COMPRESSORS | EXPANSION | MLP_COMPRESSOR,
    "multi-step": DELTA_BIASES | COMPRESSORS | EXPANSION,
    "write-only": DELTA_BIASES | COMPRESSORS | EXPANSION,
    "additive": set(),
    "expanded-additive": COMPRESSORS | EXPANSION | of_residuals("amplitude"),
    "hc": READOUT | of_residuals("static", "scale", "norm.weight"),
    "mhc": READOUT | of_residuals("base", "scale"),
}
MATRICES_OF = {
    "additive": set(),
    "expanded-additive": set(),
    "hc": {"attn_residual.dynamic", "mlp_residual.dynamic"},
    "mhc": {"attn_residual.fn", "mlp_residual.fn"},
}


@pytest.mark.parametrize(
    "variant, options, also_decayed, not_decayed",
    [
        *[(variant, {}, set(), set()) for variant in VARIANTS],
        ("cc", {"tie_word_embeddings": False}, set(), {"lm_head.weight"}),
        ("cc", {"value_anchor": 1.0}, set(), of_residuals("anchor_keep", "anchor_add")),
        (
            "scalar",
            {"gate_hidden_size": 5},
            {f"model.layers.0.{name}_residual.beta_hidden_proj.weight" for name in ("attn", "mlp")},
            {f"model.layers.0.{name}_residual.beta_hidden_proj.bias" for name in ("attn", "mlp")},
        ),
    ],
)
def test_weight_decay_by_name(tmp_path, variant, options, also_decayed, not_decayed):
    model = DDLForCausalLM(tiny_config(variant, num_hidden_layers=1, **options))
    args = TrainingArguments(output_dir=tmp_path, weight_decay=0.1, use_cpu=True)
    optimizer = DDLTrainer(model=model, args=args).create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]
    matrices = MATRICES | MATRICES_OF.get(variant, DELTA_MATRICES)
    assert decayed == {f"model.layers.0.{name}" for name in matrices} | also_decayed
    assert others == NOT_DECAYED | NOT_DECAYED_IN[variant] | not_decayed


# ---- Losses ----


def test_label_smoothing_is_left_to_training(tmp_path):
    """The loss that is reported as bits per byte is not smoothed."""
    model = tiny_model("cc")
    args = TrainingArguments(output_dir=tmp_path, label_smoothing_factor=0.5, use_cpu=True, disable_tqdm=True)
    trainer = DDLTrainer(model=model, args=args, eval_dataset=Blocks())
    tokens = torch.stack([Blocks()[index]["input_ids"] for index in range(64)])
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
        smoothed = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens}).item()
    assert abs(smoothed - loss) > 1e-2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


# ---- Logs ----


class Blocks(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.arange(index, index + 8) % 37
        return {"input_ids": tokens, "labels": tokens}


def test_logs(tmp_path, monkeypatch):
    """FLOPs in all, tokens per second of wall clock, and the share of the peak that they make up."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(trainer_module, "peak_flops", lambda: 1e6)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    model = DDLForCausalLM(tiny_config("cc"))
    args = TrainingArguments(
        output_dir=tmp_path,
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_strategy="no",
        include_num_input_tokens_seen="all",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DDLTrainer(model=model, args=args, train_dataset=Blocks())
    trainer.train()
    first, second, third = [logs for logs in trainer.state.log_history if "loss" in logs]
    flops = 2 * 4 * 2 * 8 * training_flops_per_token(model.config, 8)  # of two steps
    assert [logs["flops_so_far"] for logs in (first, second, third)] == [flops, 2 * flops, 3 * flops]
    assert "tokens_per_second" not in first
    for logs in (second, third):
        assert logs["tokens_per_second"] == 2 * 4 * 2 * 8 / 2
        assert logs["mfu"] == pytest.approx(flops / 2 / 1e6, rel=1e-12)


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("?", None)],
)
def test_peak_flops(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert trainer_module.peak_flops() == peak
