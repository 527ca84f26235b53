"""What the spine costs beside stock TRL and a bare vLLM, for `polyphony doctor --gpu` and the benchmarks (`make bench`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
LAB = Path(__file__).resolve().parents[1] / "lab" / "policy"
WARM_UP = 2
"""Steps at the start of a run that are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long is measured."""

    pairs: int
    """Of ours and a baseline, in turns; one more before them warms up."""
    steps: int
    """Of a training run, beside those that warm up."""
