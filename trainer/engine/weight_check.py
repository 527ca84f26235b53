"""The check, before a run starts, that the engine follows the policy's weights.

Some engine builds keep serving old weights without an error (the stock CPU build of vLLM does). Such a run would learn
from another model's samples. So the final norm is scaled, synced, compared, restored, synced and compared again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from polyphony.curricula.records import Completion
from polyphony.trainer.engine.engine import reshard

SCALE = 0.1
"""Factor on the final norm, and so on every logit: near-uniform sampling, which no policy's own log-probabilities are
close to. (A factor above 1 hardly moves those of a policy that is sure of its tokens already.)"""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""Largest mean |difference| of log-probabilities that counts as a match, by what the policy computes in."""
TOLERANCE_OF_TF32 = 0.02
"""The same for float32 on a GPU, where vLLM's attention multiplies with ten bits of mantissa."""
MOVE_FACTOR = 5
"""The engine's log-probabilities must move at least this many tolerances."""


def tolerance_of(precision: torch.dtype, *, device: str) -> float:
    """Return how far apart engine and policy may be in the mean where nothing is wrong."""
    if precision == torch.float32 and device != "cpu":
        return TOLERANCE_OF_TF32
    return TOLERANCE[precision]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCheck:
    """Mean |difference| between engine and policy log-probabilities: before, while scaled, and after restoring."""

    before: float
    scaled: float
    after: float
    moved: float
    """How far the engine's log-probabilities moved from the unscaled policy's, on the same tokens."""
    tolerance: float

    @property
    def is_passed(self) -> bool:
        """True if every difference is within tolerance and the engine moved; False where one of them is NaN."""
        is_equal = all(difference <= self.tolerance for difference in (self.before, self.scaled, self.after))
        return is_equal and self.moved >= MOVE_FACTOR * self.tolerance

    def __str__(self) -> str:
        return (
            f"log-prob difference {self.before:.1e} before, {self.scaled:.1e} with the final norm scaled, "
            f"{self.after:.1e} restored (allowed {self.tolerance:g}); moved {self.moved:.2f} "
            f"(needed {MOVE_FACTOR * self.tolerance:g})"
        )


def check_weights(
    *,
    model: torch.nn.Module,
    sync: Callable[[], None],
    sample: Callable[[], Sequence[Completion]],
    score: Callable[[Sequence[Completion]], Sequence[Sequence[float]]],
    tolerance: float,
    scale: float = SCALE,
) -> WeightCheck:
    """Return what the check saw; raises nothing about the result, see `is_passed`.

    `sync` loads the policy's weights into the engine, `sample` lets the engine generate, `score` returns the policy's
    own log-probabilities of the same tokens; see `tolerance_of`. `scale` is the factor on the final norm.
    """
    reshard(model)
    norm = final_norm(model)
    sync()
    first = sample()
    before = _difference(first, score(first))
    with _scaled(norm, model, scale):
        sync()
        second = sample()
        scaled = _difference(second, score(second))
    moved = _difference(second, score(second))
    sync()
    third = sample()
    return WeightCheck(
        before=before,
        scaled=scaled,
        after=_difference(third, score(third)),
        moved=moved,
        tolerance=tolerance,
    )


def final_norm(model: torch.nn.Module) -> torch.nn.Parameter:
    """Return the weight of the last normalisation before the head. Raises ValueError if the model has none."""
    norms = {
        name: weight
        for name, module in model.named_modules()
        if "norm" in name.rsplit(".", 1)[-1].lower()
        and isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter)
    }
    if not norms:
        raise ValueError(f"{type(model).__name__} has no module named like a norm: the weight sync cannot be checked")
    shallowest = min(name.count(".") for name in norms)
    return [weight for name, weight in norms.items() if name.count(".") == shallowest][-1]


@contextmanager
def _scaled(parameter: torch.nn.Parameter, model: torch.nn.Module, scale: float):
    with _whole(parameter):
        kept = parameter.data.clone()
        parameter.data.mul_(scale)
    try:
        yield
    finally:
        with _whole(parameter):
            parameter.data.copy_(kept)
        reshard(model)


def _whole(parameter: torch.nn.Parameter) -> AbstractContextManager:
    """Gather a parameter that DeepSpeed ZeRO-3 has split over the ranks; what is changed inside, stays changed."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero  # slow to import

    return zero.GatheredParameters([parameter], modifier_rank=0)


def _difference(completions: Sequence[Completion], policy: Sequence[Sequence[float]]) -> float:
    engine = [c.logps for c in completions if c.logps is not None]
    if len(engine) != len(completions):
        raise ValueError("the engine returns no log-probabilities: its weights cannot be compared with the policy's")
    pairs = [abs(e - p) for ours, theirs in zip(engine, policy, strict=True) for e, p in zip(ours, theirs, strict=True)]
    return sum(pairs) / len(pairs)
