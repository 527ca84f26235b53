import json
import math

import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.decision_log import (
    DECIDED,
    choices,
    decision_line,
    evidence_as_json,
    evidence_from_json,
    replay,
    shortened,
    wholes,
)
from polyphony.curricula.records import Domain, Evaluation, Group
from polyphony.curricula.schedulers.adaptive import Adaptive
from polyphony.curricula.schedulers.fixed import Joint, Sequential


def a_run(draws=4, scheduler=None):
    """Return the decision lines and the curriculum of a short run, under `joint` if nothing else is asked for."""
    domains = [Domain(name="math", kind="structured", train=[1]), Domain(name="talk", kind="open_ended", train=[1])]
    prompts = {d.name: [f"{d.name}{n}" for n in range(9)] for d in domains}
    curriculum = Curriculum(domains=domains, prompts=prompts, scheduler=scheduler or Joint(), total_draws=draws)
    lines = []
    for draw in range(draws):
        curriculum.record(Evaluation(trained=(), step=draw, seed=0, scores={"math": (0.5, 1.0), "talk": (0.0, 0.25)}))
        refs = curriculum.draw(3)
        lines.append(decision_line(curriculum.basis, curriculum.decision, refs))
        groups = [
            Group(prompt_id=r.id, domain=r.domain, draw=draw, rewards=(1, 0), lengths=(3, 4), truncated=(False, True))
            for r in refs[:1]
        ]
        curriculum.observe(groups, {"math": 0.7})
        curriculum.note("rolled back")
    return lines, curriculum


def test_a_line_says_what_was_drawn_and_why():
    lines, _ = a_run()
    assert lines[0]["mixture"] == {"math": 0.5, "talk": 0.5}
    assert lines[0]["counts"] == {"math": 2, "talk": 1}
    assert (lines[0]["draw"], lines[0]["reason"], lines[0]["stage"]) == (0, "fixed weights", None)


def test_evidence_comes_back_from_its_line_as_it_was():
    lines, curriculum = a_run()
    for line in lines[1:]:
        restored = evidence_from_json(json.loads(json.dumps(line["evidence"], allow_nan=False)), curriculum.evaluations)
        assert json.dumps(evidence_as_json(restored)) == json.dumps(line["evidence"])
        assert len(restored.evaluations) == line["draw"] + 1
        assert restored.notes == ("rolled back",)
    assert restored.last[0].entropy == 0.7 and math.isnan(restored.last[1].entropy)


def test_a_line_stays_small_however_many_evaluations_it_had_seen():
    lines, _ = a_run(draws=200)
    assert len(json.dumps(lines[-1])) < 700


@pytest.mark.parametrize("scheduler", [Joint(), Sequential(), Adaptive()])
def test_lines_that_leave_out_what_they_have_in_common_are_read_whole(scheduler):
    lines, curriculum = a_run(draws=12, scheduler=scheduler)
    ids = {name: list(sampler.ids) for name, sampler in curriculum.samplers.items()}
    places = [[[ids[n].index(p) for p in line["prompts"] if p in ids[n]] for n in ids] for line in lines]
    pairs = zip(lines, [None, *lines[:5], None, *lines[6:-1]], places, strict=True)  # the run went on after the sixth
    written = json.loads(json.dumps([shortened(*of) for of in pairs]))
    assert all(
        len(json.dumps(short)) < len(json.dumps(line)) - 200
        for short, line in zip(written[1:6], lines[1:], strict=False)
    )
    decided = [{key: line[key] for key in DECIDED if key in line} for line in lines]
    assert choices(written) == decided
    assert choices(lines) == decided
    assert wholes(written, ids) == lines


def test_a_line_that_leaves_out_what_is_missing_is_refused_or_left_out():
    lines, _ = a_run()
    cut = [shortened(line, before, [[0], [1]]) for line, before in zip(lines, [None, *lines], strict=False)]
    del cut[1]
    with pytest.raises(ValueError, match="draw 2 is told by what differs from the one before, which is missing"):
        choices(cut)
    assert [line["draw"] for line in choices(cut, is_lenient=True)] == [0]


def test_lines_of_an_older_version_are_read_with_null_for_nan():
    lines, curriculum = a_run()
    old = json.loads(json.dumps(lines[1]))
    stats = curriculum.basis.last
    old["evidence"]["last"] = {"groups": [1, 0], "reward": [0.5, None], "pass_rate": [0.5, None], "tokens": [7, 0]}
    assert wholes([old], {}) == [old]
    restored = evidence_from_json(old["evidence"], curriculum.evaluations)
    assert restored.last[0].reward == stats[0].reward and math.isnan(restored.last[1].reward)


def test_a_line_that_saw_more_evaluations_than_the_file_has_is_refused():
    lines, curriculum = a_run()
    with pytest.raises(ValueError, match="draw 3 had seen 4 evaluations, the run's file has 2"):
        evidence_from_json(lines[3]["evidence"], curriculum.evaluations[:2])


def test_another_scheduler_is_replayed_beside_the_one_that_ran():
    lines, curriculum = a_run()
    replayed = replay(lines, Sequential(), curriculum.evaluations)
    assert [r.ran for r in replayed] == [(0.5, 0.5)] * 4
    assert [r.replayed for r in replayed] == [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0)]
    assert replayed[3].reason == "stage 2 of 2: talk"


def test_the_scheduler_that_ran_replays_to_itself():
    lines, curriculum = a_run()
    assert all(r.ran == r.replayed for r in replay(lines, Joint(), curriculum.evaluations))
