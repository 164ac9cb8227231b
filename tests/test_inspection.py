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
"""Statistics of rewrites, against plain loops; the report of `transformers-ddl inspect`; what a training logs of gates."""

import base64
import json
import math
from html.parser import HTMLParser

import pytest
import reference
import torch
from conftest import random_tokens, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from transformers_ddl.cli import main
from transformers_ddl.delta_stats import QUANTITIES, effective_rank, record_delta_stats
from transformers_ddl.tokenization import train_tokenizer
from transformers_ddl.trainer import DDLTrainer


DELTA_VARIANTS = {
    "scalar": ("scalar", {}),
    "cc": ("cc", {}),
    "tc": ("tc", {}),
    "multi-step": ("multi-step", {}),
    "write-only": ("write-only", {}),
    "anchored": ("cc", {"value_anchor": 0.5}),
    "two-layer gate": ("cc", {"gate_hidden_size": 5}),
}
delta_variants = pytest.mark.parametrize(("variant", "options"), DELTA_VARIANTS.values(), ids=DELTA_VARIANTS)


def loop_statistics(model, tokens, monkeypatch) -> dict[str, torch.Tensor]:
    """Of one document, from the rewrites that the reference makes: [layers, 2, steps, tokens]."""
    config, rewrites, rewrite = model.config, [], reference.delta_rewrite

    def noted(state, direction, gate, target, key_eps, erase=True, anchor=None):
        new_state = rewrite(state, direction, gate, target, key_eps, erase, anchor)
        rewrites.append((state, direction, gate, target, erase, anchor, new_state))
        return new_state

    with monkeypatch.context() as patch:
        patch.setattr(reference, "delta_rewrite", noted)
        reference.logits(config, model.state_dict(), tokens[None])
    steps = config.num_delta_steps
    shape = (config.num_hidden_layers, 2, steps, len(tokens))
    values = {name: torch.zeros(shape, dtype=torch.float64) for name in QUANTITIES}
    remaining = iter(rewrites)
    last = [None] * len(tokens)
    for layer in range(shape[0]):
        for sublayer in range(2):
            for t in range(len(tokens)):
                for step in range(steps):
                    state, direction, gate, target, erase, anchor, new_state = next(remaining)
                    length = math.sqrt(sum(x * x for x in direction.tolist()))
                    k = direction / math.sqrt(length**2 + config.key_eps**2)
                    kept = [1 - gate if erase else 1.0] * state.shape[1]
                    if anchor is not None:
                        target = target + anchor[0] * (state.T @ k) + anchor[1] * direction.norm() / gate
                        kept = [1 - gate * (1 - a) for a in anchor[0]]
                    spectrum = torch.linalg.svdvals(new_state)
                    shares = [s / spectrum.sum() for s in spectrum]
                    cosine = math.nan if last[t] is None else direction @ last[t] / (length * last[t].norm())
                    last[t] = direction
                    for name, value in {
                        "gate": gate,
                        "eigenvalue": sum(kept) / len(kept),
                        "readout": (state.T @ k).norm(),
                        "discrepancy_before": (target - state.T @ k).norm(),
                        "discrepancy_after": (target - new_state.T @ k).norm(),
                        "key_norm": length,
                        "relative_step": (new_state - state).norm() / state.norm(),
                        "cosine": cosine,
                        "effective_rank": math.exp(-sum(p * math.log(p) for p in shares)),
                    }.items():
                        values[name][layer, sublayer, step, t] = value
    assert next(remaining, None) is None
    return values


def test_effective_rank_of_a_state_that_has_overflowed():
    """A training that diverges must not end in an error of this."""
    state = torch.stack([torch.eye(3, 5), *(torch.full((3, 5), value) for value in (torch.nan, torch.inf, 1e30))])
    assert effective_rank(state).isnan().tolist() == [False, True, True, True]
    assert effective_rank(state)[0].item() == pytest.approx(3)


@delta_variants
def test_statistics_equal_plain_loops(variant, options, monkeypatch):
    """In float64. Singular values come from a Gram matrix, which leaves half of the digits of the small ones."""
    model, tokens = tiny_model(variant, dtype=torch.float64, **options), random_tokens(2, 7)
    with model.record_delta_stats() as stats, torch.no_grad():
        model(tokens)
        model.model(tokens[:1])
    documents = [loop_statistics(model, row, monkeypatch) for row in (*tokens, tokens[0])]
    for name in QUANTITIES:
        expected = torch.cat([document[name] for document in documents], dim=-1)
        assert stats[name].shape == expected.shape == (2, 2, model.config.num_delta_steps, 21)
        tolerance = 1e-6 if name == "effective_rank" else 1e-9
        torch.testing.assert_close(stats[name], expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    if model.config.residual_type == "delta" and model.config.value_anchor is None:
        shrunk = (1 - stats["gate"]).abs() * stats["discrepancy_before"]
        torch.testing.assert_close(stats["discrepancy_after"], shrunk, rtol=1e-6, atol=1e-6)  # ε = 1e-5 of ‖k̃‖


def test_summary():
    model, tokens = tiny_model("multi-step", dtype=torch.float64), random_tokens(3, 50)
    model.model.layers[1].mlp_residual.beta_proj.weight.data.zero_()
    model.model.layers[1].mlp_residual.beta_proj.bias.data.copy_(torch.tensor([-3.2, 30.0]))  # β = 0.078, 2
    with model.record_delta_stats() as stats, torch.no_grad():
        model(tokens)
    rows = stats.summary()
    assert [(row["layer"], row["sublayer"], row["step"]) for row in rows] == [
        (layer, sublayer, step) for layer in (0, 1) for sublayer in ("attention", "mlp") for step in (0, 1)
    ]
    for row in rows:
        index = row["layer"], ("attention", "mlp").index(row["sublayer"]), row["step"]
        for name in QUANTITIES:
            assert row[name] == pytest.approx(stats[name][index].mean().item(), rel=1e-12, nan_ok=True)
        gates = sorted(stats["gate"][index].tolist())
        for percent in (5, 50, 95):  # linear between the neighbours in order
            place = percent / 100 * (len(gates) - 1)
            low, high = gates[math.floor(place)], gates[math.ceil(place)]
            assert row[f"gate_{percent:02}"] == pytest.approx(low + (place % 1) * (high - low), rel=1e-12)
        for centre in (0, 1, 2):
            share = sum(abs(gate - centre) < 0.1 for gate in gates) / len(gates)
            assert row[f"near_{centre}"] == pytest.approx(share, rel=1e-12)
    assert [[row[f"near_{centre}"] for centre in (0, 1, 2)] for row in rows[-2:]] == [[1, 0, 0], [0, 0, 1]]
    assert math.isnan(rows[0]["cosine"]) and not any(math.isnan(row["cosine"]) for row in rows[1:])


@delta_variants
def test_the_forward_pass_is_left_alone(variant, options):
    """Losses and gradients to the last bit, with padding too; and no hook is left behind."""
    model, tokens = tiny_model(variant, **options), random_tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def run():
        loss = model(tokens, attention_mask=mask, labels=tokens).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = run()
    with model.record_delta_stats() as stats:
        recorded = run()
    hooks = [getattr(module, name) for module in model.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
    assert not any(hooks)
    assert stats["gate"].shape[-1] == 8 and not stats["gate"].requires_grad
    assert all(torch.equal(one, other) for one, other in zip(recorded, expected, strict=True))


def assert_same(stats, expected):
    """In float32: differences of values of order 1, and singular values from a Gram matrix."""
    for name in QUANTITIES:
        tolerance = 1e-3 if name == "effective_rank" else 1e-4
        torch.testing.assert_close(stats[name], expected[name], rtol=tolerance, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", ["scalar", "cc", "tc", "write-only"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
def test_statistics_beside_the_kernels(variant, padded, monkeypatch):
    """The fused kernels compute gates and targets without calling the modules."""
    pytest.importorskip("triton")
    model, tokens = tiny_model(variant), random_tokens(2, 5)
    model.config.use_cache = False  # token convolutions with a cache have no kernel
    mask = torch.ones_like(tokens)
    mask[1, : 2 * padded] = 0
    with torch.no_grad():
        with model.record_delta_stats() as expected:
            model(tokens, mask)
        monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")
        residual = model.model.layers[1].mlp_residual
        monkeypatch.setattr(residual, "forward", None)  # only the kernels can do without it
        logits = model(tokens, mask).logits
        with model.record_delta_stats() as stats:
            assert torch.equal(model(tokens, mask).logits, logits)
    assert_same(stats, expected)


@pytest.mark.parametrize("variant", ["scalar", "cc", "tc"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(variant, side):
    model, tokens = tiny_model(variant), random_tokens(2, 7)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    row = torch.cat([tokens[0, :4], torch.zeros(3, dtype=torch.long)])
    if side == "left":
        mask, row = mask.flip(1), row.roll(3)
    with torch.no_grad():
        with model.record_delta_stats() as alone:
            model(tokens[:1, :4])
            model(tokens[1:])
        with model.record_delta_stats() as padded:
            model(torch.stack([row, tokens[1]]), mask)
    assert padded["gate"].shape[-1] == 11
    assert_same(padded, alone)


@pytest.mark.parametrize("variant", ["scalar", "cc", "tc"])
def test_packed_documents(variant):
    model, tokens = tiny_model(variant), random_tokens(1, 7)
    with torch.no_grad():
        with model.record_delta_stats() as alone:
            model(tokens[:, :4])
            model(tokens[:, 4:])
        with model.record_delta_stats() as packed:
            model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]))
    assert_same(packed, alone)


@pytest.mark.parametrize("variant", ["scalar", "cc", "tc", "multi-step"])
def test_cached_decoding(variant):
    """Each token counts once, padding of the prompt not at all, and what is generated is the same."""
    model, tokens = tiny_model(variant), random_tokens(1, 5)
    inputs = {"input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens], 1)}
    inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    with model.record_delta_stats() as cached:
        assert torch.equal(model.generate(**inputs, **options), expected)
    with model.record_delta_stats() as whole, torch.no_grad():
        model(expected[:, 2:-1])
    assert cached["gate"].shape[-1] == 10
    assert_same(cached, whole)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_counts_tokens_once(use_reentrant):
    model, tokens = tiny_model("cc").train(), random_tokens(2, 5)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with model.record_delta_stats() as stats:
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
    assert stats["gate"].shape[-1] == 20


def test_compiled_models_are_recorded():
    model, tokens = tiny_model("cc"), random_tokens(2, 5)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(tokens)
        with model.record_delta_stats() as stats:
            compiled(tokens)
    assert stats["gate"].shape[-1] == 10


def test_bfloat16_under_autocast():
    model, tokens = tiny_model("cc"), random_tokens(2, 5)
    with torch.no_grad(), model.record_delta_stats() as exact:
        model(tokens)
    with torch.no_grad(), model.record_delta_stats() as rounded, torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    for name in QUANTITIES:  # bf16 keeps 8 bits, of states over four sublayers
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.1, atol=0.1, equal_nan=True)


# ---- Errors ----


@pytest.mark.parametrize("variant", ["additive", "expanded-additive", "hc", "mhc"])
def test_residuals_without_gates(variant):
    model = tiny_model(variant)
    with pytest.raises(ValueError, match=f"'{model.config.residual_type}' has no gates"):
        with model.record_delta_stats():
            pass


def test_nothing_recorded_and_unknown_names():
    with tiny_model("cc").record_delta_stats() as stats:
        with pytest.raises(ValueError, match="nothing has been recorded"):
            stats["gate"]
        with pytest.raises(KeyError, match="gates; there are gate, eigenvalue"):
            stats["gates"]


def test_masks_with_four_dimensions():
    model = tiny_model("cc")
    with record_delta_stats(model), pytest.raises(ValueError, match=r"attention_mask as \[batch, tokens\]"):
        model(random_tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())


# ---- The command ----


TEXT = "the cat sat on the mat & <b>the dog</b> sat on $the$ cat 🐈\n" * 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=290)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def save(variant, tokenizer, folder):
    model = tiny_model(variant, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


class Page(HTMLParser):
    """Everything that a page loads or links to, and its texts."""

    def __init__(self, page: str):
        super().__init__()
        self.references, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("variant", ["scalar", "cc", "multi-step"])
def test_report(variant, tokenizer, workplace, capsys):
    model = save(variant, tokenizer, workplace / "model")
    assert main(["inspect", "model", "--text", "text.txt", "--output", "some/where"]) == 0
    folder = workplace / "some" / "where"
    images = ["gates.png", "histograms.png", "discrepancy.png"]
    assert {path.name for path in folder.iterdir()} == {"report.html", "statistics.json", *images}

    # The statistics of the whole text, in windows of the model's context
    tokens = torch.tensor(tokenizer.encode(TEXT, add_special_tokens=False))
    with torch.no_grad(), model.record_delta_stats() as stats:
        for window in tokens.split(64):
            model(window[None])
    assert stats["gate"].shape[-1] == len(tokens) > 64
    rows = json.loads((folder / "statistics.json").read_text())
    assert rows[0].pop("cosine") is None
    for row, expected in zip(rows, stats.summary(), strict=True):
        assert row.pop("sublayer") == expected.pop("sublayer")
        assert row == pytest.approx({name: expected[name] for name in row}, rel=1e-5)

    # The table on the terminal and that of the page show them, in the same order
    printed = capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    texts = [text.strip() for text in Page(page).texts]
    for row in rows:
        shown = [f"{row[name]:.3g}" for name in ("gate", "gate_95", "discrepancy_after", "effective_rank")]
        shown += [f"{row[name]:.1%}" for name in ("near_0", "near_1", "near_2")]
        assert all(text in printed and text in texts for text in shown)
    assert f"{len(tokens):,} tokens" in printed

    # The page needs nothing but itself
    embedded = ["data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode() for name in images]
    assert Page(page).references == embedded
    assert "http" not in page and "url(" not in page and "<script" not in page
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in images)


def test_first_tokens_only(tokenizer, workplace, capsys):
    save("cc", tokenizer, workplace / "model")
    assert main(["inspect", "model", "--text", "text.txt", "text.txt", "--max-tokens", "9"]) == 0
    assert "the first 9 tokens" in capsys.readouterr().out
    assert (workplace / "inspection" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model", "--text", "missing.txt"], "--text: cannot read 'missing.txt'"),
        (["model", "--text", "empty.txt"], "--text: must hold text, got none"),
        (["model", "--text", "text.txt", "--max-tokens", "0"], "--max-tokens: must be at least 1, got 0"),
        (["model", "--text", "text.txt", "--output", "text.txt"], "--output: cannot make 'text.txt'"),
        (["nowhere", "--text", "text.txt"], "model: cannot load 'nowhere'"),
        (["additive", "--text", "text.txt"], "model: ddl with residual_type 'additive' has no gates"),
        (["llama", "--text", "text.txt"], "model: llama with residual_type None has no gates"),
    ],
)
def test_unusable_input(options, message, tokenizer, workplace, capsys):
    (workplace / "empty.txt").touch()
    folder = workplace / options[0].replace("nowhere", "here")
    save("additive" if options[0] == "additive" else "cc", tokenizer, folder)
    if options[0] == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    assert main(["inspect", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (workplace / "inspection").exists()


# ---- The log of a training ----


@pytest.mark.parametrize("variant", ["cc", "additive"])
def test_gates_in_the_log_of_a_training(variant, tmp_path):
    """Those of the audited batch at the time of the first and every tenth log; the training itself is as without."""
    audited = {"input_ids": random_tokens(1, 8, seed=1)}
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8, 8)]
    weights, figures = [], []

    class Check(TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            if "loss" in logs:
                assert model.training
                figures.append(({name for name in logs if "/" in name}, logs, gate_means(model)))

    def gate_means(model):
        if not model.config.has_gates:
            return None
        with torch.no_grad(), model.eval().record_delta_stats() as stats:
            model(**audited)
        model.train()
        return stats["gate"].mean((2, 3)), stats["relative_step"].mean((2, 3))

    for inputs in (audited, None):
        args = TrainingArguments(
            output_dir=tmp_path, max_steps=12, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True
        )
        model = tiny_model(variant, attention_dropout=0.5).train()
        trainer = DDLTrainer(
            model=model, args=args, train_dataset=rows, audited_inputs=inputs, callbacks=[Check()] if inputs else []
        )
        trainer.train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(figures) == 12
    for step, (names, logs, means) in enumerate(figures, start=1):
        if variant == "additive" or step not in (1, 11):
            assert not names
            continue
        places = ["00.attention", "00.mlp", "01.attention", "01.mlp"]
        assert names == {f"{name}/{place}" for name in ("gate", "relative_step") for place in places}
        for name, of_layers in zip(("gate", "relative_step"), means):
            assert [logs[f"{name}/{place}"] for place in places] == pytest.approx(
                of_layers.flatten().tolist(), rel=1e-5
            )
