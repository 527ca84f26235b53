import math
from dataclasses import fields

import numpy as np
import pytest

from polyphony.curricula.records import Evaluation
from polyphony.curricula.schedulers.online_transfer import Prior, Regression, entropy_prior, flat_prior, score_prior
from polyphony.curricula.transfer.matrix import TransferMatrix

NAMES = ("a", "b")


def row(step, scores, *, exposure=(0, 0), entropy=None, trained=NAMES, probe=False, n=10):
    items = {name: tuple(float(k < round(s * n)) for k in range(n)) for name, s in zip(NAMES, scores, strict=True)}
    return Evaluation(
        trained=trained,
        step=step,
        seed=0,
        scores=items,
        exposure=dict(zip(NAMES, exposure, strict=True)),
        entropy=entropy or {},
        probe=probe,
    )


def one_effect(mean, sd):
    return Prior(trained=("a",), measured=("a",), mean=np.array([[mean]]), sd=np.array([[sd]]), steps=np.array([1.0]))


def test_without_evaluations_the_posterior_is_the_prior():
    mean, sd = Regression.empty(1, 1).posterior(one_effect(0.1, 0.05))
    assert (mean[0, 0], sd[0, 0]) == (0.1, 0.05)


def test_one_interval_by_hand():
    # 2 steps of practice, change .4 with variance .01: likelihood of B mean .2, variance .01 / 4 = .0025
    # prior N(.1, .05^2 = .0025): equal precision, so the mean is .15 and the variance .00125
    sums = Regression.empty(1, 1).add(np.array([2.0]), np.array([0.4]), np.array([0.01]))
    mean, sd = sums.posterior(one_effect(0.1, 0.05))
    assert mean[0, 0] == pytest.approx(0.15) and sd[0, 0] == pytest.approx(math.sqrt(0.00125))


def test_true_effects_are_found_when_mixtures_vary():
    rng = np.random.default_rng(0)
    truth = np.array([[0.02, -0.01], [0.0, 0.03]])
    sums = Regression.empty(2, 2)
    for _ in range(60):
        practice = 10 * rng.dirichlet([0.3, 0.3])
        sums = sums.add(practice, truth @ practice + rng.normal(0, 0.02, 2), np.full(2, 0.02**2))
    mean, sd = sums.posterior(flat_prior(NAMES, NAMES, own=0.0, sd=0.05))
    assert np.abs(mean - truth).max() < 3 * sd.max() < 0.004


def test_a_constant_mixture_tells_only_the_sum_and_leaves_the_rest_to_the_prior():
    sums = Regression.empty(2, 2)
    for _ in range(50):
        sums = sums.add(np.array([5.0, 5.0]), np.array([0.2, 0.2]), np.full(2, 1e-4))
    prior = flat_prior(NAMES, NAMES, own=0.03, sd=0.02)
    mean, sd = sums.posterior(prior)
    assert (5 * mean).sum(axis=1) == pytest.approx([0.2, 0.2], abs=0.002)
    assert mean[0, 0] - mean[0, 1] == pytest.approx(0.03, abs=0.002)  # the difference was never seen
    assert sd.min() > 0.012


def test_a_domain_that_one_domain_harms_is_expected_to_be_harmed_by_others():
    # only b is practised and c falls: a's effect on c moves down too, by the correlation of .3
    names = ("a", "b", "c")
    prior = flat_prior(names, names, own=0.0, sd=0.02)
    sums = Regression.empty(3, 3).add(np.array([0.0, 10.0, 0.0]), np.array([0.0, 0.0, -0.3]), np.full(3, 1e-6))
    mean, _ = sums.posterior(prior)
    assert mean[2, 1] == pytest.approx(-0.03, abs=1e-3)
    assert mean[2, 0] == pytest.approx(0.3 * -0.03, abs=1e-3)
    assert mean[2, 2] == pytest.approx(0)  # its effect on itself stands alone


def test_sums_are_the_same_after_json_also_where_nothing_is_measured():
    for measured in (0, 2):
        sums = Regression.empty(measured, 2).add(np.ones(2), np.ones(measured), np.ones(measured))
        restored = Regression.from_json(sums.as_json())
        assert restored.cross.shape == (measured, 2)
        np.testing.assert_array_equal(restored.gram, sums.gram)


def test_practice_is_the_steps_between_evaluations_split_by_prompts():
    before, now = row(10, (0.5, 0.5), exposure=(40, 40)), row(20, (0.7, 0.5), exposure=(70, 50))
    sums = Regression.empty(2, 2).add_scores(before, now, NAMES)
    np.testing.assert_allclose(sums.gram, np.outer([7.5, 2.5], [7.5, 2.5]))
    np.testing.assert_allclose(sums.cross, np.outer([0.2, 0.0], [7.5, 2.5]), atol=1e-12)


def test_an_interval_without_practice_says_nothing():
    before = row(10, (0.5, 0.5), exposure=(40, 40))
    assert Regression.empty(2, 2).add_scores(before, row(10, (0.7, 0.5), exposure=(40, 40)), NAMES).weight == 0


def probed(entropy):
    rows = (
        row(0, (0.2, 0.4), trained=(), probe=True, entropy=entropy[0]),
        row(10, (0.8, 0.2), trained=("a",), probe=True, entropy=entropy[1]),
        row(20, (0.4, 0.8), trained=("b",), probe=True, entropy=entropy[2]),
    )
    return TransferMatrix(domains=NAMES, kinds=dict.fromkeys(NAMES, "structured"), rows=rows)


def test_probes_give_effects_per_step():
    prior = score_prior(probed([{}, {}, {}]))
    np.testing.assert_allclose(prior.mean, [[0.06, 0.01], [-0.02, 0.02]], atol=1e-12)
    assert (prior.sd >= 0.5 * np.abs(prior.mean)).all()


def test_probes_give_entropy_effects_where_all_of_them_measured_it():
    prior = entropy_prior(probed([{"a": 0.8, "b": 0.5}, {"a": 0.3}, {"a": 1.0}]))
    assert prior.measured == ("a",)
    np.testing.assert_allclose(prior.mean, [[-0.05, 0.01]], atol=1e-12)


def test_a_prior_knows_only_its_own_domains():
    with pytest.raises(ValueError, match=r"\['c'\] of this run are not in the transfer file"):
        score_prior(probed([{}, {}, {}])).select(("a", "c"), NAMES)


def test_a_probe_that_took_no_steps_is_refused():
    rows = probed([{}, {}, {}]).rows
    still = row(0, (0.8, 0.2), trained=("a",), probe=True)
    matrix = TransferMatrix(domains=NAMES, kinds=dict.fromkeys(NAMES, "structured"), rows=(rows[0], still, rows[2]))
    with pytest.raises(ValueError, match="domain 'a': its probe ends at the baseline's step"):
        score_prior(matrix)


def test_what_a_rollback_gave_back_is_nobodys_doing():
    before, damaged = row(0, (0.5, 0.9)), row(10, (0.5, 0.3), exposure=(80, 0))
    healed = Evaluation(**{**vars_of(row(20, (0.5, 0.9), exposure=(80, 80))), "rolled_back": True})
    sums = Regression.empty(2, 2).add_scores(before, damaged, NAMES)
    assert sums.add_scores(damaged, healed, NAMES) is sums
    assert sums.add_entropies(damaged, healed, NAMES, ()) is sums
    later = row(30, (0.5, 0.9), exposure=(80, 160))
    mean, _ = sums.add_scores(healed, later, NAMES).posterior(flat_prior(NAMES, NAMES, own=0.0, sd=0.05))
    assert mean[1, 0] < -0.03 and abs(mean[1, 1]) < 0.01  # a harms b, b does nothing
    assert Evaluation.from_row(healed.as_row()) == healed and "rolled_back" not in later.as_row()


def vars_of(evaluation):
    return {f.name: getattr(evaluation, f.name) for f in fields(evaluation)}
