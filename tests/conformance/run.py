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
Runs transformers' own tests of a model against DDL, and against Llama under the same harness: DDL may fail none of them
and skip none that Llama does not skip.

    python tests/conformance/run.py [pytest arguments]

The tests are those of the installed version of transformers. They are not part of its wheel, so that its source
distribution is downloaded once, into `build/conformance/`. What the distribution leaves out is taken from `stubs/`.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest


HERE = Path(__file__).parent
STUBS = HERE / "stubs"
CACHE = HERE.parents[1] / "build" / "conformance"


def fetch_tests() -> Path:
    """The folder in which the package `tests` of the installed transformers lies, downloaded if need be."""
    name = f"transformers-{version('transformers')}"
    folder = CACHE / name
    if not (CACHE / f"{name}.tar.gz").exists():
        requirement = name.replace("-", "==", 1)
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(CACHE)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)

    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(CACHE / f"{name}.tar.gz", CACHE)
    shutil.copytree(STUBS, folder / "tests", dirs_exist_ok=True)
    # The tests look for the library next to them
    shutil.rmtree(folder / "src" / "transformers")
    (folder / "src" / "transformers").symlink_to(Path(find_spec("transformers").origin).parent)
    # One test class per pipeline is looked up by module and name
    mixin = (folder / "tests" / "test_pipeline_mixin.py").read_text()
    for task, test_class in re.findall(r"\bpipelines\.test_pipelines_(\w+)(?:\.| import )(\w+)", mixin):
        (folder / "tests" / "pipelines" / f"test_pipelines_{task}.py").write_text(
            f"from . import PipelineTests\n\n\nclass {test_class}(PipelineTests):\n    task = {task.replace('_', '-')!r}\n"
        )
    return folder


class Report:
    """Pytest plugin that compares what the models pass, fail and skip, prints it, and lets excess skips fail the run."""

    def __init__(self):
        self.counts = Counter()  # (outcome, model, test); a test may skip several of its subtests
        self.reasons = {}  # (model, test) → why it was skipped

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            _, model, test = report.nodeid.split("::")
            self.counts[report.outcome, model, test] += 1
            if report.skipped:
                self.reasons[model, test] = report.longrepr[2].removeprefix("Skipped: ")

    def tests(self, outcome: str, model: str) -> list[str]:
        return [test for counted, name, test in self.counts if (counted, name) == (outcome, model)]

    def excess_skips(self, model: str) -> list[str]:
        return [
            test
            for test in self.tests("skipped", model)
            if self.counts["skipped", model, test] > self.counts["skipped", "LlamaTest", test]
        ]

    def pytest_sessionfinish(self, session):
        models = {model for _, model, _ in self.counts}
        if session.exitstatus == pytest.ExitCode.OK and any(self.excess_skips(model) for model in models):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"conformance with transformers {version('transformers')}")
        write = terminalreporter.write_line
        models = list(dict.fromkeys(model for _, model, _ in self.counts))
        for model in models:
            write(
                f"{model}: " + ", ".join(f"{len(self.tests(o, model))} {o}" for o in ("passed", "failed", "skipped"))
            )
        for model in models:
            if model == "LlamaTest":
                write("\nSkipped by LlamaTest:")
                tests = self.tests("skipped", model)
            else:
                tests = self.excess_skips(model)
                write(f"\nSkipped by {model} and not by LlamaTest:{'' if tests else ' nothing'}")
            for test in tests:
                write(f"  {test}: {self.reasons[model, test]}")


if __name__ == "__main__":
    # Both, for the sake of the processes that distributed tests start
    sys.path.insert(0, str(fetch_tests()))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # The tests bring markers of their own, which --strict-markers would refuse
    options = ["-q", "-o", "addopts=", "--disable-warnings", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([str(HERE / "models.py"), *options, *sys.argv[1:]], plugins=[Report()]))
