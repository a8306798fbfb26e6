"""Distillation in a training loop of your own, with gradient accumulation and autocast.

    python examples/by_feature/own_loop.py

Prepares a W4A4 student of a small network for scikit-learn's digits and trains it against that network without labels.
"""

import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.config import Settings
from qakd_plugin.training.optimizers import student_optimizer


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose label a model in eval mode finds."""
    return float((model(images).argmax(1) == labels).float().mean())


def main(epochs: int = 3, teacher_epochs: int = 10, width: int = 8, micro_batches: int = 2, toolkit: str = "modelopt") -> float:
    """Run the example; returns the student's accuracy on the test split."""
    torch.manual_seed(0)
    digits = load()
    teacher = train_float(DigitNet(width), digits.loader("train", shuffle=True), teacher_epochs)
    loader = digits.loader("train", labels=False, batch_size=32, shuffle=True)
    student = qakd.prepare(teacher, list(loader)[:8], toolkit, weight_bits=4, activation_bits=4)

    optimizer = student_optimizer(adapter_for(student), student, Settings(lr=1e-3))
    with qakd.attach(student, teacher, method=qakd.SQAKD(temperature=4.0)) as kd:
        for epoch in range(epochs):
            kd.train()  # and not student.train(), which PT2E forbids
            for index, x in enumerate(loader):
                with torch.autocast(x.device.type, dtype=torch.bfloat16):
                    student(x)
                loss = kd.loss()
                (loss / micro_batches).backward()
                if (index + 1) % micro_batches == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            kd.eval()  # ranges frozen
            print(f"epoch {epoch}: loss {float(loss):.4f}, accuracy {accuracy(student, *digits.validation):.4f}")
    print(f"teacher {accuracy(teacher, *digits.test):.4f}, student {accuracy(student, *digits.test):.4f}")
    return accuracy(student, *digits.test)


if __name__ == "__main__":
    main()
