"""EWGS's delta is refreshed by distill, and other loops say that they do not."""

import pytest

from qakd_plugin import EWGS, LSQ, attach, use_quantizers
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training import curvature


@pytest.fixture
def student(make_student):
    return lambda quantizers: use_quantizers(make_student(), quantizers)


def test_a_refresh_is_due_every_so_many_epochs(student):
    model = student(EWGS(refresh_every=3))
    assert [epoch for epoch in range(7) if curvature.is_due(adapter_for(model), model, epoch)] == [0, 3, 6]
    model = student(LSQ())
    assert not curvature.is_due(adapter_for(model), model, 0)


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if "never refreshes delta" in record.getMessage()]


def test_attach_says_once_that_delta_is_not_refreshed(student, teacher, batches, caplog):
    model = student(EWGS(refresh_every=5))
    with attach(model, teacher) as kd:
        for x, _ in batches[:2]:
            model(x)
            kd.loss()
    (warning,) = _warnings(caplog)
    assert "refresh_every=5" in warning


@pytest.mark.parametrize("quantizers", [LSQ(), EWGS(refresh_every=0)])
def test_nothing_is_said_where_nothing_is_to_be_refreshed(quantizers, student, teacher, caplog):
    with attach(student(quantizers), teacher):
        pass
    assert not _warnings(caplog)


def test_lightning_says_once_that_delta_is_not_refreshed(student, teacher, caplog):
    pytest.importorskip("lightning")
    from qakd_plugin.integrations.lightning import DistillationModule

    DistillationModule(student(EWGS()), teacher)
    assert len(_warnings(caplog)) == 1


def test_hugging_face_says_once_that_delta_is_not_refreshed(student, teacher, caplog, tmp_path):
    transformers = pytest.importorskip("transformers")
    from qakd_plugin.integrations.huggingface import DistillationTrainer

    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    DistillationTrainer(student(EWGS()), args, teacher=teacher)
    assert len(_warnings(caplog)) == 1
