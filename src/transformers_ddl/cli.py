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
"""The command line: `transformers-ddl COMMAND ...`. A command's own module is loaded only when it is asked for."""

import argparse
import sys
from importlib import import_module


class InputError(Exception):
    """What a user gave cannot be used; the message names it and says what is allowed."""


class RunError(Exception):
    """What was asked for has begun and cannot be finished; the message says why, and what is left."""


# Modules with a function `main(arguments: list[str])`, which raises `InputError` for input that cannot be used
COMMANDS = {
    "pretrain": ("training", "train a model from scratch, as a YAML file says"),
    "finetune": ("finetuning", "train a model to answer or to label texts, as a YAML file says"),
    "evaluate": ("evaluation", "measure bits per byte of texts, or accuracy on tasks"),
    "inspect": ("inspection", "show what a model's gates do on a text, as a table, plots and a page"),
    "generate": ("generation", "print sampled continuations of prompts"),
    "convert": ("conversion", "turn a checkpoint of the authors' code, or a Llama, into a DDL model"),
    "push": ("hub", "upload a finished model to the Hugging Face Hub"),
    "compare": ("comparison", "train a grid of methods, each tuned alike, and report the results"),
}


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments: Those of the process if None.

    Returns:
        The exit code: 2, with one line on stderr, for input that cannot be used or a package that is missing; 1, also with a line, for a failure later on.
    """
    parser = argparse.ArgumentParser(
        prog="transformers-ddl",
        description="Deep Delta Learning for Hugging Face Transformers.",
        epilog="commands:\n" + "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below; COMMAND --help explains it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    arguments = sys.argv[1:] if arguments is None else arguments
    # Wherever it stands: what follows the command is the command's
    options = parser.parse_args([argument for argument in arguments if argument != "--traceback"])
    module, _ = COMMANDS[options.command]
    try:
        import_module(f".{module}", __package__).main(options.arguments)
    except (InputError, RunError, ModuleNotFoundError) as error:
        if "--traceback" in arguments:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    return 0
