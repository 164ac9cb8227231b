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
"""Cached decoding against the full forward pass, with every kind of cache, and `generate()` in all its modes."""

import contextlib
import copy
import itertools

import pytest
import torch
from conftest import CONV_VARIANTS, VARIANTS, close, random_tokens, tiny_model
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


BATCH, LENGTH = 2, 12

variants = pytest.mark.parametrize("variant", VARIANTS)
conv_variants = pytest.mark.parametrize("variant", CONV_VARIANTS)


def full_logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@torch.no_grad()
def cached_logits(model, tokens, cache, chunks, **kwargs):
    """Logits of tokens given in chunks of these lengths."""
    outputs = [model(chunk, past_key_values=cache, **kwargs).logits for chunk in tokens.split(chunks, dim=1)]
    return torch.cat(outputs, dim=1)


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=LENGTH + 8)


# Cached forward passes


# Prompts shorter than, as long as and longer than the convolutions' kernels of 4 tokens, in one and in several chunks
CHUNKS = {
    "token-by-token": [1] * LENGTH,
    "prompt-2": [2] + [1] * (LENGTH - 2),
    "prompt-4": [4] + [1] * (LENGTH - 4),
    "prompt-9": [9] + [1] * (LENGTH - 9),
    "multi-token": [1, 2, 5, 3, 1],
    "whole": [LENGTH],
}


@variants
@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_cache_equals_full_forward(variant, make_cache, chunks):
    model, tokens = tiny_model(variant), random_tokens(BATCH, LENGTH)
    close(cached_logits(model, tokens, make_cache(model), CHUNKS[chunks]), full_logits(model, tokens))


@pytest.mark.parametrize(
    "options",
    [
        {"compressor_kernel_size": 1, "embedding_conv_kernel_size": 1},
        {"compressor_kernel_size": 2, "embedding_conv_kernel_size": 5},
        {"compressor_kernel_size": 7, "embedding_conv_kernel_size": 3},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3, "share_compressor": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("make_cache", [dynamic, static])
def test_kernel_sizes_and_depths(options, make_cache):
    model, tokens = tiny_model("tc", **options), random_tokens(BATCH, LENGTH)
    expected = full_logits(model, tokens)
    for chunks in ("token-by-token", "multi-token"):
        close(cached_logits(model, tokens, make_cache(model), CHUNKS[chunks]), expected)


@variants
def test_cache_the_model_makes(variant):
    model, tokens = tiny_model(variant), random_tokens(BATCH, LENGTH)
    with torch.no_grad():
        first = model(tokens[:, :5], use_cache=True)
        second = model(tokens[:, 5:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], dim=1), full_logits(model, tokens))


@variants
def test_reset_cache_is_a_new_one(variant):
    """As `generate` does with its static cache; up to transformers 5.17, a dynamic one keeps zeros in its place."""
    model, tokens = tiny_model(variant), random_tokens(BATCH, LENGTH)
    cache = static(model)
    cached_logits(model, random_tokens(BATCH, 7, seed=1), cache, [5, 2])
    cache.reset()
    close(cached_logits(model, tokens, cache, CHUNKS["prompt-2"]), full_logits(model, tokens))


@variants
def test_cache_made_without_config(variant):
    """Such a cache has no place for the inputs of convolutions: their models must say so, others must work."""
    model, tokens = tiny_model(variant), random_tokens(BATCH, LENGTH)
    if variant in CONV_VARIANTS:
        with pytest.raises(ValueError, match="config"):
            cached_logits(model, tokens, DynamicCache(), CHUNKS["prompt-2"])
    else:
        close(cached_logits(model, tokens, DynamicCache(), CHUNKS["prompt-2"]), full_logits(model, tokens))


@variants
def test_two_continuations_of_one_cache(variant):
    model, prompt = tiny_model(variant), random_tokens(BATCH, 6)
    cache = dynamic(model)
    cached_logits(model, prompt, cache, [6])
    for seed in (1, 2):
        continuation = random_tokens(BATCH, 5, seed=seed)
        expected = full_logits(model, torch.cat([prompt, continuation], dim=1))[:, 6:]
        close(cached_logits(model, continuation, copy.deepcopy(cache), [1, 3, 1]), expected)


@variants
@pytest.mark.parametrize("prompt_length", [1, 3, 6])
@pytest.mark.parametrize("rejected", [0, 1, 2, 5])
def test_crop(variant, prompt_length, rejected):
    """As in assisted decoding: five candidates after a prompt, the last of which are rejected, twice."""
    model, prompt = tiny_model(variant), random_tokens(BATCH, prompt_length)
    cache = dynamic(model)
    cache.activate_past_recording()
    cached_logits(model, prompt, cache, [prompt_length])
    for seed in (1, 2):
        candidates = random_tokens(BATCH, 5, seed=seed)
        tokens = torch.cat([prompt, candidates], dim=1)
        close(cached_logits(model, candidates, cache, [5]), full_logits(model, tokens)[:, prompt.shape[1] :])
        cache.crop(-rejected)
        prompt = tokens[:, : tokens.shape[1] - rejected]
        assert cache.get_seq_length() == prompt.shape[1]


@variants
@pytest.mark.parametrize("make_cache", [dynamic, static])
def test_reorder(variant, make_cache):
    """As in beam search: rows are dropped and doubled."""
    model, tokens = tiny_model(variant), random_tokens(3, LENGTH)
    cache, order = make_cache(model), torch.tensor([2, 0, 0])
    cached_logits(model, tokens[:, :6], cache, [6])
    cache.reorder_cache(order)
    reordered = torch.cat([tokens[order, :6], tokens[:, 6:]], dim=1)
    close(cached_logits(model, tokens[:, 6:], cache, [1, 1, 3, 1]), full_logits(model, reordered)[:, 6:])


# Of a prompt of 9 tokens and three more; with single tokens, some chunks of a row are nothing but padding
PADDED_CHUNKS = {"whole-prompt": [9, 1, 1, 1], "pairs": [2] * 6, "uneven": [3, 4, 2, 3], "single-tokens": [1] * 12}


@conv_variants
@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("chunks", PADDED_CHUNKS)
def test_padded_prefill_in_chunks(variant, make_cache, padding_side, chunks):
    """A prompt of 9 tokens beside one of 4, followed by three tokens of each: padding reaches into several chunks."""
    model, tokens, lengths = tiny_model(variant), random_tokens(2, LENGTH), [9, 4]
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padding = slice(0, 9 - length) if padding_side == "left" else slice(length, 9)
        mask[row, padding] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)

    cache, outputs, start = make_cache(model), [], 0
    for length in PADDED_CHUNKS[chunks]:
        end = start + length
        inputs = {"input_ids": tokens[:, start:end], "position_ids": position_ids[:, start:end]}
        with torch.no_grad():
            outputs.append(model(**inputs, attention_mask=mask[:, :end], past_key_values=cache).logits)
        start = end
    logits = torch.cat(outputs, dim=1)
    for row in range(2):
        present = mask[row].bool()
        close(logits[row, present], full_logits(model, tokens[row : row + 1, present])[0])


@variants
def test_logits_to_keep(variant):
    model, tokens = tiny_model(variant), random_tokens(BATCH, LENGTH)
    expected, positions = full_logits(model, tokens), torch.tensor([0, 3, 10])
    with torch.no_grad():
        close(model(tokens, logits_to_keep=3).logits, expected[:, -3:])
        close(model(tokens, logits_to_keep=positions).logits, expected[:, positions])


# generate()


def greedy(model, tokens, new_tokens):
    """Greedy decoding by full forward passes."""
    for _ in range(new_tokens):
        tokens = torch.cat([tokens, full_logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def generate(model, tokens, new_tokens=8, do_sample=False, **kwargs):
    return model.generate(tokens, max_new_tokens=new_tokens, do_sample=do_sample, **kwargs)


@contextlib.contextmanager
def count_forward_passes(model):
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    hook.remove()


GREEDY_MODES = {
    "dynamic-cache": {},
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 3},
}


@variants
@pytest.mark.parametrize("mode", GREEDY_MODES)
@pytest.mark.parametrize("prompt_length", [1, 7])
def test_greedy(variant, mode, prompt_length):
    model, prompt = tiny_model(variant), random_tokens(BATCH, prompt_length)
    assert torch.equal(generate(model, prompt, **GREEDY_MODES[mode]), greedy(model, prompt, 8))


@variants
def test_static_cache_is_used_again(variant):
    """`generate` keeps the static cache for the next call, which may have another batch size and a shorter prompt."""
    model = tiny_model(variant)
    for batch_size, prompt_length in ((2, 5), (2, 3), (1, 6), (3, 1), (2, 5)):
        prompt = random_tokens(batch_size, prompt_length, seed=prompt_length)
        assert torch.equal(generate(model, prompt, cache_implementation="static"), greedy(model, prompt, 8))


@variants
def test_one_mask_for_each_token(variant, monkeypatch):
    """Of what `generate` does between compiled forward passes, masks are most."""
    model, prompt = tiny_model(variant), random_tokens(1, 5)
    masks, make_mask = [], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def count_mask(*args, **kwargs):
        masks.append(make_mask(*args, **kwargs))
        return masks[-1]

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", count_mask)
    generate(model, prompt, new_tokens=4, min_new_tokens=4, cache_implementation="static")
    assert len(masks) == 4


@variants
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_left_padded_batch(variant, cache_implementation):
    model, prompts = tiny_model(variant), [random_tokens(1, length, seed=length) for length in (1, 3, 8)]
    batch = torch.cat([torch.nn.functional.pad(prompt, (8 - prompt.shape[1], 0)) for prompt in prompts])
    outputs = generate(model, batch, attention_mask=batch.ne(0), cache_implementation=cache_implementation)
    for prompt, output in zip(prompts, outputs):
        assert torch.equal(output[8 - prompt.shape[1] :], greedy(model, prompt, 8)[0])


@variants
def test_sampling_does_not_depend_on_the_cache(variant):
    model, prompt = tiny_model(variant), random_tokens(BATCH, 5)
    samples = []
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        samples.append(generate(model, prompt, do_sample=True, num_return_sequences=3, **mode))
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    assert len(samples[0].unique(dim=0)) == 6, "sampled the same continuations"


@variants
def test_beam_search_does_not_depend_on_the_cache(variant):
    model, prompt = tiny_model(variant), random_tokens(BATCH, 5)
    beams = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    cached, plain = generate(model, prompt, **beams), generate(model, prompt, use_cache=False, **beams)
    assert (cached.beam_indices[:, 1:8] != cached.beam_indices[:, :7]).any(), "no beam was reordered"
    assert torch.equal(cached.sequences, plain.sequences)
    close(cached.sequences_scores, plain.sequences_scores)
    score = full_logits(model, cached.sequences).log_softmax(-1)[:, 4:-1].gather(2, cached.sequences[:, 5:, None])
    close(cached.sequences_scores, score.mean((1, 2)))


@variants
@pytest.mark.parametrize("prompt_length, padding", [(1, 0), (6, 0), (4, 3)])
def test_assisted_decoding_is_greedy_decoding(variant, prompt_length, padding):
    """The assistant proposes what the model would write, except for every third token."""
    model, prompt = tiny_model(variant), random_tokens(1, prompt_length)
    expected = greedy(model, prompt, 20)
    assistant = copy.deepcopy(model)
    assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0)
    calls = itertools.count(1)

    def err(module, args, output):
        if next(calls) % 3 == 0:
            output.logits = output.logits.roll(1, dims=-1)

    assistant.register_forward_hook(err)
    padded = torch.nn.functional.pad(prompt, (padding, 0))
    with count_forward_passes(model) as passes:
        generated = generate(model, padded, 20, attention_mask=padded.ne(0), assistant_model=assistant)
    assert torch.equal(generated[:, padding:], expected)
    assert 5 < len(passes) < 20, "no candidate was rejected, or none accepted"


@variants
def test_early_exit_decoding_is_greedy_decoding(variant):
    """The assistant is the first layer of the model, which reads the state with the readout of the last."""
    model, prompt = tiny_model(variant), random_tokens(1, 6)
    assert torch.equal(generate(model, prompt, 12, assistant_early_exit=1), greedy(model, prompt, 12))


@variants
def test_prompt_lookup_is_greedy_decoding(variant):
    """The prompt repeats itself, and so do small models: some candidates are right, and not all."""
    model, prompt = tiny_model(variant), random_tokens(1, 5).repeat(1, 3)
    expected = greedy(model, prompt, 32)
    with count_forward_passes(model) as passes:
        assert torch.equal(generate(model, prompt, 32, prompt_lookup_num_tokens=3), expected)
    assert len(passes) < 32, "no candidate was accepted"


@variants
@pytest.mark.parametrize("new_turn", [1, 4])
def test_continues_a_conversation(variant, new_turn):
    model, prompt = tiny_model(variant), random_tokens(BATCH, 5)
    first = generate(model, prompt, return_dict_in_generate=True)
    second = torch.cat([first.sequences, random_tokens(BATCH, new_turn, seed=1)], dim=1)
    continued = generate(model, second, past_key_values=first.past_key_values)
    assert torch.equal(continued, greedy(model, second, 8))


@variants
def test_inputs_embeds(variant):
    model, prompt = tiny_model(variant), random_tokens(BATCH, 5)
    embeddings = model.get_input_embeddings()(prompt)
    generated = model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, greedy(model, prompt, 8)[:, 5:])


@pytest.mark.parametrize("variant", ["scalar", "cc", "tc"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("checked", [True, False], ids=["modules-checked", "modules-not-checked"])
def test_static_cache_compiled(variant, padded, checked):
    """
    `generate` compiles by itself on accelerators only, without graph breaks; the CPU must be asked to. What is compiled need not check
    at every token that no module has changed (docs/serving.md).
    """
    torch.compiler.reset()
    options = None if checked else {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compile_config = CompileConfig(fullgraph=True, mode=None, dynamic=False, options=options)
    compile_config._compile_all_devices = True
    model, prompt = tiny_model(variant), random_tokens(BATCH, 6)
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :3] = 0
    compiled = generate(
        model, prompt, attention_mask=mask, cache_implementation="static", compile_config=compile_config
    )
    assert hasattr(model, "_compiled_call"), "not compiled"
    for row in range(BATCH):
        present = mask[row].bool()
        expected = greedy(model, prompt[row : row + 1, present], 8)[0]
        assert torch.equal(compiled[row, 6 - len(expected) + 8 :], expected)


@conv_variants
def test_quantised_cache_refuses_convolutions(variant):
    """Transformers quantises keys and values only."""
    with pytest.raises(ValueError, match="hybrid"):
        generate(tiny_model(variant), random_tokens(BATCH, 5), cache_implementation="quantized")


@pytest.mark.gpu
@pytest.mark.parametrize("cache_implementation", ["offloaded", "offloaded_static"])
@variants
def test_offloaded_cache(variant, cache_implementation):
    """Not compiled: torch 2.11 crashes when it compiles the streams of an offloaded static cache, with Llama too."""
    model, prompt = tiny_model(variant).cuda(), random_tokens(BATCH, 5).cuda()
    arguments = {"cache_implementation": cache_implementation, "disable_compile": True}
    if cache_implementation == "offloaded_static" and model.config.compressor == "token":
        with pytest.raises(ValueError, match="offloaded static cache"):
            generate(model, prompt, **arguments)
    else:
        assert torch.equal(generate(model, prompt, **arguments), greedy(model, prompt, 8))
