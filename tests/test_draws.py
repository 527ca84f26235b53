"""The walk of one draw with an engine that is told what to answer: which groups are replaced, and by what."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from trl import GRPOConfig

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import COLUMNS, Completion, Domain, Group, Prompt
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.trainer.advantages import Advantages
from polyphony.trainer.diversity_reward import Fusion
from polyphony.trainer.domains import DomainData
from polyphony.trainer.draws import Draws
from polyphony.trainer.engine.vllm import completion_seed
from polyphony.trainer.metrics import DomainSums
from polyphony.trainer.scoring import Failures, Scorer
from polyphony.trainer.settings import UpdateSettings
from polyphony.trainer.shortcuts import ShortcutWatch
from tests.conftest import POLICY

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


class Alone:
    """What a policy is beside its engine, on one rank."""

    rank, world_size, group_size, next_step = 0, 1, G, 7

    def read(self, prompts, completions):
        return [replace(c, prompt=prompt) for prompt, c in zip(prompts, completions, strict=True)]


class Engine(Alone):
    """Answers by prompt: `alive` prompts get one success in a group, the others what `dead` says."""

    def __init__(self, alive: set[str], dead: int = 0):
        self.alive, self.dead = alive, dead
        self.rounds: list[list] = []

    def complete(self, requests, copies, on_finished=None):
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
        pool=PoolSettings(refill={"max_rounds": refill_rounds}, **settings),
    )
    return Draws(
        data=rows,
        curriculum=curriculum,
        scorer=Scorer(rows.domains),
        fusion=Fusion(),
        policy=engine,
        advantages=Advantages.of(UpdateSettings(), rows.domains, lambda group: ()),
        shortcuts=ShortcutWatch(rows.names),
        seed=1,
        failures=Failures(most=0.5),
        refill_rounds=refill_rounds,
    )


def learned(rollout) -> list:
    return [r for group in rollout.groups_of_rows for r in group.learned]


def test_a_placebo_deals_each_groups_rewards_anew_among_its_completions():
    alive = {f"{name}{k}" for name in ("math", "talk") for k in range(12)}
    plain, walk = draws(Engine(alive), size=12), draws(Engine(alive), size=12)
    walk.is_placebo = True
    told, dealt = plain.roll_out(16), walk.roll_out(16)
    assert [g.prompt_id for g in dealt.groups.values()] == [g.prompt_id for g in told.groups.values()]
    assert [sorted(g.rewards) for g in dealt.groups.values()] == [sorted(g.rewards) for g in told.groups.values()]
    assert 0 < sum(a.rewards != b.rewards for a, b in zip(dealt.groups.values(), told.groups.values(), strict=True)) < 8
    assert dealt.rows == told.rows and dealt.rewards == learned(dealt)


def test_dead_groups_are_replaced_by_prompts_of_their_domain_until_all_live():
    walk = draws(Engine({f"math{k}" for k in range(6)} | {f"talk{k}" for k in range(6)}))
    rollout = walk.roll_out(8)
    assert rollout.rounds == 0 and not rollout.discarded
    alive = {g.prompt_id for g in rollout.groups.values() if g.domain == "math"} | {f"talk{k}" for k in range(6)}
    walk = draws(Engine({f"math{k}" for k in range(6)} - alive | {f"talk{k}" for k in range(6)}))
    rollout = walk.roll_out(8)
    assert [g.domain for g in rollout.groups.values()] == ["math", "math", "talk", "talk"]
    assert all(g.has_signal for g in rollout.groups.values())
    assert rollout.rounds == 1
    assert {g.prompt_id for g in rollout.discarded} == alive & {f"math{k}" for k in range(6)}
    assert [row.prompt.domain for row in rollout.rows.values()] == ["math"] * 4 + ["talk"] * 4
    assert learned(rollout) == [1.0, 0.0] * 4


def test_a_refill_that_falls_short_ends_and_says_so():
    told = []
    engine = Engine({f"talk{k}" for k in range(6)})
    walk = draws(engine, size=3)
    walk.recorder = SimpleNamespace(
        record_draw=lambda step, choice: told.append((step, len(choice.prompts))),
        record_refill=lambda step, line: told.append((step, line["round"], line["short"], len(line["prompts"]))),
    )
    rollout = walk.roll_out(8)
    assert [g.has_signal for g in rollout.groups.values()] == [False, False, True, True]
    assert rollout.rounds == 1  # the third of three prompts was tried in vain, then there were none
    assert told == [(7, 4), (7, 1, 1, 1), (7, 2, 2, 0)]
    assert len(rollout.discarded) == 1
    assert len(rollout.sampled) == 5


def test_rounds_are_bounded_and_each_has_seeds_of_its_own():
    engine = Engine(set())
    rollout = draws(engine, size=40).roll_out(8)
    assert rollout.rounds == 2 and len(engine.rounds) == 3
    seeds = [request.seed for requests in engine.rounds for request in requests]
    assert len(set(seeds)) == len(seeds)
    first = next(iter(rollout.groups.values())).prompt_id
    assert completion_seed(1, 0, first, 0, 0) == seeds[0]


def test_without_rounds_nothing_is_replaced():
    engine = Engine(set())
    assert draws(engine, refill_rounds=0).roll_out(8).rounds == 0
    assert len(engine.rounds) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_makes_its_own_rows_of_a_refill_only(rank, monkeypatch):
    """Both ranks know all groups; here the other rank's half of every gather is played back."""
    import polyphony.trainer.draws as module

    whole = draws(Engine(set()), size=40).roll_out(8)
    everything = {group.prompt_id: group for group in whole.sampled}
    engine = Engine(set())
    walk = draws(engine, size=40)
    engine.rank, engine.world_size = rank, 2
    asked: list = []
    monkeypatch.setattr(module, "broadcast_object", lambda prompts: asked.append(prompts) or prompts)
    monkeypatch.setattr(module, "gather_object", lambda mine: list(enumerate(everything[p.id] for p in asked[-1])))
    rollout = walk.roll_out(4)
    assert rollout.groups == whole.groups
    assert [len(requests) for requests in engine.rounds] == [4, 4, 4]
    assert list(rollout.rows) == [4 * rank + i for i in range(4)]


class Script(Alone):
    """Answers each prompt's completions in order with the rewards that were written for it, 0 where nothing was."""

    def __init__(self, rewards: dict[str, list[int]]):
        self.rewards = rewards
        self.rounds: list[list] = []
        self.copies: list[int] = []
        self.told: dict[str, int] = {}

    def complete(self, requests, copies, on_finished=None):
        self.rounds.append(list(requests))
        self.copies.append(copies)
        return [Completion(ids=[self._next(TOKENIZER.decode(r.prompt_ids))], logps=[-0.5]) for r in requests]

    def _next(self, text: str) -> int:
        name = next(name for name in EVERY if f"{name[:4]} {name[4:]}" in text)
        n = self.told[name] = self.told.get(name, -1) + 1
        return self.rewards[name][n] if name in self.rewards else 0


def looking(engine, **changes) -> Draws:
    walk = draws(engine, refill_rounds=changes.pop("refill_rounds", 0))
    engine.group_size, walk.look = 4, 2
    for name, value in changes.items():
        setattr(walk, name, value)
    return walk


class Paying:
    """A fusion that pays for difference in talk, and finds none."""

    domains = frozenset({"talk"})

    def compares(self, others):
        return {"talk": "answers"}

    def __call__(self, groups, question):
        return groups


EVERY = {f"{name}{k}" for name in ("math", "talk") for k in range(6)}


def test_a_group_that_is_all_alike_after_its_look_is_left_at_that():
    engine = Script({name: [1, 0, 1, 1] for name in EVERY if name < "n"})  # talk never succeeds
    rollout = looking(engine).roll_out(16)
    assert [len(requests) for requests in engine.rounds] == [8, 4] and engine.copies == [2, 2]
    assert [g.rewards for g in rollout.groups.values()] == [(1.0, 0.0, 1.0, 1.0)] * 2 + [(0.0, 0.0)] * 2
    assert [g.look for g in rollout.groups.values()] == [2] * 4
    # TRL gets whole groups, the missing rows being what there is once more
    assert learned(rollout) == [1.0, 0.0, 1.0, 1.0] * 2 + [0.0] * 8
    assert [len(group.lengths) for group in rollout.groups_of_rows] == [4] * 4
    assert list(rollout.rows) == list(range(16))
    assert rollout.rows[10] is rollout.rows[8] and rollout.rows[11] is rollout.rows[9]


def test_what_goes_on_after_its_look_is_the_group_that_would_have_been_sampled_whole():
    answers = {name: [1, 0, 0, 1] for name in EVERY}
    seeds = []
    for look in (None, 2, 3):
        engine = Script(answers)
        rollout = looking(engine, look=look).roll_out(16)
        asked = [request for requests in engine.rounds for request in requests]
        seeds.append(sorted((str(r.prompt_ids), r.seed) for r in asked))
        assert [g.rewards for g in rollout.groups.values()] == [(1.0, 0.0, 0.0, 1.0)] * 4
    assert seeds[0] == seeds[1] == seeds[2]


@pytest.mark.parametrize("look", [None, 2])
def test_a_prompt_that_stands_in_a_draw_repeatedly_is_sampled_anew_each_time(look):
    engine = Script({name: [1, 0] * 16 for name in EVERY})
    walk = looking(engine, look=look)
    deal = walk.curriculum._draw
    walk.curriculum._draw = lambda n: [Prompt(domain="math", id="math0") for _ in deal(n)]  # type: ignore
    rollout = walk.roll_out(16)
    asked = [request.seed for requests in engine.rounds for request in requests]
    assert len(set(asked)) == len(asked) == 16
    assert {g.prompt_id for g in rollout.groups.values()} == {"math0"}


def test_where_difference_is_paid_for_a_look_selects_nothing():
    engine = Script({name: [1, 1, 1, 1] for name in EVERY})
    walk = looking(engine)
    walk.fusion = Paying()
    assert [g.look for g in walk.roll_out(16).groups.values()] == [2, 2, None, None]
    assert [len(requests) for requests in engine.rounds] == [8, 4]


def test_a_completion_without_a_grade_is_no_reason_to_leave_a_group():
    engine = Script({name: [0, 0, 0, 0] for name in EVERY})
    walk = looking(engine)
    walk.scorer.rewards = dict.fromkeys(
        walk.scorer.rewards, lambda completion_ids, **columns: [None] + [0.0] * (len(completion_ids) - 1)
    )
    walk.failures = Failures(most=1.0)
    rollout = walk.roll_out(16)
    # one completion of each domain's first batch has no grade: its group goes on
    assert sorted(len(g.rewards) for g in rollout.groups.values()) == [2, 2, 4, 4]


def test_a_group_that_was_left_is_replaced_and_its_replacement_is_looked_at_too():
    engine = Script({})
    rollout = looking(engine, refill_rounds=1).roll_out(16)
    assert rollout.rounds == 1 and [len(requests) for requests in engine.rounds] == [8, 8]
    assert [len(g.rewards) for g in rollout.sampled] == [2] * 8
    assert len(rollout.rows) == 16


def test_the_mean_of_a_domain_is_over_what_was_sampled_unasked():
    group = Group(
        prompt_id="a",
        domain="math",
        draw=0,
        rewards=(1.0, 0.0, 1.0, 1.0),
        lengths=(1,) * 4,
        truncated=(False,) * 4,
        look=2,
    )
    assert group.unselected == (1.0, 0.0) and group.graded == (1.0, 0.0, 1.0, 1.0)
    sums = DomainSums.of(group, is_useful=True)
    other = replace(group, rewards=(0.0, 0.0), lengths=(1, 1), truncated=(False, False))
    sums.add(DomainSums.of(other, is_useful=False))
    metrics = sums.metrics()
    assert metrics["reward"] == metrics["pass_rate"] == 0.25 and metrics["n"] == 6


def part(group, members) -> Group:
    return replace(group, look=None, **{name: getattr(group, name)[members] for name in COLUMNS})


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_fills_up_its_own_groups_after_a_look(rank, monkeypatch):
    """Both ranks know all groups; here the other rank's half of every gather is played back."""
    import polyphony.trainer.draws as module

    answers = {name: [1, 0, 1, 1] for name in EVERY if name < "n"}
    whole = looking(Script(answers)).roll_out(16)
    gathers = [
        [(k, part(group, slice(0, 2))) for k, group in whole.groups.items()],
        [(k, part(group, slice(2, 4))) for k, group in whole.groups.items() if len(group.rewards) > 2],
    ]
    monkeypatch.setattr(module, "broadcast_object", lambda prompts: prompts)
    monkeypatch.setattr(module, "gather_object", lambda mine: gathers.pop(0))
    engine = Script(answers)
    engine.rank, engine.world_size = rank, 2
    rollout = looking(engine).roll_out(8)
    assert rollout.groups == whole.groups and learned(rollout) == learned(whole)
    assert [len(requests) for requests in engine.rounds] == [4, 4 if rank == 0 else 0]  # rank 1 has the groups left
    assert list(rollout.rows) == [8 * rank + i for i in range(8)]
    assert len(rollout.rows) == 8
