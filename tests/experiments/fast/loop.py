"""One run of the fast lab: what `polyphony train` does to the lab's policy, without TRL, vLLM and a run folder.

Rows, rewards, curriculum, schedulers, pool, draws and advantages are the product's, imported unchanged. Its own are the
decoder (`decoder.py`), the update (`gradient`: TRL's dapo loss of one on-policy step; `Learner`: AdamW behind a clipped
gradient) and the held-out evaluation (`exam.py`). `tests/test_fast_lab.py` holds it to the real trainer.

Left out on purpose: several optimizer steps a draw, diversity rewards, guard, KL, resume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Completion, Prompt, Rollout, per_token
from polyphony.curricula.schedulers import Scheduler
from polyphony.trainer.advantages import Advantages
from polyphony.trainer.diversity_reward import Fusion
from polyphony.trainer.domains import DomainData
from polyphony.trainer.draws import Draws
from polyphony.trainer.engine.vllm import Request
from polyphony.trainer.scoring import Failures, Scorer
from polyphony.trainer.settings import MAX_GRADER_FAILURES, UpdateSettings
from polyphony.trainer.shortcuts import ShortcutWatch
from tests.experiments.fast.decoder import Decoder
from tests.experiments.fast.worlds import World

POLICY = Path(__file__).resolve().parents[3] / "launch" / "lab" / "policy"
GROUP = 8
"""Completions a prompt."""
PROMPTS = 8
"""Prompts a draw."""
LONGEST = 32
"""Tokens of a completion."""
CLIP = 1.0
"""Largest norm of a gradient; Transformers' default."""
SMALLEST_SPREAD = 1e-4
"""TRL's, beside a group's standard deviation."""

MOST_STALE = 3.0
"""Ratio above which TRL leaves a row out (`vllm_importance_sampling_clip_max`)."""

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabCompletion(Completion):
    """A completion whose tokens' entropies are known from sampling it."""

    entropy: float = 0.0
    """Nats, summed over its tokens."""


@lru_cache(maxsize=1)
def base() -> tuple[Weights, Any, Any]:
    """Return the lab's policy: its weights by name, its config and its tokenizer."""
    torch.set_num_threads(1)
    weights = load_file(POLICY / "model.safetensors")
    weights.pop("lm_head.weight", None)  # tied
    return weights, AutoConfig.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)


@lru_cache(maxsize=8)
def load_world(world: World) -> DomainData:
    """Return a world's rows as the trainer reads them."""
    _, config, tokenizer = base()
    args = GRPOConfig(bf16=False, report_to="none", max_completion_length=LONGEST)
    domains = [subject.domain() for subject in world]
    return DomainData.load(domains, tokenizer=tokenizer, args=args, context=config.max_position_embeddings)


class Unwatched(ShortcutWatch):
    """Looks for no signs of shortcuts, which only a guard acts on; looking takes a tenth of a draw."""

    def inspect(self, completions: Sequence[Completion]) -> list[tuple[str, ...]]:
        """Return no signs."""
        return [()] * len(completions)


class LabPolicy:
    """What `Draws` asks of a policy; one rank.

    Example: `LabPolicy(data).complete([Request(prompt_ids=[1, 5], seed=3, max_tokens=8)], 1)`
    """

    rank = 0
    world_size = 1
    group_size = GROUP

    def __init__(self, data: DomainData) -> None:
        weights, self.config, self.tokenizer = base()
        self.names = list(weights)
        self.silent = data.framing | {self.config.eos_token_id}
        self.next_step = 1
        self.load(weights)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Sample with these weights from now on."""
        self.decoder = Decoder(weights, self.config)

    def complete(
        self,
        requests: Sequence[Request],
        copies: int,
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Sample one completion a request, in order."""
        if not requests:
            return []
        sampled = self.decoder.sample(
            [r.prompt_ids for r in requests],
            seeds=[r.seed for r in requests],
            most=[r.max_tokens for r in requests],
        )
        return [LabCompletion(ids=s.ids, logps=s.logps, version=self.next_step, entropy=s.entropy) for s in sampled]

    def read(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Completion]:
        """Return the completions with prompt and text; one without an end-of-sequence token was cut off."""
        said = [[i for i in c.ids if i not in self.silent] for c in completions]
        texts = self.tokenizer.batch_decode(said)
        return [
            _read(c, prompt, text, self.config.eos_token_id)
            for c, prompt, text in zip(completions, prompts, texts, strict=True)
        ]


def _read(c: Completion, prompt: Prompt, text: str, end: int) -> Completion:
    return LabCompletion(
        ids=c.ids,
        logps=c.logps,
        version=c.version,
        entropy=c.entropy if isinstance(c, LabCompletion) else 0.0,
        prompt=prompt,
        text=text,
        truncated=c.ids[-1] != end,
    )


def stock_advantages(rewards: Sequence[float | None]) -> Tensor:
    """Return TRL's advantages [B] of whole groups in order, (r - mean) / (std + 1e-4)."""
    of_groups = torch.tensor([float("nan") if r is None else r for r in rewards]).view(-1, GROUP)
    centred = of_groups - of_groups.nanmean(1, keepdim=True)
    count = (~of_groups.isnan()).sum(1, keepdim=True)
    spread = (centred.square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.nan_to_num(centred / (spread + SMALLEST_SPREAD), nan=0.0).view(-1)


def gradient(
    weights: Mapping[str, Tensor],
    config: Any,
    rows: Sequence[Completion],
    advantages: Tensor,
    *,
    is_stale: bool = False,
) -> tuple[float, Weights]:
    """Return the loss of a draw and its gradient by name; `rows` are whole groups in order, `advantages` [B].

    TRL's dapo on policy, where every ratio is 1:  L = - sum over rows and tokens of A exp(logp - logp') / tokens of the
    draw, with logp' the same number held fixed. Groups without an advantage are counted and not computed. Rows of older
    weights (`is_stale`) are importance-corrected as TRL does by default: a row's loss is multiplied by the ratio of its
    probabilities, and left out where that is above `MOST_STALE`.
    """
    tokens = sum(len(row.ids) for row in rows)
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    decoder, parts = Decoder(leaves, config), []
    for groups in _alike(rows, advantages):
        said = [[row.ids for row in rows[g : g + GROUP]] for g in groups]
        flat = [ids for group in said for ids in group]
        logits = decoder.completion_logits([rows[g].prompt.ids for g in groups], said)
        chosen = torch.tensor([token for ids in flat for token in ids])
        logps = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        of_rows = torch.cat([advantages[g : g + GROUP] for g in groups])
        of_tokens = of_rows.repeat_interleave(torch.tensor([len(ids) for ids in flat]))
        if is_stale:
            of_tokens = of_tokens * _ratios(logps.detach(), [row for g in groups for row in rows[g : g + GROUP]])
        parts.append(-((logps - logps.detach()).exp() * of_tokens).sum() / tokens)
    if not parts:
        return 0.0, {name: torch.zeros_like(value) for name, value in leaves.items()}
    loss = torch.stack(parts).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, found, strict=True))


def _ratios(logps: Tensor, rows: Sequence[Completion]) -> Tensor:
    """Return, for every token of the rows, how much likelier its row is now than where it was sampled; 0 past the most."""
    told = torch.tensor([p for row in rows for p in row.logps or ()])
    lengths = [len(row.ids) for row in rows]
    ratios = torch.stack([part.sum() for part in (logps - told).split(lengths)]).exp()
    return ratios.where(ratios <= MOST_STALE, 0.0).repeat_interleave(torch.tensor(lengths))


def _alike(rows: Sequence[Completion], advantages: Tensor) -> list[list[int]]:
    """Return the first rows of the groups with an advantage, in two parts at most: a story is no padding for a sum."""
    live = [g for g in range(0, len(rows), GROUP) if bool((advantages[g : g + GROUP] != 0).any())]
    longest = {g: max(len(row.ids) for row in rows[g : g + GROUP]) for g in live}
    live.sort(key=lambda g: longest[g])
    if not live:
        return []
    cut = min(range(1, len(live) + 1), key=lambda n: n * longest[live[n - 1]] + (len(live) - n) * longest[live[-1]])
    return [part for part in (live[:cut], live[cut:]) if part]


class Learner:
    """AdamW over one flat vector, behind a clipped gradient; no weight decay.

    Example: `Learner(weights, rate=2e-4).step(gradient, factor=1.0)`
    """

    def __init__(self, weights: Mapping[str, Tensor], *, rate: float) -> None:
        self.rate = rate
        self.shapes = {name: value.shape for name, value in weights.items()}
        self.flat = torch.cat([value.reshape(-1) for value in weights.values()]).float().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.flat], lr=rate, weight_decay=0.0)

    @property
    def weights(self) -> Weights:
        """The present weights, as views."""
        parts = self.flat.detach().split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def step(self, gradient: Mapping[str, Tensor], *, factor: float = 1.0) -> None:
        """Take one step at the rate times `factor`."""
        flat = torch.cat([gradient[name].reshape(-1) for name in self.shapes])
        self.flat.grad = flat * min(1.0, CLIP / (float(flat.norm()) + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.step()


@dataclass(kw_only=True, slots=True)
class Tokens:
    """What was sampled, or scored in its place, and what for."""

    rollout: int = 0
    evaluation: int = 0
    """Of the evaluations that a scheduler may read."""
    published: int = 0
    """Of those that only the study reads."""


@dataclass(kw_only=True)
class LabRun:
    """One run, draw by draw.

    Example: `LabRun(data=load_world(even()), scheduler=Joint(), rate=2e-4, draws=160, seed=1).advance()`
    """

    data: DomainData
    scheduler: Scheduler
    rate: float
    draws: int
    seed: int
    pool: PoolSettings | None = None
    decay: float = 0.0
    """Share of the draws, the last ones, over which the rate falls to 0 in a line."""
    ahead: int = 0
    """Draws that are chosen and sampled before the one that is learned from (`rollouts.ahead`)."""
    tokens: Tokens = field(default_factory=Tokens)
    seconds: float = 0.0
    """Of the processor."""

    def __post_init__(self) -> None:
        weights, self.config, _ = base()
        self.policy = LabPolicy(self.data)
        self.learner = Learner(weights, rate=self.rate)
        self.scorer = Scorer(self.data.domains)
        self.shortcuts = Unwatched(self.data.names)
        self.advantages = Advantages.of(UpdateSettings(), self.data.domains, self.shortcuts.suspects)
        self.curriculum = Curriculum(
            domains=self.data.domains,
            prompts={name: table.ids for name, table in self.data.train.items()},
            scheduler=self.scheduler,
            total_draws=self.draws,
            seed=self.seed,
            pool=self.pool,
        )
        self.curriculum.look_ahead(self.ahead)
        self._flights: list[Rollout] = []
        self._draws = Draws(
            data=self.data,
            curriculum=self.curriculum,
            policy=self.policy,  # type: ignore[arg-type]
            scorer=self.scorer,
            fusion=Fusion(),
            advantages=self.advantages,
            shortcuts=self.shortcuts,
            seed=self.seed,
            failures=Failures(most=MAX_GRADER_FAILURES),
            look=self.pool.look if self.pool else None,
            refill_rounds=self.pool.refill.max_rounds if self.pool else 0,
        )

    def advance(self) -> Rollout:
        """Make one draw and learn from it; return what was rolled out."""
        began = time.process_time()
        step = self.policy.next_step
        rollout = self._from_before() if self.ahead else self._draws.roll_out(PROMPTS * GROUP)
        self.tokens.rollout += sum(sum(group.lengths) for group in rollout.sampled)
        self.curriculum.observe(rollout.sampled, _entropies(rollout))
        self.learner.step(self._gradient(rollout), factor=self._factor(step))
        self.policy.next_step = step + 1
        self.policy.load(self.learner.weights)
        self.seconds += time.process_time() - began
        return rollout

    def _from_before(self) -> Rollout:
        """Return the draw that was sampled `ahead` draws ago, and sample another with the present weights."""
        while len(self._flights) <= self.ahead and self.curriculum.draws < self.draws:
            choice = self._draws.choose(PROMPTS * GROUP, unseen=len(self._flights))
            self._flights.append(self._draws.apart(choice).make(choice, PROMPTS * GROUP))
        self._draws.begin()
        return self._draws.take(self._flights.pop(0))

    def _gradient(self, rollout: Rollout) -> Weights:
        values = self.advantages(stock_advantages(rollout.rewards), rollout.groups_of_rows, 0)
        rows, is_stale = list(rollout.rows.values()), self.ahead > 0
        return gradient(self.learner.weights, self.config, rows, values, is_stale=is_stale)[1]

    def _factor(self, step: int) -> float:
        left, falling = self.draws - step + 1, self.draws * self.decay
        return min(1.0, left / falling) if falling else 1.0


def _entropies(rollout: Rollout) -> dict[str, float]:
    """Return nats per token by domain; of what a refill replaced, minus the log-probability, as the trainer does."""
    pairs: dict[str, list[tuple[float, int]]] = {}
    for row in rollout.rows.values():
        assert isinstance(row, LabCompletion)
        pairs.setdefault(row.prompt.domain, []).append((row.entropy, len(row.ids)))
    for group in rollout.discarded:
        told = [(s, n) for s, n in zip(group.surprisals, group.lengths, strict=True) if s is not None]
        pairs.setdefault(group.domain, []).extend(told)
    return {name: per_token(of) for name, of in pairs.items()}
