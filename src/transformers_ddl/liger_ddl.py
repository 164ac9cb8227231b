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
"""Liger's Triton kernels for what a DDL model shares with Llama: `TrainingArguments(use_liger_kernel=True)`."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.utils.import_utils import is_liger_kernel_available

from .ops_triton_ddl import NAMESPACE, on_its_device


# Always true here, see `ops_triton_ddl`
if is_liger_kernel_available():
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _patch_rms_norm_module,
        _patch_swiglu_module,
    )
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP


def apply_liger_kernel_to_ddl(
    model: PreTrainedModel,
    rope: bool = True,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
):
    """
    Makes a model use Liger's kernels from now on, where this package's own are not used. Other models are left alone.

    Args:
        model: The model, which is changed.
        rope: For the rotary embedding.
        fused_linear_cross_entropy: For the loss of a causal language model, computed without logits in training.
        rms_norm: For RMSNorm.
        swiglu: For the gated product of the MLP, if its activation is SiLU.
    """
    # The classes that those of DDL derive from, as remote code has DDL classes of its own
    for module in model.modules():
        if rope and isinstance(module, LlamaAttention):
            module.apply_rotary = apply_rotary
        elif rms_norm and isinstance(module, LlamaRMSNorm):
            _patch_rms_norm_module(module)
        elif swiglu and isinstance(module, LlamaMLP) and model.config.hidden_act in ("silu", "swish"):
            _patch_swiglu_module(module, LigerSwiGLUMLP)
    if fused_linear_cross_entropy:
        model.loss_without_logits = causal_lm_loss


def apply_rotary(
    query_states: torch.Tensor, key_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the function of this name in `modeling_ddl`."""
    query_states, key_states = liger_rotary_pos_emb(query_states.transpose(1, 2), key_states.transpose(1, 2), cos, sin)
    return query_states.transpose(1, 2), key_states.transpose(1, 2)


# Liger knows models by their type
MODEL_TYPE_TO_APPLY_LIGER_FN["ddl"] = apply_liger_kernel_to_ddl


# Liger's own autograd function cannot be compiled as part of a model. It waits for the device, which CUDA graphs cannot.
@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
@on_its_device
def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    with_grad: bool,
    with_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The sum of the cross-entropies of `labels` `[tokens]` other than `ignore_index` under the logits `hidden_states @ weight.T`, in
    float32, and its gradients with respect to hidden states `[tokens, hidden_size]` and weight `[vocabulary, hidden_size]`,
    empty if not asked for. Logits exist for some tokens at a time.
    """
    loss, _, _, _, grad_hidden_states, grad_weight, _ = fused_linear_cross_entropy_forward(
        hidden_states,
        weight,
        labels,
        ignore_index=ignore_index,
        reduction="sum",
        accum_dtype=torch.float32,
        compute_gradients=with_grad,
        weight_requires_grad=with_weight_grad,
        # The logits of a chunk are at most so many times as large as all hidden states: few, large matrix products
        chunk_mem_const=8,
    )
    return (
        loss,
        grad_hidden_states if with_grad else hidden_states.new_empty(0),
        grad_weight if with_grad and with_weight_grad else weight.new_empty(0),
    )


@linear_cross_entropy.register_fake
def _(hidden_states, weight, labels, ignore_index, with_grad, with_weight_grad):
    return (
        hidden_states.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden_states) if with_grad else hidden_states.new_empty(0),
        torch.empty_like(weight) if with_grad and with_weight_grad else weight.new_empty(0),
    )


def setup_context(ctx, inputs, output):
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.save_for_backward(*grads)
    ctx.with_weight_grad = inputs[-1]


def backward(ctx, grad_loss, *_):
    grad_hidden_states, grad_weight = ctx.saved_tensors
    return grad_loss * grad_hidden_states, grad_loss * grad_weight if ctx.with_weight_grad else None, *[None] * 4


linear_cross_entropy.register_autograd(backward, setup_context=setup_context)


def causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    Transformers' `ForCausalLMLoss` of the logits `hidden_states @ weight.T`, without the logits.

    Args:
        hidden_states (`[batch, sequence, hidden_size]`): What the head would be applied to.
        weight (`[vocabulary, hidden_size]`): Of the head.

    Raises:
        `ValueError`: unless there is a label for each of the hidden states.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.flatten().to(hidden_states.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    hidden_states = hidden_states.flatten(0, -2)
    if len(shift_labels) != len(hidden_states):
        raise ValueError(
            f"labels must be those of the positions in logits_to_keep, of which there are {len(hidden_states)}, "
            f"got {len(shift_labels)} labels"
        )
    with_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    loss, _, _ = linear_cross_entropy(
        hidden_states, weight, shift_labels, ignore_index, with_grad, weight.requires_grad
    )
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)
