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
"""Padding and packing change no logit and no gradient of any document, for every variant and attention implementation."""

import pytest
import torch
from conftest import CONV_VARIANTS, VARIANTS, all_gradients, close, gradients_close, random_tokens, tiny_model
from transformers import DataCollatorWithFlattening, StaticCache


IGNORED = -100
# Documents shorter than, as long as and longer than the convolutions' kernels of 4 tokens
DOCUMENTS = [random_tokens(length, seed=length) for length in (9, 1, 4, 2)]

variants = pytest.mark.parametrize("variant", VARIANTS)
attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])
modes = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def model_in_mode(variant, attention, training):
    return tiny_model(variant, attention=attention).train(training)


def document_logits(model):
    return [model(document[None], use_cache=False).logits[0] for document in DOCUMENTS]


def random_loss(logits):
    """A loss on every logit, for each document another."""
    generator = torch.Generator().manual_seed(0)
    return sum((part * torch.randn(part.shape, generator=generator)).sum() for part in logits)


def assert_same_as_alone(model, logits):
    """Logits of the documents and gradients of a loss on them, against those of the documents one by one."""
    alone = document_logits(model)
    for actual, expected in zip(logits, alone):
        close(actual, expected)
    gradients_close(all_gradients(random_loss(logits), model), all_gradients(random_loss(alone), model))


# Padding


def pad(layout):
    """A batch of the documents, each with padding (random tokens) where `layout` puts it."""
    tokens = random_tokens(len(DOCUMENTS), 11, seed=100)
    mask = torch.zeros_like(tokens)
    for row, document in enumerate(DOCUMENTS):
        length = len(document)
        if layout == "left":
            places = torch.arange(11 - length, 11)
        elif layout == "right":
            places = torch.arange(length)
        elif layout == "both sides":
            places = torch.arange(length) + 1
        else:
            # Padding between tokens, too
            places = torch.randperm(11, generator=torch.Generator().manual_seed(row))[:length].sort().values
        tokens[row, places] = document
        mask[row, places] = 1
    return tokens, mask


@variants
@attentions
@pytest.mark.parametrize("layout", ["left", "right", "both sides", "interior"])
@modes
def test_padding(variant, attention, layout, training):
    model = model_in_mode(variant, attention, training)
    tokens, mask = pad(layout)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=position_ids).logits
    assert_same_as_alone(model, [logits[row, mask[row].bool()] for row in range(len(DOCUMENTS))])


@variants
def test_padding_with_default_positions(variant):
    """Rotary embeddings are relative: with left padding, positions need not start at 0 (unless normalised after)."""
    model = tiny_model(variant)
    tokens, mask = pad("left")
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
        for row, expected in enumerate(document_logits(model)):
            close(logits[row, mask[row].bool()], expected)


@variants
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int32], ids=str)
def test_mask_dtypes(variant, mask_dtype):
    model = tiny_model(variant)
    tokens, mask = pad("left")
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        actual = model(tokens, attention_mask=mask.to(mask_dtype)).logits
    assert torch.equal(actual[mask.bool()], expected[mask.bool()])


@variants
def test_mask_of_ones_is_no_mask(variant):
    model, tokens = tiny_model(variant), random_tokens(2, 9)
    with torch.no_grad():
        close(model(tokens, attention_mask=torch.ones_like(tokens)).logits, model(tokens).logits)


@variants
@attentions
def test_what_padding_holds_does_not_matter(variant, attention):
    """However large it is: it is not multiplied by zeros, but left out."""
    model = tiny_model(variant, attention=attention)
    tokens, mask = pad("both sides")
    embeddings = model.get_input_embeddings()(tokens).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, attention_mask=mask).logits
        embeddings[mask == 0] = 1e30
        actual = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert torch.equal(actual[mask.bool()], expected[mask.bool()])


# Packing


def pack(rows):
    """Rows of documents, as `DataCollatorWithFlattening` makes each of them."""
    batches = [DataCollatorWithFlattening()([{"input_ids": document.tolist()} for document in row]) for row in rows]
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels", "position_ids")}


ONE_ROW = [DOCUMENTS]
# Documents begin at other places in each row, and the last one of a row is unlike any of the others
TWO_ROWS = [DOCUMENTS, [DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]]]


@variants
@attentions
@modes
@pytest.mark.parametrize("use_cache", [None, False], ids=["default-cache", "no-cache"])
def test_packing(variant, attention, training, use_cache):
    model = model_in_mode(variant, attention, training)
    batch = pack(ONE_ROW)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=use_cache).logits[0]
    assert_same_as_alone(model, logits.split([len(document) for document in DOCUMENTS]))


@variants
@attentions
def test_packing_several_rows(variant, attention):
    model = tiny_model(variant, attention=attention)
    batch = pack(TWO_ROWS)
    with torch.no_grad():
        logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
        for row, documents in enumerate(TWO_ROWS):
            for document, actual in zip(documents, logits[row].split([len(document) for document in documents])):
                close(actual, model(document[None]).logits[0])


@variants
def test_packing_given_once_for_all_rows(variant):
    model, tokens = tiny_model(variant), random_tokens(2, 9)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1]])
    with torch.no_grad():
        logits = model(tokens, position_ids=position_ids).logits
        for document, actual in zip(tokens.split([5, 2, 2], dim=1), logits.split([5, 2, 2], dim=1)):
            close(actual, model(document).logits)


@variants
@modes
def test_loss_of_a_packed_batch(variant, training):
    """The collator masks the first label of each document, which would be predicted from the one before it."""
    model = model_in_mode(variant, "sdpa", training)
    loss = model(**pack(ONE_ROW)).loss
    losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none")
            for logits, document in zip(document_logits(model), DOCUMENTS)
        ]
    )
    close(loss, losses.mean())
    gradients_close(all_gradients(loss, model), all_gradients(losses.mean(), model))


# Flex attention, which has no backward pass on the CPU


@variants
@modes
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@torch.no_grad()
def test_flex_attention(variant, training, layout):
    model = model_in_mode(variant, "flex_attention", training)
    alone = document_logits(model_in_mode(variant, "sdpa", training))
    if layout == "packed":
        batch = pack(ONE_ROW)
        logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        logits = logits.split([len(document) for document in DOCUMENTS])
    else:
        tokens, mask = pad(layout)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=position_ids).logits
        logits = [logits[row, mask[row].bool()] for row in range(len(DOCUMENTS))]
    for actual, expected in zip(logits, alone):
        close(actual, expected)


@pytest.mark.parametrize("variant", CONV_VARIANTS)
def test_mask_as_long_as_a_static_cache(variant):
    """A mask of fixed length names tokens that are yet to come, too."""
    model, tokens = tiny_model(variant), random_tokens(2, 9)
    with torch.no_grad():
        expected = model(tokens).logits
        mask = torch.zeros(2, 20, dtype=torch.long)
        mask[:, :9] = 1
        cache = StaticCache(config=model.config, max_cache_len=20)
        first = model(tokens[:, :6], attention_mask=mask, past_key_values=cache).logits
        second = model(tokens[:, 6:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-5, atol=1e-5)
