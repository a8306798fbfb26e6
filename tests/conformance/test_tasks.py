"""Networks of every task, each from preparation to the runtimes.

A part that meets every kind of task, every toolkit and every method runs by default; `make matrix` runs all cells, and
`benchmarks/conformance.py` writes what came of them.
"""

import json

import conformance
import pytest
from conformance import FIGURES, TOOLKITS, check_deployment, check_training
from page_tables import read_table
from reference_tasks import TASKS

from qakd_plugin import QakdError

TRAINED = {
    ("classification", "torch_ao", "QKD"),
    ("binary, one logit", "torch_ao_eager", "QAT"),
    ("multi-label", "torchao", "SQAKD"),
    ("depth map, U-Net", "modelopt", "QAT"),
    ("detection, RetinaNet", "modelopt", "QKD"),
    ("image classification, ViT", "pt2e", "SQAKD"),
    ("segmentation, SegFormer", "torchao", "QAT"),
    ("embeddings, BERT", "torchao", "QKD"),
    ("causal language model, Llama", "modelopt", "SQAKD"),
    ("keyword spotting, Conv1d + GRU", "pt2e", "QKD"),
}
DEPLOYED = {
    ("binary, one logit", "torch_ao_eager"),
    ("depth map, U-Net", "modelopt"),
    ("detection, YOLO-like with DFL", "pt2e"),
    ("embeddings, BERT", "torchao"),
    ("causal language model, Llama", "modelopt"),
    ("keyword spotting, Conv1d + GRU", "torch_ao"),
}
pytestmark = pytest.mark.filterwarnings("ignore")


def _cells(covering, *more):
    for task in TASKS:
        for toolkit in TOOLKITS:
            for rest in more or ((),):
                key = (task.name, toolkit, *rest)
                marks = () if key in covering else (pytest.mark.matrix,)
                yield pytest.param(task, toolkit, *rest, id="-".join(key), marks=marks)


def _known(task, toolkit, part):
    """What the table says of a cell."""
    return json.loads(FIGURES.read_text())[task.name][toolkit][part]


def _as_the_table_says(work, known):
    if known:
        with pytest.raises(QakdError):
            work()
    else:
        work()


@pytest.mark.parametrize(("task", "toolkit", "method"), _cells(TRAINED, ("SQAKD",), ("QKD",), ("QAT",)))
def test_a_task_trains_goes_on_after_a_stop_and_has_the_losses_of_a_loop_by_hand(task, toolkit, method, tmp_path):
    _as_the_table_says(lambda: check_training(task, toolkit, method, tmp_path), _known(task, toolkit, method))


@pytest.mark.parametrize(("task", "toolkit"), _cells(DEPLOYED))
def test_a_tasks_metric_is_the_same_in_torch_and_in_each_runtime(task, toolkit, tmp_path):
    _as_the_table_says(lambda: check_deployment(task, toolkit, tmp_path), _known(task, toolkit, "files"))


def test_cells_of_the_covering_part_are_no_refusals():
    assert not any(_known(task, toolkit, method) for task in TASKS for name, toolkit, method in TRAINED if name == task.name)
    assert not any(_known(task, toolkit, "files") for task in TASKS for name, toolkit in DEPLOYED if name == task.name)
    assert len({name for name, *_ in TRAINED} & {task.name for task in TASKS}) == len(TRAINED)


def test_the_table_is_what_its_script_writes():
    assert read_table("conformance") == conformance.table(json.loads(FIGURES.read_text()))
