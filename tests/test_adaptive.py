"""`adaptive`: half of every draw evenly, the rest to what lacks most, and no more to what has stopped rising."""

import math
from dataclasses import replace

import numpy as np
import pytest

from polyphony.curricula.records import DomainStats, Evaluation, Evidence
from polyphony.curricula.schedulers.adaptive import Adaptive
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.curricula.transfer.matrix import TransferMatrix
from tests.experiments.fast.rules import Wanting
from tests.toy_world import ToyWorld

NAMES = ("a", "b", "c")


def spread(step, scores, *, exposure=(0, 0, 0), entropy=(), trained=NAMES, probe=False, n=400):
    scattered = np.random.default_rng(1).permutation(n)
    items = {
        m: tuple((scattered < round(s * n)).astype(float)) for m, s in zip((*NAMES, "safety"), scores, strict=False)
    }
    return Evaluation(
        trained=trained,
        step=step,
        seed=0,
        scores=items,
        exposure=dict(zip(NAMES, exposure, strict=True)),
        entropy=dict(zip(NAMES, entropy, strict=False)),
        probe=probe,
    )


def evidence(draw, evaluations=(), *, advantage=(0.8, 0.8, 0.8), reward=(0.5, 0.5, 0.5), alarms=()):
    last = [DomainStats(groups=4, abs_advantage=a, reward=r) for a, r in zip(advantage, reward, strict=True)]
    return Evidence(
        draw=draw,
        total_draws=100,
        domains=NAMES,
        kinds=("structured",) * 3,
        weights=(1.0,) * 3,
        sizes=(9,) * 3,
        drawn=(0,) * 3,
        last=tuple(last) if draw else (DomainStats(),) * 3,
        evaluations=tuple(evaluations),
        alarms=alarms,
    )


def probes(effects, entropies=None):
    """Probes of ten steps from .5 everywhere; effects[j] are the changes that training on j makes."""
    rows = [spread(0, (0.5,) * 4, trained=(), probe=True, entropy=(1.0, 1.0, 1.0))]
    for j, (name, change) in enumerate(zip(NAMES, effects, strict=True)):
        entropy = np.add(1.0, entropies[j]) if entropies else (1.0, 1.0, 1.0)
        rows.append(spread(10, np.add(0.5, change), trained=(name,), probe=True, entropy=entropy))
    names = (*NAMES, "safety")
    kinds = dict.fromkeys(names, "structured")
    return TransferMatrix(domains=names, kinds=kinds, rows=tuple(rows), watch_only=("safety",))


OWN = np.array([[0.2, 0, 0, 0], [0, 0.2, 0, 0], [0, 0, 0.2, 0]])


def row(step, scores, *, n=100, entropy=()):
    items = {
        name: tuple([1.0] * round(s * n) + [0.0] * (n - round(s * n)))
        for name, s in zip((*NAMES, "safety"), scores, strict=False)
    }
    return Evaluation(
        trained=NAMES, step=step, seed=0, scores=items, entropy=dict(zip((*NAMES, "safety"), entropy, strict=False))
    )


def shares(scheduler, rows, *, groups=3, draws=4):
    """Return the mixture after the rows, each of which came after so many draws with as many groups of each domain."""
    state, draw, decision = {}, 0, None
    for n in range(len(rows)):
        for _ in range(draws):
            last = (DomainStats(groups=groups, frac_dead=0.0) if draw else DomainStats(),) * 3
            evidence = Evidence(
                draw=draw, total_draws=100, domains=NAMES, kinds=("structured",) * 3, weights=(1.0,) * 3, sizes=(9,) * 3,
                drawn=(0,) * 3, last=last, evaluations=tuple(rows[: n + 1]),
            )  # fmt: skip
            decision = scheduler.decide(evidence, state)
            state, draw = decision.state, draw + 1
    return decision.mixture


def test_half_is_even_and_half_goes_by_score():
    # exp(-s / .2) of .2, .4, .4 is e^-1, e^-2, e^-2: shares 1 / (1 + 2 / e) = .5761 and .2119 of the half by need
    mixture = shares(Adaptive(), [row(0, (0.2, 0.4, 0.4))])
    assert mixture == pytest.approx([1 / 6 + 0.2881, 1 / 6 + 0.1060, 1 / 6 + 0.1060], abs=1e-4)


def test_a_level_is_the_last_evaluation():
    rows = [row(0, (0.9, 0.4, 0.4)), row(4, (0.1, 0.4, 0.4)), row(8, (0.2, 0.4, 0.4))]
    assert shares(Adaptive(), rows, groups=0) == pytest.approx(shares(Adaptive(), [row(0, (0.2, 0.4, 0.4))]))


def test_a_run_of_the_rule_that_had_this_name_before_is_told_that_it_goes_by_another(caplog):
    decision = Adaptive().decide(evidence(3), {"arms": {"mean": []}, "worth": {}})
    assert "another rule that was called adaptive" in caplog.text and "arms" not in decision.state


def test_nothing_was_measured_yet():
    evidence = Evidence(
        draw=0, total_draws=9, domains=NAMES, kinds=("structured",) * 3, weights=(1.0,) * 3, sizes=(9,) * 3,
        drawn=(0,) * 3, last=(DomainStats(),) * 3,
    )  # fmt: skip
    assert Adaptive().decide(evidence, {}).mixture == pytest.approx([1 / 3] * 3)


LOW = [row(4 * n, (s, 0.2 + 0.1 * n, 0.2 + 0.1 * n)) for n, s in enumerate((0.1, 0.3, 0.3, 0.3, 0.3))]
"""The first stands still at .3 from the second evaluation on; the others rise."""


def lacking(first, others=0.4):
    """The first domain's share, by what it lacks beside two that lack so much."""
    return 1 / 6 + 0.5 / (1 + 2 * math.exp((others - first) / 0.2))


def test_what_practice_does_not_move_comes_down_to_its_own_best():
    # three evaluations after 12 groups each brought nothing: .3 + .7 x 2^(-36 / 64) - .3 = .474; others 1 - .6
    assert shares(Adaptive(), LOW)[0] == pytest.approx(lacking(0.7 * 2 ** (-36 / 64)), abs=1e-4)
    # one standard error of 100 items at .3 is .046: .34 is no new best, .36 is, and all is open again
    for score, unmoved in ((0.34, 36), (0.36, 0)):
        rows = [*LOW[:4], row(16, (score, 0.6, 0.6))]
        best = max(score, 0.3)
        lacks = best + (1 - best) * 2 ** (-unmoved / 64) - score
        assert shares(Adaptive(), rows)[0] == pytest.approx(lacking(lacks), abs=1e-4)


def test_one_look_never_takes_more_than_half_of_what_is_open():
    # 12 draws of 99 groups between evaluations: 64 count of each, so three halvings
    assert shares(Adaptive(), LOW, groups=99, draws=12)[0] == pytest.approx(lacking(0.7 / 8), abs=1e-4)


def test_only_practice_counts():
    assert shares(Adaptive(), LOW, groups=0)[0] == pytest.approx(lacking(0.7), abs=1e-4)


def test_what_falls_is_not_let_go():
    # two standard errors of a difference of 100 items at .6 are .139: at .47 it stands still, at .45 it has fallen
    for score, unmoved in ((0.47, 24), (0.45, 0)):
        rows = [row(0, (0.6, 0.6, 0.6)), row(4, (score, 0.6, 0.6)), row(8, (score, 0.6, 0.6))]
        # the others stand still at .6
        others = 0.4 * 2 ** (-24 / 64)
        lacks = 0.6 + 0.4 * 2 ** (-unmoved / 64) - score
        assert shares(Adaptive(), rows)[0] == pytest.approx(lacking(lacks, others), abs=1e-4)


def test_a_fall_below_its_own_best_is_a_lack_again():
    fallen = [*LOW, row(20, (0.1, 0.7, 0.7)), row(24, (0.1, 0.8, 0.8))]
    assert shares(Adaptive(), fallen)[0] > shares(Adaptive(), LOW)[0] + 0.05


def test_a_run_that_the_rule_before_began_goes_on_with_its_evaluations():
    of_before = {"live": [9.0] * 3, "marks": [], "seen": 2}
    at = replace(evidence(3, [row(0, (0.2, 0.4, 0.4)), row(4, (0.5, 0.4, 0.4))]))
    state = Adaptive().decide(at, of_before).state
    assert state["best"] == [0.5, 0.4, 0.4] and state["seen"] == 2


def test_measured_transfer_and_entropy_move_shares_only_where_they_are_asked_for():
    harm = np.add(OWN, [[0, -0.2, -0.2, 0], [0, 0, 0, 0], [0.1, 0.1, 0, 0]])
    matrix, even = probes(harm), [row(0, (0.5, 0.5, 0.5, 0.9))]
    assert shares(Adaptive(transfer=matrix), even) == pytest.approx([1 / 3] * 3)
    mixture = shares(Adaptive(transfer=matrix, strength=0.9), even)
    assert mixture[0] < 0.9 / 3 and mixture[2] > 1.1 / 3
    matrix = probes(OWN, entropies=[[-0.4, 0, 0], [0.4, 0, 0], [0, 0, 0]])
    low = [row(0, (0.5,) * 3, entropy=(1.0, 1.0, 1.0)), row(10, (0.5,) * 3, entropy=(0.3, 1.0, 1.0))]
    assert shares(Adaptive(transfer=matrix), low) == pytest.approx([1 / 3] * 3)
    held = shares(Adaptive(transfer=matrix, entropy_control=("a",)), low)
    assert held[1] > 1.1 / 3 and held[0] < 0.9 / 3


class Ceilings(ToyWorld):
    """Domains that learn from what they can do already, up to a ceiling of their own."""

    def __init__(self, *, start, ceiling, seed):
        super().__init__(np.zeros((len(start), len(start))), seed=seed)
        self.hard[:] = 0
        self.skill, self.ceiling = np.array(start), np.array(ceiling)

    def practise(self, shares):
        """Grow by practice, by what is known and by what is left to be known."""
        self.skill += 0.1 * shares * (self.skill + 0.01) * (self.ceiling - self.skill) * (self.ceiling > 0)


START, CEILING = (0.005, 0.25, 0.4, 0.0), (1.0, 0.35, 1.0, 0.0)
"""One domain is found late, one ends at .35, one is ordinary; nothing of the last can ever be learned."""


def trained(scheduler, *, seed, domains=4):
    """Return the skills at the end, how often each domain was drawn, and the last mixture."""
    world = Ceilings(start=START[:domains], ceiling=CEILING[:domains], seed=seed)
    skill, curriculum = world.train(scheduler, draws=120, prompts=8, every=8)
    return (
        skill,
        np.array(list(curriculum.drawn.values())) / sum(curriculum.drawn.values()),
        curriculum.decision.mixture,
    )


def test_a_domain_that_starts_at_zero_is_found_sooner_than_by_mixing():
    gains = [trained(Adaptive(), seed=s, domains=3)[0][0] - trained(Joint(), seed=s, domains=3)[0][0] for s in range(2)]
    assert min(gains) > 0.1


def test_a_low_ceiling_and_a_hopeless_domain_are_let_go_and_keep_their_part():
    found, drawn, _ = trained(Adaptive(), seed=0)
    known, wanted, _ = trained(Wanting(), seed=0)
    assert drawn.min() >= 0.125 - 0.01  # half of an even share, whatever the need
    assert drawn[3] < 0.25 < wanted[3] and drawn[1] < 0.3
    assert found[0] > known[0] + 0.15  # to the good of the one that is found late


def test_harm_to_a_watch_only_domain_counts():
    harm = np.add(OWN, [[0, 0, 0, -0.3], [0, 0, 0, 0], [0, 0, 0, 0]])
    mixture = shares(Adaptive(transfer=probes(harm), strength=0.9), [row(0, (0.5,) * 4)])
    assert mixture[0] < 0.8 * mixture[1]


def test_a_broken_guardrail_doubles_the_need_of_its_domain_at_once():
    harm = np.add(OWN, [[0, 0, 0, -0.2], [0, 0, 0, 0], [0, 0, 0, 0]])
    scheduler, rows = Adaptive(transfer=probes(harm), strength=0.9), [spread(0, (0.5,) * 4, trained=())]
    before = scheduler.decide(evidence(0, rows), {}).state
    after = scheduler.decide(evidence(1, rows, alarms=("safety",)), before).state
    # needs 1, 1, 1, 1 become 1, 1, 1, 2 over their mean 5/4; effects a step are .02 and -.02
    assert before["worth"]["value"][:2] == pytest.approx([0.0, 0.02])
    assert after["worth"]["value"][:2] == pytest.approx([-0.02 / 1.25, 0.02 / 1.25])
    assert scheduler.decide(evidence(2, rows), after).state["worth"]["value"] == after["worth"]["value"]


def test_evaluations_that_came_one_by_one_or_together_leave_the_same_sums():
    rows = [spread(0, (0.5,) * 3, trained=())]
    rows += [spread(10 * k, (0.5 + 0.01 * k,) * 3, exposure=(30 * k, 20 * k, 10 * k)) for k in range(1, 6)]
    scheduler, state = Adaptive(transfer=probes(OWN)), {}
    for draw in range(6):
        state = scheduler.decide(evidence(draw, rows[: draw + 1]), state).state
    together = scheduler.decide(evidence(0, rows), {}).state
    assert state["worth"]["value"] == pytest.approx(together["worth"]["value"])


def test_an_entropy_that_is_missing_is_said_and_counts_as_in_its_band(caplog):
    rows = [spread(0, (0.5,) * 3, entropy=(1.0,) * 3), spread(5, (0.5,) * 3, exposure=(8,) * 3, entropy=(1.0,) * 2)]
    Adaptive(entropy_control=("c",)).decide(evidence(1, rows), {})
    (record,) = caplog.records
    assert record.getMessage() == (
        "domain 'c': its entropy was not measured at step 5: it is assumed in the middle of its band, and no entropy "
        "change of this interval is used"
    )


def test_probes_that_measured_fewer_entropies_than_the_run_count_for_nothing_and_that_is_said(caplog):
    matrix = probes(OWN)
    few = replace(matrix, rows=tuple(replace(r, entropy={"a": 1.0}) for r in matrix.rows))
    rows = [spread(0, (0.5,) * 4, entropy=(1.0,) * 3), spread(5, (0.5,) * 4, exposure=(8,) * 3, entropy=(1.0,) * 3)]
    Adaptive(transfer=few).decide(evidence(1, rows), {})
    assert "the probes measured no entropy of b, c: their entropies are ignored" in caplog.text


def test_a_transfer_file_of_other_domains_is_refused_though_it_moves_nothing():
    evidence_of_others = replace(evidence(0), domains=("a", "b", "x"))
    with pytest.raises(ValueError, match="x"):
        Adaptive(transfer=probes(OWN)).decide(evidence_of_others, {})
