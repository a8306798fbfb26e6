"""What each augmentation costs, as a share of one SQAKD step.

    python benchmarks/augmentation_cost.py --out benchmarks/results/augmentation_cost.json

Batches of 128 colour images 32x32, on the device where training runs. The step is that of distill_step.py: ResNet-20 prepared
by ModelOpt at W4A4 with LSQ, a teacher of the same size, SGD. Every round runs the step and each augmentation once, in turn;
shares are medians over rounds of (augmentation / step of the same round). Bars: 25 % on a CPU, 10 % on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distill_step
import page_tables
import torch

from qakd_plugin._common.console import track
from qakd_plugin._common.files import write_atomic
from qakd_plugin.augment.candidates import Candidate, default_candidates
from qakd_plugin.runtimes.host import environment, is_busy

RESULTS = page_tables.RESULTS / "augmentation_cost.json"
BARS = {"cpu": 0.25, "cuda": 0.10}


def measure(batch: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds and share of a step of every candidate."""
    step = distill_step.ours(batch, device)
    images = torch.rand(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)
    candidates = [candidate for candidate in default_candidates() if candidate.name != "none"]
    shares: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in track(range(rounds + 2), "rounds"):
        base = _timed(step, device)
        for candidate in candidates:
            own = _timed(lambda candidate=candidate: candidate(images, labels, num_classes=10), device)  # type: ignore[misc]
            if number >= 2:
                shares[candidate.name].append(own / base)
                times[candidate.name].append(own)
    return [_row(candidate, shares[candidate.name], times[candidate.name]) for candidate in candidates]


def _row(candidate: Candidate, shares: list[float], times: list[float]) -> dict[str, Any]:
    return {"candidate": candidate.name, "share": statistics.median(shares), "ms": 1e3 * statistics.median(times)}


def _timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def make_table(document: dict[str, Any]) -> str:
    """Markdown: plain candidates and with CutMix."""
    share = {row["candidate"]: f"{100 * row['share']:.0f} %" for row in document["rows"]}
    plain = [name for name in share if name != "cutmix" and not name.endswith("+cutmix")]
    rows = [["none", "0", share["cutmix"]], *([name, share[name], share[f"{name}+cutmix"]] for name in plain)]
    return page_tables.markdown(["augmentation", "share of a step", "with CutMix"], rows)


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=BARS)
    parser.add_argument("--out", type=Path, help="JSON file; the table in docs/measured.md is written with the committed one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    busy, bar = is_busy(), BARS[options.device]
    rows = measure(options.batch, options.device, options.rounds)
    for row in rows:
        verdict = "met" if row["share"] <= bar else "MISSED"
        share = f"{100 * row['share']:5.1f} % of a step"
        print(f"{row['candidate']:28s} {row['ms']:7.1f} ms   {share}   bar {100 * bar:.0f} % {verdict}")
    if busy:
        print("The machine was busy when this began: take the shares with care.")
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k != "out"} | {"busy": busy}
        document = {"environment": environment(), "settings": settings, "rows": rows}
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        print(options.out)
        if options.out.resolve() == RESULTS:
            page_tables.write_table("augmentation_cost", make_table(document))


if __name__ == "__main__":
    main()
