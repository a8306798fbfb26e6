"""What each process of test_sharding's two runs; a module of its own, since spawned processes import it."""

import copy
import warnings

import torch
import torch.distributed as dist
from torch import nn

from qakd_plugin import LSQ, SQAKD, attach, prepare, use_quantizers
from qakd_plugin.training.distributed.sharding import gathered, shard

BATCH, STEPS = 16, 4


class Tower(nn.Module):
    """Blocks in a list, as transformers keep theirs; (N, 16) inputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(32, 32)) for _ in range(2))
        self.head = nn.Linear(32, 10)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.relu(x)) * self.temperature


def networks(toolkit):
    """Student, teacher and a batch, the same in every process."""
    torch.manual_seed(0)
    teacher = Tower().eval()
    x = torch.randn(BATCH, 16)
    student = prepare(teacher, [x], toolkit, weight_bits=4, activation_bits=4)
    if toolkit == "modelopt":
        use_quantizers(student, LSQ())
    return student, teacher, x


def trained(student, teacher, x):
    """A few steps on ``x``, gradients clipped."""
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9)  # Adam makes steps of rounding errors
    with attach(student, teacher, SQAKD()) as kd:
        kd.train()
        for _ in range(STEPS):
            student(x)
            kd.loss().backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        kd.eval()
    return student


def work(rank, folder, toolkits):
    """One process of two: divided networks, half of the batch."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for toolkit in toolkits:
        student, teacher, x = networks(toolkit)
        student, teacher = shard(student), shard(copy.deepcopy(teacher).requires_grad_(False))
        trained(student, teacher, x[rank * BATCH // 2 : (rank + 1) * BATCH // 2])
        held = sum(parameter.to_local().numel() for parameter in student.parameters())
        torch.save({"state": gathered(student), "held": held}, folder / f"{toolkit}-{rank}.pt")
    dist.destroy_process_group()
