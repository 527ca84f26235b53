"""Which domains are probed where not all can be: the choice, what is predicted of the rest, and when it is enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polyphony.curricula.schedulers import build_scheduler
from polyphony.curricula.transfer.budget import choose, completed, next_domain, posterior, probed
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.planner import make_plan
from polyphony.curricula.transfer.settled import is_settled
from tests.experiments.budget import RECORDED, at_random, course, load
from tests.experiments.decisions import OWN, World

NAN = np.nan


def of(matrix: TransferMatrix, names, **fields) -> TransferMatrix:
    """The matrix while only these domains were probed."""
    rows = tuple(row for row in matrix.rows if not row.trained or row.trained[0] in names)
    return replace(matrix, rows=rows, **fields)


def test_domains_that_respond_alike_are_believed_to_move_others_alike():
    # a and b lift c, d harms it; what a and d do to the others says that x responds as a does
    known = np.array([[0.3, 0.1, 0.2, -0.2, 0.1], [NAN] * 5, [0.1, 0.1, 0.3, -0.2, 0.1], [-0.2, -0.2, -0.2, 0.3, -0.2]])
    known = np.concatenate([known, [[NAN] * 5]])
    mean, spread = posterior(known)
    assert mean[0] == pytest.approx(known[0]) and spread[0] == 0 < spread[1]
    assert mean[1, 0] > 0 > mean[1, 3]  # domain 1 moved as 0 and 2 did, and not as 3
    assert mean[1, 1] == pytest.approx(0.3)  # by its own training as much as the others by theirs


def test_weights_that_moved_in_like_directions_are_evidence_where_responses_are_none():
    known = np.array([[0.2, 0.0, 0.1, 0.1], [0.0, 0.2, -0.1, -0.1], [NAN] * 4, [NAN] * 4])
    cosines = np.full((4, 4), NAN)
    cosines[2, 0] = cosines[0, 2] = cosines[3, 1] = cosines[1, 3] = 0.9
    mean, _ = posterior(known, cosines)
    assert mean[2, 3] > 0 > mean[3, 2]


def test_the_first_domain_is_the_one_whose_rewards_differ_most_and_the_next_what_others_do_not_lift():
    assert choose(np.full((3, 3), NAN), np.array([0.9, 0.45, 0.1])) == 1
    known = np.array([[NAN] * 3, [0.29, 0.3, 0.0], [NAN] * 3])  # 0 is lifted by 1 already
    assert choose(known, np.array([0.9, 0.45, 0.1])) == 2


def test_chosen_domains_leave_less_regret_than_random_ones_on_recorded_matrices():
    rng, chosen, random = np.random.default_rng(0), [], []
    for path in sorted(RECORDED.glob("*.json")):
        transfer, scores = load(path)
        chosen.append(course(transfer, scores, choose)[0][2])
        random += [course(transfer, scores, at_random(rng))[0][2] for _ in range(4)]
    assert len(chosen) == 6 and np.mean(chosen) < np.mean(random) / 1.5  # after three probes


def test_a_file_that_a_budget_left_incomplete_plans_to_mix_and_names_what_was_predicted():
    whole = TransferMatrix.load(RECORDED / "uneven-0.0002.json")
    part = of(whole, ("plus", "minus", "strings"), provenance={"budget": 3})
    filled = completed(part)
    assert set(probed(filled)) == set(whole.trainable) and next_domain(part) in {"facts", "refuse", "stories"}
    table = Effects(filled).transfer()
    assert np.isfinite(table).all()
    plan = make_plan(part)
    assert plan.decision == "mix" and plan.options[0].kind == "mix" and set(plan.order) == set(whole.trainable)
    assert "facts, refuse, stories were not probed" in plan.explain()
    (sequence,) = [option for option in plan.options if option.kind == "sequence"]
    assert sequence.over_mix is None and "`polyphony probe RECIPE --out FOLDER` would" in sequence.note
    assert build_scheduler("auto", transfer=part).why.startswith("adaptive, for the plan says mix")
    with pytest.raises(ValueError, match="have neither a probe nor a stage"):
        make_plan(replace(part, provenance={}))


def test_no_domain_more_is_probed_where_no_order_matters_and_plans_stay_alike():
    whole = World(size=6, items=60).matrix(np.random.default_rng(0), OWN * np.eye(6))
    assert not is_settled(of(whole, ("d0", "d1", "d2")))  # three plans need four domains
    assert is_settled(of(whole, ("d0", "d1", "d2", "d3")))
    turned = np.triu(np.ones((6, 6)), 1) * -0.15 + OWN * np.eye(6)  # each domain more changes the order
    clear = World(size=6, items=60, luck=0.0).matrix(np.random.default_rng(0), turned)
    assert not is_settled(of(clear, ("d5", "d0", "d4", "d1")))
