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
"""What gates and rewrites do, token by token: `with model.record_delta_stats() as stats: model(**inputs)`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .configuration_ddl import DDLConfig
from .modeling_ddl import delta_rewrite, upcast, write_delta


# Of a rewrite of a state X by a direction k̃ with k = k̃ / ‖k̃‖, a gate β and a target v (spec §2)
QUANTITIES = {
    "gate": "β",
    "eigenvalue": "1 − β, by which what the state holds along k is multiplied; 1 without the erase term",
    "readout": "‖Xᵀk‖, what the state holds along k",
    "discrepancy_before": "‖v − Xᵀk‖",
    "discrepancy_after": "‖v − X'ᵀk‖",
    "key_norm": "‖k̃‖",
    "relative_step": "‖X' − X‖ / ‖X‖",
    "cosine": "cosine of k with that of the rewrite before, at the same token; NaN at the first rewrite",
    "effective_rank": "of the n channels of X': e to the entropy of its normalised singular values",
}
SUBLAYERS = ("attention", "mlp")
NEAR = 0.1  # a gate is near 0, 1 or 2 if less than this away


class DeltaStats:
    """
    Statistics of all rewrites made while they are recorded, by [`record_delta_stats`].

    `stats[name]` is one of `QUANTITIES` for every rewrite, `[layers, 2 (attention, MLP), num_delta_steps, tokens]`, on the
    CPU in at least float32. Tokens are those of all forward passes, one after the other, each flattened from
    `[batch, sequence]` with padding left out. An anchored target (`value_anchor`) is the whole of what is written, and its
    eigenvalue, which then differs between channels, their mean.
    """

    def __init__(self, config: DDLConfig):
        self.config = config
        self._recorded = [[] for _ in range(2 * config.num_hidden_layers)]  # per sublayer, [quantities, steps, tokens]
        self._running = False  # gradient checkpointing runs layers again after the forward pass

    def __getitem__(self, name: str) -> torch.Tensor:
        """
        Raises:
            `KeyError`: for a name that is none of `QUANTITIES`.
            `ValueError`: if the model has not run yet.
        """
        if name not in QUANTITIES:
            raise KeyError(f"{name}; there are {', '.join(QUANTITIES)}")
        if not self._recorded[-1]:
            raise ValueError("nothing has been recorded: run the model inside of `with model.record_delta_stats()`")
        index = list(QUANTITIES).index(name)
        sublayers = [torch.cat([values[index].cpu() for values in passes], dim=-1) for passes in self._recorded]
        return torch.stack(sublayers).unflatten(0, (-1, 2))

    def summary(self) -> list[dict[str, str | int | float]]:
        """
        A row per rewrite, in the order in which they are made: `layer`, `sublayer` and `step`; of the gate `gate_05`,
        `gate_50`, `gate_95` (quantiles) and `near_0`, `near_1`, `near_2` (share of tokens less than 0.1 away); of every
        quantity the mean over tokens under its name.
        """
        values = {name: self[name].double().numpy() for name in QUANTITIES}
        rows = []
        for layer, sublayer, step in np.ndindex(values["gate"].shape[:-1]):
            gate = values["gate"][layer, sublayer, step]
            row = {"layer": layer, "sublayer": SUBLAYERS[sublayer], "step": step}
            row |= {name: float(of_tokens[layer, sublayer, step].mean()) for name, of_tokens in values.items()}
            row |= {f"gate_{share:02}": float(np.quantile(gate, share / 100)) for share in (5, 50, 95)}
            row |= {f"near_{centre}": float(np.mean(np.abs(gate - centre) < NEAR)) for centre in (0, 1, 2)}
            rows.append(row)
        return rows

    # Hooks. Those of the attention sublayer are inside of a layer, where its parameters are at hand however they are stored.

    def _start(self, model: nn.Module, args: tuple, kwargs: dict):
        inputs = signature(model.forward).bind(*args, **kwargs).arguments
        self._token_mask = None
        if (mask := inputs.get("attention_mask")) is not None:
            if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
                raise ValueError(
                    "delta statistics need attention_mask as [batch, tokens], to know what is padding; `generate` with a "
                    "static cache prepares another"
                )
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            cache = inputs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            self._token_mask = mask[:, past : past + tokens.shape[1]].bool()
        self._last_direction = None
        self._running = True

    def _finish(self, *_):
        self._running = False
        self._state = self._weights = self._last_direction = None

    @torch.no_grad()
    def _enter_layer(self, layer: nn.Module, args: tuple, kwargs: dict):
        if self._running:
            state, *write = args
            self._state = write_delta(self.config, state, *write) if write else state
            self._weights = None
            self._layout = {name: kwargs.get(name) for name in ("conv_mask", "document_ids")}

    def _take_weights(self, residual: nn.Module, args: tuple, weights: tuple[torch.Tensor, ...]):
        if self._running:
            self._weights = weights

    _take_weights.works_beside_kernels = True  # `_leave_attention` makes up for the call that they leave out

    @torch.no_grad()
    def _leave_attention(self, layer: nn.Module, attention: nn.Module, args: tuple, kwargs: dict, outputs: tuple):
        if not self._running:
            return
        state, context = self._state.to(outputs[0].device), kwargs["hidden_states"]
        if self._weights is None:  # the fused kernels compute them without calling the module
            hidden_states = layer.compressor(state, layer_idx=layer.layer_idx, state_idx=0, **self._layout)
            layer.attn_residual(hidden_states, context)
        self._record(2 * layer.layer_idx, state, outputs[0], *self._weights)

    @torch.no_grad()
    def _leave_layer(self, layer: nn.Module, args: tuple, outputs: tuple):
        if self._running:
            state, _, _, *write = outputs
            self._record(2 * layer.layer_idx + 1, state, *write)

    def _record(
        self,
        sublayer_idx: int,
        state: torch.Tensor,
        output: torch.Tensor,
        target: torch.Tensor,
        gate: torch.Tensor,
        anchor: torch.Tensor | None = None,
    ):
        """Arguments are those of `write_delta`."""
        config, steps = self.config, self.config.num_delta_steps
        if self._token_mask is None:
            state, output, target, gate = (tensor.flatten(0, 1) for tensor in (state, output, target, gate))
        else:
            mask = self._token_mask.to(state.device)
            state, output, target, gate = (tensor[mask] for tensor in (state, output, target, gate))
        erase = config.residual_type == "delta"
        erased = float(erase) if anchor is None else (1 - anchor[0]).mean()

        rows = []
        with torch.autocast(state.device.type, enabled=False):
            for direction, v, beta in zip(upcast(output).chunk(steps, -1), target.chunk(steps, -1), gate.unbind(-1)):
                new_state = delta_rewrite(state, direction, v, beta, config.key_eps, erase, anchor)
                norm = (direction.square().sum(-1, keepdim=True) + config.key_eps**2).sqrt()
                key = (direction / norm).unsqueeze(-2)
                readout, new_readout = (state * key).sum(-1), (new_state * key).sum(-1)
                if anchor is not None:
                    v = v + anchor[0] * readout + anchor[1] * norm / beta.unsqueeze(-1)
                if self._last_direction is None:
                    cosine = torch.full_like(beta, torch.nan)
                else:
                    cosine = F.cosine_similarity(direction, self._last_direction.to(direction.device), dim=-1)
                rows.append(
                    [
                        beta,
                        1 - beta * erased,
                        readout.norm(dim=-1),
                        (v - readout).norm(dim=-1),
                        (v - new_readout).norm(dim=-1),
                        direction.norm(dim=-1),
                        upcast(new_state - state).flatten(1).norm(dim=-1) / upcast(state).flatten(1).norm(dim=-1),
                        cosine,
                        effective_rank(upcast(new_state)),
                    ]
                )
                state, self._last_direction = new_state, direction
            self._recorded[sublayer_idx].append(torch.stack([torch.stack(values) for values in zip(*rows)]))


def effective_rank(state: torch.Tensor) -> torch.Tensor:
    """
    e to the entropy of the normalised singular values (Roy and Vetterli, 2007) of `[..., n, hidden_size]`, from 1 to n:
    `[...]`. Singular values below 1e-3 of the largest are not resolved in float32. NaN where the state is 0 or too large.
    """
    gram = state @ state.mT
    finite = gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values = torch.linalg.eigvalsh(gram.where(finite, 0)).clamp(min=0).sqrt()  # it raises for others
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


@contextmanager
def record_delta_stats(model: PreTrainedModel) -> Iterator[DeltaStats]:
    """
    Records the rewrites of all forward passes made inside the context, of a model with or without a head:

        with model.record_delta_stats() as stats:
            model(**inputs)
        stats["gate"].mean(-1)  # [layers, 2, num_delta_steps]
        stats.summary()

    Outputs, gradients, caches and kernels are those without it; what `torch.compile` compiled runs eagerly. Outside of the
    context nothing is left of it. For every rewrite and token it keeps 9 numbers on the token's device.

    Raises:
        `ValueError`: if the residual has no gates; by the forward pass, for an `attention_mask` with four dimensions.
    """
    config = model.config
    if not getattr(config, "has_gates", False):
        residual_type = getattr(config, "residual_type", None)
        raise ValueError(
            f"{config.model_type} with residual_type {residual_type!r} has no gates to record; allowed: 'delta' and 'write_only'"
        )
    stats, base = DeltaStats(config), model.base_model
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code may not look at new hooks
        handles = [base.register_forward_pre_hook(stats._start, with_kwargs=True)]
        handles += [base.register_forward_hook(stats._finish)]
        for layer in base.layers[: config.num_hidden_layers]:
            handles += [
                layer.register_forward_pre_hook(stats._enter_layer, with_kwargs=True),
                layer.attn_residual.register_forward_hook(stats._take_weights),
                layer.self_attn.register_forward_hook(partial(stats._leave_attention, layer), with_kwargs=True),
                layer.register_forward_hook(stats._leave_layer),
            ]
        for handle in handles:
            stack.enter_context(handle)
        yield stats


def gate_figures(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    For the log of a training: the mean gate and relative step of every sublayer on `inputs`, as `gate/00.attention`. The model
    is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.record_delta_stats() as stats:
            model(**inputs, use_cache=False)
    finally:
        model.train(was_training)
    figures = {}
    for name in ("gate", "relative_step"):
        for (layer, sublayer), mean in np.ndenumerate(stats[name].mean((2, 3)).numpy()):
            figures[f"{name}/{layer:02}.{SUBLAYERS[sublayer]}"] = mean.item()
    return figures
