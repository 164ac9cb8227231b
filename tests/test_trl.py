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
"""TRL: supervised finetuning on padded, padding-free and packed batches, and on preferences."""

import math

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from transformers_ddl.tokenization import train_tokenizer


# Of different lengths, the shortest of fewer tokens than the convolutions have taps
TEXTS = ["a", "the cat sat on the mat", "a dog", "the dog sat on the cat and the cat sat on the mat", "on and on"]
VARIANTS = ["scalar", "cc", "tc", "additive"]
BATCHES = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 64},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=280)


def make_model(variant, tokenizer, **options):
    return tiny_model(variant, vocab_size=len(tokenizer), max_position_embeddings=128, **options)


def make_arguments(config_class, tmp_path, **options):
    return config_class(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(TEXTS),
        per_device_eval_batch_size=len(TEXTS),
        **options,
    )


@torch.no_grad()
def mean_loss(model, tokenizer) -> float:
    """Of the tokens of all texts, each computed alone; TRL puts the boundary token at the end of a text."""
    losses = []
    for text in TEXTS:
        tokens = torch.tensor([tokenizer(text).input_ids + [tokenizer.eos_token_id]])
        losses.append(torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_supervised_finetuning(variant, batches, tokenizer, tmp_path):
    """The loss of all texts is that of each alone, to some roundings in fp32, and goes down."""
    model, texts = make_model(variant, tokenizer), Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(
        model=model,
        args=make_arguments(SFTConfig, tmp_path, **BATCHES[batches]),
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=tokenizer,
    )
    before, expected = trainer.evaluate()["eval_loss"], mean_loss(model, tokenizer)
    assert math.isclose(before, expected, rel_tol=1e-5)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.9 * before
    assert math.isclose(after, mean_loss(model.eval(), tokenizer), rel_tol=1e-5)


def test_scaled_logits(tokenizer, tmp_path):
    """TRL applies the head itself."""
    model, texts = make_model("cc", tokenizer, logits_scale=0.25), Dataset.from_dict({"text": TEXTS})
    arguments = make_arguments(SFTConfig, tmp_path)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer
    )
    assert math.isclose(trainer.evaluate()["eval_loss"], mean_loss(model, tokenizer), rel_tol=1e-5)


def test_supervised_finetuning_of_an_adapter(tokenizer, tmp_path):
    model, texts = make_model("cc", tokenizer), Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(
        model=model,
        args=make_arguments(SFTConfig, tmp_path, **BATCHES["packed"]),
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=2,
            target_modules="all-linear",
            exclude_modules=["beta_proj", "value_proj"],
            modules_to_save=["beta_proj"],
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize("variant", VARIANTS)
def test_direct_preference_optimisation(variant, tokenizer, tmp_path):
    """The loss starts at log 2, where the model is the reference, which TRL loads from the model's folder."""
    make_model(variant, tokenizer).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    preferences = Dataset.from_dict(
        {
            "prompt": ["the cat", "a dog sat", "on"],
            "chosen": [" sat on the mat", " on", " and on"],
            "rejected": [" on the", " the the cat sat", " a"],
        }
    )
    trainer = DPOTrainer(
        model=model,
        args=make_arguments(DPOConfig, tmp_path / "run"),
        train_dataset=preferences,
        eval_dataset=preferences,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    assert math.isclose(before["eval_loss"], math.log(2), rel_tol=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert after["eval_rewards/accuracies"] == 1
