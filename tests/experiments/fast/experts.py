"""Experts, then one model, in the fast lab: each domain is trained alone, then a pupil learns from all of them.

`distil` is the product's update (`polyphony.trainer.teachers.distil`) on the pupil's own completions, mixed evenly:
per-token advantages clip(log pi_T - log pi, -5, 5), averaged over each completion. `sft` is fine-tuning on the experts'
accepted answers. Every rollout token is charged: of the experts, of the pupil, and of answers that are learned by heart.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from polyphony.curricula.records import Completion, Prompt
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.trainer.domains import DomainData
from polyphony.trainer.draws import Rollout
from polyphony.trainer.engine.vllm import Request, completion_seed
from polyphony.trainer.teachers.settings import DistilSettings
from tests.experiments.fast.decoder import Decoder
from tests.experiments.fast.loop import GROUP, PROMPTS, LabRun, Learner, Weights, base

ACCEPTED = 0.5
"""Least score of an answer that is learned by heart; of a prompt's answers only those with its best score are."""
SAMPLING = 2**20
"""The draw whose seeds the experts' answers have: no run has so many."""


def restricted(data: DomainData, names: tuple[str, ...]) -> DomainData:
    """Return the data with the other domains only watched."""
    domains = tuple(d if d.name in names or d.is_watch_only else replace(d, train=None) for d in data.domains)
    return replace(data, domains=domains, train={name: data.train[name] for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Weights that were trained on one domain each.

    Example: `Experts.trained(data, rate=2e-4, seed=1, tokens=37_500).spent`
    """

    runs: Mapping[str, LabRun]

    @classmethod
    def trained(cls, data: DomainData, *, rate: float, seed: int, tokens: int) -> Experts:
        """Train one a domain, each from the start, for an equal part of so many rollout tokens in all."""
        runs = {}
        for name in data.train:
            run = LabRun(data=restricted(data, (name,)), scheduler=Joint(), rate=rate, draws=1, seed=seed)
            while run.tokens.rollout < tokens / len(data.train):
                run.advance()
            runs[name] = run
        return cls(runs=runs)

    @property
    def spent(self) -> int:
        """Rollout tokens."""
        return sum(run.tokens.rollout for run in self.runs.values())

    def answers(self, data: DomainData, *, seed: int, tokens: int) -> tuple[dict[str, list[Completion]], int]:
        """Return accepted answers to training prompts by domain, and the tokens sampled for them, evenly by domain.

        Eight answers a prompt, prompts in an order by chance, none twice; the distinct ones with the prompt's best score.
        """
        found: dict[str, list[Completion]] = {}
        spent = 0
        for name, run in self.runs.items():
            found[name], own = [], 0
            table = data.train[name]
            order = random.Random(f"answers/{name}/{seed}").sample(table.ids, len(table.ids))
            while order and own < tokens / len(self.runs):
                asked = data.tokenized([table[i] for i in order[:PROMPTS]])
                order = order[PROMPTS:]
                rows = _asked(run, asked, seed=seed, most=data.limits[name])
                own += sum(len(row.ids) for row in rows)
                for group in (rows[n : n + GROUP] for n in range(0, len(rows), GROUP)):
                    found[name] += _best(group, run.scorer(group))
            spent += own
        return found, spent


def _asked(run: LabRun, prompts: Sequence[Prompt], *, seed: int, most: int) -> list[Completion]:
    each = [prompt for prompt in prompts for _ in range(GROUP)]
    seeds = [completion_seed(seed, SAMPLING, prompt.id, 0, n % GROUP) for n, prompt in enumerate(each)]
    requests = [Request(prompt_ids=p.ids, seed=s, max_tokens=most) for p, s in zip(each, seeds, strict=True)]
    return run.policy.read(each, run.policy.complete(requests, 1))


def _best(group: Sequence[Completion], rewards: Sequence[float | None]) -> list[Completion]:
    best = max((reward or 0.0 for reward in rewards), default=0.0)
    chosen = [row for row, reward in zip(group, rewards, strict=True) if reward == best >= ACCEPTED]
    return list({tuple(row.ids): row for row in chosen}.values())


@dataclass(kw_only=True)
class Pupil(LabRun):
    """A run that learns from the experts what it says by itself.

    Example: `Pupil(data=data, scheduler=Joint(), rate=2e-4, draws=80, seed=1, teachers=teachers).advance()`
    """

    teachers: Mapping[str, Decoder] = field(default_factory=dict)
    """By domain, of all that are drawn."""

    def _gradient(self, rollout: Rollout) -> Weights:
        rows, clip = list(rollout.rows.values()), DistilSettings().clip
        values: dict[int, Tensor] = {}
        for name in {row.prompt.domain for row in rows}:
            places = [i for i, row in enumerate(rows) if row.prompt.domain == name]
            told = token_logps(self.teachers[name], [rows[i] for i in places])
            for i, logps in zip(places, told, strict=True):
                own = torch.tensor(rows[i].logps)
                values[i] = (logps - own).clamp(-clip, clip) / (len(own) * len(rows))
        return weighted_gradient(self.learner.weights, self.config, rows, [values[i] for i in range(len(rows))])


def token_logps(decoder: Decoder, rows: Sequence[Completion]) -> list[Tensor]:
    """Return the log-probability of each token of each completion, [T] each, without a gradient."""
    with torch.no_grad():
        logits = decoder.completion_logits([row.prompt.ids for row in rows], [[row.ids] for row in rows])
    chosen = torch.tensor([token for row in rows for token in row.ids])
    return list(logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].split([len(row.ids) for row in rows]))


def weighted_gradient(
    weights: Weights, config: object, rows: Sequence[Completion], values: Sequence[Tensor]
) -> Weights:
    """Return the gradient by name of  - sum over rows and tokens of value x log-probability;  `values` are [T] a row."""
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    decoder = Decoder(leaves, config)  # type: ignore[arg-type]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt.ids), len(rows[i].ids)))
    parts = []
    for at in range(0, len(order), len(order) // 2 or 1):
        places = order[at : at + (len(order) // 2 or 1)]
        logits = decoder.completion_logits([rows[i].prompt.ids for i in places], [[rows[i].ids] for i in places])
        chosen = torch.tensor([token for i in places for token in rows[i].ids])
        logps = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        parts.append(-(logps * torch.cat([values[i] for i in places])).sum())
    found = torch.autograd.grad(torch.stack(parts).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def learn_by_heart(answers: Mapping[str, Sequence[Completion]], *, rate: float, seed: int, steps: int) -> Weights:
    """Return the start's weights after so many steps on answers, 64 a step, evenly by domain, averaged over tokens."""
    weights, config, _ = base()
    learner, chance = Learner(weights, rate=rate), random.Random(f"by heart/{seed}")
    names = [name for name, of in answers.items() if of]
    for _ in range(steps if names else 0):
        rows = [chance.choice(answers[chance.choice(names)]) for _ in range(PROMPTS * GROUP)]
        tokens = sum(len(row.ids) for row in rows)
        values = [torch.full((len(row.ids),), 1 / tokens) for row in rows]
        learner.step(weighted_gradient(learner.weights, config, rows, values))
    return learner.weights
