"""A world with a known transfer matrix, for claims about schedulers in CPU seconds.

Skill x_i in [0, 1] is the chance to solve a prompt of domain i. One draw with shares c_j changes it by

    dx_i = speed (1 - x_i) [c_i + sum_j c_j gain_ji] - speed x_i sum_j c_j harm_ji

so a domain saturates under practice, is lifted by domains that help it, and eroded by those that harm it.
"""

from __future__ import annotations

import numpy as np

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.records import Domain, Evaluation, Group
from polyphony.curricula.transfer.matrix import TransferMatrix

G = 8  # completions a group
ITEMS = 100  # held-out items a domain


class ToyWorld:
    """K domains whose transfer[j, i] in [-1, 1] is the effect of practising j on i, relative to practising i itself."""

    def __init__(self, transfer, *, start=0.3, speed=0.05, seed=0, kinds=None):
        self.transfer = np.array(transfer, dtype=float)
        np.fill_diagonal(self.transfer, 1.0)
        self.names = [f"d{k}" for k in range(len(self.transfer))]
        self.kinds = kinds or ["structured"] * len(self.names)
        self.start, self.speed, self.seed = start, speed, seed
        self.rng = np.random.default_rng(seed)
        self.hard = self.rng.uniform(-0.3, 0.3, (len(self.names), ITEMS))  # items differ, the same at every look
        self.hard -= self.hard.mean(axis=1, keepdims=True)
        self.skill = np.full(len(self.names), float(start))

    def practise(self, shares):
        """Learn from one draw."""
        lift, erosion = shares @ self.transfer.clip(min=0), shares @ (-self.transfer).clip(min=0)
        self.skill += self.speed * ((1 - self.skill) * lift - self.skill * erosion)

    def evaluate(self, trained=(), *, step=0, exposure=None, probe=False, seed=None):
        """Score every held-out item by one coin flip."""
        solved = self.rng.random(self.hard.shape) < np.clip(self.skill[:, None] + self.hard, 0, 1)
        scores = {name: tuple(row.astype(float)) for name, row in zip(self.names, solved, strict=True)}
        return Evaluation(
            trained=tuple(trained), step=step, seed=self.seed if seed is None else seed, scores=scores,
            probe=probe, exposure=exposure or {}, entropy=dict.fromkeys(self.names, 1.0),
        )  # fmt: skip

    def probe(self, draws=15, seeds=2):
        """Measure the transfer matrix as `polyphony probe` does: K runs and a joint run, restored in between."""
        names, size = self.names, len(self.names)
        rows = [self.evaluate(probe=True, seed=0)]
        for seed in range(seeds):
            for arm in [*np.eye(size), *np.full((int(size > 1), size), 1 / size)]:
                self.skill = np.full(size, float(self.start))
                steps = draws if arm.max() == 1 else draws * size
                for _ in range(steps):
                    self.practise(arm)
                trained = [name for name, share in zip(names, arm, strict=True) if share]
                rows.append(self.evaluate(trained, step=steps, probe=True, seed=seed))
        self.skill = np.full(size, float(self.start))
        kinds = dict(zip(names, self.kinds, strict=True))
        return TransferMatrix(domains=tuple(names), kinds=kinds, rows=tuple(rows))

    def train(self, scheduler, *, draws=120, prompts=16, every=6):
        """Run a curriculum with `scheduler`; return the skills at the end and the curriculum."""
        domains = [Domain(name=n, kind=k, train=[0]) for n, k in zip(self.names, self.kinds, strict=True)]
        ids = {name: [f"{name}/{k}" for k in range(50)] for name in self.names}
        curriculum = Curriculum(domains=domains, prompts=ids, scheduler=scheduler, total_draws=draws, seed=self.seed)
        curriculum.record(self.evaluate())
        for draw in range(draws):
            refs = curriculum.draw(prompts)
            curriculum.observe([self.answer(ref, draw) for ref in refs])
            self.practise(np.array([sum(ref.domain == name for ref in refs) / prompts for name in self.names]))
            if (draw + 1) % every == 0:
                stage = curriculum.decision.stage
                trained = [stage] if stage in self.names else self.names
                curriculum.record(self.evaluate(trained, step=draw + 1, exposure=dict(curriculum.drawn)))
        return self.skill.copy(), curriculum

    def answer(self, ref, draw):
        """Roll out one group."""
        solved = self.rng.random(G) < self.skill[self.names.index(ref.domain)]
        return Group(
            prompt_id=ref.id, domain=ref.domain, draw=draw, rewards=tuple(solved.astype(float)),
            lengths=(1,) * G, truncated=(False,) * G,
        )  # fmt: skip
