"""Liger's kernels, through transformers' `use_liger_kernel`: the same model, with less memory for the loss."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import all_gradients, random_tokens, relative_error, tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel

from transformers_ddl import DDLForSequenceClassification


triton = pytest.importorskip("triton")
pytest.importorskip("liger_kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSS_ONLY = {"rope": False, "rms_norm": False, "swiglu": False}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's interpreter knows neither scalar arguments that are not integers nor CUDA's library of functions."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_float(value):
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), triton.language.float32)
        return triton.language.tensor(handle, triton.language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_float)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda value: triton.language.math.rsqrt(value))


def with_liger(model, **options):
    model = copy.deepcopy(model)
    apply_liger_kernel(model, options)
    return model


def make_batch():
    tokens = random_tokens(2, 9).to(DEVICE)
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


VARIANTS = {
    "scalar": ("scalar", {}),
    "cc": ("cc", {"logits_scale": 0.3}),
    "tc": ("tc", {"qk_norm": "post_rope"}),
    "additive": ("additive", {"tie_word_embeddings": False}),
    "hc": ("hc", {}),
    "partial-rotation": ("cc", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 2 / 3}}),
    "another-activation": ("scalar", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("num_items", [None, 23])
@pytest.mark.parametrize(("variant", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_gradients(variant, options, num_items):
    model = tiny_model(variant, num_hidden_layers=1, **options).to(DEVICE).train()
    assert_equal_loss_and_gradients(model, num_items)


def test_together_with_own_kernels(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DDL_KERNELS", "1")
    assert_equal_loss_and_gradients(tiny_model("cc", num_hidden_layers=1).to(DEVICE).train(), None)


def assert_equal_loss_and_gradients(model, num_items):
    """The gradients against those in float64, from which float32 without Liger is off by the tolerance's first term."""
    batch = make_batch()
    if num_items is not None:
        batch["num_items_in_batch"] = torch.tensor(num_items, device=DEVICE)
    liger = with_liger(model)
    expected, loss = model(**batch).loss, liger(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

    exact_model = copy.deepcopy(model).double()
    exact = all_gradients(exact_model(**batch).loss, exact_model)
    plain, gradients = all_gradients(expected, model), all_gradients(loss, liger)
    for name, reference in exact.items():
        if reference.abs().max() > 0:
            limit = 2 * relative_error(plain[name], reference) + 5e-5
            assert relative_error(gradients[name], reference) < limit, name


def test_every_kernel_stands_in_for_its_module():
    """And the modules of other models are left alone."""
    from transformers_ddl.liger_ddl import apply_rotary

    model = tiny_model("cc")
    for candidate, is_patched in ((with_liger(model), True), (model, False)):
        modules = [*candidate.modules()]
        names = [module._get_name() for module in modules]
        assert names.count("LigerRMSNorm") == (9 if is_patched else 0)
        assert names.count("LigerSwiGLUMLP") == (2 if is_patched else 0)
        rotations = [module.apply_rotary for module in modules if hasattr(module, "apply_rotary")]
        assert [rotation is apply_rotary for rotation in rotations] == 2 * [is_patched]


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **kwargs or {})
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.num_elements = max(self.num_elements, output.numel())
        return outputs


def test_there_are_never_all_logits():
    model = tiny_model("scalar", vocab_size=2000).to(DEVICE).train()
    tokens = torch.randint(2000, (2, 100), device=DEVICE)
    batch = {"input_ids": tokens, "labels": tokens}
    num_logits = 2000 * tokens.numel()
    largest = {}
    for name, candidate in {"plain": model, "liger": with_liger(model, **LOSS_ONLY)}.items():
        with LargestTensor() as largest[name]:
            candidate(**batch).loss.backward()
    assert largest["plain"].num_elements == num_logits
    assert largest["liger"].num_elements <= num_logits / 8


def test_when_there_are_logits():
    model = with_liger(tiny_model("scalar").to(DEVICE), **LOSS_ONLY)
    batch = make_batch()
    evaluated = model(**batch)
    torch.testing.assert_close(evaluated.logits, model(batch["input_ids"]).logits)
    with torch.no_grad():
        skipped = model(**batch, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, evaluated.loss, rtol=1e-6, atol=0)
    model.train()
    assert model(**batch).logits is None
    assert model(**batch, skip_logits=False).logits is not None
    assert model(batch["input_ids"]).logits is not None


def test_labels_of_other_positions_are_refused():
    """As they are by the loss from logits: Liger would take the first labels for the last positions."""
    model = with_liger(tiny_model("scalar").to(DEVICE), **LOSS_ONLY).train()
    tokens = random_tokens(2, 9).to(DEVICE)
    with pytest.raises(ValueError, match="labels"):
        model(tokens, labels=tokens, logits_to_keep=4)
    loss = model(tokens, labels=tokens[:, -4:], logits_to_keep=4).loss
    expected = model(tokens, labels=tokens[:, -4:], logits_to_keep=4, skip_logits=False).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj"]])
def test_adapters(targets):
    """A head that is wrapped takes part in the loss; one that is frozen gets no gradient."""
    torch.manual_seed(0)
    model = tiny_model("scalar", tie_word_embeddings=False).to(DEVICE)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
    batch = make_batch()
    expected = peft_model(**batch).loss
    plain = torch.autograd.grad(expected, [p for p in peft_model.parameters() if p.requires_grad])
    apply_liger_kernel(peft_model, LOSS_ONLY)
    outputs = peft_model(**batch)
    assert outputs.logits is None
    gradients = torch.autograd.grad(outputs.loss, [p for p in peft_model.parameters() if p.requires_grad])
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, plain, rtol=1e-4, atol=1e-6)


def test_hooks_of_the_head_are_called():
    """They may gather or fetch its weight, or change what it gives."""
    model = with_liger(tiny_model("scalar").to(DEVICE), **LOSS_ONLY).train()
    batch = make_batch()
    expected = with_liger(tiny_model("scalar").to(DEVICE), **LOSS_ONLY).train()(**batch, skip_logits=False).loss
    with model.lm_head.register_forward_hook(lambda head, args, logits: torch.zeros_like(logits)):
        loss = model(**batch).loss
    torch.testing.assert_close(loss.exp().item(), float(model.config.vocab_size), rtol=1e-4, atol=0)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-6, atol=0)


def test_other_heads_use_the_kernels_too():
    model = tiny_model("scalar", DDLForSequenceClassification, pad_token_id=0).to(DEVICE)
    tokens = random_tokens(2, 5).to(DEVICE)
    torch.testing.assert_close(with_liger(model)(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_compiled_without_a_graph_break():
    model = tiny_model("scalar", num_hidden_layers=1).to(DEVICE).train()
    batch = make_batch()
    liger = with_liger(model, **LOSS_ONLY)
    loss = torch.compile(liger, fullgraph=True, backend="aot_eager")(**batch).loss
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-6, atol=0)
    gradients, expected = all_gradients(loss, liger), all_gradients(model(**batch).loss, model)
    for name in expected:
        assert relative_error(gradients[name], expected[name]) < 1e-4, name


def test_autocast():
    """The products are computed in its dtype, as the head's are."""
    model = tiny_model("scalar").to(DEVICE).train()
    liger = with_liger(model, **LOSS_ONLY)
    batch = make_batch()
    with torch.autocast(DEVICE, torch.bfloat16):
        expected, loss = model(**batch).loss, liger(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)  # no more than one bfloat16 rounding of logits apart
    weight, expected_weight = (
        torch.autograd.grad(x, m.lm_head.weight)[0] for x, m in ((loss, liger), (expected, model))
    )
    assert weight.dtype == torch.float32
    assert relative_error(weight, expected_weight) < 2e-2


def train(folder, use_liger_kernel):
    """Losses of training and evaluation, and the weights, with 3, 7 and other numbers of labels in the batches of a step."""
    tokens = random_tokens(12, 9)
    labels = [row[: 3 + 4 * (i % 2)].tolist() + [-100] * (6 - 4 * (i % 2)) for i, row in enumerate(tokens)]
    data = [{"input_ids": row.tolist(), "labels": label} for row, label in zip(tokens, labels)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=DEVICE == "cpu",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        use_liger_kernel=use_liger_kernel,
        liger_kernel_config={"rms_norm": False},  # would take as long as everything else in Triton's interpreter
    )
    model = tiny_model("cc", num_hidden_layers=1)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    predictions = trainer.predict(data[:4])
    return [*losses, trainer.evaluate()["eval_loss"]], predictions, dict(model.named_parameters())


def test_trainer(tmp_path):
    expected, expected_predictions, expected_weights = train(tmp_path, use_liger_kernel=False)
    losses, predictions, weights = train(tmp_path, use_liger_kernel=True)
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    np.testing.assert_allclose(predictions.predictions, expected_predictions.predictions, rtol=1e-4, atol=1e-4)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_the_operator_is_registered_as_it_computes():
    from transformers_ddl.liger_ddl import linear_cross_entropy

    hidden_states, weight = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((5, 8), (11, 8)))
    labels = torch.tensor([0, 3, -100, 10, 1], device=DEVICE)
    for with_grad, with_weight_grad in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(
            linear_cross_entropy,
            (hidden_states, weight, labels, -100, with_grad, with_weight_grad),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
