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
"""The models that `run.py` runs transformers' tests against: those of the DDL paper, and Llama for comparison."""

import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import torch
from tests.distributed_testing_utils import _start_rank_processes
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.models.llama import configuration_llama, modeling_llama

import transformers_ddl


# The distributed tests are expensive: transformers runs them for some model types only
patch("tests.test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES", None).start()
patch("tests.test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES", None).start()
# Those of older versions start processes themselves, which then also may abort when they end
patch("torch.multiprocessing.spawn", _start_rank_processes).start()


class ModelTester:
    """A small model and a batch, under the names by which the tests ask for them."""

    batch_size = 13
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 36
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 3
    is_training = True

    def __init__(self, config_class: type, config_options: dict, base_model_class: type, causal_lm_class: type):
        self.config_class = config_class
        self.config_options = config_options
        self.base_model_class = base_model_class
        self.causal_lm_class = causal_lm_class

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.config_options,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Rows of all lengths, padded on the right
        attention_mask = torch.ones_like(input_ids).tril()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class ModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    FSDPTesterMixin,
):
    """All of transformers' tests for one configuration of one architecture."""

    config_class = transformers_ddl.DDLConfig
    config_options = {}
    base_model_class = transformers_ddl.DDLModel
    causal_lm_class = transformers_ddl.DDLForCausalLM
    sequence_classification_class = transformers_ddl.DDLForSequenceClassification
    token_classification_class = transformers_ddl.DDLForTokenClassification
    question_answering_class = transformers_ddl.DDLForQuestionAnswering

    def setUp(self):
        self.model_tester = ModelTester(
            self.config_class, self.config_options, self.base_model_class, self.causal_lm_class
        )
        self.config_tester = ConfigTester(self, self.config_class, **self.config_options)
        self.all_model_classes = (
            self.base_model_class,
            self.causal_lm_class,
            self.sequence_classification_class,
            self.token_classification_class,
            self.question_answering_class,
        )
        self.pipeline_model_mapping = {
            "feature-extraction": self.base_model_class,
            "text-generation": self.causal_lm_class,
            "text-classification": self.sequence_classification_class,
            "token-classification": self.token_classification_class,
            "zero-shot": self.sequence_classification_class,
        }

    def test_config(self):
        self.config_tester.run_common_tests()

    def run_pipeline_test(self, task, repo_name, model_architecture, **kwargs):
        """Where the mixin would download a small model from the Hub, it finds one in a folder."""
        set_seed(0)
        model = model_architecture(self.model_tester.get_config())
        words = ["<pad>", "<bos>", "<eos>", "<unk>", *"this is a test of one model and another".split()]
        words += [f"word{i}" for i in range(len(words), model.config.vocab_size)]
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        )
        with tempfile.TemporaryDirectory() as hub:
            model.save_pretrained(Path(hub, model.config.model_type, repo_name))
            tokenizer.save_pretrained(Path(hub, model.config.model_type, repo_name))
            with patch("tests.test_pipeline_mixin.TRANSFORMERS_TINY_MODEL_PATH", hub):
                super().run_pipeline_test(task, repo_name, model_architecture, **kwargs)


class LlamaTest(ModelTest, unittest.TestCase):
    config_class = configuration_llama.LlamaConfig
    base_model_class = modeling_llama.LlamaModel
    causal_lm_class = modeling_llama.LlamaForCausalLM
    sequence_classification_class = modeling_llama.LlamaForSequenceClassification
    token_classification_class = modeling_llama.LlamaForTokenClassification
    question_answering_class = modeling_llama.LlamaForQuestionAnswering


class AdditiveTest(ModelTest, unittest.TestCase):
    config_options = {"residual_type": "additive"}


class ScalarTest(ModelTest, unittest.TestCase):
    config_options = {"num_value_channels": 1}


class ChannelTest(ModelTest, unittest.TestCase):
    config_options = {"compressor": "channel"}


class ChannelWithoutEmbeddingConvTest(ModelTest, unittest.TestCase):
    config_options = {"compressor": "channel", "embedding_conv": False}


class TokenTest(ModelTest, unittest.TestCase):
    config_options = {"compressor": "token"}


class TokenWithoutEmbeddingConvTest(ModelTest, unittest.TestCase):
    config_options = {"compressor": "token", "embedding_conv": False}
