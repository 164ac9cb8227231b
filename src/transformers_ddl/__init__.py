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
"""Deep Delta Learning for Transformers. Importing the package registers its models with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_ddl import DDLConfig
from .delta_stats import record_delta_stats
from .modeling_ddl import (
    DDLForCausalLM,
    DDLForQuestionAnswering,
    DDLForSequenceClassification,
    DDLForTokenClassification,
    DDLModel,
    DDLPreTrainedModel,
)


__version__ = "0.1.0"

AutoConfig.register("ddl", DDLConfig, exist_ok=True)
AutoModel.register(DDLConfig, DDLModel, exist_ok=True)
AutoModelForCausalLM.register(DDLConfig, DDLForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DDLConfig, DDLForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DDLConfig, DDLForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(DDLConfig, DDLForQuestionAnswering, exist_ok=True)

# Not in `modeling_ddl`, which is also remote code and then has no other module of the package at hand
DDLPreTrainedModel.record_delta_stats = record_delta_stats

__all__ = [
    "DDLConfig",
    "DDLForCausalLM",
    "DDLForQuestionAnswering",
    "DDLForSequenceClassification",
    "DDLForTokenClassification",
    "DDLModel",
    "DDLPreTrainedModel",
]
