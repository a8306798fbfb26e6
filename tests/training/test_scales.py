"""Scales alone: nothing else moves, and they move as by hand."""

import pytest
import torch
from interruption import Stop, StopAt

from qakd_plugin import EWGS, KD, LSQ, PACT, DoReFa, QakdError, Settings, attach, distill, export_onnx, use_quantizers
from qakd_plugin.toolkits import adapter_for


def _learned(student):
    adapter = adapter_for(student)
    holders = [quantizer.module for quantizer in adapter.quantizers(student)]
    of_quantizers = {id(parameter) for holder in holders for parameter in holder.parameters()}
    named = student.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if id(parameter) in of_quantizers}


def _copied(student):
    return {name: value.clone() for name, value in student.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("toolkit", "config"),
    [("modelopt", LSQ()), ("modelopt", PACT()), ("torch_ao", EWGS(delta=1e-3, refresh_every=1)), ("pt2e", LSQ())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_scales_move_and_nothing_else_by_a_bit(make_student, teacher, batches, toolkit, config):
    student = use_quantizers(make_student(toolkit, 3), config)
    before, learned, asked = _copied(student), _learned(student), [p.requires_grad for p in student.parameters()]
    # With labels and without held-out batches the last epoch is returned, whether it is better than the start or not.
    distill(student, teacher, batches[:3], method=KD(), epochs=2, quantizer_lr=1e-1, trainable="scales")
    after = _copied(student)
    kept = [name for name in after if not name.endswith(("qakd_delta", "_enabled"))]  # curvature, and whether ranges follow
    moved = {name for name in kept if not torch.equal(after[name], before[name])}
    assert moved
    assert moved <= learned
    assert [p.requires_grad for p in student.parameters()] == asked


def test_the_steps_are_those_of_an_optimizer_that_holds_the_scales_alone(make_student, teacher, batches):
    student, expected = (use_quantizers(make_student(bits=3), LSQ()) for _ in range(2))
    options = {"quantizer_lr": 0.05, "warmup": 0.0, "grad_clip": None, "val_loader": batches[:1]}
    result = distill(student, teacher, batches, epochs=1, trainable="scales", **options)
    assert result.metrics["epoch"] == 0  # else it would be the start
    learned = _learned(expected)
    for name, parameter in expected.named_parameters():
        parameter.requires_grad_(name in learned)
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], 0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    with attach(expected, teacher) as kd:
        kd.train()
        for x, _ in batches:
            expected(x)
            kd.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        kd.eval()
    torch.testing.assert_close(dict(student.named_parameters()), dict(expected.named_parameters()))


def test_a_stopped_run_goes_on_with_the_same_bits_and_not_with_all_weights(make_student, teacher, batches, tmp_path):
    def student():
        return use_quantizers(make_student(bits=3), LSQ())

    options = {"epochs": 2, "trainable": "scales", "seed": 0, "quantizer_lr": 0.05, "val_loader": batches[:1]}
    whole = distill(student(), teacher, batches, **options)
    with pytest.raises(Stop):
        distill(student(), teacher, batches, checkpoint_dir=tmp_path, checkpoint_every=2, callbacks=[StopAt(8)], **options)
    with pytest.raises(QakdError, match="belongs to another run: settings"):
        distill(student(), teacher, batches, checkpoint_dir=tmp_path, resume=True, **options | {"trainable": "all"})
    resumed = distill(student(), teacher, batches, checkpoint_dir=tmp_path, resume=True, **options)
    for name, value in _copied(whole.model).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_what_is_exported_computes_what_was_trained(make_student, teacher, batches, digits, tmp_path):
    """Parity is proven in the export, or it raises; the codes of the file are of the weights as they were before."""
    student = use_quantizers(make_student(bits=4), LSQ())
    distill(student, teacher, batches, epochs=1, trainable="scales", quantizer_lr=0.05, val_loader=batches[:1])
    assert export_onnx(student, digits.test[0][:8], tmp_path / "s.onnx", target="onnxruntime").path.is_file()


def test_where_nothing_would_be_trained_or_two_things_are_asked_it_says_so(make_student, teacher, batches):
    for student in (make_student(), use_quantizers(make_student(), DoReFa())):
        with pytest.raises(
            QakdError, match=r"none of the quantizers .* learns a scale.*qakd.use_quantizers\(prepared_model, qakd.LSQ"
        ):
            distill(student, teacher, batches, epochs=1, trainable="scales")
    with pytest.raises(QakdError, match=r'trainable=.weights. is unknown: use "all" or "scales"'):
        Settings(trainable="weights")
    with pytest.raises(QakdError, match=r"lr=0.1 is the rate of weights.*pass quantizer_lr="):
        Settings(trainable="scales", lr=0.1)
    with pytest.raises(QakdError, match=r"recalibrate_batches=8 moves the statistics"):
        Settings(trainable="scales", recalibrate_batches=8)
