"""A causal language model with 4-bit weights in blocks of 32, quantized by ModelOpt's own call, distilled token by token.

    python examples/by_feature/causal_lm.py

A Llama writes digits pixel by pixel; its teacher has the same size. No labels are learned from: they are for perplexity.
"""

import copy

import modelopt.torch.quantization as mtq
import torch
from torchmetrics.text import Perplexity
from transformers import LlamaConfig, LlamaForCausalLM

import qakd_plugin as qakd
from qakd_plugin.demo.data import load

INT4_BLOCKS = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}, "enable": True},
        {"quantizer_name": "*lm_head*", "enable": False},
        {"quantizer_name": "*embed_tokens*", "enable": False},
    ],
    "algorithm": "max",
}


def batches(images: torch.Tensor, labels: torch.Tensor, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """The digit itself, then the brightness (0 to 7) of each of 16 pixels; labels are the same tokens."""
    pixels = (torch.nn.functional.avg_pool2d(images[:, 0], 8) * 7).round().long().flatten(1)
    tokens = torch.cat([labels[:, None] + 8, pixels], 1)
    return [{"input_ids": part, "labels": part} for part in tokens.split(size)]


def main(epochs: int = 2, teacher_epochs: int = 5, width: int = 64) -> tuple[float, float, float]:
    """Run the example; returns the perplexity of the quantized model before and after, and of its teacher."""
    torch.manual_seed(0)
    digits = load()
    train, held_out = batches(*digits.train), batches(*digits.validation)
    config = LlamaConfig(
        vocab_size=18,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    teacher = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(teacher_epochs):
        for batch in train:
            teacher(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.eval()

    def perplexity(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(torch.stack([model(**batch).loss for batch in held_out]).mean().exp())

    student = mtq.quantize(copy.deepcopy(teacher), INT4_BLOCKS)
    before = perplexity(student)
    result = qakd.distill(
        student,
        teacher,
        train,
        method=qakd.SQAKD(match={"logits": qakd.KL(dim=-1)}),
        epochs=epochs,
        val_loader=held_out,
        metric=Perplexity(),
        metric_fn=lambda logits, labels: (logits[:, :-1], labels[:, 1:]),
    )
    own, other = result.metrics["val_perplexity"], result.metrics["val_teacher_perplexity"]
    print(f"perplexity in INT4 {before:.3f}, after distillation {own:.3f}, of the teacher {other:.3f}")
    return before, float(own), float(other)


if __name__ == "__main__":
    main()
