"""The bridges, each with the real library: ModelOpt's distill mode, Lightning's and Hugging Face's Trainer."""

import copy
import io
import sys
import warnings

import pytest
import torch
from nets import Structures
from torch.utils.data import DataLoader, Dataset, TensorDataset

from qakd_plugin import (
    KD,
    LSQ,
    QAT,
    QKD,
    SQAKD,
    Features,
    LabelsRequiredError,
    QakdError,
    attach,
    distill,
    export_onnx,
    prepare,
)
from qakd_plugin._common.module_mode import eval_mode
from qakd_plugin._common.training_record import TrainingRecord, training_records
from qakd_plugin.bench.file_facts import record_of
from qakd_plugin.losses import cross_entropy, kl_divergence
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.optimizers import (
    Settings,
    cosine_schedule,
    quantizer_parameters,
    student_optimizer,
    teacher_optimizer,
)


def _assert_equal_state(expected, actual):
    expected, actual = expected.state_dict(), actual.state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        if (
            "module.head.activation_post_process" not in name
        ):  # eager mode only watches this output, and quantizes nothing there
            assert torch.equal(value, actual[name]), name


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_library_is_named_with_its_pip_line(name, monkeypatch):
    file = {"lightning": "lightning", "transformers": "huggingface"}[name]
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"qakd_plugin.integrations.{file}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install -e '\.\[{name}\]'"):
        __import__(f"qakd_plugin.integrations.{file}")


# -- modelopt.torch.distill


def test_the_criterion_has_the_number_and_the_gradient_of_the_loss():
    from qakd_plugin.integrations.modelopt_distill import KLCriterion

    torch.manual_seed(0)
    own, other = (8 * torch.randn(6, 10)).requires_grad_(True), (8 * torch.randn(6, 10)).requires_grad_(True)
    loss = KLCriterion(3.0)(own, other)
    expected = kl_divergence(own, other.detach(), 3.0).mean()
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(expected, own)
    loss.backward()
    assert torch.equal(own.grad, gradient)
    assert other.grad is None
    with pytest.raises(QakdError, match="temperature=0"):
        KLCriterion(0)


def _step(student, loss):
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.05)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("method", [SQAKD(3.0), KD(2.0, alpha=0.3)])
@pytest.mark.parametrize("quantizers", [None, LSQ()])
@pytest.mark.filterwarnings("ignore:.StaticLossBalancer.")
def test_a_step_of_a_converted_student_equals_attach(method, quantizers, prepared, mentor, batches):
    import modelopt.torch.distill as mtd

    from qakd_plugin.integrations.modelopt_distill import kd_loss_config

    x, y = batches[0]
    own, theirs = prepared(quantizers=quantizers), prepared(quantizers=quantizers)
    with attach(own, mentor, method) as kd:
        kd.train()
        own(x)
        _step(own, kd.loss(y))
    converted = mtd.convert(theirs, mode=[("kd_loss", kd_loss_config(theirs, copy.deepcopy(mentor), method))])
    converted.train()  # returns None: do not chain it
    logits = converted(x)
    _step(converted, converted.compute_kd_loss(student_loss=cross_entropy(logits, y).mean() if method != SQAKD(3.0) else None))
    exported = mtd.export(converted)
    for (name, expected), actual in zip(own.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_an_exported_student_is_saved_restored_and_exported_to_onnx(prepared, network, mentor, batches, tmp_path):
    import modelopt.torch.distill as mtd
    import modelopt.torch.opt as mto

    from qakd_plugin.integrations.modelopt_distill import kd_loss_config

    student, x = prepared(), batches[0][0]
    converted = mtd.convert(student, mode=[("kd_loss", kd_loss_config(student, mentor))])
    assert not [name for name in converted.state_dict() if "teacher" in name]
    converted.train()
    converted(x)
    with torch.no_grad():
        converted.compute_kd_loss()
    assert training_records(converted) == (), "no loss has trained it yet"
    for _ in range(2):
        converted(x)
        converted.compute_kd_loss().backward()
    student = mtd.export(converted)
    student.eval()
    buffer = io.BytesIO()
    mto.save(student, buffer)
    buffer.seek(0)
    restored = mto.restore(Structures(functional=True), buffer).eval()
    assert torch.equal(restored(x), student(x))
    assert export_onnx(student, x, tmp_path / "student.onnx").parity.weight_codes > 0
    assert record_of(tmp_path / "student.onnx").training == (TrainingRecord("SQAKD", "own"),)


def test_quantizing_after_converting_would_quantize_the_teacher(network, mentor, batches):
    """Why the order matters; if ModelOpt changes this, the documentation can be shorter."""
    import modelopt.torch.distill as mtd
    import modelopt.torch.quantization as mtq

    from qakd_plugin.integrations.modelopt_distill import KLCriterion

    config = {"teacher_model": mentor, "criterion": KLCriterion()}
    converted = mtd.convert(copy.deepcopy(network), mode=[("kd_loss", config)])
    quantized = mtq.quantize(converted, mtq.INT8_DEFAULT_CFG, lambda model: model(batches[0][0]))
    assert any("_teacher_model" in name and name.endswith("weight_quantizer") for name, _ in quantized.named_modules())
    assert not any(p.requires_grad for p in mentor.parameters())  # and the caller's teacher stays switched off


def test_what_a_criterion_cannot_express_is_refused(prepared, mentor):
    from qakd_plugin.integrations.modelopt_distill import kd_loss_config

    with pytest.raises(QakdError, match=r"QKD\(\) cannot be expressed .* qakd.distill or qakd.attach"):
        kd_loss_config(prepared(), mentor, QKD())
    with pytest.raises(QakdError, match=r"prepared by torch_ao: use qakd\.attach"):
        kd_loss_config(prepared("torch_ao"), mentor)
    with pytest.raises(QakdError, match="holds no quantizer"):
        kd_loss_config(mentor, mentor)


# -- Lightning


def _fit(module, train, validation=None, epochs=2, **options):
    import lightning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the number of workers of the loaders
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **({"enable_checkpointing": False} | options),
        )
        trainer.fit(module, train, validation)
    return trainer


def _clip(adapter, student, limit=1.0):
    of_quantizers = quantizer_parameters(adapter, student)
    for part in (False, True):
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if (id(p) in of_quantizers) == part], limit)


def _by_hand(student, teacher, batches, epochs, settings, losses, teacher_losses=None, together=0):
    """A loop as anyone would write it: one loss per epoch, the cosine over all steps."""
    adapter = adapter_for(student)
    optimizer = student_optimizer(adapter, student, settings)
    schedule = cosine_schedule(optimizer, epochs * len(batches), settings.warmup)
    if together:
        second = teacher_optimizer(teacher, settings)
        second_schedule = cosine_schedule(second, together * len(batches), settings.warmup)
    adapter.set_mode(student, True)
    adapter.freeze_ranges(student, False)
    for epoch in range(epochs):
        learns = teacher_losses is not None and teacher_losses[epoch] is not None
        teacher.train(learns)
        for x, y in batches:
            own = student(x)
            other = teacher(x)
            losses[epoch](own, other.detach(), y).backward()
            if learns:
                teacher.zero_grad()
                teacher_losses[epoch](other, own.detach(), y).backward()
                torch.nn.utils.clip_grad_norm_(teacher.parameters(), settings.grad_clip)
                second.step()
                second_schedule.step()
            _clip(adapter, student, settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    adapter.freeze_ranges(student, True)
    adapter.set_mode(student, False)


def _imitate(own, other, y):
    return kl_divergence(own, other, 4.0).mean()


def _supervise(own, other, y):
    return cross_entropy(own, y).mean()


def _both(own, other, y):
    return cross_entropy(own, y).mean() + kl_divergence(own, other, 2.0).mean()


@pytest.mark.parametrize(
    ("toolkit", "quantizers"),
    [("modelopt", None), ("modelopt", LSQ()), ("pt2e", None), ("torchao", None), ("torch_ao", None), ("torch_ao_eager", None)],
)
def test_lightning_trains_bit_for_bit_like_a_hand_written_loop(toolkit, quantizers, prepared, mentor, digits):
    from qakd_plugin.integrations.lightning import DistillationModule

    x, y = digits.train[0][:192], digits.train[1][:192]
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    by_hand, student = prepared(toolkit, quantizers), prepared(toolkit, quantizers)
    settings = Settings(lr=2e-3, grad_clip=0.1)  # which clips every step: the norm's last bit must be the same, too
    teacher, weights = copy.deepcopy(mentor), copy.deepcopy(mentor)
    _by_hand(by_hand, teacher, list(loader), 2, settings, [_imitate] * 2)
    module = DistillationModule(student, mentor, SQAKD(4.0), settings)
    assert not [name for name, _ in module.named_parameters() if "teacher" in name]
    # A validation in the middle, which must leave no trace.
    held_out = DataLoader(TensorDataset(*(part[:64] for part in digits.validation)), batch_size=64)
    trainer = _fit(module, loader, held_out)
    _assert_equal_state(by_hand, student)
    _assert_equal_state(weights, mentor)
    assert not student.training
    assert 0 <= float(trainer.callback_metrics["val_agreement"]) <= 1
    assert not any(quantizer.module._forward_pre_hooks for quantizer in adapter_for(student).quantizers(student))


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_lightning_walks_the_phases_of_qkd_and_trains_a_copy_of_the_teacher(toolkit, prepared, mentor, digits):
    from qakd_plugin.integrations.lightning import DistillationModule

    loader = DataLoader(TensorDataset(digits.train[0][:128], digits.train[1][:128]), batch_size=64)
    by_hand, student = prepared(toolkit), prepared(toolkit)
    settings = Settings(lr=2e-3, teacher_lr=1e-3, grad_clip=0.1)
    teacher, weights = copy.deepcopy(mentor), copy.deepcopy(mentor)
    _by_hand(by_hand, teacher, list(loader), 3, settings, [_supervise, _both, _both], [None, _both, None], together=1)
    method = QKD(1, 1, 1, temperature=2.0) if toolkit == "pt2e" else QKD(1 / 3, 1 / 3, 1 / 3)
    module = DistillationModule(student, mentor, method, settings)
    _fit(module, loader, epochs=3)
    _assert_equal_state(by_hand, student)
    _assert_equal_state(teacher, module.teacher)
    _assert_equal_state(weights, mentor)
    assert any(name.startswith("teacher.") for name in module.state_dict())


def test_lightning_ends_where_distill_ends(prepared, mentor, digits):
    from qakd_plugin.integrations.lightning import DistillationModule

    loader = DataLoader(TensorDataset(*(part[:128] for part in digits.train)), batch_size=64)
    students, method = [prepared("torch_ao"), prepared("torch_ao")], QKD(1 / 3, 1 / 3, 1 / 3)
    result = distill(students[0], mentor, loader, method=method, epochs=3, grad_clip=0.1)
    module = DistillationModule(students[1], mentor, method, Settings(grad_clip=0.1))
    _fit(module, loader, epochs=3)
    _assert_equal_state(*students)
    _assert_equal_state(result.teacher, module.teacher)


def test_lightning_checkpoints_go_on_bit_for_bit_and_hold_no_frozen_teacher(prepared, mentor, digits, tmp_path):
    """With a toolkit whose state says whether ranges are frozen: a checkpoint is written right after a validation."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from qakd_plugin.integrations.lightning import DistillationModule

    loader = DataLoader(TensorDataset(*(part[:128] for part in digits.train)), batch_size=64)
    held_out = DataLoader(TensorDataset(*(part[:64] for part in digits.validation)), batch_size=64)
    whole, first = prepared("torch_ao"), prepared("torch_ao")
    _fit(DistillationModule(whole, mentor), loader, held_out)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    _fit(DistillationModule(first, mentor), loader, held_out, enable_checkpointing=True, callbacks=[keep])
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)["state_dict"]
    assert not [name for name in state if not name.startswith("student.")]
    resumed = prepared("torch_ao")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DistillationModule(resumed, mentor), loader, held_out, ckpt_path=tmp_path / "epoch=0.ckpt")
    _assert_equal_state(whole, resumed)


def test_lightning_under_bfloat16_quantizers_see_float32(prepared, mentor, digits):
    from qakd_plugin.integrations.lightning import DistillationModule

    student, seen = prepared("pt2e"), set()
    module = DistillationModule(student, mentor)

    loader = DataLoader(TensorDataset(*(part[:64] for part in digits.train)), batch_size=64)
    setup = module.setup

    def look_behind(stage):
        setup(stage)
        for quantizer in adapter_for(student).quantizers(student):
            quantizer.module.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))

    module.setup = look_behind
    _fit(module, loader, epochs=1, precision="bf16-mixed")
    assert seen == {torch.float32}


def test_lightning_trains_and_validates_networks_that_take_keywords():
    from qakd_plugin.integrations.lightning import DistillationModule

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 7)

        def forward(self, input_ids, attention_mask):
            return {"logits": self.head(self.embed(input_ids) * attention_mask[..., None])}

    torch.manual_seed(0)
    ids = torch.randint(20, (8, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones(8, 6), "labels": ids % 7}
    teacher = Tokens().eval()
    student = prepare(teacher, [batch])
    loader = DataLoader([batch], batch_size=None)
    trainer = _fit(DistillationModule(student, teacher, KD()), loader, loader, epochs=1)
    with torch.no_grad():
        own, other = (network(ids, batch["attention_mask"])["logits"].argmax(-1) for network in (student, teacher))
    assert float(trainer.callback_metrics["val_agreement"]) == pytest.approx(float((own == other).float().mean()))
    assert float(trainer.callback_metrics["val_accuracy"]) == pytest.approx(float((own == ids % 7).float().mean()))


def test_lightning_names_what_does_not_fit(prepared, mentor, digits):
    from qakd_plugin.integrations.lightning import DistillationModule

    loader = DataLoader(TensorDataset(digits.train[0][:64]), batch_size=64)
    with pytest.raises(QakdError, match=r"QKD counts 6 epochs itself: pass Trainer\(max_epochs=6\)"):
        _fit(DistillationModule(prepared(), mentor, QKD(2, 2, 2)), loader, epochs=2)
    with pytest.raises(LabelsRequiredError, match="QAT"):
        _fit(DistillationModule(prepared(), None, QAT()), loader, epochs=1)
    with pytest.raises(QakdError, match="teacher=None"):
        DistillationModule(prepared(), None)


# -- Hugging Face


class Dictionaries(Dataset):
    """Digits as a Trainer wants them."""

    def __init__(self, images, labels=None, name="x"):
        self.images, self.labels, self.name = images, labels, name

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        sample = {self.name: self.images[index]}
        return sample if self.labels is None else sample | {"labels": self.labels[index]}


def _arguments(folder, **options):
    from transformers import TrainingArguments

    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 32, "learning_rate": 2e-3, "weight_decay": 1e-4, "logging_steps": 1,
        "lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(defaults | options))


def _hand_written_steps(student, teacher, micro_batches, loss, settings, logits=lambda output: output, accumulate=1):
    """Losses of each step; the optimizer steps after every ``accumulate`` micro-batches."""
    optimizer = student_optimizer(adapter_for(student), student, settings)
    student.train()
    values = []
    for index, (x, y) in enumerate(micro_batches):
        with eval_mode(teacher), torch.no_grad():
            other = logits(teacher(x))
        value = loss(logits(student(x)), other, y)
        (value / accumulate).backward()
        values.append(float(value.detach()))
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [sum(values[i : i + accumulate]) / accumulate for i in range(0, len(values), accumulate)]


def _logged(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("quantizers", [None, LSQ()])
def test_hugging_face_without_labels_equals_hand_written_steps(quantizers, prepared, mentor, batches, tmp_path):
    from safetensors.torch import load_file

    from qakd_plugin.integrations.huggingface import DistillationTrainer

    by_hand, student = prepared(quantizers=quantizers), prepared(quantizers=quantizers)
    expected = _hand_written_steps(by_hand, mentor, batches[:2], _imitate, Settings(lr=2e-3))
    images = torch.cat([x for x, _ in batches[:2]])
    trainer = DistillationTrainer(student, _arguments(tmp_path), teacher=mentor, train_dataset=Dictionaries(images))
    trainer.train()
    assert _logged(trainer) == pytest.approx(expected, rel=1e-4)
    for (name, value), actual in zip(by_hand.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(value, actual), name
    assert not any(quantizer.module._forward_pre_hooks for quantizer in adapter_for(student).quantizers(student))
    trainer.save_model(tmp_path)
    again = prepared(quantizers=quantizers)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    _assert_equal_state(student, again)


def test_hugging_face_accumulates_labelled_micro_batches_and_evaluates(prepared, mentor, batches, tmp_path):
    from qakd_plugin.integrations.huggingface import DistillationTrainer

    def loss(own, other, y):
        return 0.5 * kl_divergence(own, other, 4.0).mean() + 0.5 * cross_entropy(own, y).mean()

    by_hand, student = prepared(), prepared()
    expected = _hand_written_steps(by_hand, mentor, batches[:4], loss, Settings(lr=2e-3), accumulate=2)
    data = Dictionaries(*(torch.cat(part) for part in zip(*batches[:4], strict=True)))
    trainer = DistillationTrainer(
        student,
        _arguments(tmp_path, gradient_accumulation_steps=2),
        teacher=mentor,
        method=KD(),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())},
    )
    trainer.train()
    assert _logged(trainer) == pytest.approx(expected, rel=1e-4)
    metrics = trainer.evaluate()
    student.eval()
    with torch.no_grad():  # in the Trainer's batches: a label on a tie may be another in a batch of another size
        answers = torch.cat([student(x).argmax(1) for x in data.images.split(trainer.args.eval_batch_size)])
    assert metrics["eval_accuracy"] == pytest.approx(float((answers == data.labels).float().mean()))


def test_hugging_face_trains_one_of_its_own_models(digits, batches, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    from qakd_plugin.integrations.huggingface import DistillationTrainer

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    teacher = ViTForImageClassification(config).eval()
    import modelopt.torch.quantization as mtq

    x = batches[0][0]
    by_hand, student = (
        mtq.quantize(copy.deepcopy(teacher), mtq.INT8_DEFAULT_CFG, lambda model: model(pixel_values=x)) for _ in range(2)
    )
    # Its forward takes **kwargs, of which the Trainer concludes that losses are divided already.
    settings = Settings(lr=2e-3)
    expected = _hand_written_steps(
        by_hand, teacher, batches[:4], _imitate, settings, lambda output: output.logits, accumulate=2
    )
    data = Dictionaries(*(torch.cat(part) for part in zip(*batches[:4], strict=True)), name="pixel_values")
    arguments = _arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = DistillationTrainer(student, arguments, teacher=teacher, train_dataset=data)
    trainer.train()
    assert _logged(trainer) == pytest.approx(expected, rel=1e-3)
    for (name, value), actual in zip(by_hand.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(actual, value, msg=lambda text, name=name: f"{name}: {text}")


def test_hugging_face_under_bfloat16_quantizers_see_float32(prepared, mentor, batches, tmp_path):
    from transformers import TrainerCallback

    from qakd_plugin.integrations.huggingface import DistillationTrainer

    student, seen, outputs = prepared(), set(), set()
    arguments = _arguments(tmp_path, bf16=True, max_steps=1)
    trainer = DistillationTrainer(student, arguments, teacher=mentor, train_dataset=Dictionaries(batches[0][0]))

    class Look(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):  # behind the hooks that training has put there
            for quantizer in adapter_for(student).quantizers(student):
                quantizer.module.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
            student.head.register_forward_hook(lambda _, args, output: outputs.add(output.dtype))

    trainer.add_callback(Look())
    trainer.train()
    assert seen == {torch.float32}
    assert outputs == {torch.bfloat16}


def test_hugging_face_refuses_phases_and_other_toolkits(prepared, mentor, batches, tmp_path):
    from qakd_plugin.integrations.huggingface import DistillationTrainer

    with pytest.raises(QakdError, match=r"QKD has 3 phases.*qakd.distill, or with qakd.attach"):
        DistillationTrainer(prepared(), _arguments(tmp_path), teacher=mentor, method=QKD())
    with pytest.raises(QakdError, match="prepared by torch_ao_eager"):
        DistillationTrainer(prepared("torch_ao_eager"), _arguments(tmp_path), teacher=mentor)
    unlabelled = Dictionaries(batches[0][0])
    trainer = DistillationTrainer(prepared(), _arguments(tmp_path), teacher=None, method=QAT(), train_dataset=unlabelled)
    with pytest.raises(LabelsRequiredError, match="QAT"):
        trainer.train()


# -- all of them


def test_features_are_refused_and_not_left_out(prepared, mentor, tmp_path):
    from qakd_plugin.integrations.huggingface import DistillationTrainer
    from qakd_plugin.integrations.lightning import DistillationModule
    from qakd_plugin.integrations.modelopt_distill import kd_loss_config

    method = SQAKD(features=Features(["head"]))
    for make in (
        lambda: DistillationTrainer(prepared(), _arguments(tmp_path), teacher=mentor, method=method),
        lambda: DistillationModule(prepared(), mentor, method),
        lambda: kd_loss_config(prepared(), mentor, method),
    ):
        with pytest.raises(QakdError, match=r"features=...*compares logits only"):
            make()
