"""Rollout tokens to the same held-out score with the prompt pool, against stock draws of three sizes (`launch.lab.worth`).

Twenty runs of one to three minutes each, so that it is measured only when it is named: `launch.lab.bench worth`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from polyphony.launch.lab.bench_result import Result, Target

SEEDS = (1, 2, 3, 4, 5)


def bench_worth() -> list[Result]:
    """Train every arm with every seed; the spread of a ratio is its 95 % interval over seeds."""
    from polyphony.launch.lab.worth import PASSES, compare

    with tempfile.TemporaryDirectory() as folder:
        found = {share: compare(Path(folder), SEEDS, share=share) for share in (0.9, 1.0)}  # of the same runs
    return [
        Result(
            name=f"rollout tokens to {share:.0%} of the gain of {stock}",
            value=ratio.mid,
            unit="x",
            ratio=ratio.mid,
            target=Target(relation="<=", limit=0.7),
            repetitions=len(SEEDS),
            spread=(ratio.low, ratio.high),
            note="geometric mean, spread its 95 % interval over seeds",
        )
        for share, ratios in found.items()
        for stock, (ratio, _) in zip(PASSES, ratios, strict=True)
    ]


BENCHMARKS = {"worth": bench_worth}
