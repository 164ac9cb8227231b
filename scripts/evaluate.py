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
"""`transformers-ddl evaluate`, for a checkout."""

import sys
from pathlib import Path

from transformers_ddl.cli import main


# Python looks for modules in this folder first, where it would take this file for the library `evaluate`
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
