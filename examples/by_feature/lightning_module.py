"""Distillation by a Lightning Trainer, which keeps the epoch with the best validation accuracy.

    python examples/by_feature/lightning_module.py

QKD here: the student alone, both networks together, the trained teacher frozen.
"""

import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float
from qakd_plugin.integrations.lightning import DistillationModule
from qakd_plugin.training.config import Settings


def main(epochs: int = 3, width: int = 8, toolkit: str = "modelopt") -> float:
    """Run the example; returns the student's accuracy on the test split."""
    lightning.seed_everything(0, verbose=False)
    digits = load()
    loader, held_out = digits.loader("train", shuffle=True), digits.loader("validation")
    teacher = train_float(DigitNet(width), loader, 3 * epochs)
    student = qakd.prepare(teacher, list(loader)[:8], toolkit, weight_bits=4, activation_bits=4)

    module = DistillationModule(student, teacher, qakd.QKD(1 / 3, 1 / 3, 1 / 3), Settings(lr=1e-3, teacher_lr=1e-4))
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(Path(folder), monitor="val_accuracy", mode="max")
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[best],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, held_out)
        module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    module.finish()  # checkpoints hold ranges that may still follow
    (metrics,) = trainer.test(module, digits.loader("test"), verbose=False)
    print(f"student {metrics['test_accuracy']:.4f}, agrees with its teacher on {metrics['test_agreement']:.4f}")
    return metrics["test_accuracy"]


if __name__ == "__main__":
    main()
