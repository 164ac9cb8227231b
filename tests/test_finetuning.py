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
"""The fine-tuning command: what it teaches, what it leaves, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import close
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from transformers_ddl.checkpoints import last_complete_checkpoint
from transformers_ddl.cli import InputError, main
from transformers_ddl.examples import ExampleArguments, read_examples
from transformers_ddl.finetuning import FinetuningRun, prepare, sft_trainer
from transformers_ddl.settings import read_settings
from transformers_ddl.tokenization import load_tokenizer


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ANIMALS = ["cat", "dog", "fox", "owl", "bee", "cow", "hen", "pig"]
COLOURS = {"red": "warm", "pink": "warm", "brown": "warm", "white": "warm"}
COLOURS |= {"blue": "cold", "green": "cold", "black": "cold", "grey": "cold"}
PAIRS = [(colour, animal) for colour in COLOURS for animal in ANIMALS]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"the {colour} {animal}"},
            {"role": "assistant", "content": f"({animal}) is here"},
        ]
    }
    for colour, animal in PAIRS
]
COMPLETIONS = [{"prompt": f"the {colour} {animal}", "completion": f" ({animal}) is here"} for colour, animal in PAIRS]
LABELLED = [
    {"text": f"the {colour} {animal} sat by the {other} .", "label": COLOURS[colour]}
    for colour, animal in PAIRS
    for other in ANIMALS
]
TRAINING = {"per_device_train_batch_size": 16, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
PRETRAINING = {
    "data": {"source": "corpus.txt", "held_out": 0.1},
    "tokenizer": {"vocab_size": 340},
    "model": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_value_channels": 2,
        "max_position_embeddings": 64,
    },
    "training": TRAINING | {"output_dir": "base", "max_steps": 40, "learning_rate": 1e-2, "save_strategy": "no"},
}
SFT = {
    "data": {"source": "chats.jsonl", "held_out": 0.2},
    "model": {"name": "base"},
    "training": TRAINING
    | {
        "output_dir": "chat",
        "assistant_only_loss": True,
        "max_steps": 160,
        "learning_rate": 1e-2,
        "save_steps": 80,
        "bf16": False,
        "gradient_checkpointing": False,
    },
}
CLASSIFICATION = {
    "data": {"source": "labelled.jsonl", "task": "classification", "held_out": 0.2},
    "model": {"name": "base"},
    "training": TRAINING | {"output_dir": "classifier", "max_steps": 60, "learning_rate": 3e-3, "save_strategy": "no"},
}
LORA = ("--training.output_dir", "lora", "--training.max_steps", "20", "--training.save_steps", "10")
LORA += ("--lora.target_modules", "all-linear", "--lora.r", "4", "--lora.lora_alpha", "16")


def write_json_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, settings, the pretrained model `base`, and a model that was fine-tuned to answer, `chat`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sentences = [
            f"the {colour} {animal} ( {other} ) is here ." for colour, animal in PAIRS for other in ANIMALS[:4]
        ]
        Path("corpus.txt").write_text("\n".join(sentences))
        write_json_lines("chats.jsonl", CHATS)
        write_json_lines("completions.jsonl", COMPLETIONS)
        write_json_lines("labelled.jsonl", LABELLED)
        for name, settings in (("pretrain", PRETRAINING), ("sft", SFT), ("classify", CLASSIFICATION)):
            Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
        assert main(["pretrain", "pretrain.yaml"]) == 0
        assert main(["finetune", "sft.yaml"]) == 0
    return folder


@pytest.fixture
def workplace(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def answers(model, tokenizer, prompts) -> list[str]:
    """What a model generates, greedily, up to the token that it stops at."""
    texts = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(tokens))
    return texts


def held_out_prompts() -> list[str]:
    return [row["messages"][0]["content"] for row in read_examples(ExampleArguments(**SFT["data"])).held_out]


def weights(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.safetensors")}


# ---- Answering ----


def test_model_follows_a_format_that_it_could_not_follow_before(workplace):
    """On prompts that it was not trained on: the animal that is asked about, in parentheses, and then the end."""
    tokenizer, prompts = AutoTokenizer.from_pretrained("chat"), held_out_prompts()
    assert len(prompts) >= 5
    expected = [f"({prompt.split()[-1]}) is here{tokenizer.eos_token}" for prompt in prompts]
    before = answers(AutoModelForCausalLM.from_pretrained("base"), tokenizer, prompts)
    after = answers(AutoModelForCausalLM.from_pretrained("chat"), tokenizer, prompts)
    assert not set(before) & set(expected)
    assert after == expected


def test_results_against_a_computation_of_their_own(workplace):
    tokenizer = AutoTokenizer.from_pretrained("chat")
    model = AutoModelForCausalLM.from_pretrained("chat").eval()
    losses, hits = [], []
    for row in read_examples(ExampleArguments(**SFT["data"])).held_out:
        prompt, answer = row["messages"]
        prompt = tokenizer.apply_chat_template([prompt], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(answer["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
        hits.append(logits.argmax(-1) == torch.tensor(answer))
    results = json.loads(Path("chat/eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert results["eval_token_accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert results["perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-5)


@pytest.mark.parametrize("options", [(), ("--training.packing", "true", "--training.eval_packing", "true")], ids=str)
def test_results_do_not_depend_on_the_batches_of_evaluation(options, workplace):
    answers = [f"({animal}) " * (index % 5 + 1) for index, animal in enumerate(2 * ANIMALS)]
    write_json_lines("answers.jsonl", [{"prompt": "the animal", "completion": answer} for answer in answers])
    options += ("--data.source", "answers.jsonl", "--training.assistant_only_loss", "false")
    results = []
    for batch_size in ("1", "3", "8"):
        trainer = make_trainer("--training.per_device_eval_batch_size", batch_size, "--model.name", "chat", *options)
        metrics = trainer.evaluate()
        results.append([metrics["eval_loss"], metrics["eval_token_accuracy"]])
    assert 0 < results[0][1] < 1
    assert results[1] == pytest.approx(results[0], rel=1e-5) and results[2] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_trains_in_float32_whatever_is_stored(stored, workplace):
    """In bfloat16, small steps of an optimizer would be rounded away; what is frozen beside adapters may stay in it."""
    base = AutoModelForCausalLM.from_pretrained("base", dtype=stored)
    base.save_pretrained("stored")
    shutil.copy("base/tokenizer.json", "stored")
    shutil.copy("base/tokenizer_config.json", "stored")
    model = ("--model.name", "stored")
    assert {parameter.dtype for parameter in make_trainer(*model).model.parameters()} == {torch.float32}
    model_with_adapters = make_trainer(*model, *LORA).model
    for parameter in model_with_adapters.parameters():
        assert parameter.dtype == torch.float32 or not parameter.requires_grad
    assert model_with_adapters.get_base_model().model.embed_tokens.weight.dtype == stored
    # The head is no adapter, and trained
    settings = read_settings(["classify.yaml"], ["--training.output_dir", "unused", *model, *LORA[6:]])
    classifier = prepare(FinetuningRun.from_settings(settings))[0].model
    assert {parameter.dtype for parameter in classifier.parameters() if parameter.requires_grad} == {torch.float32}
    options = ("--training.output_dir", "merged", "--training.max_steps", "2")
    assert main(["finetune", "classify.yaml", *options, *model, *LORA[6:]]) == 0
    assert load_file("merged/model.safetensors")["score.weight"].dtype == torch.float32
    shutil.rmtree("merged")
    chosen = make_trainer(*model, "--model.dtype", "bfloat16").model
    assert chosen.model.embed_tokens.weight.dtype == torch.bfloat16
    shutil.rmtree("stored")


@pytest.mark.parametrize(
    ("config", "lora"),
    [("sft.yaml", {"modules_to_save": "[embed_tokens]"}), ("classify.yaml", {"target_modules": "[embed_tokens]"})],
)
def test_embeddings_are_trained_beside_adapters(config, lora, workplace):
    """As copies, or where no head has the same weight."""
    options = [f"--lora.{name}={value}" for name, value in ({"target_modules": "[q_proj]"} | lora).items()]
    settings = read_settings([config], ["--training.output_dir", "unused", *options])
    model = prepare(FinetuningRun.from_settings(settings))[0].model
    assert any("embed_tokens" in name and weight.requires_grad for name, weight in model.named_parameters())


def gates(checkpoint):
    history = json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]
    return [value for entry in history for name, value in entry.items() if name == "gate/01.mlp"]


def test_samples_and_gates(workplace):
    """Answers to a prompt that is held out, at every checkpoint, and figures of the gates in the log."""
    before, after = (Path(f"chat/samples/step-{step:08}.txt").read_text() for step in (80, 160))
    assert re.fullmatch(r"\((.*)\) is here", after) and before
    assert len(gates("chat/checkpoint-160")) == 2  # at the first and the eleventh log, of the same tokens
    assert all(0 < gate < 2 for gate in gates("chat/checkpoint-160"))


def make_trainer(*overrides):
    settings = read_settings(["sft.yaml"], ["--training.output_dir", "unused", *overrides])
    run = FinetuningRun.from_settings(settings)
    return sft_trainer(run, read_examples(run.data), load_tokenizer("base"))


CONVERSATION = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " the dog "},
    {"role": "assistant", "content": "(dog)\n is here "},
    {"role": "user", "content": "(cat) is here"},
    {"role": "assistant", "content": "no"},
]


def test_loss_is_over_the_assistants_words_alone(workplace):
    """Each with the token that ends it; whole words, also where those of others look the same."""
    write_json_lines("long.jsonl", [{"messages": CONVERSATION}, *CHATS])
    trainer = make_trainer("--data.source", "long.jsonl", "--training.max_length", "null")
    tokenizer = trainer.processing_class
    eos = tokenizer.eos_token_id
    seen = set()
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        for batch in trainer._get_dataloader(dataset, "", batch_size=4):
            assert batch["labels"].shape == batch["input_ids"].shape
            for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
                assert all(label in (-100, token) for token, label in zip(tokens, labels))
                spans, span = [], []
                for label in labels:
                    if label == -100:
                        assert not span, "a span that does not end with the eos token"
                    else:
                        span.append(label)
                        if label == eos:
                            spans.append(tokenizer.decode(span[:-1]))
                            span = []
                seen.add(tuple(spans))
    expected = {(row["messages"][1]["content"],) for row in CHATS}
    assert seen == expected | {("(dog)\n is here", "no")}


def test_loss_over_everything_if_asked_for(workplace):
    trainer = make_trainer("--training.assistant_only_loss", "false")
    assert all(row["labels"] == row["input_ids"] for row in trainer.train_dataset)


def test_loss_is_over_completions_alone(workplace):
    trainer = make_trainer("--data.source", "completions.jsonl", "--training.assistant_only_loss", "false")
    tokenizer = trainer.processing_class
    assert tokenizer.chat_template is None, "texts are no conversations"
    for row in trainer.train_dataset:
        text = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert re.fullmatch(r" \(\w+\) is here<\|endoftext\|>", text)
        assert row["input_ids"][0] == tokenizer.bos_token_id


def test_chat_template(workplace):
    tokenizer = AutoTokenizer.from_pretrained("chat")
    text = tokenizer.apply_chat_template(CONVERSATION[:3], tokenize=False)
    assert text.replace(tokenizer.eos_token, "#") == (
        "#<|system|>\nbe kind#\n<|user|>\nthe dog#\n<|assistant|>\n(dog)\n is here#\n"
    )
    assert text.startswith(tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True))


# ---- Adapters ----


def test_adapter_is_saved_reloaded_and_merged(workplace):
    assert main(["finetune", "sft.yaml", *LORA]) == 0
    base = AutoModelForCausalLM.from_pretrained("base").eval()
    num_parameters = base.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained("lora")
    tokens = tokenizer(held_out_prompts()[0], return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, "lora/adapter").eval()
        logits = adapted(tokens).logits
        close(AutoModelForCausalLM.from_pretrained("lora").eval()(tokens).logits, logits)
    assert (logits - before).abs().max() > 0.1
    assert Path("lora/samples/step-00000020.txt").exists() and len(gates("lora/checkpoint-20")) == 1
    card = ModelCard.load("lora/README.md").text
    assert "`base`, fine-tuned on chats.jsonl with `SFTTrainer` through LORA adapters of rank 4" in card
    assert f"{num_parameters:,} parameters" in card
    assert main(["push", "lora", "user/lora", "--dry-run"]) == 0


def test_adapter_is_continued_as_if_it_had_not_been_interrupted(workplace):
    if not Path("lora").is_dir():
        assert main(["finetune", "sft.yaml", *LORA]) == 0
    check_continuation("lora", "sft.yaml", *LORA)


# ---- Labelling ----


@torch.no_grad()
def accuracy(folder) -> float:
    """Of a saved classifier on the held-out examples, each by itself."""
    held_out = read_examples(ExampleArguments(**CLASSIFICATION["data"])).held_out
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in held_out["text"]]
    right = [score.argmax().item() == label for score, label in zip(scores, held_out["label"])]
    return sum(right) / len(right)


def test_classification_beats_chance(workplace, capsys):
    """By a wide margin, on examples that it was not trained on; the saved model gives the accuracy that was measured."""
    assert main(["finetune", "classify.yaml"]) == 0
    assert re.search(r"held-out examples: loss \S+, accuracy \S+, commonest_label \S+\n$", capsys.readouterr().out)
    results = json.loads(Path("classifier/eval_results.json").read_text())
    assert results["commonest_label"] < 0.7
    assert results["eval_accuracy"] > 0.9

    assert results["eval_accuracy"] == pytest.approx(accuracy("classifier"))
    assert AutoModelForSequenceClassification.from_pretrained("classifier").config.label2id == {"cold": 0, "warm": 1}
    assert main(["push", "classifier", "user/classifier", "--dry-run"]) == 0


def test_classification_with_an_adapter(workplace):
    """With the gates and targets trained themselves, as in the recipe."""
    Path("lora.yaml").write_text(yaml.safe_dump({"lora": read_settings([CONFIGS / "lora.yaml"], [])["lora"]}))
    overrides = ("--training.output_dir", "classifier-lora", "--training.max_steps", "120")
    assert main(["finetune", "classify.yaml", "lora.yaml", *overrides]) == 0
    results = json.loads(Path("classifier-lora/eval_results.json").read_text())
    assert results["eval_accuracy"] > 0.9
    assert results["eval_accuracy"] == pytest.approx(accuracy("classifier-lora")), "without the trained head"


# ---- Continued pretraining ----


def test_pretraining_starts_from_a_model(workplace, capsys):
    """With its tokenizer and its weights, of which one step without learning rate changes nothing."""
    settings = {name: PRETRAINING[name] for name in ("data", "training")} | {"model": {"name": "base"}}
    Path("continue.yaml").write_text(yaml.safe_dump(settings))
    options = ["--training.output_dir", "same", "--training.max_steps", "1", "--training.learning_rate", "0"]
    assert main(["pretrain", "continue.yaml", *options]) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert Path("same", name).read_bytes() == Path("base", name).read_bytes()
    options = ["--training.output_dir", "further", "--model.max_position_embeddings", "32"]
    assert main(["pretrain", "continue.yaml", *options, "--dry-run"]) == 0
    assert "sequences of 32 tokens" in capsys.readouterr().out
    assert main(["pretrain", "continue.yaml", *options]) == 0
    before, after = (
        json.loads(Path(name, "eval_results.json").read_text())["bits_per_byte"] for name in ("base", "further")
    )
    assert after < 0.99 * before


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--tokenizer.vocab_size", "300"], "tokenizer: cannot be set, model.name decides it"),
        (["--model.num_hidden_layers", "3"], "model: 'base' lacks 21 weights that these settings ask for"),
        (["--model.hidden_size", "96"], "model: cannot load 'base' with these settings"),
    ],
)
def test_pretraining_that_cannot_start_from_a_model(workplace, capsys, overrides, message):
    settings = {name: PRETRAINING[name] for name in ("data", "training")} | {"model": {"name": "base"}}
    Path("continue.yaml").write_text(yaml.safe_dump(settings))
    assert main(["pretrain", "continue.yaml", "--training.output_dir", "bad", *overrides]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not [*Path("bad").glob("*")]


# ---- Converted Llamas ----


@pytest.mark.parametrize("command, config", [("pretrain", "continue"), ("finetune", "sft"), ("finetune", "classify")])
def test_anchors_are_annealed(workplace, command, config):
    """Those of a converted Llama are 1 before the run; half-way they are not yet 0, and after it they are."""
    if not Path("converted").exists():
        tokenizer = load_tokenizer("base")
        llama = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
        LlamaForCausalLM(llama).save_pretrained("llama")
        tokenizer.save_pretrained("llama")
        assert main(["convert", "llama", "llama", "converted", "--num_value_channels=2"]) == 0
    settings = {name: PRETRAINING[name] for name in ("data", "training")}
    Path("continue.yaml").write_text(yaml.safe_dump(settings))
    options = ["--model.name", "converted", "--training.output_dir", f"annealed-{command}-{config}"]
    options += ["--training.max_steps=2", "--training.save_strategy=steps", "--training.save_steps=1"]
    assert main([command, f"{config}.yaml", *options, "--anchor.annealing_steps=2"]) == 0
    for folder, is_zero in (("checkpoint-1", False), ("", True)):
        weights = load_file(Path(options[3], folder, "model.safetensors"))
        anchors = [weight for name, weight in weights.items() if ".anchor_" in name]
        assert len(anchors) == 8 and all(anchor[0] == 0 for anchor in anchors) == is_zero


# ---- The output folder ----


def check_continuation(folder, *arguments):
    """Without the last checkpoint and everything after it, the same command makes the same files again."""
    complete = weights(folder)
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    for path in Path(folder).glob("*.safetensors"):
        path.unlink()
    Path(folder, "eval_results.json").unlink()
    assert main(["finetune", *arguments]) == 0
    assert weights(folder) == complete


def test_same_run_again_changes_nothing(workplace, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path("chat").rglob("*")}
    assert main(["finetune", "sft.yaml"]) == 0
    output = capsys.readouterr().out
    assert "chat holds this very run, finished" in output and "held-out examples: loss" in output
    assert {path: path.stat().st_mtime_ns for path in Path("chat").rglob("*")} == before


def test_interrupted_run_is_continued(workplace, capsys):
    check_continuation("chat", "sft.yaml")
    assert "continuing from chat/checkpoint-80" in capsys.readouterr().out


SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "finetune.py"
KILLED = {
    "all weights": ("sft.yaml", "--training.max_steps", "24", "--training.save_steps", "8"),
    "adapters": ("sft.yaml", *LORA),
    "classification": ("classify.yaml", "--training.max_steps", "16", "--training.save_strategy", "steps")
    + ("--training.save_steps", "8"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "adapters" else pytest.mark.slow) for kind in KILLED]
)
def test_killed_and_continued(workplace, kind):
    """While the second checkpoint is written: the same weights to the last bit as without an interruption."""
    folders = [f"{kind} {name}".replace(" ", "-") for name in ("uninterrupted", "killed")]
    complete, killed = ((*KILLED[kind], "--training.output_dir", folder) for folder in folders)
    assert main(["finetune", *complete]) == 0
    first, second = sorted(Path(folders[0]).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[:2]
    process = subprocess.Popen([sys.executable, SCRIPT, *killed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (Path(folders[1]) / second.name / "trainer_state.json").exists():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(1e-4)
    process.kill()
    process.communicate()
    assert last_complete_checkpoint(Path(folders[1])).name == first.name
    assert main(["finetune", *killed]) == 0
    assert weights(folders[1]) == weights(folders[0])


@pytest.mark.slow
def test_two_processes_continued_by_one(workplace):
    """The same examples in every step: losses differ by the order of sums, and a mean over processes for unequal lengths."""
    options = ("--training.max_steps", "4", "--training.logging_steps", "1", "--training.save_steps", "2")
    batch = ("--training.per_device_train_batch_size", "4", "--training.gradient_accumulation_steps")
    assert main(["finetune", "sft.yaml", *options, *batch, "2", "--training.output_dir", "one"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", SCRIPT, "sft.yaml", *options]
    process = subprocess.run([*launch, *batch, "1", "--training.output_dir", "two"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    shutil.rmtree("two/checkpoint-4")
    Path("two/eval_results.json").unlink()
    assert main(["finetune", "sft.yaml", *options, *batch, "2", "--training.output_dir", "two"]) == 0
    one, two = (
        [
            entry["loss"]
            for entry in json.loads(Path(folder, "checkpoint-4", "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for folder in ("one", "two")
    )
    assert len(one) == 4 and two == [pytest.approx(loss, rel=1e-4) for loss in one]


# ---- What a person sees ----


@pytest.mark.parametrize("settings, options", [("sft.yaml", ()), ("sft.yaml", LORA), ("classify.yaml", ())])
def test_dry_run(workplace, capsys, settings, options):
    """What it says, against the run itself."""
    options = (*options, "--training.output_dir", "dry", "--training.save_strategy", "epoch")
    options += ("--training.max_steps", "-1", "--training.num_train_epochs", "2")
    before = {*Path().rglob("*")}
    to_hub = ("--training.push_to_hub", "true", "--training.hub_model_id", "user/dry")
    assert main(["finetune", settings, *options, *to_hub, "--dry-run"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert {*Path().rglob("*")} == before
    assert (lines["output"], lines["hub"]) == (str(Path("dry").resolve()), "user/dry")
    assert "GiB for activations" in lines["memory"]

    assert main(["finetune", settings, *options]) == 0
    num_trained = re.search(r"([\d,]+) of them trained", lines["parameters"])[1]
    assert f"model: {num_trained} parameters are trained" in capsys.readouterr().out
    state = json.loads(max(Path("dry").glob("checkpoint-*/trainer_state.json")).read_text())
    assert lines["steps"].startswith(f"{state['max_steps']:,} of 16 sequences of ")
    said = float(re.search(r"for (\S+) FLOPs", lines["tokens"])[1])
    # The last batch of an epoch is smaller, and batches are padded
    assert said == pytest.approx(state["total_flos"], rel=0.35)
    shutil.rmtree("dry")


def test_progress_bar(workplace, capsys):
    options = ("--training.output_dir", "bar", "--training.max_steps", "3", "--training.disable_tqdm", "false")
    assert main(["finetune", "sft.yaml", *options, "--training.logging_steps", "1"]) == 0
    assert re.search(r" 3/3 \[\d+:\d+<\d+:\d+, [^\r]*loss=\d\.\d+, tokens/s=[\d,]+\]", capsys.readouterr().err)


def test_counts_and_card(workplace):
    counts = json.loads(Path("chat/text_counts.json").read_text())
    assert counts["train"] + counts["held_out"] == len(CHATS) and counts["skipped"] == {}
    results = json.loads(Path("chat/eval_results.json").read_text())
    card = ModelCard.load("chat/README.md")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["token_accuracy"] == results["eval_token_accuracy"]
    assert "`base`, fine-tuned on chats.jsonl with `SFTTrainer`." in card.text


# ---- Examples ----


def test_every_row_is_accounted_for(tmp_path):
    good = [*CHATS[:8], {"messages": CONVERSATION}]
    bad = [
        {"messages": []},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "hello"}]},
    ]
    write_json_lines(tmp_path / "chats.jsonl", [*good, *bad])
    corpus = read_examples(ExampleArguments(str(tmp_path / "chats.jsonl"), held_out=0.3))
    assert corpus.skipped == {
        "without messages": 1,
        "without an answer": 1,
        "with a message without role or content": 1,
    }
    assert sorted([*corpus.train["messages"], *corpus.held_out["messages"]], key=str) == sorted(
        [row["messages"] for row in good], key=str
    )


@pytest.mark.parametrize("messages", ["hello", [["user", "hello"]], ["hello"]])
def test_messages_that_are_none(tmp_path, messages):
    write_json_lines(tmp_path / "chats.jsonl", [{"messages": messages}] * 5)
    with pytest.raises(InputError, match=r"5 skipped \(5 with a message without role or content\)"):
        read_examples(ExampleArguments(str(tmp_path / "chats.jsonl")))


def test_labels_that_are_numbers_keep_their_order(tmp_path):
    """Where they count from zero, each is its own index, also beyond ten; others stay in the order of their size."""
    for labels in (range(12), (-2, 3, 20)):
        rows = [{"text": f"text {i} of {label}", "label": label} for label in labels for i in range(9)]
        write_json_lines(tmp_path / "labels.jsonl", rows)
        corpus = read_examples(ExampleArguments(str(tmp_path / "labels.jsonl"), task="classification", held_out=0.3))
        names = corpus.train.features["label"].names
        assert names == corpus.held_out.features["label"].names == [str(label) for label in labels]
        for part in (corpus.train, corpus.held_out):
            assert [names[label] for label in part["label"]] == [text.split()[-1] for text in part["text"]]


def test_copies_fall_on_the_same_side(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", LABELLED * 2)
    args = ExampleArguments(str(tmp_path / "*.jsonl"), task="classification", held_out=0.3)
    corpus = read_examples(args)
    assert not set(corpus.train["text"]) & set(corpus.held_out["text"])
    assert len(corpus.train) + len(corpus.held_out) == 2 * len(LABELLED)
    assert len(corpus.held_out) / (2 * len(LABELLED)) == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_examples_whose_answer_is_cut_off_are_counted(workplace, packing):
    long = [{"messages": [{"role": "user", "content": "the dog " * 50}, CHATS[0]["messages"][1]]}]
    write_json_lines("cut.jsonl", CHATS + long)
    run = FinetuningRun.from_settings(
        read_settings(["sft.yaml"], ["--data.source", "cut.jsonl", "--training.packing", packing])
    )
    corpus = read_examples(run.data)
    sft_trainer(run, corpus, load_tokenizer("base"))
    assert corpus.skipped == {"without an answer in the first training.max_length tokens": 1}
    assert corpus.counts.train + corpus.counts.held_out == len(CHATS)


# ---- Input that cannot be used ----


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--model", "x"], "unknown argument '--model'"),
        (["--model.name", "nowhere"], "model: cannot load 'nowhere': "),
        (["--model.hiden_size", "3"], "model: unknown field hiden_size=3: did you mean hidden_size?"),
        (["--model.num_labels", "3"], "model.num_labels: cannot be set, the data decides it"),
        (["--tokenizer.name", "base"], "tokenizer: unknown section; allowed: data, model, training, lora, card"),
        (["--data.task", "poetry"], "data.task: 'poetry' has the wrong type; allowed: typing.Literal['sft',"),
        (["--data.held_out", "0"], "data: held_out must lie strictly between 0 and 1, got 0"),
        (["--data.source", "missing.jsonl"], "data.source: no file or folder 'missing.jsonl'"),
        (["--data.source", "corpus.txt"], "data.source: 'corpus.txt' holds files of type text; allowed: either JSON"),
        (["--data.source", "labelled.jsonl"], "for data.task sft it must have messages, or prompt and completion"),
        (["--data.source", "broken.jsonl"], "data.source: cannot read 'broken.jsonl'"),
        (["--data.source", "one.jsonl"], "data.source: 'one.jsonl' holds too few examples"),
        (["--data.source", "completions.jsonl"], "training: You set `assistant_only_loss=True`, but the dataset is not"),
        (["--data.task", "classification"], "training.assistant_only_loss: unknown field"),
        (["--training.max_length", "100"], "training.max_length: 100; allowed: up to model.max_position_embeddings, 64"),
        (["--training.max_length", "8"], "training.max_length: 8 leaves too few examples"),
        (["--training.max_length", "8", "--training.packing", "true"], "training.max_length: 8 leaves too few examples"),
        (["--training.eos_token", "x"], "training.eos_token: cannot be set, the tokenizer decides it"),
        (["--lora.r", "many"], "lora.r: 'many' has the wrong type; allowed: int"),
        (["--lora.rang", "4"], "lora.rang: unknown field; allowed, among others: "),
        (["--lora.r", "4"], "lora: Please specify `target_modules`"),
        (["--lora.target_modules", "[embed_tokens]"], "lora: an adapter of embed_tokens or lm_head, which share their"),
        (["--lora.target_modules=[q_proj]", "--lora.trainable_token_indices=[1]"], "lora: an adapter of embed_tokens or"),
        (["--lora.target_parameters", "[embed_tokens.weight]"], "lora: an adapter of embed_tokens or lm_head, which share"),
        (["--lora.target_modules", "[nothing]"], "lora: Target modules {'nothing'} not found"),
        (["--lora.task_type", "CAUSAL_LM"], "lora.task_type: cannot be set, the task decides it"),
        (["--training.output_dir", "base"], "training.output_dir: 'base' holds a run with another "),
        (["--anchor.annealing_steps", "9"], "anchor.annealing_steps: the model has no anchors; allowed: a model with"),
        (["--anchor.annealing_steps", "0"], "anchor: annealing_steps must be at least 1, got 0"),
        (["--anchor.annealing_steps", "9", "--model.value_anchor=1", "--lora.r=4"], "cannot be set with lora"),
    ],
)  # fmt: skip
def test_unusable_input(workplace, capsys, overrides, message):
    Path("broken.jsonl").write_text('{"messages": [')
    write_json_lines("one.jsonl", CHATS[:1])
    before = weights("base")
    assert main(["finetune", "sft.yaml", "--training.output_dir", "bad", *overrides]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:] and message in errors[-1]
    assert not [*Path("bad").glob("*")] and weights("base") == before


def test_model_must_be_said(workplace, capsys):
    Path("none.yaml").write_text("{data: {source: chats.jsonl}, training: {output_dir: bad}}")
    assert main(["finetune", "none.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: model.name: missing; every fine-tuning must say which model it starts from\n"
    )


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": f"text {i}", "label": "good"} for i in range(20)], "data.label_column: all labels are good"),
        ([{"text": f"text {i}", "stars": i % 5} for i in range(20)], "it must have text and label"),
        (
            [{"text": f"text {i}", "label": i / 8} for i in range(20)],
            "data.label_column: 'label' holds float64; allowed",
        ),
        ([{"text": f"text {i}", "label": [i]} for i in range(20)], "data.source: cannot read 'rows.jsonl': "),
    ],
)
def test_unusable_labels(workplace, capsys, rows, message):
    write_json_lines("rows.jsonl", rows)
    options = ("--data.source", "rows.jsonl", "--training.output_dir", "bad")
    assert main(["finetune", "classify.yaml", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not [*Path("bad").glob("*")]


# ---- The recipes ----


@pytest.mark.parametrize("name", ["sft", "lora", "classification"])
def test_recipe(workplace, name):
    overrides = ["--model.name", "base", "--training.use_cpu", "true", "--training.bf16", "false"]
    settings = read_settings([CONFIGS / f"{name}.yaml"], overrides)
    run = FinetuningRun.from_settings(settings)
    assert (run.lora is not None) == (name == "lora")
    assert (run.data.task == "classification") == (name == "classification")


def test_missing_package(workplace, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers_ddl.finetuning")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["finetune", "sft.yaml"]) == 2
    assert capsys.readouterr().err == "error: import of peft halted; None in sys.modules\n"
