"""Distillation by a Hugging Face Trainer, without labels.

    python examples/by_feature/hugging_face.py

A small vision transformer of the transformers library, quantized to W4A4 by ModelOpt, on scikit-learn's digits.
"""

import tempfile

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.integrations.huggingface import DistillationTrainer


@torch.no_grad()
def agreement(student: torch.nn.Module, teacher: torch.nn.Module, images: torch.Tensor) -> float:
    """Share of images on which both networks, in eval mode, say the same."""
    return float((student(images).logits.argmax(1) == teacher(images).logits.argmax(1)).float().mean())


def train_teacher(model: torch.nn.Module, loader: torch.utils.data.DataLoader, epochs: int) -> torch.nn.Module:
    """Full precision, with labels."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for _ in range(epochs):
        for x, y in loader:
            torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def main(steps: int = 60, epochs: int = 5) -> float:
    """Run the example; returns how often student and teacher agree on the test split."""
    torch.manual_seed(0)
    digits = load()
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    teacher = train_teacher(ViTForImageClassification(config), digits.loader("train", shuffle=True), epochs)
    images = digits.train[0]
    student = qakd.prepare(teacher, [images[:256]], "modelopt", weight_bits=4, activation_bits=4)
    print(f"before training they agree on {agreement(student.eval(), teacher, digits.test[0]):.4f}")

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=1e-3, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        data = [{"pixel_values": image} for image in images]
        trainer = DistillationTrainer(student, arguments, teacher=teacher, method=qakd.SQAKD(), train_dataset=data)
        trainer.train()
    result = agreement(student.eval(), teacher, digits.test[0])
    print(f"after {steps} steps they agree on {result:.4f}")
    return result


if __name__ == "__main__":
    main()
