"""Forward passes of the policy over completions it is not trained on: log-probabilities and entropies, no gradient.

They are TRL's own passes, so that temperature, precision and the fused head are those of the update. All collective where
the policy is split over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyphony.trainer.padding import pad_rows
from polyphony.trainer.scoring import Sample

Rows = Sequence[Sequence[int]]
"""Token ids, ragged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """Run the policy as it is at each call.

    Example: `Forward(passes=..., policy=lambda: trainer.model, batch_size=8, padding=0, device=device)([[1, 2]], [[3]])`
    """

    passes: Callable[..., tuple]
    """TRL's `_get_per_token_logps_and_entropies`."""
    policy: Callable[[], Any]
    batch_size: int
    padding: int
    device: torch.device

    def __call__(self, prompt_ids: Rows, completion_ids: Rows, *, model: Any = None) -> tuple[torch.Tensor, ...]:
        """Return log-probabilities, entropies (nats) and mask of completions, each [B, T], under the policy or `model`."""
        ids, attention, mask = pad_rows(prompt_ids, completion_ids, padding=self.padding, device=self.device)
        model = self.policy() if model is None else model
        with torch.no_grad():
            logps, entropy, _ = self.passes(model, ids, attention, mask.size(1), self.batch_size, compute_entropy=True)
        return logps, entropy, mask

    def entropy_sums(self, prompt_ids: Rows, samples: Sequence[Sample]) -> list[tuple[float, int]]:
        """Return summed token entropy (nats) and token count of each sample."""
        _, entropy, mask = self(prompt_ids, [s.ids for s in samples])
        return list(zip((entropy * mask).sum(1).tolist(), mask.sum(1).tolist(), strict=True))

    def token_logps(self, prompt_ids: Rows, completion_ids: Rows) -> list[list[float]]:
        """Return, for each completion, the log-probability of each of its tokens."""
        logps, _, mask = self(prompt_ids, completion_ids)
        return [row[m].tolist() for row, m in zip(logps, mask.bool(), strict=True)]

    def log_probabilities(self, prompt_ids: Rows, completion_ids: Rows, *, model: Any = None) -> list[float]:
        """Return the summed log-probability of each completion, at the run's temperature."""
        logps, _, mask = self(prompt_ids, completion_ids, model=model)
        return (logps * mask).sum(1).tolist()
