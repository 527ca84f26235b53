"""How much held-out samples differ, worked by hand."""

from __future__ import annotations

import math

import pytest

from polyphony.curricula.records import Completion, Prompt
from polyphony.trainer.evaluation.answers import Variety, varieties, variety_metrics
from polyphony.trainer.settings import Diversity


def samples(domain, item, *texts, scores=()) -> list[Completion]:
    prompt = Prompt(id=item, domain=domain, prompt=f"{domain} {item}", columns={})
    rewards = scores or [1.0] * len(texts)
    return [Completion(prompt=prompt, ids=[1], text=t, reward=r) for t, r in zip(texts, rewards, strict=True)]


STORIES = {"stories": Diversity(partitioner="normalised")}


def test_variety_of_an_item_by_hand():
    # pairs of words: x y, X y!, x y, y z: 3 of 4 differ; classes {0, 1}, {2}, {3}; the last is not right;
    # counts of words and pairs, only two of the texts share any: x y (1, 1, 1) and x y z (1, 1, 1, 1, 1) with cosine
    # 3 / sqrt(3 * 5): eigenvalues (1 + c) / 4, (1 - c) / 4, 1/4, 1/4
    (variety,) = varieties(
        samples("stories", "1", "x y", "X y!", "x y z", "no", scores=[1.0, 1.0, 1.0, 0.9]), k=4, by_domain=STORIES
    )
    eigenvalues = [(1 + math.sqrt(0.6)) / 4, (1 - math.sqrt(0.6)) / 4, 0.25, 0.25]
    assert (variety.distinct_2, variety.unique_correct, variety.classes) == (0.75, 2, 3)
    assert variety.vendi == pytest.approx(math.exp(-sum(x * math.log(x) for x in eigenvalues)))
    # x y: 1, 1 of 1 (nearest length 2: no penalty); X y!: nothing shared, 0; x y z: 2/3, 1/2, 0.1/1; no: 0
    assert variety.self_bleu == pytest.approx((1 + (2 / 3 * 1 / 2 * 0.1) ** (1 / 3)) / 4)


def test_without_a_partitioner_answers_are_what_they_come_to():
    texts = [r"\boxed{4}", "The answer is 4", "<answer>5</answer>", "6"]
    (variety,) = varieties(samples("math", "1", *texts, scores=[1.0, 1.0, 1.0, 0.0]), k=4, by_domain=STORIES)
    assert variety.unique_correct == 2
    assert math.isnan(variety.classes)


def test_items_keep_their_order_over_domains():
    both = samples("math", "1", "1", "1") + samples("stories", "1", "a", "b") + samples("stories", "2", "c", "c")
    found = varieties(both, k=2, by_domain=STORIES)
    assert [v.unique_correct for v in found] == [1, 2, 1]
    assert [v.classes for v in found[1:]] == [2, 1]


def test_one_sample_differs_from_nothing():
    assert varieties(samples("math", "1", "4"), k=1, by_domain={}) == []
    assert variety_metrics({}) == {}


class Lost:
    def same(self, groups, prompts):
        raise ConnectionError("no judge")


def test_what_the_partitioner_could_not_tell_is_undefined():
    (variety,) = varieties(
        samples("stories", "1", "a b", "a b"), k=2, by_domain={"stories": Diversity(partitioner=Lost())}
    )
    assert variety.distinct_2 == 0.5
    assert math.isnan(variety.unique_correct)
    assert math.isnan(variety.classes)


def test_the_mean_over_the_items_is_published():
    unknown = dict.fromkeys(("self_bleu", "vendi", "unique_correct", "classes"), math.nan)
    of_items = [Variety(distinct_2=float(i), **unknown) for i in range(8)]
    metrics = variety_metrics({"math": of_items})
    assert metrics["heldout/math/distinct_2"] == 3.5
    assert math.isnan(metrics["heldout/math/classes"])
