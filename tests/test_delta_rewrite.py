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
"""The delta rewrite X' = X + β k (v − Xᵀk)ᵀ: its algebra, its gradients and its behaviour at the edge of a number format."""

import pytest
import torch

from transformers_ddl.modeling_ddl import delta_rewrite


BATCH, SEQUENCE, HIDDEN_SIZE = 2, 3, 5
KEY_EPS = 1e-5
CHANNELS = pytest.mark.parametrize("n", [1, 4], ids=lambda n: f"n={n}")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(n):
    """State, direction, target and gate in (0, 2)."""
    return {
        "state": random(BATCH, SEQUENCE, n, HIDDEN_SIZE, seed=1),
        "direction": random(BATCH, SEQUENCE, HIDDEN_SIZE, seed=2),
        "target": random(BATCH, SEQUENCE, n, seed=3),
        "gate": 2 * torch.sigmoid(random(BATCH, SEQUENCE, seed=4)),
    }


def unit(direction):
    return direction / direction.norm(dim=-1, keepdim=True)


def read(state, direction):
    """Xᵀk, `[batch, sequence, n]`."""
    return (state @ unit(direction)[..., None])[..., 0]


def close(actual, expected, tolerance=1e-12):
    """With KEY_EPS = 0 the algebra holds up to the rounding of fp64, 1e-16 for each of a few dozen operations."""
    return torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The algebra of the paper's §2


@CHANNELS
def test_is_the_definition(n):
    x = arguments(n)
    expected = torch.empty_like(x["state"])
    for b in range(BATCH):
        for t in range(SEQUENCE):
            X, k = x["state"][b, t].T, x["direction"][b, t]
            k = k / torch.sqrt(k @ k + 0.3**2)
            expected[b, t] = (X + x["gate"][b, t] * torch.outer(k, x["target"][b, t] - X.T @ k)).T
    close(delta_rewrite(**x, key_eps=0.3), expected)


@CHANNELS
def test_gate_0_is_the_identity(n):
    x = arguments(n)
    x["gate"] = torch.zeros_like(x["gate"])
    assert torch.equal(delta_rewrite(**x, key_eps=KEY_EPS), x["state"])


@CHANNELS
def test_gate_1_makes_the_readout_equal_the_target(n):
    x = arguments(n)
    x["gate"] = torch.ones_like(x["gate"])
    close(read(delta_rewrite(**x, key_eps=0), x["direction"]), x["target"])


@CHANNELS
def test_gate_2_without_target_is_a_reflection(n):
    x = arguments(n)
    x["gate"], x["target"] = torch.full_like(x["gate"], 2), torch.zeros_like(x["target"])
    reflected = delta_rewrite(**x, key_eps=0)
    close(reflected.norm(dim=-1), x["state"].norm(dim=-1))
    close(read(reflected, x["direction"]), -read(x["state"], x["direction"]))
    close(delta_rewrite(**{**x, "state": reflected}, key_eps=0), x["state"])


@CHANNELS
def test_contracts_the_discrepancy(n):
    x = arguments(n)
    after = read(delta_rewrite(**x, key_eps=0), x["direction"]) - x["target"]
    before = read(x["state"], x["direction"]) - x["target"]
    close(after, (1 - x["gate"])[..., None] * before)


def test_erase_operator_has_one_eigenvalue_other_than_1():
    """The rewrite of the identity matrix with v = 0 is I − β k kᵀ: eigenvalue 1 − β on k, 1 elsewhere, det 1 − β."""
    x = arguments(HIDDEN_SIZE)
    x["state"] = torch.eye(HIDDEN_SIZE, dtype=torch.float64).expand(BATCH, SEQUENCE, -1, -1)
    x["target"] = torch.zeros_like(x["target"])
    operator = delta_rewrite(**x, key_eps=0)
    ones = torch.ones(BATCH, SEQUENCE, HIDDEN_SIZE - 1, dtype=torch.float64)
    expected = torch.cat([(1 - x["gate"])[..., None], ones], dim=-1).sort().values
    close(torch.linalg.eigvalsh(operator), expected)
    close(torch.linalg.det(operator), 1 - x["gate"])
    close(operator @ unit(x["direction"])[..., None], ((1 - x["gate"])[..., None] * unit(x["direction"]))[..., None])


@CHANNELS
def test_leaves_what_is_orthogonal_untouched(n):
    x = arguments(n)
    probe = random(BATCH, SEQUENCE, HIDDEN_SIZE, seed=5)
    probe = probe - (probe * unit(x["direction"])).sum(-1, keepdim=True) * unit(x["direction"])
    rewritten = delta_rewrite(**x, key_eps=KEY_EPS)
    assert not torch.allclose(rewritten, x["state"])
    close(rewritten @ probe[..., None], x["state"] @ probe[..., None])


def test_changes_the_state_by_a_matrix_of_rank_1():
    x = arguments(4)
    singular_values = torch.linalg.svdvals(delta_rewrite(**x, key_eps=KEY_EPS) - x["state"])
    assert (singular_values[..., 0] > 1e-3).all()
    assert (singular_values[..., 1:] < 1e-14).all()


def test_does_not_depend_on_the_norm_of_the_direction():
    x = arguments(4)
    scaled = {**x, "direction": 1e6 * x["direction"]}
    close(delta_rewrite(**scaled, key_eps=0), delta_rewrite(**x, key_eps=0))


# Gradients


@CHANNELS
def test_gradients_equal_the_closed_forms(n):
    """Those of the specification's §5, which hold without the guard."""
    x = {name: tensor.requires_grad_() for name, tensor in arguments(n).items()}
    G = random(BATCH, SEQUENCE, n, HIDDEN_SIZE, seed=6)
    gradients = dict(zip(x, torch.autograd.grad(delta_rewrite(**x, key_eps=0), list(x.values()), G)))
    with torch.no_grad():
        for b in range(BATCH):
            for t in range(SEQUENCE):
                X, G_t, gate = x["state"][b, t].T, G[b, t].T, x["gate"][b, t]
                norm = x["direction"][b, t].norm()
                k = x["direction"][b, t] / norm
                r, p = x["target"][b, t] - X.T @ k, G_t.T @ k
                grad_k = gate * (G_t @ r - X @ p)
                close(gradients["state"][b, t], (G_t - gate * torch.outer(k, p)).T)
                close(gradients["target"][b, t], gate * p)
                close(gradients["gate"][b, t], p @ r)
                close(gradients["direction"][b, t], (grad_k - k * (k @ grad_k)) / norm)


@CHANNELS
def test_gradcheck(n):
    x = {name: tensor.requires_grad_() for name, tensor in arguments(n).items()}
    torch.autograd.gradcheck(lambda *tensors: delta_rewrite(*tensors, key_eps=0.1), tuple(x.values()))


# The anchored target


@CHANNELS
def test_anchor_is_part_of_the_target(n):
    x, keep, add = arguments(n), random(n, seed=7), random(n, seed=8)
    norm = (x["direction"].square().sum(-1, keepdim=True) + KEY_EPS**2).sqrt()
    readout = (x["state"] @ (x["direction"] / norm)[..., None])[..., 0]
    target = x["target"] + keep * readout + add * norm / x["gate"][..., None]
    expected = delta_rewrite(**{**x, "target": target}, key_eps=KEY_EPS)
    close(delta_rewrite(**x, key_eps=KEY_EPS, anchor=torch.stack((keep, add))), expected)
    assert torch.equal(
        delta_rewrite(**x, key_eps=KEY_EPS, anchor=torch.zeros(2, n)), delta_rewrite(**x, key_eps=KEY_EPS)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@CHANNELS
def test_anchor_of_ones_is_the_residual_addition(n, dtype):
    """To the last bit, whatever the gate."""
    x = {name: tensor.to(dtype) for name, tensor in arguments(n).items()}
    x["target"].zero_()
    expected = x["state"] + x["direction"][:, :, None]
    assert torch.equal(delta_rewrite(**x, key_eps=KEY_EPS, anchor=torch.ones(2, n)), expected)


@CHANNELS
def test_gradcheck_with_an_anchor(n):
    x = {**arguments(n), "anchor": random(2, n, seed=7)}
    names, tensors = zip(*((name, tensor.requires_grad_()) for name, tensor in x.items()))
    torch.autograd.gradcheck(lambda *tensors: delta_rewrite(**dict(zip(names, tensors)), key_eps=0.1), tensors)


# Vanishing, tiny and huge directions


@pytest.mark.parametrize(
    "dtype, tol",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
    ids=str,
)
@pytest.mark.parametrize("key_eps", [KEY_EPS, 1e-12])  # 1e-12 is the least that the configuration allows
def test_zero_direction_is_the_identity(dtype, tol, key_eps):
    """The gradient is rounded once, up to a unit in the last place, after sums of four targets in fp32."""
    x = {name: tensor.to(dtype).requires_grad_() for name, tensor in arguments(4).items()}
    x["direction"] = torch.zeros_like(x["direction"]).requires_grad_()
    rewritten = delta_rewrite(**x, key_eps=key_eps)
    assert torch.equal(rewritten, x["state"])
    gradients = dict(zip(x, torch.autograd.grad(rewritten, list(x.values()), torch.ones_like(rewritten))))
    assert torch.equal(gradients["state"], torch.ones_like(x["state"]))
    assert not gradients["target"].any() and not gradients["gate"].any()
    # ∂k̃ = β Σ_j v_j / ε for a cotangent of ones: 1e5 or more, rounded to infinity in fp16, but never NaN
    expected = (x["gate"].double() * x["target"].double().sum(-1) / key_eps).to(dtype)
    assert expected.abs().min() > 1e3
    torch.testing.assert_close(gradients["direction"], expected[..., None].expand_as(x["direction"]), rtol=tol, atol=0)


@pytest.mark.parametrize("norm", [1e-30, 1e-20, 1e-10, 1e-5, 1.0, 1e5, 1e15])
def test_fp32_with_tiny_and_huge_norms(norm):
    """
    Squares of directions below 1e-23 underflow in fp32, where the guard takes over, and above 1e19 overflow. The bound
    is a few units of the last place of the state: k has norm 1 or less, whatever k̃.
    """
    x = arguments(4)
    x["direction"] = norm * unit(x["direction"])
    x = {name: tensor.float() for name, tensor in x.items()}
    expected = delta_rewrite(**{name: tensor.double() for name, tensor in x.items()}, key_eps=KEY_EPS)
    close(delta_rewrite(**x, key_eps=KEY_EPS).double(), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@CHANNELS
def test_rounds_once(n, dtype):
    """
    Target and gate come in fp32 from the model, the sums over features are made in fp32, and only the result is rounded
    to the dtype of the state: half a unit in its last place, and a little more from fp32.
    """
    torch.manual_seed(0)
    state, direction = torch.randn(2, 9, n, 768).to(dtype), 30 * torch.randn(2, 9, 768).to(dtype)
    target, gate = torch.randn(2, 9, n), 2 * torch.rand(2, 9)
    actual = delta_rewrite(state, direction, target, gate, KEY_EPS)
    expected = delta_rewrite(state.double(), direction.double(), target.double(), gate.double(), KEY_EPS)
    assert actual.dtype == dtype
    if dtype == torch.float32:
        close(actual.double(), expected, 1e-6)
    else:
        torch.testing.assert_close(actual.double(), expected, rtol=0.505 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_huge_direction_in_half_precision(dtype):
    """The square of its norm, 768 · 30000², is beyond fp16."""
    torch.manual_seed(0)
    state, direction = torch.randn(1, 4, 4, 768).to(dtype), (30000 * torch.randn(1, 4, 768).clamp(-2, 2)).to(dtype)
    target, gate = torch.randn(1, 4, 4), 2 * torch.rand(1, 4)
    actual = delta_rewrite(state, direction, target, gate, KEY_EPS)
    expected = delta_rewrite(state.double(), direction.double(), target.double(), gate.double(), KEY_EPS)
    torch.testing.assert_close(actual.double(), expected, rtol=0.505 * torch.finfo(dtype).eps, atol=1e-6)
