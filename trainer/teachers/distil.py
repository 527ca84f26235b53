"""On-policy distillation: teachers' log-probabilities become the advantages of the policy's own tokens.

    A_t = f_d * ( clip(log pi_T(y_t) - log pi_old(y_t), -c, c) + a * A_reward )

T: the teacher of the completion's domain d; c: `clip`; a: `reward_weight`; TRL's loss takes A as [B, T]. Its expected
gradient is that of KL(policy || teacher) on the policy's own completions (arXiv:2306.13649, MOPD arXiv:2606.30406).

f_d: a domain's tokens shall weigh together what its share of the completions drawn is, or long answers drown short ones
(Open-MOPD, arXiv:2608.19098). Losses that average over each completion first do that, so f = 1; under those that average
over tokens f_d = (n_d / n) / (t_d / t), with n completions and t tokens of the draw.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyphony.curricula.records import Completion, Lessons
from polyphony.trainer.metrics import defined, key
from polyphony.trainer.scoring import FEWEST, LAST
from polyphony.trainer.teachers.settings import DistilSettings
from polyphony.trainer.teachers.teachers import Teachers

BY_COMPLETION = ("grpo", "sapo")
"""Losses that average over the tokens of each completion first."""

COLUMNS = ("completions", "tokens", "taught", "missing", "scored", "kl", "size", "advantage", "clipped")
"""What is summed by domain: `kl`, `clipped`, and of advantages their `size` and sum, over the `scored` tokens of the
completions that were taught."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What the update learns from in one draw."""

    advantages: torch.Tensor
    """[B, T], 0 behind the end of each completion."""
    lessons: Mapping[str, Lessons]
    """By domain that was taught in this draw, over all ranks: for schedulers."""


class Distil:
    """Turn a draw into advantages a token, and count what teachers said of it.

    Example: `Distil(settings, teachers, domains=("math",), loss_type="grpo")(advantages, old, mask, rows).advantages`
    """

    def __init__(self, settings: DistilSettings, teachers: Teachers, *, domains: Sequence[str], loss_type: str) -> None:
        self.settings, self.teachers, self.domains = settings, teachers, tuple(domains)
        self.is_balanced = loss_type in BY_COMPLETION
        self._missing: dict[str, deque[tuple[int, int]]] = {}
        """By domain, of the last draws: completions that were taught, and that their teacher failed on."""
        self._sums = torch.zeros(len(self.domains), len(COLUMNS), dtype=torch.float64)
        self._factors: dict[str, float] = {}

    def __call__(
        self, by_reward: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, rows: Sequence[Completion]
    ) -> Learned:
        """Return the advantages of this rank's `rows`; collective over ranks.

        `by_reward` [B] are those of their rewards, `old` [B, T] the policy's log-probabilities, `mask` [B, T] what of the
        completions the loss counts. Raises RuntimeError where a teacher's answers are no numbers too often.
        """
        told = self.teachers.logps(rows)
        counted, clip = mask.bool(), self.settings.clip
        gaps = torch.zeros_like(old, dtype=torch.float32)
        for i, logps in enumerate(told):
            if logps is not None:
                gaps[i, : len(logps)] = logps.float() - old[i, : len(logps)].float()
        has_teacher = torch.tensor([logps is not None for logps in told], device=old.device)
        taught = has_teacher & ~gaps.isnan().any(1)
        scored = counted & taught.unsqueeze(1)
        gaps = gaps.masked_fill(~scored, 0.0)
        clipped = gaps.clamp(-clip, clip)
        finite = torch.where(gaps.isinf(), clipped, gaps)  # a token that the teacher never says
        others = by_reward if self.settings.others == "grpo" else torch.zeros_like(by_reward)
        rewarded = torch.where(taught, self.settings.reward_weight * by_reward, others * ~has_teacher)
        values = (clipped + rewarded.unsqueeze(1)) * counted
        columns = {
            "completions": torch.ones_like(taught),
            "tokens": counted.sum(1),
            "taught": taught,
            "missing": has_teacher & ~taught,
            "scored": scored.sum(1),
            "kl": -finite.sum(1),
            "size": (values * scored).abs().sum(1),
            "advantage": (values * scored).sum(1),
            "clipped": (gaps.abs() > clip).sum(1),
        }
        total = self._total(torch.stack([columns[name].double() for name in COLUMNS], dim=1), rows)
        factors = self._factors_of(total)
        values = values * torch.tensor([[factors[row.prompt.domain]] for row in rows], device=values.device)
        self._see(total)
        return Learned(advantages=values, lessons=self._lessons(total))

    def _total(self, told: torch.Tensor, rows: Sequence[Completion]) -> torch.Tensor:
        """Return the sums of rows' columns [B, C] by domain over all ranks, [K, C], in the host's memory."""
        owners = torch.tensor([self.domains.index(row.prompt.domain) for row in rows], device=told.device)
        sums = torch.zeros(len(self.domains), len(COLUMNS), dtype=torch.float64, device=told.device)
        accelerator = self.teachers.policy.trainer.accelerator
        return accelerator.reduce(sums.index_add_(0, owners, told), reduction="sum").cpu()

    def flush(self) -> dict[str, float]:
        """Return the `distil/<d>` metrics since the last log and start anew."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        found: dict[str, float] = {}
        for name, row in zip(self.domains, sums.tolist(), strict=True):
            of = dict(zip(COLUMNS, row, strict=True))
            metrics: dict[str, float] = {}
            if of["taught"] + of["missing"]:
                metrics = {
                    "kl": _ratio(of["kl"], of["scored"]),
                    "advantage": _ratio(of["advantage"], of["scored"]),
                    "clipped": _ratio(of["clipped"], of["scored"]),
                    "missing": of["missing"],
                }
            if metrics or (of["completions"] and self._factors[name] != 1):
                metrics["factor"] = self._factors[name]
            found |= {key("distil", metric, name): value for metric, value in metrics.items()}
        return defined(found)

    def _factors_of(self, total: torch.Tensor) -> dict[str, float]:
        """Return what each domain's advantages are multiplied with; kept for the log."""
        completions, tokens = total[:, 0].tolist(), total[:, 1].tolist()
        n, t = sum(completions), sum(tokens)
        self._factors = {
            name: 1.0 if self.is_balanced or not of else (drawn / n) / (of / t)
            for name, drawn, of in zip(self.domains, completions, tokens, strict=True)
        }
        return self._factors

    def _see(self, total: torch.Tensor) -> None:
        """Add a draw's sums; its advantages count as they are learned from."""
        of = total.clone()
        of[:, COLUMNS.index("advantage")] *= torch.tensor(list(self._factors.values()), dtype=of.dtype)
        self._sums += of
        for name, row in zip(self.domains, total.tolist(), strict=True):
            taught, missing = (int(row[COLUMNS.index(column)]) for column in ("taught", "missing"))
            last = self._missing.setdefault(name, deque())
            last.append((taught, missing))
            while sum(map(sum, last)) - sum(last[0]) >= LAST:
                last.popleft()
            failed, among = sum(n for _, n in last), sum(map(sum, last))
            if among >= FEWEST and failed > self.settings.max_missing * among:
                raise RuntimeError(
                    f"domain {name!r}: the log-probabilities of teacher {self.teachers.lesson.of_domain[name]!r} are no "
                    f"numbers on {failed} of the last {among} completions, or it has no room for them; distil.max_missing "
                    f"allows a share of {self.settings.max_missing:g}"
                )

    def _lessons(self, total: torch.Tensor) -> dict[str, Lessons]:
        found = {}
        for name, row in zip(self.domains, total.tolist(), strict=True):
            of = dict(zip(COLUMNS, row, strict=True))
            if of["scored"]:
                size = self._factors[name] * of["size"] / of["scored"]
                found[name] = Lessons(kl=of["kl"] / of["scored"], abs_advantage=size)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what decides whether teachers fail too often; JSON-able."""
        return {"missing": {name: [*map(list, last)] for name, last in self._missing.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self._missing = {
            name: deque((taught, missing) for taught, missing in of) for name, of in state["missing"].items()
        }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
