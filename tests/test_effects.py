"""T of three domains by hand. Means before .2, .4, .0; after training on a alone .8, .2, .0, and so on:

         a    b    c        T  =   a   .6  -.2   .0
base    .2   .4   .0               b   .2   .4   .2
a       .8   .2   .0               c  -.1   .0   .8
b       .4   .8   .2
c       .1   .4   .8
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.effects import Effects, Part
from polyphony.curricula.transfer.matrix import TransferMatrix

NAMES = ("a", "b", "c")
AFTER = {(): (0.2, 0.4, 0.0), ("a",): (0.8, 0.2, 0.0), ("b",): (0.4, 0.8, 0.2), ("c",): (0.1, 0.4, 0.8)}
T = np.array([[0.6, -0.2, 0.0], [0.2, 0.4, 0.2], [-0.1, 0.0, 0.8]])


def row(trained, means, *, seed=0, n=10, step=1, probe=True, entropy=None):
    scores = {name: tuple(float(k < round(m * n)) for k in range(n)) for name, m in zip(NAMES, means, strict=True)}
    return Evaluation(trained=tuple(trained), step=step, seed=seed, scores=scores, probe=probe, entropy=entropy or {})


def effects(rows, names=NAMES):
    return Effects(TransferMatrix(domains=names, kinds=dict.fromkeys(names, "structured"), rows=tuple(rows)))


def probes(**fields):
    return [row(trained, means, **fields) for trained, means in AFTER.items()]


def test_transfer_is_after_minus_before():
    np.testing.assert_allclose(effects(probes()).transfer(), T, atol=1e-12)


def test_beyond_the_placebo_is_what_its_own_rows_leave_of_a_change():
    noise = {"a": (0.2, 0.3, 0.0), "b": (0.2, 0.4, 0.0), "c": (0.0, 0.2, 0.0)}
    rows = [*probes(), *(replace(row((n,), means), placebo=True) for n, means in noise.items())]
    matrix = TransferMatrix(domains=NAMES, kinds=dict.fromkeys(NAMES, "structured"), rows=tuple(rows))
    np.testing.assert_allclose(Effects(matrix).transfer(), T, atol=1e-12)
    damage = np.array([[0, -0.1, 0], [0, 0, 0], [-0.2, -0.2, 0]])
    np.testing.assert_allclose(Effects(matrix.of_placebo()).transfer(), damage, atol=1e-12)
    np.testing.assert_allclose(Effects(matrix, against="placebo").transfer(), T - damage, atol=1e-12)
    unfinished = replace(matrix, rows=tuple(rows[:-1]))  # c has none: a table of both kinds would mean neither
    np.testing.assert_allclose(Effects(unfinished, against="placebo").transfer(), T, atol=1e-12)


def test_seeds_are_paired_with_their_own_baseline_and_averaged():
    other = [row((), (0.4, 0.4, 0.0), seed=1), row(("a",), (0.6, 0.2, 0.2), seed=1)]  # T of a: .2, -.2, .2
    np.testing.assert_allclose(effects(probes() + other).transfer()[0], [0.4, -0.2, 0.1], atol=1e-12)


def test_a_run_gives_transfer_stage_by_stage_where_a_domain_was_never_probed():
    rows = [row(t, m, step=n, probe=False) for n, (t, m) in enumerate(AFTER.items())]
    table = effects(rows).transfer()
    np.testing.assert_allclose(table[1], [0.4 - 0.8, 0.8 - 0.2, 0.2 - 0.0], atol=1e-12)
    probed = effects([*rows, row(("b",), AFTER["b",])]).transfer()
    np.testing.assert_allclose(probed[1], T[1], atol=1e-12)


def test_entropy_transfer_is_in_nats_and_undefined_where_it_was_not_measured():
    rows = [
        row((), AFTER[()], entropy={"a": 0.8, "b": 0.5}),
        row("a", AFTER["a",], entropy={"a": 0.2, "b": 0.6}),
        row("b", AFTER["b",], entropy={"a": 0.7}),
    ]
    table = effects(rows).entropy_transfer()
    assert table[0, 0] == pytest.approx(-0.6) and table[0, 1] == pytest.approx(0.1)
    assert math.isnan(table[1, 1]) and math.isnan(table[0, 2])
    start, own = effects(rows).entropies()
    assert start[0] == pytest.approx(0.8) and own[0] == pytest.approx(0.2) and math.isnan(own[1])


def test_a_part_is_every_other_item_or_the_rest():
    # of ten items a has solved 0 and 1 before and 0 to 7 after its training: among the even ones 4/5 - 1/5
    measured = effects(probes())
    assert measured.means(Part(0, 2, rest=False)).change[0, 0, 0] == pytest.approx(0.6)
    # b after training on a has items 0 and 1: one of three in 0, 3, 6, 9 is none but 0, so 1/4; the rest holds 1/6
    assert measured.means(Part(0, 3, rest=False)).after[0, 0, 1] == pytest.approx(1 / 4)
    assert measured.means(Part(0, 3, rest=True)).after[0, 0, 1] == pytest.approx(1 / 6)


def test_bootstrap_interval_has_the_width_of_the_paired_standard_error():
    rng = np.random.default_rng(0)
    n = 400
    before, after = (rng.random((2, n)) < [[0.3], [0.5]]).astype(float)
    rows = [
        Evaluation(trained=t, step=1, seed=0, scores={"a": tuple(s), "b": tuple(s)}, probe=True)
        for t, s in (((), before), (("a",), after))
    ]
    bounds = effects(rows, ("a", "b")).intervals(resamples=4000)
    width = 2 * 1.96 * np.std(after - before) / math.sqrt(n)
    assert (bounds.high - bounds.low)[0, 0] == pytest.approx(width, rel=0.05)


def two_seed_world(rng, *, sd, n=200, names=NAMES):
    """Two seeds a probe; each training's true effects are drawn with `sd` around zero, items are coin flips."""
    level = {name: rng.random(n) for name in names}

    def scores(shift):
        return {
            name: tuple((rng.random(n) < np.clip(level[name] + s, 0, 1)).astype(float)) for name, s in shift.items()
        }

    rows = [Evaluation(trained=(), step=0, seed=0, scores=scores(dict.fromkeys(names, 0.0)))]
    for name in names:
        for seed in (0, 1):
            shift = dict(zip(names, rng.normal(0, sd, len(names)), strict=True))
            rows.append(Evaluation(trained=(name,), step=1, seed=seed, scores=scores(shift), probe=True))
    return effects(rows, names)


@pytest.mark.parametrize("sd", [0.0, 0.1])
def test_seed_noise_is_estimated_apart_from_item_noise(sd):
    rng = np.random.default_rng(1)
    variances = [two_seed_world(rng, sd=sd).noise.sd ** 2 for _ in range(60)]
    assert np.mean(variances, axis=0) == pytest.approx([sd**2] * 3, abs=0.002)


def test_one_seed_knows_no_seed_noise():
    noise = effects(probes()).noise
    assert (noise.sd.tolist(), noise.seeds) == ([0.0] * 3, 1)


def test_a_watched_domain_that_swings_between_seeds_does_not_blur_the_others():
    # a trained: +.1 under both seeds; w watched: +.4 and -.4. Ten items of a all move alike, so no item noise either
    rows = [Evaluation(trained=(), step=0, seed=s, scores={"a": (0.2,) * 10, "w": (0.5,) * 10}) for s in (0, 1)]
    for seed, swing in ((0, 0.9), (1, 0.1)):
        scores = {"a": (0.3,) * 10, "w": (swing,) * 10}
        rows.append(Evaluation(trained=("a",), step=1, seed=seed, scores=scores, probe=True))
    names = ("a", "w")
    kinds = dict.fromkeys(names, "structured")
    measured = Effects(TransferMatrix(domains=names, kinds=kinds, rows=tuple(rows), watch_only=("w",)))
    # the two changes of w differ from their mean by .4 each, with one degree of freedom: .4 x sqrt(2)
    assert measured.noise.sd == pytest.approx([0.0, 0.4 * math.sqrt(2)])


def test_intervals_hold_the_noise_between_seeds():
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(40):
        bounds = two_seed_world(rng, sd=0.1, names=("a", "b", "c", "d")).intervals(resamples=400)
        inside.append(((bounds.low <= 0) & (bounds.high >= 0)).mean())
    assert np.mean(inside) > 0.9


def test_only_items_that_were_graded_in_every_row_are_compared_and_how_many_is_told():
    rows = probes()
    holes = replace(rows[1], scores={**rows[1].scores, "b": (None, *rows[1].scores["b"][1:])})
    found = effects([rows[0], holes, *rows[2:]])
    assert found.gaps == {"b": "9 of 10 items"} and effects(rows).gaps == {}
    np.testing.assert_allclose(found.transfer()[:, 1], [(1 - 3) / 9, (7 - 3) / 9, 0], atol=1e-12)
    np.testing.assert_allclose(found.transfer()[:, [0, 2]], T[:, [0, 2]], atol=1e-12)
