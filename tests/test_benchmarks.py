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
The benchmark of converted Llamas compares what it says, and goes on where it was interrupted; that of several processes
trains the same models whatever their number; those of speed say how fast each model was.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml


REPOSITORY = Path(__file__).resolve().parents[1]
WITHOUT_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_converted_llamas(tmp_path):
    for name, numbers in (("train", range(300)), ("validation", range(300, 360))):
        texts = [f"{i} green bottles, hanging on the wall, and {i * i % 97} of them fall." for i in numbers]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / f"{name}.parquet")
    grid = yaml.safe_load((REPOSITORY / "configs/compare/toy.yaml").read_text())
    grid |= {"output": str(tmp_path / "tokens"), "seeds": [1, 2]}
    grid["data"]["vocab_size"] = 280
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

    def benchmark() -> list[dict]:
        subprocess.run(
            [
                *(sys.executable, REPOSITORY / "benchmarks/convert_llama.py", "--grid", tmp_path / "grid.yaml"),
                *("--data", tmp_path, "--output", tmp_path / "out", "--pretrain-steps", "4", "--steps", "8"),
                *("--lrs", "1e-3", "2e-3", "--arms", "scalar", "cc_annealed"),
            ],
            check=True,
        )
        return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]

    results = benchmark()
    # For each seed, the Llama before and after, and arms for as many tokens and seconds; other learning rates with one
    assert len({result["id"] for result in results}) == len(results) == 2 * (1 + 1 + 2 + 2) + 3
    pretrained = {result["seed"]: result["loss"] for result in results if result["arm"] == "pretrained"}
    for result in results:
        if result["arm"] != "pretrained":
            # The same function, in bfloat16 on a GPU, of which the loss is taken in the same way
            assert result["curve"][0]["loss"] == pytest.approx(pretrained[result["seed"]], abs=1e-3)
            assert result["steps"] == 8 or result["budget"] == "seconds"

    # Killed before its last lines
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_text("".join(lines[:-3]))
    continued = benchmark()
    assert continued[:-3] == results[:-3]
    for before, after in zip(results[-3:], continued[-3:]):
        assert before["id"] == after["id"]
        if before["steps"] == after["steps"]:  # as the speeds of other runs had it
            assert before["loss"] == after["loss"]
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [(row["arm"], row["budget"], len(row["seeds"])) for row in rows] == [
        ("llama", "tokens", 2),
        ("scalar", "tokens", 2),
        ("cc_annealed", "tokens", 2),
        ("scalar", "seconds", 2),
        ("cc_annealed", "seconds", 2),
    ]


@pytest.mark.parametrize(
    "command",
    [
        "train_step.py --sizes toy --steps 2 --eager",
        "decode.py --size toy --batch_sizes 2 --new_tokens 10 --skip_guards",
    ],
)
def test_speed(command, tmp_path):
    command = [*command.split(), "--models", "additive", "cc", "--output", tmp_path / "out.json"]
    subprocess.run([sys.executable, *command], env=WITHOUT_GPU, cwd=REPOSITORY / "benchmarks", check=True)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["model"] for result in results] == ["additive", "cc"]
    # Ratios are of tokens per second
    times = [result.get("milliseconds", result.get("step_ms")) for result in results]
    assert results[1]["ratio"] == pytest.approx(times[0] / times[1])


def test_what_is_profiled():
    """The profiler is for GPUs; the steps of which it makes profiles are not."""
    program = "from profile_step import decoded, trained; decoded('cc', 'toy', 2)(); trained('cc', 'toy', False)()"
    subprocess.run([sys.executable, "-c", program], env=WITHOUT_GPU, cwd=REPOSITORY / "benchmarks", check=True)


@pytest.mark.slow
def test_scaling(tmp_path):
    workloads = ["ddp/toy", "fsdp2/toy", "tensor/toy"]
    command = [sys.executable, REPOSITORY / "benchmarks/scaling.py", "--workloads", *workloads]
    command += ["--processes", "1", "2", "--steps", "2", "--eager", "--output", tmp_path / "scaling.json"]
    subprocess.run(command, env=WITHOUT_GPU, check=True)
    results = {
        tuple(result[name] for name in ("workload", "phase", "model", "processes")): result
        for result in json.loads((tmp_path / "scaling.json").read_text())["results"]
    }
    phases = [("ddp/toy", "train"), ("fsdp2/toy", "train"), ("tensor/toy", "forward"), ("tensor/toy", "decode")]
    assert results.keys() == {(*phase, model, n) for phase in phases for model in ("additive", "cc") for n in (1, 2)}
    for (workload, phase, model, processes), result in results.items():
        speed, alone, additive = (
            results[workload, phase, *other]["tokens_per_second"]
            for other in ((model, processes), (model, 1), ("additive", processes))
        )
        assert (result["efficiency"], result["ratio"]) == pytest.approx((speed / alone, speed / additive))
        assert result["loss_difference"] < 1e-5  # float32, of which sums are in another order
        if phase == "train":
            assert len(result["losses"]) == 20 and result["losses"][0] - result["losses"][-1] > 0.2
        # Gates, value maps and norms of heads are whole with tensor parallelism
        share = result["parameters"] / results[workload, phase, model, 1]["parameters"]
        assert share == 1 if processes == 1 or workload == "ddp/toy" else 0.5 <= share < 0.52
