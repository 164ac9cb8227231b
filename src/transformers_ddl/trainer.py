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
"""Trainers that decay matrices only, leave nothing but complete checkpoints, and log speed and FLOPs."""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from .checkpoints import seal
from .cli import RunError
from .delta_stats import gate_figures
from .flops import linear_maps, training_flops


# Dense 16-bit matrix products per second and device, from the vendors' data sheets; the first name that occurs in the
# device's is taken.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "MI300X": 1307e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops() -> float | None:
    """FLOP/s of the current device at its best; None where that is not known, as on a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for device, flops in PEAK_FLOPS.items() if device in name), None)


def decay_parameter_names(model: PreTrainedModel) -> list[str]:
    """
    Names of the parameters to which weight decay applies: the matrices of linear maps, those of the residual included.
    Embeddings (the head is one, tied or not), norms, biases, read vectors, convolutions and the static weights of
    hyper-connections are left alone (spec §4).
    """
    head = model.get_output_embeddings()
    return [name for name, matrix, _ in linear_maps(model) if head is None or matrix is not head.weight]


def sequences_per_step(args: TrainingArguments) -> int:
    """Of an optimizer step, by all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def keep_dtypes(accelerator: Accelerator):
    """
    Has FSDP2 return losses as models compute them, in float32, and hand on gates and targets in float32 from layer to layer:
    accelerate's policy would round them to 16 bits, and before torch 2.13 not when a checkpointed layer is computed again.
    """
    if accelerator.is_fsdp2 and accelerator.state.mixed_precision != "no":
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False
        )


class Layout(TrainerCallback, ExportableState):
    """
    Keeps in every checkpoint what a run must have in common with it to be continued from it.

    Args:
        data: Amounts of what is trained and evaluated on, by which it is known again.
    """

    def __init__(self, sequences_per_step: int, sharding: str, data: list[int] | None = None):
        self.sequences_per_step = sequences_per_step
        self.sharding = sharding
        self.data = data

    def state(self) -> dict:
        return {"args": vars(self), "attributes": {}}


class ResumableTrainer(Trainer):
    """
    [`~transformers.Trainer`] for models of the family, with adapters or without. Its logs have, since the last one, the tokens
    per second and their share of what the devices could do (MFU), and all FLOPs so far; tokens of padding count.

    Args:
        audited_inputs (`dict`, *optional*):
            A small batch, on which [`gate_figures`] are taken at the first and then every tenth log, with a model that has
            gates.

    Raises:
        `RunError`: by `train`, as soon as a loss or gradient norm to be logged is not finite; no checkpoint is saved after
            the step at which it became so.
    """

    def __init__(self, *args, audited_inputs: dict[str, torch.Tensor] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.audited_inputs = audited_inputs
        self.args.logging_nan_inf_filter = False  # would log the mean of the finite losses
        self.args.include_num_input_tokens_seen = "all"
        # Or copying a batch would wait for the step before, and the device for the next step's launches
        self.accelerator.dataloader_config.non_blocking = self.args.dataloader_pin_memory
        keep_dtypes(self.accelerator)
        self.flops_per_token = training_flops(self.model)
        self.last_log = None  # time in seconds, tokens seen, FLOPs
        sharding = "no sharding"
        if self.is_fsdp_enabled:
            sharding = "FSDP"
        elif self.is_deepspeed_enabled:  # every process reads the part that it wrote
            sharding = f"DeepSpeed on {self.args.world_size} processes"
        self.layout = Layout(sequences_per_step(self.args), sharding)
        self.add_callback(self.layout)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs):
        # Accelerate would turn the logits, which nobody looks at, into float32
        if not return_outputs:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        # Losses are reported as bits per byte, which smoothed ones are not
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.label_smoother = smoother

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        input_ids = inputs["input_ids"]
        return input_ids.numel() * self.flops_per_token(input_ids.shape[1])

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0)):
                    raise RunError(f"{name} is {logs[name]} at step {self.state.global_step:,}")
            now, tokens, flops = time.monotonic(), self.state.num_input_tokens_seen, self.state.total_flos
            if self.last_log is not None:
                last_time, last_tokens, last_flops = self.last_log
                logs["tokens_per_second"] = (tokens - last_tokens) / (now - last_time)
                if peak := peak_flops():
                    logs["mfu"] = (flops - last_flops) / (now - last_time) / (peak * self.args.world_size)
            logs["flops_so_far"] = flops  # as `total_flos`, W&B and trackio would not draw it
            self.last_log = now, tokens, flops
            if self.audited_inputs is not None and self.model.config.has_gates:
                if sum("loss" in entry for entry in self.state.log_history) % 10 == 0:
                    logs.update(gate_figures(self.model, self._prepare_inputs(self.audited_inputs)))
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # Or the first loss that a continued run logs would be a mean over other steps than in an uninterrupted one (an
        # evaluation may decide to save), and nobody would look at the losses after the last one that is logged
        control, state = self.control, self.state
        control.should_log |= control.should_save or control.should_evaluate or state.global_step >= state.max_steps
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial):
        # Earlier checkpoints may only go when this one is known to be complete
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder, best = self._get_output_dir(trial=trial), self.state.best_model_checkpoint
            checkpoint = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            seal(checkpoint)
            if limit is not None and limit > 0:
                # Checkpoints of later steps are damaged, or this run would have continued from them: they must not take the place
                # of good ones, nor of this one where one alone is kept beside the best
                later = [
                    path for path in sort_checkpoints(folder) if int(path.rpartition("-")[2]) > self.state.global_step
                ]
                limit = max(limit, 1 if best is None or Path(best) == checkpoint else 2)
                rotate_checkpoints(folder, limit + len(later), best)


class DDLTrainer(ResumableTrainer):
    """[`ResumableTrainer`] for [`DDLForCausalLM`] and `input_ids` of one length."""

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]):
        # Batches are of one size on all processes; gathering the sizes would wait for the device in every step
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
