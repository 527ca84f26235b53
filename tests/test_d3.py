"""`d3` worked by hand: remaining distance to the teacher times its descent."""

from __future__ import annotations

import json
import math

import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.decision_log import decision_line, evidence_from_json, replay
from polyphony.curricula.records import Domain, Group, Lessons
from polyphony.curricula.schedulers.d3 import D3

NAMES = ("far", "near", "alone")


def run(scheduler, kls, draws=4):
    """Draw so often; `kls` gives each domain's distance to its teacher, by draw; return the lines of the log."""
    domains = [Domain(name=name, kind="structured", train=[0], heldout=[0], reward="exact") for name in NAMES]
    prompts = {name: [f"{name}/{n}" for n in range(9)] for name in NAMES}
    curriculum = Curriculum(domains=domains, prompts=prompts, scheduler=scheduler, total_draws=draws)
    lines = []
    for draw in range(draws):
        refs = curriculum.draw(12)
        lines.append(decision_line(curriculum.basis, curriculum.decision, refs))
        alone = {"rewards": (1.0,), "lengths": (3,), "truncated": (False,)}
        groups = [Group(prompt_id=ref.id, domain=ref.domain, draw=draw, **alone) for ref in refs]
        lessons = {name: Lessons(kl=of[draw], abs_advantage=0.5) for name, of in kls.items()}
        curriculum.observe(groups, {}, lessons)
        curriculum.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    return lines


def test_shares_by_hand_and_a_domain_without_a_teacher_keeps_its_own():
    # windows of one draw; far: 2, 1.6 of 2 left falling by .4 / 2, so .8 * .2 = .16; near does not fall: 0
    lines = run(D3(every=1, warm_up=2, floor=0.1), {"far": [2.0, 1.6, 1.6], "near": [0.1, 0.2, 0.2]}, draws=3)
    assert list(lines[1]["mixture"].values()) == [1 / 3] * 3
    far = 1 / (1 + math.exp(-0.16 / 0.5))
    expected = [0.1 + (2 / 3 - 0.2) * far, 0.1 + (2 / 3 - 0.2) * (1 - far), 1 / 3]
    assert list(lines[2]["mixture"].values()) == pytest.approx(expected)
    assert "score far 0.16, near 0.00" in lines[2]["reason"]


def test_shares_stay_uniform_through_the_warm_up_and_move_at_the_ends_of_windows():
    kls = {"far": [2.0, 2.0, 1.0, 1.0, 0.5, 0.5], "near": [0.1] * 6}
    mixtures = [tuple(line["mixture"].values()) for line in run(D3(every=2, warm_up=4), kls, draws=6)]
    assert mixtures[:4] == [(1 / 3,) * 3] * 4
    assert mixtures[4] == mixtures[5] != mixtures[0]
    assert mixtures[4][0] > mixtures[4][1]


def test_what_a_teacher_said_is_evidence_and_replays():
    scheduler = D3(every=1, warm_up=2)
    lines = json.loads(json.dumps(run(scheduler, {"far": [2.0, 1.6, 1.2, 1.0], "near": [1.0] * 4})))
    evidence = evidence_from_json(lines[2]["evidence"], ())
    assert [stats.teacher_kl for stats in evidence.last[:2]] == [1.6, 1.0]
    assert (evidence.last[0].abs_advantage, evidence.last[0].frac_dead) == (0.5, 0.0)  # and not by its single reward
    assert math.isnan(evidence.last[2].teacher_kl) and evidence.last[2].frac_dead == 1.0
    assert all(one.ran == one.replayed for one in replay(lines, scheduler))


def test_without_teachers_the_log_has_no_such_column_and_shares_are_uniform():
    lines = run(D3(every=1, warm_up=1), {})
    assert all("teacher_kl" not in line["evidence"]["last"] for line in lines)
    assert {tuple(line["mixture"].values()) for line in lines} == {(1 / 3,) * 3}
    assert "uniform" in lines[-1]["reason"]
