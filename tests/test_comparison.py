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
"""Comparisons: what is run and in which order, what survives a kill, and what the report makes of it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from transformers_ddl import DDLForCausalLM, comparison
from transformers_ddl.cli import main
from transformers_ddl.comparison import (
    Bench,
    MethodRuns,
    OutOfTime,
    TokenBlocks,
    best_trial,
    initial_weights,
    prepare_tokens,
)
from transformers_ddl.comparison_grid import Grid
from transformers_ddl.comparison_report import (
    loss_at,
    mean_and_error,
    paired_differences,
    select_results,
    tuning_table,
)
from transformers_ddl.tokenization import BOUNDARY_TOKEN


REPOSITORY = Path(__file__).resolve().parents[1]
LENGTH = 16
GRID = {
    "output": "out",
    "data": {
        "train": "train.parquet",
        "validation": "validation.parquet",
        "text_column": "text",
        "vocab_size": 280,
    },
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
    },
    "training": {"steps": 10, "batch_size": 4, "warmup_steps": 2, "eval_steps": 4, "compile": False},
    "methods": {"additive": {"residual_type": "additive"}, "scalar": {"num_value_channels": 1, "lr": 1e-2}},
    "tune": {
        "fraction": 0.5,
        "seed": 0,
        "axes": {"additive": {"lr": [1e-3, 1e-2]}, "scalar": {"gate_init": [0.2, 1.5]}},
    },
    "seeds": [1, 2],
}
MEASUREMENTS = {"training_seconds", "tokens_per_second", "git_commit"}


def write_inputs(folder):
    for name, numbers in (("train", range(120)), ("validation", range(120, 137))):
        texts = [f"{i} green bottles, hanging on the wall, and {i * i % 97} of them fall." for i in numbers]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{name}.parquet")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_measurements(results):
    """What must be the same whenever and however often a run is made."""
    kept = []
    for result in results:
        curve = [{name: value for name, value in point.items() if name != "seconds"} for point in result["curve"]]
        kept.append({name: value for name, value in result.items() if name not in MEASUREMENTS} | {"curve": curve})
    return sorted(kept, key=lambda result: result["id"])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the whole grid's results."""
    folder = tmp_path_factory.mktemp("comparison")
    write_inputs(folder)
    assert main(["compare", "run", str(folder / "grid.yaml"), "--data", str(folder), "--output", str(folder)]) == 0
    return folder


def run_of(grid, method="scalar", index=0):
    return grid.trials(method)[index]


def test_grid(finished, capsys):
    results = read_lines(finished / "results.jsonl")
    assert len({result["id"] for result in results}) == len(results) == 2 * (2 + 2)
    for method, axis in (("additive", "lr"), ("scalar", "gate_init")):
        trials, finals = (
            [result for result in results if (result["method"], result["stage"]) == (method, stage)]
            for stage in ("tune", "final")
        )
        assert [trial["tuned"] for trial in trials] == [{axis: value} for value in GRID["tune"]["axes"][method][axis]]
        assert [trial["curve"][-1]["step"] for trial in trials] == [5, 5]
        best = trials[0] if trials[0]["validation_loss"] < trials[1]["validation_loss"] else trials[1]
        assert [(final["seed"], final["tuned"]) for final in finals] == [(1, best["tuned"]), (2, best["tuned"])]
        for final in finals:
            assert [point["step"] for point in final["curve"]] == [4, 8, 10]
            assert final["tokens"] == final["curve"][-1]["tokens"] == 10 * 4 * LENGTH
            assert final["validation_loss"] == final["curve"][-1]["validation_loss"] < math.log(280)
            assert final["training_seconds"] == final["curve"][-1]["seconds"]
            assert {**final["config"], **final["training"]}[axis] == final["tuned"][axis]
            assert not final["diverged"] and final["versions"]["torch"] == torch.__version__ and final["hardware"]

    # Nothing is left to do
    before = (finished / "results.jsonl").read_bytes()
    main(["compare", "run", str(finished / "grid.yaml"), "--data", str(finished), "--output", str(finished)])
    assert (finished / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out == "all runs are finished\n"


def test_report(finished, tmp_path, capsys):
    assert main(["compare", "report", str(finished / "results.jsonl"), str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    results = read_lines(finished / "results.jsonl")
    for result in results:
        assert f" {result['validation_loss']:.4f} " in report.replace("**", " ")
    for result in (best_trial(select_results(results)[0][method]) for method in GRID["methods"]):
        assert f"**{result['validation_loss']:.4f}**" in report
    for resource in ("tokens", "FLOPs", "seconds"):
        assert f"](loss_{resource}.png)" in report
        assert (tmp_path / f"loss_{resource}.png").read_bytes().startswith(b"\x89PNG")

    assert main(["compare", "report", str(finished / "results.jsonl"), str(tmp_path), "--baseline", "hc"]) == 2
    assert "allowed: additive, scalar" in capsys.readouterr().err


def test_killed_run(finished, workplace):
    """A comparison that is killed and begun again has the lines of one that was not."""
    command = [sys.executable, REPOSITORY / "scripts" / "compare.py", "run", "grid.yaml"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    results = workplace / "out" / "results.jsonl"
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        while len(read_lines(results)) < 2:
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
    before = read_lines(results)
    assert 2 <= len(before) < 8

    assert main(["compare", "run", "grid.yaml"]) == 0
    assert read_lines(results)[: len(before)] == before
    assert without_measurements(read_lines(results)) == without_measurements(read_lines(finished / "results.jsonl"))


@pytest.mark.slow
def test_workers(finished, workplace):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, REPOSITORY / "scripts" / "compare.py", "run", "grid.yaml", "--workers", "2"]
    subprocess.run(command, env=environment, check=True)
    results = read_lines(workplace / "out" / "results.jsonl")
    assert without_measurements(results) == without_measurements(read_lines(finished / "results.jsonl"))


def test_time_limit(workplace, capsys):
    assert main(["compare", "run", "grid.yaml", "--seconds", "0"]) == 0
    assert "to be continued: additive, scalar" in capsys.readouterr().out
    assert not (workplace / "out" / "results.jsonl").exists()
    # The tokens are there
    grid = Grid.from_yaml("grid.yaml")
    (workplace / "out" / "results.jsonl").touch()
    written = {path: path.stat().st_mtime_ns for path in prepare_tokens(grid, workplace).iterdir()}
    assert {path.name for path in written} == {"tokenizer.json", "train.npy", "validation.npy"}
    assert {path: path.stat().st_mtime_ns for path in prepare_tokens(grid, workplace).iterdir()} == written


def test_time_of_a_run(finished, workplace):
    """No run begins that would end after the limit, going by the speed of the method's last result."""
    grid = Grid.from_yaml("grid.yaml", output=str(finished))
    runs = MethodRuns(grid, prepare_tokens(grid, finished), deadline=time.time() + 600)
    before = (finished / "results.jsonl").read_bytes()
    assert runs.result(run_of(grid))["tokens_per_second"] == runs.tokens_per_second
    runs.tokens_per_second = 5 * 4 * LENGTH / 1000  # the trial takes 1,000 s
    (new,) = grid.final_runs("scalar", {"gate_init": 1.0})[:1]
    with pytest.raises(OutOfTime):
        runs.result(new)
    assert (finished / "results.jsonl").read_bytes() == before


def test_tune_only(workplace):
    assert main(["compare", "run", "grid.yaml", "--tune-only", "--methods", "scalar"]) == 0
    results = read_lines(workplace / "out" / "results.jsonl")
    assert [(result["method"], result["stage"]) for result in results] == [("scalar", "tune")] * 2


def test_tokens(workplace):
    """The stream decodes to the documents, a boundary before each and one at the end; blocks predict each token once."""
    folder = prepare_tokens(Grid.from_yaml("grid.yaml"), workplace)
    blocks = TokenBlocks(folder / "validation.npy", LENGTH, torch.device("cpu"))
    every = blocks[torch.arange(len(blocks))]
    assert every.shape == (len(blocks), LENGTH + 1)
    assert torch.equal(every[1:, 0], every[:-1, -1])
    predicted = every[:, 1:]
    assert (predicted >= 0).sum() == blocks.num_tokens

    tokenizer = comparison.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    stream = [every[0, 0].item(), *predicted[predicted >= 0].tolist()]
    texts = pyarrow.parquet.read_table("validation.parquet")["text"].to_pylist()
    assert tokenizer.decode(stream) == "".join(BOUNDARY_TOKEN + text for text in texts) + BOUNDARY_TOKEN


def test_order(workplace, monkeypatch):
    """Methods read the same batches, which depend on seed and step alone; an epoch reads every block once."""
    grid = Grid.from_yaml("grid.yaml")
    tokens = prepare_tokens(grid, workplace)
    batches = []
    backward = Bench.backward
    monkeypatch.setattr(Bench, "backward", lambda self, indices: batches.append(indices) or backward(self, indices))

    def read_by(run):
        batches.clear()
        Bench(run, tokens).train(run, initial_weights(run))
        return torch.stack(batches)

    (first, second), (other, _) = grid.final_runs("additive", {"lr": 1e-3}), grid.final_runs("scalar", {})
    assert torch.equal(read_by(first), read_by(other))
    assert not torch.equal(read_by(first), read_by(second))
    trial = run_of(grid)
    trial.seed = first.seed
    assert torch.equal(read_by(trial), read_by(first)[: trial.training_settings.steps])

    blocks = TokenBlocks(tokens / "train.npy", LENGTH, torch.device("cpu"))
    order = blocks.order(2 * len(blocks) + 3, seed=0)
    for epoch in order.split(len(blocks))[:2]:
        assert torch.equal(epoch.sort().values, torch.arange(len(blocks)))
    assert not torch.equal(*order.split(len(blocks))[:2])


def test_bench_is_trained_anew(workplace):
    """A run on a bench that has been used for another, with another `gate_init`, is the run on a new bench, bit for bit."""
    grid = Grid.from_yaml("grid.yaml")
    tokens = prepare_tokens(grid, workplace)
    first, second = grid.trials("scalar")
    assert first.architecture == second.architecture

    used, new = Bench(first, tokens), Bench(second, tokens)
    used.train(first, initial_weights(first))
    used.model.load_state_dict(initial_weights(second))
    torch.manual_seed(second.seed)
    for (name, parameter), expected in zip(
        used.model.named_parameters(), DDLForCausalLM(second.config).parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    gate = 2 * torch.sigmoid(used.model.model.layers[0].attn_residual.beta_proj.bias)
    torch.testing.assert_close(gate, torch.tensor([1.5]))

    curves = [
        [
            (point["train_loss"], point["validation_loss"])
            for point in bench.train(second, initial_weights(second))["curve"]
        ]
        for bench in (used, new)
    ]
    assert curves[0] == curves[1]


def test_bench_is_compiled_once(workplace, monkeypatch):
    """Whatever the initial gate, learning rate and seed; and compiled it computes the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    grid = Grid.from_yaml("grid.yaml")
    tokens = prepare_tokens(grid, workplace)
    grid.training["compile"] = True
    first, second = grid.trials("scalar")
    second.seed, second.training["lr"] = 5, 3e-3
    bench, curves = Bench(first, tokens), []
    with torch.compiler.set_stance("fail_on_recompile"):
        for run in (first, second):
            curves.append(bench.train(run, initial_weights(run))["curve"])

    grid.training["compile"] = False
    plain = grid.trials("scalar")[0]
    expected = Bench(plain, tokens).train(plain, initial_weights(plain))["curve"]
    assert [point["validation_loss"] for point in curves[0]] == [point["validation_loss"] for point in expected]
    assert curves[1][-1]["validation_loss"] != curves[0][-1]["validation_loss"]


@pytest.mark.parametrize("fields", [{"value_activation": None}, {"batch_size": 5}, {"compile": True}])
def test_architecture(workplace, fields):
    grid = Grid.from_yaml("grid.yaml")
    plain = run_of(grid).architecture
    grid.methods["scalar"] |= fields
    assert run_of(grid).architecture != plain


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_parameter_groups(workplace, factor):
    run = run_of(Grid.from_yaml("grid.yaml"))
    run.training["branch_lr_factor"] = factor
    model = DDLForCausalLM(run.config)
    groups = comparison.parameter_groups(model, run.training_settings)
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert group_of[parameter]["lr"] == (1e-2 * factor if "residual" in name else 1e-2), name
        assert group_of[parameter]["weight_decay"] == (0.1 if "proj.weight" in name else 0.0), name


def test_validation_weighs_tokens(workplace):
    """The mean over tokens in blocks of any number, the last one padded."""
    run = run_of(Grid.from_yaml("grid.yaml"))
    bench = Bench(run, prepare_tokens(Grid.from_yaml("grid.yaml"), workplace))
    assert bench.validation_blocks.num_tokens % LENGTH and len(bench.validation_blocks) % bench.batch_size
    losses = []
    for index in range(len(bench.validation_blocks)):
        (block,) = bench.validation_blocks[torch.tensor([index])]
        block = block[block >= 0]
        with bench.autocast(), torch.no_grad():
            losses.append(bench.model(block[None, :-1]).logits.float().log_softmax(-1)[0].gather(1, block[1:, None]))
    # bf16 products are summed in another order in another batch
    assert bench.validate() == pytest.approx(-torch.cat(losses).mean().item(), abs=1e-3)


def test_divergence(workplace):
    grid = GRID | {"tune": GRID["tune"] | {"axes": GRID["tune"]["axes"] | {"additive": {"lr": [1e30, 2e30]}}}}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    assert main(["compare", "run", "grid.yaml"]) == 1  # all trials of a method
    diverged, _ = read_lines(workplace / "out" / "results.jsonl")
    assert diverged["diverged"] and diverged["validation_loss"] is None

    finite = {"diverged": False, "method": "scalar", "validation_loss": 3.0}
    assert best_trial([diverged, finite | {"validation_loss": 3.5}, finite, dict(finite)]) is not diverged
    assert best_trial([diverged, finite | {"validation_loss": 3.5}, finite])["validation_loss"] == 3.0


def test_changed_default(finished, workplace, capsys):
    """A result made with another default of a field that the grid does not give is no result of the grid, unless it has no effect."""
    results = read_lines(finished / "results.jsonl")
    Path("out").mkdir()

    def write(changed):
        lines = [result | {"config": result["config"] | changed.get(result["method"], {})} for result in results]
        Path("out/results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write({"scalar": {"key_eps": 1e-3}})
    assert main(["compare", "run", "grid.yaml"]) == 2
    assert "scalar with key_eps=0.001, which is 1e-05 by default now" in capsys.readouterr().err

    write({"additive": {"gate_init": 0.9, "transformers_version": "5.0.0"}})
    assert main(["compare", "run", "grid.yaml"]) == 0
    assert len(read_lines(Path("out/results.jsonl"))) == len(results)


def test_axes_of_several_products(workplace):
    """Trials that were made before a list got longer are still found."""
    axes = [GRID["tune"]["axes"]["scalar"], {"lr": [1e-3], "value_activation": [None]}]
    tune = GRID["tune"] | {"axes": {"additive": {"lr": [1e-3, 1e-2, 1e-1]}, "scalar": axes}}
    Path("grid.yaml").write_text(yaml.safe_dump(GRID))
    before = Grid.from_yaml("grid.yaml").trials("scalar")
    Path("grid.yaml").write_text(yaml.safe_dump(GRID | {"tune": tune}))
    trials = Grid.from_yaml("grid.yaml").trials("scalar")
    assert [trial.tuned for trial in trials[2:]] == [{"lr": 1e-3, "value_activation": None}]
    assert trials[2].config.value_activation is None and trials[2].training_settings.lr == 1e-3
    assert [trial.identifier("") for trial in trials[:2]] == [trial.identifier("") for trial in before]

    results = [{"tuned": trial.tuned, "diverged": False, "validation_loss": 3 - i} for i, trial in enumerate(trials)]
    assert tuning_table(results).splitlines() == [
        "| gate_init | lr | value_activation | validation loss |",
        "| --- | --- | --- | --- |",
        "| 0.2 |  |  | 3.0000 |",
        "| 1.5 |  |  | 2.0000 |",
        "|  | 0.001 | null | **1.0000** |",
    ]


BAD_GRIDS = {
    "missing section": (("seeds",), None, "seeds: missing"),
    "unknown section": (("colour",), "blue", "colour: unknown field; allowed: output, data"),
    "unknown training field": (("training", "stepz"), 3, "training.stepz: unknown field; allowed: batch_size,"),
    "unknown method field": (("methods", "scalar", "gate_inti"), 0.1, "methods.scalar: unknown field gate_inti=0.1: did you"),
    "contradiction": (("methods", "scalar", "compressor"), "token", "methods.scalar: compressor must be None"),
    "unknown axis": (("tune", "axes", "scalar"), {"gate": [0.1, 0.2]}, "methods.scalar: unknown field gate=0.1"),
    "value on an axis": (("tune", "axes", "scalar"), {"gate_init": [0.2, 3]}, "gate_init must lie strictly between 0 and 2"),
    "axis without list": (("tune", "axes", "scalar"), {"lr": 1e-3}, "tune.axes.scalar.lr: got 0.001; allowed: a list"),
    "unequal trials": (("tune", "axes", "scalar", "lr"), [1, 2], "must be the same for every method, got additive 2, scalar 4"),
    "axes in a list": (("tune", "axes", "scalar"), [{"lr": [1e-3]}, 2], "tune.axes.scalar: got 2; allowed: fields with lists"),
    "no axes": (("tune", "axes", "scalar"), 2, "tune.axes.scalar: 2 has the wrong type; allowed: dict or list"),
    "untuned method": (("tune", "axes", "scalar"), None, "tune.axes.scalar: missing"),
    "no learning rate": (("methods", "scalar"), {"num_value_channels": 1}, "methods.scalar: "),
    "negative steps": (("training", "steps"), -1, "methods.additive: steps must be at least 1"),
    "vocabulary": (("data", "vocab_size"), 100_000, "data.vocab_size: got 100000; allowed: 258 to 65536"),
    "vocabulary twice": (("model", "vocab_size"), 300, "model.vocab_size: cannot be set"),
    "file": (("data", "train"), "none.parquet", "data: [Errno 2]"),
    "column": (("data", "text_column"), "story", "data: "),
    "column without texts": (("data", "text_column"), "number", "data.train: 'number' of 'train.parquet' is empty or holds"),
    "no documents": (("data", "validation"), "empty.parquet", "data.validation: 'text' of 'empty.parquet' is empty or holds"),
    "seed twice": (("seeds",), [1, 2, 1], "seeds: got [1, 2, 1]; allowed: a list of different integers"),
    "output": (("output",), "grid.yaml/out", "output: "),
}  # fmt: skip


@pytest.mark.parametrize("path, value, message", BAD_GRIDS.values(), ids=BAD_GRIDS)
def test_bad_grid(workplace, capsys, path, value, message):
    grid = json.loads(json.dumps(GRID))
    section = grid
    for name in path[:-1]:
        section = section[name]
    if value is None:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    texts = {"text": ["text"], "number": [1]}
    for name, number in (("train", 1), ("validation", 1), ("empty", 0)):
        table = pyarrow.table({column: values[:number] for column, values in texts.items()})
        pyarrow.parquet.write_table(table, f"{name}.parquet")
    assert main(["compare", "run", "grid.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("out").exists()


def test_bad_options(workplace, capsys):
    assert main(["compare", "run", "grid.yaml", "--workers", "0"]) == 2
    assert capsys.readouterr().err == "error: --workers must be at least 1, got 0\n"
    Path("results.jsonl").write_text('{"method": "additive"}\n')
    assert main(["compare", "report", "results.jsonl", "report"]) == 2
    assert capsys.readouterr().err == "error: 'results.jsonl': line 1 is not a result\n"


@pytest.mark.parametrize("name", ["toy", "33m"])
def test_shipped_grids(name):
    grid = Grid.from_yaml(REPOSITORY / "configs" / "compare" / f"{name}.yaml")
    assert len(grid.methods) == {"toy": 3, "33m": 10}[name]


def hand_made(method, seed, losses, tokens_per_second, flops_per_token, **fields):
    curve = [
        {"step": step, "tokens": 100 * step, "seconds": 100 * step / tokens_per_second, "validation_loss": loss}
        for step, loss in zip((10, 20, 30), losses)
    ]
    result = {"method": method, "stage": "final", "seed": seed, "tuned": {}, "curve": curve, "diverged": False}
    return result | {"flops_per_token": flops_per_token, "validation_loss": losses[-1]} | fields


def test_paired_differences():
    baseline = [hand_made("additive", seed, losses, 100, 6) for seed, losses in ((1, (5, 4, 3)), (2, (5, 4, 3.5)))]
    # Twice as slow and half as many FLOPs more; seed 3 has no partner, seed 2 diverged
    slow = [
        hand_made("slow", 1, (4, 3, 1), 50, 9),
        hand_made("slow", 2, (4, 3, 2), 50, 9, diverged=True),
        hand_made("slow", 3, (4, 3, 2), 50, 9),
    ]
    assert paired_differences(slow, baseline, "tokens") == [1 - 3]
    # In the baseline's 30 s the slow one had read 1,500 tokens: half-way between 4 and 3
    assert loss_at(slow[0], "seconds", 30) == 3.5
    assert paired_differences(slow, baseline, "seconds") == [3.5 - 3]
    # With the baseline's 18,000 FLOPs, it had read 2,000
    assert paired_differences(slow, baseline, "FLOPs") == [3 - 3]
    # A faster one ends first; then the baseline is interpolated
    fast = [hand_made("fast", seed, (5, 4, 3), 200, 6) for seed in (1, 2)]
    assert paired_differences(fast, baseline, "seconds") == [3 - 4.5, 3 - 4.5]
    assert mean_and_error([1.0, 2.0, 4.5]) == f"2.5000 ± {(3.25 / 3) ** 0.5:.4f}"
    assert mean_and_error([-0.5], sign="+") == "-0.5000 ± –"
    assert mean_and_error([]) == "–"


def test_select_results():
    trials = [
        hand_made("scalar", 0, (5, 4, loss), 100, 6, stage="tune", tuned={"lr": lr})
        for lr, loss in ((1, 3.1), (2, 3.0))
    ]
    finals = [hand_made("scalar", 1, (5, 4, 3), 100, 6, tuned={"lr": lr}) for lr in (1, 2)]
    assert select_results([*trials, *finals])[1] == {"scalar": [finals[1]]}
    with pytest.raises(comparison.InputError, match="several final runs of a seed"):
        select_results([*trials, *finals, finals[1]])


WITHOUT_PACKAGES = """
import sys
from importlib.machinery import PathFinder

MISSING = {"datasets", "evaluate", "pydantic"}
REPORT = {"matplotlib"}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in MISSING else super().find_spec(name, path, target)


sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
import transformers_ddl.comparison

assert not (MISSING | REPORT) & sys.modules.keys()
"""


def test_imports():
    """Comparisons run where the packages of the other commands are missing."""
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
