"""The check, before a run starts, that the engine follows the policy's weights.

Some engine builds keep serving old weights without an error (the stock CPU build of vLLM does). Such a run would learn
from another model's samples. So weights of every parameter change their sign, which is undone exactly and needs no copy;
synced, compared, restored, synced and compared again. Nothing is asked of the model but that its weights move what it says:
engine and policy have to be closer than the weights moved them, by as much as the precision allows. Where an adapter alone
is sent, that is changed; its base, which is sent once, is seen in what policy and engine say before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from polyphony.curricula.records import Completion
from polyphony.trainer.engine.adapters import FACTORS, factors_of
from polyphony.trainer.engine.engine import reshard

EVERY = 13
"""Of a parameter's weights, one in so many changes its sign: enough to move any policy, in every layer, and still a model
of like size. No divisor of a layer's width, or the same channels would be turned in all of them and turned back."""
FILL = 1 / 64
"""What takes the place of one in so many weights where all are zero (biases, the second half of an adapter, norms around
zero at their start); exact in every precision."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""Largest mean |difference| of log-probabilities that counts as a match, by what the policy computes in; and its largest
share of what the changed weights move, so that a policy which hardly tells its tokens apart is held to less."""
TOLERANCE_OF_TF32 = 0.02
"""The same for float32 on a GPU, where vLLM's attention multiplies with ten bits of mantissa."""
WHOLE = "weights of all parameters"
ROUNDING = 2e-6
"""Mean |difference| that the softmax alone makes, in float32 whatever the policy computes in: eight of its last bits, of
log-probabilities between 2 and 4."""


def tolerance_of(precision: torch.dtype, *, device: str) -> float:
    """Return how far apart engine and policy may be in the mean where nothing is wrong."""
    if precision == torch.float32 and device != "cpu":
        return TOLERANCE_OF_TF32
    return TOLERANCE[precision]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCheck:
    """Mean |difference| between engine and policy log-probabilities: before, while changed, and after restoring."""

    before: float
    changed: float
    after: float
    moved: float
    """How far the engine's log-probabilities moved from the unchanged policy's, on the same tokens."""
    tolerance: float
    coldness: float = 1.0
    """What logits were divided by, where that made them, and what rounding does to them, larger."""
    what: str = WHOLE
    """What was changed."""
    note: str = ""
    """What else there is to say of how weights reach the engine, and what of it this check does not see."""

    @property
    def allowed(self) -> float:
        """What they may differ by while the weights are changed."""
        return max(self.tolerance * self.moved, ROUNDING / self.coldness)

    @property
    def allowed_at_rest(self) -> float:
        """What they may differ by before and after."""
        return min(self.tolerance / self.coldness, self.allowed)

    @property
    def is_passed(self) -> bool:
        """True if every difference is allowed and the engine moved by more; False where one of them is NaN."""
        alike = self.changed <= self.allowed
        for difference in (self.before, self.after):
            alike = alike and difference <= self.allowed_at_rest
        return alike and self.moved > 2 * self.allowed

    def __str__(self) -> str:
        return (
            f"log-prob difference {self.before:.1e} before, {self.changed:.1e} with {self.what} changed, "
            f"{self.after:.1e} restored (allowed {self.allowed_at_rest:.1e}, changed {self.allowed:.1e}); "
            f"moved {self.moved:.2g}{f'; {self.note}' if self.note else ''}"
        )


def check_weights(
    *,
    model: torch.nn.Module,
    sync: Callable[[], None],
    sample: Callable[[], Sequence[Completion]],
    score: Callable[[Sequence[Completion]], Sequence[Sequence[float]]],
    tolerance: float,
    coldness: float = 1.0,
    is_adapter: bool = False,
) -> WeightCheck:
    """Return what the check saw; raises nothing about the result, see `is_passed`.

    `sync` loads the policy's weights into the engine, `sample` lets the engine generate, `score` returns the policy's
    own log-probabilities of the same tokens; see `tolerance_of` and `WeightCheck.coldness`. Where a sync is of the adapter
    alone, only that is changed.
    """
    reshard(model)
    sync()
    first = sample()
    before = _difference(first, score(first))
    with changed_adapter(model) if is_adapter else changed_weights(model):
        sync()
        second = sample()
        changed = _difference(second, score(second))
    moved = _difference(second, score(second))
    sync()
    third = sample()
    return WeightCheck(
        before=before,
        changed=changed,
        after=_difference(third, score(third)),
        moved=moved,
        tolerance=tolerance,
        coldness=coldness,
        what="the adapter's tensors" if is_adapter else WHOLE,
    )


@contextmanager
def changed_adapter(model: Any) -> Iterator[None]:
    """Have every 13th weight of a plain adapter's factors be others meanwhile, so large that the policy is another one.

    Turned signs would not do: the second factor begins at zero and stays small. With a first factor as PEFT starts it, what
    is added to a layer's output is then of the size of its input, whatever rank and scale: enough for bfloat16.
    """
    kept: list[tuple[int, torch.nn.Parameter, torch.Tensor]] = []
    try:
        for n, (name, parameter, scale, rank) in enumerate(factors_of(model)):
            with _whole(parameter):
                if (weights := _some(parameter, n)) is None:
                    continue
                kept.append((n, parameter, weights.clone()))
                weights.fill_(8 / (scale * rank**0.5)) if name.endswith(FACTORS[1]) else weights.neg_()
        yield
    finally:
        for n, parameter, before in kept:
            with _whole(parameter):
                weights = _some(parameter, n)
                assert weights is not None
                weights.copy_(before)
        reshard(model)


@contextmanager
def changed_weights(model: torch.nn.Module) -> Iterator[None]:
    """Turn the sign of every 13th weight of each parameter meanwhile; those that are all zero get other ones.

    On several ranks each changes what it holds, the same everywhere.
    """
    done: list[tuple[int, torch.nn.Parameter, bool]] = []
    try:
        for n, parameter in enumerate(model.parameters()):
            with _whole(parameter):
                if (weights := _some(parameter, n)) is None:
                    continue
                was_zero = not _held(parameter).any()
                done.append((n, parameter, was_zero))
                weights.fill_(FILL) if was_zero else weights.neg_()
        yield
    finally:
        for n, parameter, was_zero in done:
            with _whole(parameter):
                weights = _some(parameter, n)
                assert weights is not None
                weights.zero_() if was_zero else weights.neg_()
        reshard(model)


def _held(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter; FSDP2 splits it."""
    data = parameter.data
    return data.to_local() if isinstance(data, DTensor) else data


def _some(parameter: torch.nn.Parameter, n: int) -> torch.Tensor | None:
    """Return a view of the weights to be changed; None where a parameter has none that could be (quantised ones).

    Of the `n`-th parameter they are not those of its neighbour: two that are alike must become different.
    """
    held = _held(parameter)
    if not held.is_floating_point() or held.element_size() < 2:
        return None
    flat = held.view(-1) if held.is_contiguous() else held
    return flat[n % min(EVERY, len(flat)) :: EVERY] if len(flat) else flat


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
