"""A text encoder of Hugging Face: batches are mappings, and the student learns from the teacher's logits without labels.

    python examples/by_feature/text_encoder.py

BERT with random weights reads a digit as 16 tokens, one for the brightness of each pixel, and some padding.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

import qakd_plugin as qakd
from qakd_plugin.demo.data import load


def batches(images: torch.Tensor, labels: torch.Tensor, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """What a tokenizer and a collator yield: token ids, the mask of those that count, labels."""
    pixels = 1 + (torch.nn.functional.avg_pool2d(images[:, 0], 8) * 14).round().long().flatten(1)
    tokens = torch.nn.functional.pad(pixels, (0, 4))
    mask = (tokens > 0).long()
    columns = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return [{key: column[start : start + size] for key, column in columns.items()} for start in range(0, len(tokens), size)]


def main(epochs: int = 2, teacher_epochs: int = 10, width: int = 64) -> float:
    """Run the example; returns how often the student is right."""
    torch.manual_seed(0)
    digits = load()
    train, held_out = batches(*digits.train), batches(*digits.validation)
    config = BertConfig(
        vocab_size=16, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, num_labels=10
    )
    teacher = BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
    for _ in range(teacher_epochs):
        for batch in train:
            teacher(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.eval()

    student = qakd.prepare(teacher, train[:4], weight_bits=4, activation_bits=8)
    result = qakd.distill(student, teacher, train, method=qakd.SQAKD(), epochs=epochs, val_loader=held_out)
    print(f"{result.metrics['val_accuracy']:.3f}, its teacher {result.metrics['val_teacher_accuracy']:.3f}")
    return float(result.metrics["val_accuracy"])


if __name__ == "__main__":
    main()
