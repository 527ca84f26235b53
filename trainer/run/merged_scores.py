"""What `final/` scores, where the run trained and sampled with an adapter by itself and saved it merged.

Merged weights are rounded once more than the adapter beside its base, so that a completion can turn out otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyphony.curricula.records import graded, mean
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.run.trained import Trained

Scores = Mapping[str, Sequence[float | None]]


def merged_beside_adapter(trainer: Trained, before: Scores) -> str:
    """Evaluate the policy with its adapter merged; say how far that is from `before`, the same with the adapter by itself.

    Empty where the engine is sent merged weights in any case. Collective over ranks. Nothing is written of it.
    """
    if not trainer.policy.sends_adapter:
        return ""
    try:
        with trainer.policy.merged():
            after = trainer.evaluator.run().scores()
    except GraderGoneError as error:
        return f"final/, merged, was not evaluated: {error}"
    changed = sum(a != b for name in after for a, b in zip(after[name], before[name], strict=True))
    apart = {name: mean(graded(after[name])) - mean(graded(before[name])) for name in after}
    told = ", ".join(f"{name} {difference:+.4f}" for name, difference in apart.items())
    items = sum(map(len, after.values()))
    return f"final/, merged, beside the adapter that was trained: {changed} of {items} held-out items differ ({told})"
