from dataclasses import replace

import numpy as np
import pytest

from polyphony.curricula.records import DomainStats, Evaluation, Evidence
from polyphony.curricula.schedulers.adaptive import Adaptive
from polyphony.curricula.transfer.matrix import TransferMatrix

NAMES = ("a", "b", "c")


def row(step, scores, *, exposure=(0, 0, 0), entropy=(), trained=NAMES, probe=False, n=400):
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


def mean_mixture(scheduler, draws=200, evaluations=(), **shown):
    """Average over draws of constant evidence, the first ten left out."""
    state, mixtures = {}, []
    for draw in range(draws):
        rewards = shown.get("rising", lambda draw: (0.5, 0.5, 0.5))(draw)
        given = evidence(draw, evaluations, advantage=shown.get("advantage", (0.8, 0.8, 0.8)), reward=rewards)
        decision = scheduler.decide(given, state)
        state = decision.state
        mixtures.append(decision.mixture)
    return np.mean(mixtures[10:], axis=0), decision


def probes(effects, entropies=None):
    """Probes of ten steps from .5 everywhere; effects[j] are the changes that training on j makes."""
    rows = [row(0, (0.5,) * 4, trained=(), probe=True, entropy=(1.0, 1.0, 1.0))]
    for j, (name, change) in enumerate(zip(NAMES, effects, strict=True)):
        entropy = np.add(1.0, entropies[j]) if entropies else (1.0, 1.0, 1.0)
        rows.append(row(10, np.add(0.5, change), trained=(name,), probe=True, entropy=entropy))
    names = (*NAMES, "safety")
    kinds = dict.fromkeys(names, "structured")
    return TransferMatrix(domains=names, kinds=kinds, rows=tuple(rows), watch_only=("safety",))


OWN = np.array([[0.2, 0, 0, 0], [0, 0.2, 0, 0], [0, 0, 0.2, 0]])


def test_equal_evidence_gives_equal_shares():
    shares, _ = mean_mixture(Adaptive())
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_what_teaches_more_is_practised_more_and_nothing_is_starved():
    shares, _ = mean_mixture(Adaptive(), advantage=(0.9, 0.4, 0.0))
    assert shares[0] > 0.5 > shares[1] > shares[2] >= 0.1 / 3


@pytest.mark.parametrize("direction", [1, -1])
def test_reward_that_moves_either_way_calls_for_practice(direction):
    shares, _ = mean_mixture(Adaptive(), draws=16, rising=lambda draw: (0.5 + direction * 0.02 * draw, 0.5, 0.5))
    assert shares[0] > 1.3 * shares[1]


def test_a_domain_that_harms_the_others_gets_less_and_one_that_helps_gets_more():
    harm = np.add(OWN, [[0, -0.2, -0.2, 0], [0, 0, 0, 0], [0.1, 0.1, 0, 0]])
    shares, _ = mean_mixture(Adaptive(transfer=probes(harm)), evaluations=[row(0, (0.5,) * 4, trained=())])
    assert shares[0] < 0.8 / 3 and shares[2] > 1.2 / 3


def test_harm_to_a_watch_only_domain_counts():
    harm = np.add(OWN, [[0, 0, 0, -0.3], [0, 0, 0, 0], [0, 0, 0, 0]])
    shares, _ = mean_mixture(Adaptive(transfer=probes(harm)), evaluations=[row(0, (0.5,) * 4, trained=())])
    assert shares[0] < 0.7 * shares[1]


def test_the_domain_with_the_lowest_score_is_needed_most():
    shares, _ = mean_mixture(Adaptive(transfer=probes(OWN)), evaluations=[row(0, (0.7, 0.7, 0.3, 0.7), trained=())])
    assert shares[2] > 1.5 * shares[0]


def test_a_domain_below_its_best_is_needed_more():
    fallen = [row(0, (0.6, 0.6, 0.6, 0.6), trained=()), row(10, (0.45, 0.6, 0.6, 0.6)), row(20, (0.45, 0.6, 0.6, 0.6))]
    steady = [row(0, (0.45, 0.6, 0.6, 0.6), trained=()), *fallen[1:]]
    scheduler = Adaptive(transfer=probes(OWN))
    assert mean_mixture(scheduler, evaluations=fallen)[0][0] > 1.1 * mean_mixture(scheduler, evaluations=steady)[0][0]


def test_a_broken_guardrail_doubles_the_need_of_its_domain_at_once():
    harm = np.add(OWN, [[0, 0, 0, -0.2], [0, 0, 0, 0], [0, 0, 0, 0]])
    scheduler, rows = Adaptive(transfer=probes(harm)), [row(0, (0.5,) * 4, trained=())]
    before = scheduler.decide(evidence(0, rows), {}).state
    after = scheduler.decide(evidence(1, rows, alarms=("safety",)), before).state
    # needs 1, 1, 1, 1 become 1, 1, 1, 2 over their mean 5/4; effects a step are .02 and -.02
    assert before["worth"]["value"][:2] == pytest.approx([0.0, 0.02])
    assert after["worth"]["value"][:2] == pytest.approx([-0.02 / 1.25, 0.02 / 1.25])
    assert scheduler.decide(evidence(2, rows), after).state["worth"]["value"] == after["worth"]["value"]


def test_when_an_entropy_is_below_its_band_what_raises_it_is_practised():
    # training on b raises a's entropy by .4 nats, training on a lowers it by .4
    matrix = probes(OWN, entropies=[[-0.4, 0, 0], [0.4, 0, 0], [0, 0, 0]])

    def shares(nats, held=("a",)):
        rows = [row(0, (0.5,) * 4, trained=(), entropy=(1.0, 1.0, 1.0)), row(10, (0.5,) * 4, entropy=(nats, 1.0, 1.0))]
        return mean_mixture(Adaptive(transfer=matrix, entropy_control=held), evaluations=rows)

    calm, decision = shares(0.8)
    assert calm == pytest.approx([1 / 3] * 3, abs=0.04) and "entropy" not in decision.reason
    collapsed, _ = shares(0.1)
    assert collapsed[1] > 1.15 * collapsed[2] > 1.15 * 1.15 * collapsed[0]
    exploded, _ = shares(2.0)
    assert exploded[0] > exploded[2] > exploded[1]
    for others in ((), ("b", "c")):  # nobody asked for a to be held
        free, decision = shares(0.1, others)
        assert free == pytest.approx(calm) and "entropy" not in decision.reason


def test_without_probes_the_run_itself_shows_who_harms_whom():
    rng = np.random.default_rng(0)
    rows, exposure, b = [row(0, (0.5,) * 3, trained=())], np.zeros(3), 0.5
    for step in range(1, 25):
        shares = rng.dirichlet([0.5] * 3)
        exposure += 100 * shares
        b = float(np.clip(b + 0.05 * (0.3 - shares[0]), 0.1, 0.9))  # b falls whenever a is practised
        rows.append(row(10 * step, (0.5, b, 0.5), exposure=tuple(exposure)))
    shares, _ = mean_mixture(Adaptive(), evaluations=rows)
    assert shares[0] < 0.85 * shares[2]


def test_evaluations_that_came_one_by_one_or_together_leave_the_same_sums():
    rows = [row(0, (0.5,) * 3, trained=())]
    rows += [row(10 * k, (0.5 + 0.01 * k,) * 3, exposure=(30 * k, 20 * k, 10 * k)) for k in range(1, 6)]
    scheduler, state = Adaptive(), {}
    for draw in range(6):
        state = scheduler.decide(evidence(draw, rows[: draw + 1]), state).state
    together = scheduler.decide(evidence(0, rows), {}).state
    assert state["worth"]["value"] == pytest.approx(together["worth"]["value"])


def test_an_entropy_that_is_missing_is_said_and_counts_as_in_its_band(caplog):
    rows = [row(0, (0.5,) * 3, entropy=(1.0,) * 3), row(5, (0.5,) * 3, exposure=(8,) * 3, entropy=(1.0,) * 2)]
    Adaptive(entropy_control=("c",)).decide(evidence(1, rows), {})
    (record,) = caplog.records
    assert record.getMessage() == (
        "domain 'c': its entropy was not measured at step 5: it is assumed in the middle of its band, and no entropy "
        "change of this interval is used"
    )


def test_probes_that_measured_fewer_entropies_than_the_run_count_for_nothing_and_that_is_said(caplog):
    matrix = probes(OWN)
    few = replace(matrix, rows=tuple(replace(r, entropy={"a": 1.0}) for r in matrix.rows))
    rows = [row(0, (0.5,) * 4, entropy=(1.0,) * 3), row(5, (0.5,) * 4, exposure=(8,) * 3, entropy=(1.0,) * 3)]
    Adaptive(transfer=few).decide(evidence(1, rows), {})
    assert "the probes measured no entropy of b, c: their entropies are ignored" in caplog.text
