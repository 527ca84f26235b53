"""Ragged rows as rectangles, and back: padding for a forward pass, and sums over rows that belong together.

B rows, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from trl.trainer.utils import pad


def pad_rows(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, padding: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids [B, P + T], attention mask [B, P + T] and completion mask [B, T]; prompts padded left, the rest right."""
    left, left_mask = _padded(prompt_ids, "left", padding)
    right, mask = _padded(completion_ids, "right", padding)
    ids = torch.cat([left, right], dim=1).to(device)
    return ids, torch.cat([left_mask, mask], dim=1).to(device), mask.to(device)


def sums_by_owner(values: torch.Tensor, mask: torch.Tensor, owner: Sequence[int], *, n: int) -> torch.Tensor:
    """Return, for each of `n` owners, the sum of masked `values` [B, T] over its rows and their number, [n, 2]."""
    sums = torch.zeros(n, 2, dtype=torch.float64, device=values.device)
    rows = torch.stack([(values * mask).sum(1), mask.sum(1)], dim=1).double()
    return sums.index_add_(0, torch.tensor(owner, device=values.device), rows)


def _padded(rows: Sequence[Sequence[int]], side: str, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [torch.tensor(row) for row in rows]
    ids = pad(tensors, padding_value=padding, padding_side=side)
    return ids, pad([torch.ones_like(t) for t in tensors], padding_side=side)
