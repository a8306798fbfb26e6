"""What each process of test_attach's data parallel test runs; a module of its own, since spawned processes import it."""

import copy
import warnings

import torch
import torch.distributed as dist
from nets import Structures
from torch.nn.parallel import DistributedDataParallel

from qakd_plugin import KD, QKD, SQAKD, attach, prepare

TOOLKITS = ["modelopt", "pt2e", "torchao", "torch_ao", "torch_ao_eager"]
BATCH = 32


def named_gradients(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loaded(path):
    """The float network, and one batch of images and labels."""
    saved = torch.load(path, weights_only=True)
    network = Structures(functional=True)
    network.load_state_dict(saved["network"])
    return network.eval(), saved["x"], saved["y"]


def gradients(network, x, y, rank=None):
    """Gradients of one step for every toolkit, attached before and after wrapping; of the whole batch without a rank."""
    part = slice(None) if rank is None else slice(BATCH // 2 * rank, BATCH // 2 * (rank + 1))
    found = {}
    for toolkit in TOOLKITS:
        student = prepare(network, [x], toolkit)
        for when, method in (("before", SQAKD()), ("after", KD())):
            student.zero_grad()
            kd = attach(student, network, method) if when == "before" else None
            called = student if rank is None else DistributedDataParallel(student)
            kd = kd or attach(called, network, method)
            kd.eval()  # BatchNorm would see half a batch
            called(x[part])
            kd.loss(y[part]).backward()
            kd.detach()
            found[f"{toolkit} {when}"] = named_gradients(student)
    found |= _co_studying(network, prepare(network, [x], "modelopt"), x[part], y[part], wrap=rank is not None)
    return found


def _co_studying(network, student, x, y, wrap):
    """Both networks learn, each in a wrapper of its own."""
    teacher = copy.deepcopy(network)
    called, mentor = (DistributedDataParallel(student), DistributedDataParallel(teacher)) if wrap else (student, teacher)
    with attach(called, mentor, QKD()) as kd:
        kd.next_phase()
        kd.eval()
        called(x)
        kd.loss(y).backward()
        kd.teacher_loss(y).backward()
    return {"co-studying student": named_gradients(student), "co-studying teacher": named_gradients(teacher)}


def work(rank, folder):
    """One process of two."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(gradients(*loaded(folder / "batch.pt"), rank), folder / f"gradients{rank}.pt")
    dist.destroy_process_group()
