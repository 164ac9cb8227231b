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
The same training with kernels and without: their losses must differ by less than those of two seeds. Trains every method of a
grid for some hundred steps: with kernels, without, and with kernels from another seed, whose difference is the yardstick.

    python benchmarks/loss_curves.py configs/compare/33m.yaml --data FOLDER_OF_THE_TEXTS --output outputs/loss_curves
    TRITON_INTERPRET=1 python benchmarks/loss_curves.py configs/compare/toy.yaml --data FOLDER --steps 2 --interval 1 --methods scalar
"""

import argparse
import os
from pathlib import Path

from common import free_memory, report

from transformers_ddl.comparison import Bench, initial_weights, prepare_tokens
from transformers_ddl.comparison_grid import Grid, Run


def train(run: Run, tokens: Path, kernels: str) -> list[dict]:
    """The points of the run's curve; `kernels` is the value of the environment variable."""
    os.environ["TRANSFORMERS_DDL_KERNELS"] = kernels
    return Bench(run, tokens).train(run, initial_weights(run))["curve"]


def compare(first: Run, second: Run, tokens: Path) -> list[dict]:
    """A row for every point of the curves; the runs differ in their seed."""
    curves = {}
    for name, run, kernels in (("kernels", first, "1"), ("plain", first, "0"), ("other_seed", second, "1")):
        curves[name] = train(run, tokens, kernels)
        free_memory()
    results = []
    for kernels, plain, other_seed in zip(*curves.values(), strict=True):
        result = {"method": first.method, "step": kernels["step"]}
        for kind in ("train", "validation"):
            losses = [point[f"{kind}_loss"] for point in (kernels, plain, other_seed)]
            result |= {f"{kind}_{name}": loss for name, loss in zip(curves, losses)}
            result |= {
                f"{kind}_of_kernels": abs(losses[0] - losses[1]),
                f"{kind}_of_seeds": abs(losses[0] - losses[2]),
            }
        results.append(result)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="YAML file of a comparison, for its data, model and methods")
    parser.add_argument(
        "--data", type=Path, default=Path("."), help="folder to which the grid's data files are relative"
    )
    parser.add_argument("--output", default="outputs/loss_curves", help="folder of tokens and results")
    parser.add_argument("--methods", nargs="+", default=["scalar", "cc"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, help="instead of the grid's")
    parser.add_argument("--interval", type=int, default=50, help="steps over which losses are averaged")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()

    grid = Grid.from_yaml(args.grid, args.output, args.methods)
    grid.training |= {"steps": args.steps, "eval_steps": args.interval}
    if args.batch_size is not None:
        grid.training["batch_size"] = args.batch_size
    grid.seeds = [1, 2]
    tokens = prepare_tokens(grid, args.data)
    results = []
    for method in grid.methods:
        results += compare(*grid.final_runs(method, {"lr": args.lr}), tokens)
    columns = {"method": "", "step": ""}
    for kind in ("train", "validation"):
        columns |= {f"{kind}_kernels": ".4f", f"{kind}_plain": ".4f"}
        columns |= {f"{kind}_of_kernels": ".5f", f"{kind}_of_seeds": ".5f"}
    report(results, columns, f"{args.output}/loss_curves.json", training=grid.training, lr=args.lr)


if __name__ == "__main__":
    main()
