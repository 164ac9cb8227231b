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
"""What only a GPU can show: models that are partly on it, and the same model with its fused kernels and without."""

import copy

import pytest
import torch
from conftest import TINY, VARIANTS, all_gradients, random_tokens, tiny_model
from torch._dynamo.utils import counters
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from transformers_ddl import modeling_ddl


pytestmark = pytest.mark.gpu
variants = pytest.mark.parametrize("variant", [*VARIANTS, "anchored"])
GENERATE = {"max_new_tokens": 8, "do_sample": False}


def gpu_model(variant, **options):
    if variant == "anchored":
        variant, options = "cc", {"value_anchor": 0.5, **options}
    return tiny_model(variant, **options).cuda()


@pytest.fixture
def fused(monkeypatch):
    """Counts the uses of the fused kernels."""
    calls, fused_boundary = [], modeling_ddl.fused_boundary

    def count(*args):
        calls.append(args)
        return fused_boundary(*args)

    monkeypatch.setattr(modeling_ddl, "fused_boundary", count)
    return calls


def near(actual, expected):
    """Logits in float32, whose sums the kernels compute in another order."""
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-4, atol=1e-4)


@variants
def test_kernels_generate_the_same(variant, fused, monkeypatch):
    model, tokens = gpu_model(variant), random_tokens(2, 9).cuda()
    with torch.no_grad():
        logits, generated = model(tokens).logits, model.generate(tokens, **GENERATE)
        assert bool(fused) == (
            variant not in ("additive", "tc", "tc-repeat", "tc-separate", "multi-step", "hc", "mhc")
        )
        fused.clear()
        monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "0")
        near(logits, model(tokens).logits)
        assert torch.equal(generated, model.generate(tokens, **GENERATE)) and not fused


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)], ids=str)
@pytest.mark.parametrize("variant", ["scalar", "cc", "write-only", "expanded-additive", "anchored"])
def test_half_precision(variant, dtype, tolerance, fused, tmp_path):
    """Logits come from the kernels, and are those in float32 to some roundings."""
    model, tokens = gpu_model(variant), random_tokens(2, 9).cuda()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cuda")
    for name, parameter in loaded.named_parameters():
        keeps = "_residual." in name and variant != "expanded-additive"
        assert parameter.dtype == (torch.float32 if keeps else dtype), name
    with torch.no_grad():
        logits = loaded(tokens).logits
        assert len(fused) == 2 * model.config.num_hidden_layers + 1
        expected = model(tokens).logits
    assert logits.dtype == dtype
    assert (logits - expected).norm() / expected.norm() < tolerance
    assert loaded.generate(tokens, **GENERATE).shape == (2, 17)


@variants
def test_offloading_by_a_device_map(variant, tmp_path):
    """`device_map="auto"` with too little memory on the GPU and too little beside it: the rest is read from disk."""
    model, tokens = gpu_model(variant, num_hidden_layers=6), random_tokens(2, 9).cuda()
    model.save_pretrained(tmp_path)
    size = max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in model.model.layers)
    embeddings = model.model.embed_tokens.weight.nbytes
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={0: embeddings + 4 * size, "cpu": 2 * size},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {0, "cpu", "disk"}, loaded.hf_device_map
    with torch.no_grad():
        near(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.generate(tokens, **GENERATE), model.generate(tokens, **GENERATE))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@variants
def test_on_another_gpu_than_the_current_one(variant):
    """Where the layers of a `device_map` may lie; Triton would launch on the current one."""
    model, tokens = gpu_model(variant), random_tokens(2, 9).cuda()
    other, other_tokens = copy.deepcopy(model).to("cuda:1"), tokens.to("cuda:1")
    loss = other(other_tokens, labels=other_tokens, use_cache=False).loss
    expected = model(tokens, labels=tokens, use_cache=False).loss
    near(loss.cuda(), expected)
    gradients = all_gradients(loss, other)
    for name, gradient in all_gradients(expected, model).items():
        near(gradients[name].cuda(), gradient)


@pytest.mark.xfail(
    torch.__version__.startswith("2.11."),
    raises=torch._dynamo.exc.UserError,
    reason="on a GPU it refuses a length that is a named `Dim`, a Llama's too",
    strict=True,
)
@pytest.mark.parametrize("variant", ["llama", *VARIANTS, "anchored"])
def test_export(variant):
    """A program made on the GPU, for lengths other than the one that it was made from, padding included; as a Llama's."""
    model = LlamaForCausalLM(LlamaConfig(**TINY)).cuda().eval() if variant == "llama" else gpu_model(variant)
    tokens = random_tokens(2, 9).cuda()
    sequence = {1: torch.export.Dim("sequence", min=2, max=64)}
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens, "attention_mask": mask, "use_cache": False},
        dynamic_shapes={"input_ids": sequence, "attention_mask": sequence, "use_cache": None},
        strict=False,
    )
    tokens = random_tokens(2, 12, seed=1).cuda()
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[1, -3:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        near(program.module()(**inputs).logits[mask.bool()], model(**inputs).logits[mask.bool()])


@variants
def test_training_in_cuda_graphs(variant):
    """Losses of six steps, of which the first ones record the graphs, are those without compiling; nothing stays out of graphs."""
    torch.compiler.reset()
    counters.clear()
    model, tokens = gpu_model(variant).train(), random_tokens(4, 12).cuda()
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, mode="reduce-overhead")

    def losses(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    expected = torch.tensor(list(losses(model)))
    assert expected[0] - expected[-1] > 1e-3
    torch.testing.assert_close(torch.tensor(list(losses(compiled))), expected, rtol=1e-4, atol=0)
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.fixture(scope="module")
def one_process():
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fsdp2(variant, dtype, one_process):
    """Losses of five steps are those without it; in bfloat16, gates and targets are as well."""
    model, tokens = gpu_model(variant).train(), random_tokens(4, 12).cuda()
    sharded = copy.deepcopy(model)
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    for module in [*sharded.model.layers, sharded]:
        fully_shard(module, mp_policy=policy)

    def losses(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
        for _ in range(5):
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    expected = torch.tensor(list(losses(model)))
    assert expected[0] - expected[-1] > 1e-3
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(torch.tensor(list(losses(sharded))), expected, rtol=tolerance, atol=0)
