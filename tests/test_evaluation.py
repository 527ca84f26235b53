"""Held-out evaluation with an engine of a few lines: item "n" of a domain is answered well in its first n samples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import polyphony.trainer.evaluation.evaluator as module
from polyphony.curricula.records import Completion, Domain
from polyphony.curricula.transfer.halves import halves, taken
from polyphony.trainer.data import PromptTable
from polyphony.trainer.evaluation.base_kl import BaseReference, mean_kl
from polyphony.trainer.evaluation.evaluator import Evaluator
from polyphony.trainer.evaluation.result import HeldoutResult
from polyphony.trainer.settings import EvaluationSettings

MATH = Domain(name="math", kind="structured", reward="exact")
STORIES = Domain(name="stories", kind="open_ended", reward="exact")


def table(domain, *ids) -> PromptTable:
    rows = [{"prompt": f"{domain.name} {i}", "id": i} for i in ids]
    return PromptTable(rows, domain=domain, where=domain.name, is_chat=False)


class World:
    """Stands for data, engine, policy and rewards, and counts what it is asked."""

    def __init__(self, *tables, rank=0, world_size=1):
        self.heldout = {t.domain.name: t for t in tables or BOTH}
        self.limits = {"math": 8, "stories": 32}
        self.rewards, self.slow = dict.fromkeys(self.limits), frozenset()
        self.rank, self.world_size = rank, world_size
        self.requests = []
        self.asked = 0
        self.moved = 0.0

    def tokenized(self, prompts):
        asked = [replace(prompt, ids=[ord(letter) for letter in prompt.prompt]) for prompt in prompts]
        self.asked += len(asked)
        return asked

    def complete(self, requests, copies):
        self.requests += requests
        return [Completion(ids=list(request.prompt_ids)[-1:]) for request in requests]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def read(self, prompts, completions):
        pairs = zip(prompts, completions, strict=True)
        return [replace(c, prompt=prompt, text=self.decode(c.ids)) for prompt, c in pairs]

    def __call__(self, completions):
        """Item "2" earns 1 in its first 2 samples, then 0; item "x" cannot be graded at all."""
        seen: dict[str, int] = {}
        scores = []
        for c in completions:
            seen[c.prompt.prompt] = seen.get(c.prompt.prompt, 0) + 1
            scores.append(None if c.text == "x" else float(seen[c.prompt.prompt] <= int(c.text)))
        return scores

    def entropy_sums(self, completions):
        """An item's number in nats, over ten tokens in math and thirty in stories."""
        return [(float(c.text), 10 if c.prompt.domain == "math" else 30) for c in completions]

    def logps(self, prompt_ids, ids):
        """Half a nat a token, and less the further the policy has moved."""
        return [-0.5 * len(row) - self.moved for row in ids]

    def rest(self):
        pass

    def apart(self):
        return self


def evaluator(world) -> Evaluator:
    settings = EvaluationSettings(samples=4, shown=1)
    return Evaluator(data=world, policy=world, scorer=world, settings=settings, seed=1)


BOTH = (table(MATH, "4", "1", "2"), table(STORIES, "0", "3"))


def test_items_samples_and_entropies_of_all_domains_come_in_the_order_of_their_sets():
    result = evaluator(World()).run()
    assert result.items == {"math": ("4", "1", "2"), "stories": ("0", "3")}
    assert result.samples == {
        "math": ((1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0)),
        "stories": ((0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0)),
    }
    assert result.scores() == {"math": (1.0, 0.25, 0.5), "stories": (0.0, 0.75)}
    assert result.passed() == {"math": (1.0, 1.0, 1.0), "stories": (0.0, 1.0)}
    assert result.entropy == {"math": 7 / 30, "stories": 3 / 60}  # nats summed, then divided by all tokens


def test_the_first_published_items_of_each_domain_are_kept_to_be_read():
    first = [next(i for i, side in zip(t.ids, halves(t.ids), strict=True) if side == "report") for t in BOTH]
    shown = evaluator(World()).run().shown
    assert [(c.prompt.domain, c.prompt.id) for c in shown] == [("math", first[0]), ("stories", first[1])]


class Telling(World):
    """Remembers which items it logged."""

    def __init__(self, told, quiet):
        super().__init__()
        self.told, self.quiet = told, quiet

    def __call__(self, completions):
        self.told += [(c.prompt.domain, c.prompt.id) for c in completions]
        return super().__call__(completions)

    def apart(self):
        return Telling(self.quiet, [])


def test_what_a_reward_logs_is_kept_of_the_published_items_alone():
    world = Telling([], [])
    evaluator(world).run()
    published = {
        (t.domain.name, i) for t in BOTH for i, side in zip(t.ids, halves(t.ids), strict=True) if side == "report"
    }
    assert set(world.told) == published
    assert len(set(world.quiet)) == 5 - len(published)


def test_samples_of_an_item_differ_in_their_seed_and_are_the_same_at_every_evaluation():
    world = World()
    twice = evaluator(world)
    twice.run()
    first = [request.seed for request in world.requests]
    world.requests.clear()
    twice.run()
    assert [request.seed for request in world.requests] == first
    assert len(set(first)) == 20
    assert world.asked == 5  # prompts never change: the second evaluation remembers


def test_each_domain_has_its_own_length_limit():
    world = World()
    evaluator(world).run()
    assert [request.max_tokens for request in world.requests] == [8] * 12 + [32] * 8


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_items_evenly_and_see_each_once(world_size, monkeypatch):
    whole = evaluator(World()).run()
    shares = [World(rank=rank, world_size=world_size) for rank in range(world_size)]
    kept: list = []
    monkeypatch.setattr(module, "gather_object", lambda records: kept.extend(records) or records)
    for world in shares:
        evaluator(world).run()
    monkeypatch.setattr(module, "gather_object", lambda records: kept)
    assert replace(evaluator(World()).run(), shown=()) == replace(whole, shown=())
    assert len({len(world.requests) for world in shares}) == 1  # generation is collective: as many on every rank
    seeds = {request.seed for world in shares for request in world.requests}
    alone = World()
    evaluator(alone).run()
    assert seeds == {request.seed for request in alone.requests}


def result(**samples) -> HeldoutResult:
    return HeldoutResult(items={}, samples=samples, entropy={})


def test_a_sample_that_was_not_graded_leaves_the_mean_of_the_others():
    assert result(math=((1.0, None, 0.0, None), (None, 0.5))).scores() == {"math": (0.5, 0.5)}
    assert result(math=((None, 1.0), (None, 0.5))).passed() == {"math": (1.0, 0.0)}


def test_an_item_that_nobody_could_grade_is_none_and_not_a_zero_and_is_named(caplog):
    items = {"math": ("a", "b", "c", "d", "e", "f")}
    one = HeldoutResult(items=items, samples={"math": ((1.0, 0.0), (None, None), *[(1.0, 1.0)] * 4)}, entropy={})
    assert one.scores() == {"math": (0.5, None, 1.0, 1.0, 1.0, 1.0)}
    assert one.passed() == {"math": (1.0, None, 1.0, 1.0, 1.0, 1.0)}
    one.check_failures(most=0.2)
    assert "domain 'math': 1 of 6 held-out items could not be graded (b)" in caplog.text
    with pytest.raises(RuntimeError, match=r"\(b\); max_grader_failures allows a share of 0.1"):
        one.check_failures(most=0.1)
    steer = taken(items["math"], items["math"], "steer")
    lost = tuple((None,) if i in steer else (1.0,) for i in items["math"])
    with pytest.raises(RuntimeError, match="none is left in one half"):
        HeldoutResult(items=items, samples={"math": lost}, entropy={}).check_failures(most=1.0)


@pytest.mark.parametrize(("samples", "message"), [((2.0, 1.0), "0 to 2"), ((-1.0, 1.0), "-1 to 1")])
def test_a_score_outside_0_to_1_is_an_error(samples, message):
    with pytest.raises(ValueError, match=rf"domain 'math': held-out scores must lie in \[0, 1\], got {message}"):
        result(math=(samples, (0.0, 0.0))).scores()


def test_greedy_answers_are_asked_for_apart_from_the_samples():
    world = World()
    asked = evaluator(world)
    asked.settings = EvaluationSettings(samples=4, greedy=True)
    result = asked.run()
    assert [r.is_greedy for r in world.requests] == [False] * 20 + [True] * 5
    assert {name: len(answers) for name, answers in result.greedy.items()} == {"math": 3, "stories": 2}
    assert evaluator(World()).run().greedy == {}


def test_the_distance_to_the_base_is_what_its_own_completions_lost_in_probability():
    world = World()
    moving = evaluator(world)
    assert moving.run().base_kl == {}
    moving.remember_base()
    world.moved = 0.25
    kl = moving.run().base_kl
    assert kl == {"math": dict.fromkeys(("4", "1", "2"), (0.25, 1)), "stories": dict.fromkeys(("0", "3"), (0.25, 1))}
    assert mean_kl(kl, ["math"]) == 0.25 and math.isnan(mean_kl(kl, []))


def test_only_so_many_items_of_each_domain_are_remembered():
    few = evaluator(World())
    few.settings = EvaluationSettings(samples=1, kl_items=1)
    few.run()
    assert [(c.domain, c.item) for c in few.remember_base().completions] == [("math", "4"), ("stories", "0")]


def test_a_base_is_the_same_after_it_was_written_and_read():
    base = evaluator(World())
    base.run()
    assert BaseReference.from_json(base.remember_base().to_json()) == base.base


def test_answers_come_item_by_item_with_their_entropies():
    read = evaluator(World()).run().read("math")
    assert [[a.score for a in row] for row in read.sampled] == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert read.entropy == ((4.0, 10), (1.0, 10), (2.0, 10)) and read.kl is None and read.greedy is None
