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
"""
What serving engines ask of a model: the attention interface, a batch of tokens without a batch dimension, no state but the
one that they keep. docs/serving.md says which variants meet it.
"""

import pytest
import torch
from conftest import CONV_VARIANTS, VARIANTS, close, random_tokens, tiny_config, tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_ddl import DDLForCausalLM, DDLModel


TOKEN_LOCAL = [variant for variant in VARIANTS if variant not in CONV_VARIANTS]
ENGINES = ["vllm", "sglang"]


class PagedAttention:
    """The keys and values of one layer, request by request, as engines keep them."""

    def __init__(self):
        self.pages = {}

    def __call__(self, query, key, value, scaling, requests):
        output = []
        for token, request in enumerate(requests):
            # [heads, 1, head_dim] each
            q, k, v = (states[0, :, token : token + 1] for states in (query, key, value))
            if request in self.pages:
                k, v = (torch.cat(pair, dim=1) for pair in zip(self.pages[request], (k, v)))
            self.pages[request] = k, v
            output.append(scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True).flatten())
        return torch.stack(output)


def engine_attention(module, query, key, value, attention_mask, scaling, attention_instances, requests, **kwargs):
    """Called as those of vLLM and SGLang, and returns `[tokens, heads * head_dim]` as they do."""
    assert attention_mask is None and module.is_causal
    return attention_instances[module.layer_idx](query, key, value, scaling, requests), None


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    for engine in ENGINES:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, engine, engine_attention)


@torch.no_grad()
@pytest.mark.parametrize("variant", TOKEN_LOCAL)
@pytest.mark.parametrize("engine", ENGINES)
def test_served_as_documents_alone(engine, variant):
    """Two requests in the same batches: a prompt in two chunks beside one in one, then a token of each at a time."""
    documents = {"a": random_tokens(9, seed=1), "b": random_tokens(6, seed=2)}
    batches = [[("a", 0, 4), ("b", 0, 3)], [("b", 3, 4), ("a", 4, 6)]]
    batches += [[("a", 6, 7), ("b", 4, 5)], [("a", 7, 8), ("b", 5, 6)], [("a", 8, 9)]]

    reference = tiny_model(variant, DDLModel)
    served = tiny_model(variant, DDLModel, attention=engine)
    assert served._supports_attention_backend
    attention_instances = {layer: PagedAttention() for layer in range(served.config.num_hidden_layers)}
    outputs = {name: [] for name in documents}
    for batch in batches:
        hidden_states = served(
            input_ids=torch.cat([documents[name][start:end] for name, start, end in batch])[None],
            inputs_embeds=None,
            position_ids=torch.cat([torch.arange(start, end) for _, start, end in batch])[None],
            use_cache=False,
            return_dict=False,
            attention_instances=attention_instances,
            requests=[name for name, start, end in batch for _ in range(start, end)],
        )[0][0]
        for name, part in zip(
            [name for name, *_ in batch], hidden_states.split([end - start for _, start, end in batch])
        ):
            outputs[name].append(part)
    for name, document in documents.items():
        close(torch.cat(outputs[name]), reference(document[None]).last_hidden_state[0])


@pytest.mark.parametrize("variant", CONV_VARIANTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_convolutions_are_refused(engine, variant):
    """They would read the wrong tokens: engines have no place for what they remember."""
    config = tiny_config(variant)
    config._attn_implementation = engine
    with pytest.raises(ValueError, match=f"{engine} cannot serve a model with convolutions"):
        AutoModel.from_config(config)


@pytest.mark.parametrize("variant", ["scalar", "cc-repeat", "additive"])
def test_one_graph_for_any_number_of_tokens(variant):
    """Engines compile the base model as a whole, once."""
    model = tiny_model(variant, DDLModel)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (5, 7, 12):
        tokens, position_ids = random_tokens(1, length), torch.arange(length)[None]
        with torch.no_grad():
            arguments = {"input_ids": tokens, "position_ids": position_ids, "use_cache": False}
            close(compiled(**arguments).last_hidden_state, model(**arguments).last_hidden_state)
    assert len(graphs) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_keep_nothing_from_a_call(variant):
    model, (first, other) = tiny_model(variant), random_tokens(2, 1, 9)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        logits = model(first).logits
        model(other, position_ids=torch.arange(3, 12)[None])
        assert torch.equal(model(first).logits, logits)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(value is before[name][key] for key, value in vars(module).items()), name


@pytest.mark.parametrize("logits_scale", [None, 0.5])
def test_engines_scale_logits(logits_scale):
    """They apply the head to the base model's output themselves, and multiply by `config.logit_scale`."""
    model, tokens = tiny_model(logits_scale=logits_scale), random_tokens(2, 9)
    with torch.no_grad():
        logits = model.config.logit_scale * model.lm_head(model.model(tokens).last_hidden_state)
        close(model(tokens).logits, logits)


PROMPTS = [random_tokens(length, seed=length).tolist() for length in (9, 1, 4)]


def generate_batch(model: DDLForCausalLM):
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    # Without bounds, it takes most of the memory
    bounds = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    return model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=bounds)


@pytest.mark.parametrize("variant", TOKEN_LOCAL)
def test_continuous_batching(variant):
    """Transformers' own engine generates what `generate` does."""
    model = tiny_model(variant)
    for prompt, output in zip(PROMPTS, generate_batch(model).values(), strict=True):
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert output.generated_tokens == tokens.tolist()


@pytest.mark.parametrize("variant", CONV_VARIANTS)
def test_continuous_batching_refuses_convolutions(variant):
    with pytest.raises(ValueError, match="hybrid"):
        generate_batch(tiny_model(variant))
