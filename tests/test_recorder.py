"""A recorder over a real curriculum and a real folder: two domains that are trained and one that is watched."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.decision_log import decision_line
from polyphony.curricula.records import Completion, Decision, Domain, Evaluation, Group, Prompt
from polyphony.curricula.schedulers.fixed import Joint, Sequential
from polyphony.curricula.transfer.halves import halves
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.checkpoints import load_ledgers, save_ledgers
from polyphony.trainer.draws import refill_line
from polyphony.trainer.evaluation.answers import Answer
from polyphony.trainer.evaluation.result import HeldoutResult
from polyphony.trainer.run.folder import RunFolder, read_transfer
from polyphony.trainer.run.recorder import Recorder

DOMAINS = (
    Domain(name="math", kind="structured", train=[], heldout=[]),
    Domain(name="stories", kind="open_ended", train=[], heldout=[]),
    Domain(name="safety", kind="structured", heldout=[]),
)
NAMES = ("math", "stories", "safety")
IDS = ("a", "b", "c", "d", "e", "f")
STEER = tuple(side == "steer" for side in halves(IDS))


def recorder(path, *, scheduler=None, is_main=True) -> Recorder:
    curriculum = Curriculum(
        domains=DOMAINS,
        prompts={"math": ["m1", "m2"], "stories": ["s1", "s2"]},
        scheduler=scheduler or Joint(),
        total_draws=4,
    )
    return Recorder(
        folder=RunFolder(path), domains=DOMAINS, curriculum=curriculum, seed=1, provenance={}, is_main=is_main
    )


def result(*, steer=0.5, report=0.5, confidence=math.nan, **domains) -> HeldoutResult:
    """Every item's two samples have the score of its half; a domain may have (steer, report) of its own."""
    samples = {}
    for name in NAMES:
        mine = domains.get(name, (steer, report))
        samples[name] = tuple((mine[0],) * 2 if is_steer else (mine[1],) * 2 for is_steer in STEER)
    shown = Completion(prompt=Prompt(id="a", domain="math", prompt="1+1 =", columns={}), ids=[1], text="2", reward=1.0)
    answers = {
        name: tuple(
            tuple(Answer(score=s, vote=str(s), confidence=confidence, is_valid=True, style="bare") for s in row)
            for row in rows
        )
        for name, rows in samples.items()
    }
    return HeldoutResult(
        items=dict.fromkeys(NAMES, IDS),
        samples=samples,
        answers=answers,
        entropy=dict.fromkeys(NAMES, 0.7),
        shown=(shown,),
    )


def test_held_out_samples_without_a_reward_are_counted(tmp_path):
    metrics = recorder(tmp_path).record_heldout(
        0, replace(result(), samples=result().samples | {"math": ((1, None),) * 6})
    )
    assert (metrics["heldout/math/grader_failures"], metrics["heldout/stories/grader_failures"]) == (6, 0)


def test_both_halves_have_items():
    assert {True, False} == set(STEER)


def test_what_decides_sees_the_steer_half_and_what_is_published_is_the_report_half(tmp_path):
    ours = recorder(tmp_path)
    metrics = ours.record_heldout(0, result(steer=1.0, report=0.25))
    assert metrics["heldout/math/score"] == 0.25
    assert metrics["heldout/math/pass_at_k"] == 0.0
    assert metrics["heldout/math/entropy"] == 0.7
    assert set(ours.curriculum.evaluations[-1].scores["math"]) == {1.0}
    assert len(ours.curriculum.evaluations[-1].scores["math"]) == sum(STEER)


def test_the_file_keeps_every_item_of_every_domain(tmp_path):
    ours = recorder(tmp_path)
    ours.record_heldout(0, result(steer=1.0, report=0.25))
    ours.save()
    saved = TransferMatrix.load(tmp_path / "transfer.json")
    assert saved.rows[0].scores["safety"] == tuple(1.0 if is_steer else 0.25 for is_steer in STEER)
    assert saved.items == dict.fromkeys(NAMES, IDS)
    assert (saved.domains, saved.watch_only) == (NAMES, ("safety",))


def test_the_worst_domain_is_judged_on_the_steer_half_of_what_is_trained(tmp_path):
    ours = recorder(tmp_path)
    ours.record_heldout(0, result(math=(0.75, 0.0), stories=(0.5, 1.0), safety=(0.0, 0.0)))
    assert ours.worst_steer_score == 0.5


class Replaying:
    """A stage on math with a little of stories in every draw."""

    def decide(self, evidence, state):
        return Decision(mixture=(0.75, 0.25), reason="stage 1: math; replay stories", stage="math")


def test_a_stage_stays_a_stage_with_replay_in_it_and_what_was_replayed_stays_on_record(tmp_path):
    ours = recorder(tmp_path, scheduler=Replaying())
    ours.record_heldout(0, result())
    ours.curriculum.draw(8)
    (tmp_path / "again").mkdir()
    restored = recorder(tmp_path / "again", scheduler=Replaying())
    restored.record_heldout(0, result())
    restored.curriculum.load_state_dict(json.loads(json.dumps(ours.curriculum.state_dict())))
    for each in (ours, restored):
        each.record_heldout(1, result())
        row = each.curriculum.evaluations[-1]
        assert (row.trained, row.exposure) == (("math",), {"math": 6, "stories": 2})


def test_a_row_names_what_was_trained_since_the_row_before(tmp_path):
    ours = recorder(tmp_path, scheduler=Sequential(order=("math", "stories")))
    trained = []
    for step in range(5):
        ours.record_heldout(step, result())
        trained.append(ours.matrix.rows[-1].trained)
        if step < 4:
            ours.curriculum.draw(2)
    assert trained == [(), ("math",), ("math",), ("stories",), ("stories",)]
    assert ours.matrix.rows[-1].exposure == {"math": 4, "stories": 4}


def test_a_stage_of_several_domains_trained_all_of_them(tmp_path):
    ours = recorder(tmp_path, scheduler=Sequential(order=(("math", "stories"),)))
    ours.record_heldout(0, result())
    ours.curriculum.draw(2)
    ours.record_heldout(1, result())
    assert ours.matrix.rows[-1].trained == ("math", "stories") and ours.curriculum.decision.stage == "math, stories"


def test_backward_transfer_appears_once_a_stage_has_ended(tmp_path):
    ours = recorder(tmp_path, scheduler=Sequential(order=("math", "stories")))
    first = ours.record_heldout(0, result(report=0.5))
    assert not any(name.startswith("transfer/") for name in first)
    ours.curriculum.draw(2)
    ours.curriculum.draw(2)
    ours.record_heldout(2, result(math=(0.5, 1.0), stories=(0.5, 0.25), safety=(0.5, 0.5)))
    ours.curriculum.draw(2)
    last = ours.record_heldout(3, result(math=(0.5, 0.75), stories=(0.5, 0.5), safety=(0.5, 0.375)))
    assert last["transfer/math/bwt"] == -0.25  # 0.75 now, 1 at the end of its stage
    assert last["transfer/safety/bwt"] == -0.125  # watched: against the baseline
    assert "transfer/stories/bwt" not in last  # its stage is still running
    assert last["transfer/stories/fwt"] == -0.25  # 0.25 before its stage, 0.5 at the start
    assert last["transfer/bwt"] == pytest.approx((-0.25 - 0.125) / 2)


def test_a_draw_leaves_its_decision_with_the_prompts_it_chose(tmp_path):
    ours = recorder(tmp_path)
    ours.record_draw(1, ours.curriculum.choose(4))
    (line,) = ours.folder.decisions()
    assert (line["step"], line["draw"], line["reason"]) == (1, 0, "fixed weights")
    assert line["mixture"] == {"math": 0.5, "stories": 0.5}
    assert line["counts"] == {"math": 2, "stories": 2}
    assert sorted(line["prompts"]) == ["m1", "m2", "s1", "s2"]


def test_a_draw_is_written_as_what_differs_from_the_one_before_and_read_whole(tmp_path):
    ours, whole = recorder(tmp_path, scheduler=Replaying()), []
    for step in (1, 2, 3):
        ours.curriculum.draw(4)
        ours.record_draw(step, choice := ours.curriculum.begun)
        whole.append({"step": step, **decision_line(choice.basis, choice.decision, choice.prompts)})
    short = ours.folder.read("decisions")[-1]
    assert short == {"step": 3, "draw": 2, "prompts": short["prompts"], "evidence": {}}
    assert ours.folder.decisions() == whole


def test_a_run_that_goes_on_begins_with_a_whole_line(tmp_path):
    ours = recorder(tmp_path)
    for step in (1, 2):
        ours.curriculum.draw(2)
        ours.record_draw(step, ours.curriculum.begun)
    again = recorder(tmp_path)
    again.curriculum.load_state_dict(ours.curriculum.state_dict())
    again.record_draw(3, again.curriculum.choose(2))
    lines = ours.folder.decisions()
    assert [line["evidence"]["drawn"] for line in lines] == [[0, 0], [1, 1], [2, 2]]
    assert "counts" in ours.folder.read("decisions")[2]
    assert sorted(lines[0]["prompts"] + lines[1]["prompts"]) == ["m1", "m2", "s1", "s2"]


def test_samples_are_kept_to_be_read(tmp_path):
    ours = recorder(tmp_path)
    ours.record_heldout(3, result())
    assert ours.folder.read("samples") == [
        {"step": 3, "domain": "math", "prompt": "1+1 =", "completion": "2", "score": 1.0}
    ]


def test_only_the_main_rank_writes_and_all_remember_alike(tmp_path):
    ours, other = recorder(tmp_path / "main"), recorder(tmp_path / "other", is_main=False)
    (tmp_path / "main").mkdir()
    (tmp_path / "other").mkdir()
    assert ours.record_heldout(0, result()) == other.record_heldout(0, result())
    assert ours.matrix == other.matrix
    assert list((tmp_path / "other").iterdir()) == []


def evaluated(path, *steps) -> Recorder:
    ours = recorder(path)
    for step in steps:
        if step:
            ours.curriculum.draw(2)
        ours.record_heldout(step, result())
    return ours


def test_a_restored_run_forgets_the_rows_after_its_checkpoint(tmp_path):
    evaluated(tmp_path, 0, 2, 4).folder.cut(2)
    again = recorder(tmp_path)
    again.restore(2)
    assert [row.step for row in again.matrix.rows] == [0, 2]
    again.curriculum.drawn = {"math": 2, "stories": 0}  # as the checkpoint's ledgers would say: 1 and 1 at step 2
    again.record_heldout(4, result())
    assert again.matrix.rows[-1].trained == ("math",)
    again.save()
    assert [row["step"] for row in json.loads((tmp_path / "transfer.json").read_text())["rows"]] == [0, 2, 4]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    evaluated(tmp_path, 0, 2).folder.cut(-1)
    again = evaluated(tmp_path, 0)
    again.save()
    assert [row["step"] for row in json.loads((tmp_path / "transfer.json").read_text())["rows"]] == [0]


def listing(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_verb_reads_what_a_run_has_appended_and_writes_nothing(tmp_path):
    ours = evaluated(tmp_path, 0, 2)
    files = listing(tmp_path)
    assert "transfer.json" not in files
    assert [row.step for row in read_transfer(ours.folder.transfer).rows] == [0, 2]
    ours.save()
    ours.record_heldout(4, result())
    os.utime(ours.folder.ledger("transfer"), ns=(0, 0))  # a clock may have been set back meanwhile
    files = listing(tmp_path)
    assert [row.step for row in read_transfer(ours.folder.transfer).rows] == [0, 2, 4]
    assert listing(tmp_path) == files


@pytest.mark.parametrize("probe_rows", [True, False])
def test_the_file_of_a_checkpoint_is_what_its_ledger_says(tmp_path, probe_rows):
    ours = recorder(tmp_path)
    if probe_rows:
        ours.adopt(probed())
    pairs = tuple((float(n), 2) for n in range(len(IDS)))
    for step in (0, 2):
        ours.record_heldout(step, replace(result(), item_entropy=dict.fromkeys(NAMES, pairs)))
        ours.curriculum.draw(2)
    ours.save()
    document = json.loads(ours.folder.transfer.read_text())
    assert TransferMatrix.load(ours.folder.transfer).rows == read_transfer(ours.folder.transfer).rows
    assert len(document.pop("sha256")) == 64
    assert document == json.loads(json.dumps(read_transfer(ours.folder.transfer).as_json()))
    assert [row["step"] for row in document["rows"]] == ([0, 9] if probe_rows else []) + [0, 2]
    assert document["rows"][-1]["entropy_items"]["math"] == [list(pair) for pair in pairs]


def test_a_checkpoint_holds_no_score_and_has_them_again_from_the_ledger(tmp_path):
    ours = evaluated(tmp_path, 0, 2, 4)
    (tmp_path / "checkpoint-4").mkdir()
    save_ledgers(tmp_path / "checkpoint-4", ours.curriculum)
    assert "scores" not in (tmp_path / "checkpoint-4" / "polyphony.json").read_text()
    again = recorder(tmp_path)
    again.restore(4)
    load_ledgers(tmp_path / "checkpoint-4", again.curriculum)
    assert again.curriculum.evaluations == ours.curriculum.evaluations
    assert json.dumps(again.curriculum.state_dict()) == json.dumps(ours.curriculum.state_dict())
    seen = json.loads((tmp_path / "checkpoint-4" / "polyphony.json").read_text())["curriculum"]["evaluations"]
    assert again.lost(seen, 4) == ""
    ledger = again.folder.ledger("transfer")
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    assert again.lost(seen, 4) == f"{ledger} has lost its evaluation at step 4"
    assert again.lost(seen[:-1], 2) == ""
    again.restore(2)
    with pytest.raises(ValueError, match="checkpoint-4 had seen 3 evaluations, the ledger has 2"):
        load_ledgers(tmp_path / "checkpoint-4", again.curriculum)


def test_a_run_of_a_version_without_items_goes_on_with_the_entropy_of_all_of_them(tmp_path):
    pairs = tuple((9.0 if is_steer else 1.0, 2) for is_steer in STEER)
    said = replace(result(), item_entropy=dict.fromkeys(NAMES, pairs))
    evaluated(tmp_path, 0).save()
    RunFolder(tmp_path).ledger("transfer").unlink()  # as it was left: one file, entropies of all items
    again = recorder(tmp_path)
    again.restore(0)
    again.curriculum.draw(2)
    metrics = again.record_heldout(2, said)
    assert metrics["heldout/math/entropy"] == again.curriculum.evaluations[-1].entropy["math"] == 0.7
    assert again.steer_entropy(said)["math"] == pairs
    once_more = recorder(tmp_path)
    once_more.restore(2)
    assert not once_more.is_by_item and [row.step for row in once_more.matrix.rows] == [0, 2]


def probed() -> TransferMatrix:
    scores = dict.fromkeys(NAMES, (0.5,) * len(IDS))
    rows = [Evaluation(trained=t, step=9 * len(t), seed=1, scores=scores, probe=True) for t in ((), ("math",))]
    foreign = Evaluation(trained=("math",), step=4, seed=7, scores=scores)
    kinds = {domain.name: domain.kind for domain in DOMAINS}
    return TransferMatrix(
        domains=NAMES,
        kinds=kinds,
        rows=(*rows, foreign),
        items=dict.fromkeys(NAMES, IDS),
        watch_only=("safety",),
    )


def test_a_probes_rows_lie_beside_the_runs_own_and_stay_on_restore(tmp_path):
    ours = recorder(tmp_path)
    ours.adopt(probed())
    metrics = ours.record_heldout(0, result())
    assert not any(name.startswith("transfer/") for name in metrics)  # the probe's rows are no moments of this run
    ours.curriculum.draw(2)
    ours.record_heldout(2, result())
    again = recorder(tmp_path)
    again.restore(0)
    assert [(row.probe, row.step) for row in ours.matrix.rows] == [(True, 0), (True, 9), (False, 0), (False, 2)]
    assert [(row.probe, row.step) for row in again.matrix.rows] == [(True, 0), (True, 9), (False, 0)]


def test_calibration_and_form_are_published_of_the_report_half_alone(tmp_path):
    ours = recorder(tmp_path)
    metrics = ours.record_heldout(0, result(math=(0.0, 1.0), confidence=0.75))
    assert metrics["heldout/math/overconfidence"] == pytest.approx(0.75 - 1.0)  # every published answer is right
    assert metrics["heldout/math/brier"] == pytest.approx(0.25**2) and "heldout/math/auroc" not in metrics
    assert metrics["heldout/math/format_share"] == 1.0


def test_every_evaluation_leaves_its_intervals_and_styles(tmp_path):
    ours = recorder(tmp_path)
    ours.record_heldout(0, result(math=(0.0, 1.0)))
    line = ours.folder.read("evaluations")[0]
    assert line["step"] == 0 and line["domains"]["math"]["styles"] == {"bare": 1.0}
    # three published items: t(3)^2 = 10.128; centre 8.064 / 13.128 = .61426, half-width 3.18245 sqrt(.23694 / 13.128)
    assert line["domains"]["math"]["score"] == pytest.approx([0.18671, 1.0, 1.0], abs=1e-4)


def test_a_refill_is_written_with_why_its_groups_were_dead(tmp_path):
    def group(domain, *rewards):
        size = len(rewards)
        return Group(
            prompt_id="p", domain=domain, draw=0, rewards=rewards, lengths=(1,) * size, truncated=(False,) * size
        )

    math = [group("math", *rewards) for rewards in ((1.0, 1.0), (0.0, 0.0), (None, None))]
    dead = [*math, group("stories", 0.5, 0.5)]
    recorder(tmp_path).record_refill(3, refill_line(1, dead, [Prompt(domain="math", id="m1")]))
    (line,) = RunFolder(tmp_path).read("refills")
    assert line["dead"] == {
        "math": {"all_correct": 1, "all_wrong": 1, "all_equal": 0, "ungraded": 1},
        "stories": {"all_correct": 0, "all_wrong": 0, "all_equal": 1, "ungraded": 0},
    }
    assert (line["step"], line["round"], line["short"], line["prompts"]) == (3, 1, 3, ["m1"])
