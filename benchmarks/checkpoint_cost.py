"""What a checkpoint of ResNet-50 costs: with its digest, and with the look for numbers that are not finite.

    python benchmarks/checkpoint_cost.py --rounds 5

The ways take turns, in another order each round; the median of each is printed, of elapsed time, which waits for the disk,
and of processor time, which other work on the machine changes little. "As before" is what version 0.1 did.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from qakd_plugin._common.files import write_atomic
from qakd_plugin.training.checkpoint import CheckpointStore, not_finite


def state() -> dict[str, Any]:
    """Of a run: the network, its optimizer after a step, and the best weights."""
    model = torchvision.models.resnet50()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"student": model.state_dict(), "optimizer": optimizer.state_dict(), "best": {"state": dict(model.state_dict())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    saved = state()
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "run", {})

        def without_digest() -> None:
            buffer = io.BytesIO()
            torch.save({"fingerprint": {}, "state": saved}, buffer)
            write_atomic(Path(folder) / "plain.pt", buffer.getvalue())

        def with_digest() -> None:
            store.save(1, saved)

        def with_digest_and_look() -> None:
            if not_finite(saved) is None:
                store.save(1, saved)

        ways: dict[str, Callable[[], None]] = {
            "without a digest": without_digest,
            "with a digest, as before": with_digest,
            "with a digest and the look": with_digest_and_look,
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        order = list(ways.items())
        for number in range(options.rounds + 1):
            for name, way in order:
                started = time.perf_counter(), time.process_time()
                way()
                if number:  # the first round warms up
                    seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
            order.append(order.pop(0))
    medians = {name: [statistics.median(times) for times in zip(*found, strict=True)] for name, found in seconds.items()}
    before = medians["with a digest, as before"]
    for name, (elapsed, cpu) in medians.items():
        print(
            f"{name}: {elapsed:.2f} s, {elapsed / before[0]:.2f} of before; {cpu:.2f} s of a processor, {cpu / before[1]:.2f}"
        )


if __name__ == "__main__":
    main()
