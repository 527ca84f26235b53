"""Leave rows without a gradient out of the update; the gradient stays TRL's.

A row whose advantage is 0 adds nothing to the loss, but it costs a forward and a backward pass, and it counts in the
denominators of some losses. So it may be left out of its micro-batch if the rest is scaled by kept / B where the loss
averages over rows. Rows never move to another micro-batch. B rows of a micro-batch on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

AVERAGED_OVER_ROWS = ("grpo", "dr_grpo", "sapo", "luspo")
"""Losses with B in their denominator: what is left is scaled by kept / B."""

BY_ALL_TOKENS = ("dapo", "cispo")
"""Losses divided by the token count of the whole draw, which stays as it is."""

KEPT_SHARE = "kept_share"
"""Key of a micro-batch: what its loss is multiplied with."""


def objections(args: Any, *, has_entropy_bonus: bool, has_aux_loss: bool) -> list[str]:
    """Return why dead rows may not leave the update under these arguments; empty where they may."""
    reasons = []
    if args.loss_type not in AVERAGED_OVER_ROWS + BY_ALL_TOKENS:
        reasons.append(f"loss_type {args.loss_type!r} normalises by the rows' own tokens or weights")
    if args.beta != 0.0:
        reasons.append(f"beta={args.beta} pulls every row towards the reference")
    if has_entropy_bonus:
        reasons.append("the entropy bonus acts on every row")
    if has_aux_loss:
        reasons.append("the router's auxiliary loss acts on every row")
    if args.top_entropy_quantile < 1.0:
        reasons.append(f"top_entropy_quantile={args.top_entropy_quantile} is taken over all rows")
    return reasons


def may_drop_dead(wanted: str, args: Any, *, has_entropy_bonus: bool, has_aux_loss: bool) -> bool:
    """Say whether dead rows leave the update. Raises ValueError where they shall, but the gradient would change.

    `wanted` is `auto`, `always` or `never`.
    """
    reasons = objections(args, has_entropy_bonus=has_entropy_bonus, has_aux_loss=has_aux_loss)
    if wanted == "always" and reasons:
        raise ValueError(f"update.drop_dead: always would change the gradient: {'; '.join(reasons)}")
    return wanted != "never" and not reasons


def live_counts(batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return the rows of each micro-batch whose advantage is not 0, at least 1, [steps]."""
    return torch.stack([_is_live(batch).sum().clamp(min=1) for batch in batches])


def without_dead(batches: Sequence[dict[str, Any]], counts: Sequence[int], loss_type: str) -> list[dict[str, Any]]:
    """Return the micro-batches cut to `counts` rows, live ones first, and to their longest completion.

    `counts` is what all ranks agreed on (the most live rows of any), because TRL gathers rows: the rest is filled with
    dead rows, the shortest first.
    """
    return [_cut(batch, count, loss_type) for batch, count in zip(batches, counts, strict=True)]


def _cut(batch: dict[str, Any], count: int, loss_type: str) -> dict[str, Any]:
    is_live, lengths = _is_live(batch), batch["completion_mask"].sum(1)
    n_rows, width = batch["completion_mask"].shape
    order = sorted(range(n_rows), key=lambda i: (not is_live[i], int(lengths[i])))
    kept = sorted(order[:count])
    longest = max(1, int(lengths[kept].max()))
    cut = {name: _rows(value, kept, n_rows) for name, value in batch.items()}
    # right padding goes too; left padding stays, because some models count positions from it
    for name, value in cut.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.size(1) == width and "prompt" not in name:
            cut[name] = value[:, :longest]
    return cut | {KEPT_SHARE: count / n_rows if loss_type in AVERAGED_OVER_ROWS else 1.0}


def _rows(value: Any, kept: list[int], n_rows: int) -> Any:
    """Return what a value says of the kept rows; a value that is not one a row stays whole."""
    if isinstance(value, list):
        return [value[i] for i in kept] if len(value) == n_rows else value
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.size(0) != n_rows:
        return value
    return value[kept]


def _is_live(batch: Mapping[str, Any]) -> torch.Tensor:
    advantages = batch["advantages"]
    return (advantages if advantages.dim() == 1 else advantages.abs().sum(1)) != 0
