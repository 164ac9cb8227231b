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
"""The tokenizer of a model that is trained from scratch: trained too, or loaded."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .cli import InputError


# Precedes every document and follows the last one, so it is both the bos and the eos token.
BOUNDARY_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    Raises:
        `InputError`: if there is no such tokenizer, or it has no end-of-sequence token to put between documents.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer: cannot load {name!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer: {name!r} has no eos token; allowed: a tokenizer with one")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer, which encodes any text without loss.

    It puts the boundary token, `bos` and `eos` in one, before a text; pass `split_special_tokens=True` to encode text that
    may itself contain the special tokens' names.

    Args:
        texts: What to learn merges from.
        vocab_size: Tokens including the 256 bytes and the 2 special ones; there are fewer if `texts` offers no more merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARY_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY_TOKEN} $A", special_tokens=[(BOUNDARY_TOKEN, tokenizer.token_to_id(BOUNDARY_TOKEN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOUNDARY_TOKEN, eos_token=BOUNDARY_TOKEN, pad_token=PAD_TOKEN
    )
