"""The walk of one draw with an engine that is told what to answer: which groups are replaced, and by what."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer
from trl import GRPOConfig

from curricula.curriculum import Curriculum
from curricula.pool_settings import PoolSettings
from curricula.records import Domain
from curricula.schedulers.joint import Joint
from tests.conftest import POLICY
from trainer.domains import DomainData
from trainer.draws import Draws
from trainer.fusion import Fusion
from trainer.rollouts import Completion, completion_seed
from trainer.scoring import Sample, Scorer

G = 2
TOKENIZER = AutoTokenizer.from_pretrained(POLICY)


def passes_when_told(prompts, completion_ids, **columns):
    return [float(ids[0]) for ids in completion_ids]


def data(size=6) -> DomainData:
    domains = [
        Domain(
            name=name,
            kind="structured",
            train=[{"prompt": f"{name} {k}", "answer": "", "id": f"{name}{k}"} for k in range(size)],
            heldout=[{"prompt": f"held {name} {k}", "answer": ""} for k in range(2)],
            reward=passes_when_told,
        )
        for name in ("math", "talk")
    ]
    args = GRPOConfig(output_dir="unused", bf16=False, use_cpu=True, max_completion_length=8)
    return DomainData.load(domains, tokenizer=TOKENIZER, args=args)


class Engine:
    """Answers by prompt: `alive` prompts get one success in a group, the others what `dead` says."""

    def __init__(self, alive: set[str], dead: int = 0):
        self.alive, self.dead = alive, dead
        self.rounds: list[list] = []

    def complete(self, requests, on_finished=None):
        self.rounds.append(list(requests))
        texts = [TOKENIZER.decode(r.prompt_ids) for r in requests]
        is_alive = [any(f"{i[:4]} {i[4:]}" in text for i in self.alive) for text in texts]
        return [
            Completion(ids=[1 if i % G == 0 else 0] if lives else [self.dead], logps=[-0.5])
            for i, lives in enumerate(is_alive)
        ]


def draws(engine, *, size=6, refill_rounds=2, **settings) -> Draws:
    rows = data(size)
    curriculum = Curriculum(
        domains=rows.domains,
        prompts={name: table.ids for name, table in rows.train.items()},
        scheduler=Joint(),
        total_draws=5,
        pool=PoolSettings(refill_rounds=refill_rounds, **settings),
    )
    return Draws(
        data=rows,
        curriculum=curriculum,
        scorer=Scorer(rows.domains),
        fusion=Fusion(),
        seed=1,
        group_size=G,
        max_grader_failures=0.5,
        complete=engine.complete,
        to_samples=lambda prompts, completions: [
            Sample(prompt=p, ids=c.ids, text="", truncated=False, logps=c.logps)
            for p, c in zip(prompts, completions, strict=True)
        ],
        refill_rounds=refill_rounds,
    )


def test_dead_groups_are_replaced_by_prompts_of_their_domain_until_all_live():
    walk = draws(Engine({f"math{k}" for k in range(6)} | {f"talk{k}" for k in range(6)}))
    rollout = walk.roll_out(8)
    assert rollout.rounds == 0 and not rollout.discarded
    alive = {g.prompt_id for g in rollout.groups if g.domain == "math"} | {f"talk{k}" for k in range(6)}
    walk = draws(Engine({f"math{k}" for k in range(6)} - alive | {f"talk{k}" for k in range(6)}))
    rollout = walk.roll_out(8)
    assert [g.domain for g in rollout.groups] == ["math", "math", "talk", "talk"]
    assert all(g.has_signal for g in rollout.groups)
    assert rollout.rounds == 1
    assert {g.prompt_id for g in rollout.discarded_groups} == alive & {f"math{k}" for k in range(6)}
    assert [row.prompt.domain for row in rollout.batch.rows.values()] == ["math"] * 4 + ["talk"] * 4
    assert rollout.rewards == [1.0, 0.0] * 4


def test_a_refill_that_falls_short_ends_and_says_so():
    told = []
    engine = Engine({f"talk{k}" for k in range(6)})
    walk = draws(engine, size=3)
    walk.refill_listeners.append(lambda n, groups, refs: told.append((n, len(groups), [r.id for r in refs])))
    rollout = walk.roll_out(8)
    assert [g.has_signal for g in rollout.groups] == [False, False, True, True]
    assert rollout.rounds == 1  # the third of three prompts was tried in vain, then there were none
    assert [(n, dead, len(ids)) for n, dead, ids in told] == [(1, 2, 1), (2, 2, 0)]
    assert len(rollout.discarded_groups) == 1
    assert len(rollout.all_graded) == 5


def test_rounds_are_bounded_and_each_has_seeds_of_its_own():
    engine = Engine(set())
    rollout = draws(engine, size=40).roll_out(8)
    assert rollout.rounds == 2 and len(engine.rounds) == 3
    seeds = [request.seed for requests in engine.rounds for request in requests]
    assert len(set(seeds)) == len(seeds)
    first = next(iter(rollout.batch.groups.values())).prompt_id
    assert completion_seed(1, 0, first, 0, 0) == seeds[0]


def test_without_rounds_nothing_is_replaced():
    engine = Engine(set())
    assert draws(engine, refill_rounds=0).roll_out(8).rounds == 0
    assert len(engine.rounds) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_makes_its_own_rows_of_a_refill_only(rank, monkeypatch):
    """Both ranks know all groups; here the other rank's half of every gather is played back."""
    import trainer.draws as module

    whole = draws(Engine(set()), size=40).roll_out(8)
    everything = {members[0].prompt_id: members for members in whole.all_graded}
    engine = Engine(set())
    walk = draws(engine, size=40)
    walk.rank, walk.world_size = rank, 2
    asked: list = []
    monkeypatch.setattr(module, "broadcast_object_list", lambda shared, from_process: asked.append(shared[0]))
    monkeypatch.setattr(module, "gather_object", lambda mine: [g for ref in asked[-1] for g in everything[ref.id]])
    rollout = walk.roll_out(4)
    assert rollout.groups == whole.groups
    assert [len(requests) for requests in engine.rounds] == [4, 4, 4]
    assert list(rollout.batch.rows) == [4 * rank + i for i in range(4)]
