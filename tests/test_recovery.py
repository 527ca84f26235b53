"""Recoveries: what waits meanwhile, when they end, and what they may not do."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.decision_log import choices, decision_line, evidence_from_json, replay, shortened, wholes
from polyphony.curricula.monitors.guardrails import Guardrail, check, regained
from polyphony.curricula.records import Domain, Evaluation, Group
from polyphony.curricula.schedulers.fixed import Sequential
from polyphony.curricula.schedulers.sec import SEC
from polyphony.curricula.transfer.forgetting import stages
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.trainer.checkpoint_mark import write_mark
from polyphony.trainer.run.recovery import Rescue
from tests.test_guardrails import ones, row

DOMAINS = [Domain(name=name, kind="structured", train=[0]) for name in ("math", "code", "talk")]
DOMAINS += [Domain(name="safety", kind="open_ended")]
PROMPTS = {name: [f"{name}/{k}" for k in range(8)] for name in ("math", "code", "talk")}
ROWS = {"safety": [f"spare/{k}" for k in range(3)]}


def curriculum(scheduler):
    return Curriculum(domains=DOMAINS, prompts=PROMPTS, scheduler=scheduler, total_draws=12, spare=ROWS)


def drawn(c, own, n=4):
    """One draw and what its groups show, a function of how many draws of its own the scheduler has had."""
    refs = c.draw(n)
    rewards = [float((own + k) % 3 == 0) for k in range(4)]
    groups = [
        Group(
            prompt_id=ref.id,
            domain=ref.domain,
            draw=0,
            rewards=tuple(rewards),
            lengths=(5,) * 4,
            truncated=(False,) * 4,
        )
        for ref in refs
    ]
    c.observe(groups, {ref.domain: 0.5 for ref in refs})
    return [ref.domain for ref in refs]


def evaluation(step, *, recovery=False):
    return Evaluation(
        trained=("math",) if step else (),
        step=step,
        seed=0,
        scores={d.name: (0.5, 0.5) for d in DOMAINS},
        recovery=recovery,
    )


@pytest.mark.parametrize("scheduler", [Sequential(), SEC()], ids=["stages", "shares"])
@pytest.mark.parametrize("hurt", ["math", "safety"])
def test_the_scheduler_is_after_a_recovery_where_it_would_be_without_one(scheduler, hurt):
    plain, other = curriculum(scheduler), curriculum(scheduler)
    for c in (plain, other):
        c.record(evaluation(0))
    shown = {id(c): [drawn(c, own) for own in range(3)] for c in (plain, other)}
    other.record(evaluation(3))
    plain.record(evaluation(3))
    other.recoveries.begin(hurt, most=3)
    for n in range(3):
        assert drawn(other, 100 + n) == [hurt] * 4
        assert other.stage is None and not other.stage_ends
    other.record(evaluation(6, recovery=True))
    other.recoveries.end()
    assert other.exposure[hurt] == plain.exposure.get(hurt, 0) + 12
    for own in range(3, 8):
        assert repr(other.evidence()) == repr(plain.evidence())  # NaN is not equal to itself
        shown[id(other)].append(drawn(other, own))
        shown[id(plain)].append(drawn(plain, own))
    assert shown[id(other)] == shown[id(plain)]
    ours, theirs = other.state_dict(), plain.state_dict()
    assert all(repr(ours[key]) == repr(theirs[key]) for key in ("scheduler", "residual", "last", "stages"))
    assert (ours["draws"], theirs["draws"]) == (11, 8)


def test_a_recovery_goes_on_from_its_saved_state():
    whole, cut = curriculum(Sequential()), curriculum(Sequential())
    for c in (whole, cut):
        drawn(c, 0)
        c.recoveries.begin("safety", most=2, teacher="checkpoint-1")
        drawn(c, 1)
    resumed = curriculum(Sequential())
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert resumed.recoveries == whole.recoveries and resumed.recoveries.open.teacher
    assert resumed.draw(4) == whole.draw(4)
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())
    old = {key: value for key, value in cut.state_dict().items() if key not in ("recoveries", "spare")}
    resumed.load_state_dict(old)  # of an older version
    assert resumed.recoveries.open is None


def test_a_recovery_practises_none_of_the_rows_that_repeat_held_out_ones():
    c = Curriculum(
        domains=DOMAINS, prompts=PROMPTS, scheduler=Sequential(), total_draws=12, spare={"math": ["math/2", "math/5"]}
    )
    drawn(c, 0)
    c.recoveries.begin("math", most=2)
    assert {ref.id for _ in range(2) for ref in c.draw(4)} == {"math/2", "math/5"}
    assert (c.drawn["math"], c.evidence().drawn[0], c.metrics()["math/mixture"]) == (12, 4, 1)
    c.recoveries.end()
    drawn(c, 1)
    assert c.metrics()["math/mixture"] == 1 and c.drawn["math"] == 16


def test_the_recovery_of_a_domain_whose_guardrail_was_taken_away_is_over_at_the_resume():
    cut = curriculum(Sequential())
    cut.recoveries.begin("safety", most=2)
    drawn(cut, 0)
    resumed = Curriculum(domains=DOMAINS, prompts=PROMPTS, scheduler=Sequential(), total_draws=12)
    resumed.load_state_dict(cut.state_dict())
    assert resumed.recoveries.open is None
    assert {ref.domain for ref in resumed.draw(4)} == {"math"}
    assert resumed.exposure["safety"] == 4


@pytest.mark.parametrize("hurt", ["code", "safety"])
def test_decisions_say_what_was_a_recovery_and_a_replay_leaves_it_out(hurt):
    c, lines, kept, before = curriculum(Sequential()), [], [], None
    for n in range(6):
        if n == 2:
            c.recoveries.begin(hurt, most=2)
        refs = c.draw(4)
        recovered = hurt if n in (2, 3) else ""
        lines.append(decision_line(c.basis, c.decision, refs, draw=n, recovered=recovered))
        places = [[int(ref.id.split("/")[1]) for ref in refs if ref.domain == name] for name in lines[-1]["mixture"]]
        is_whole = before is None or "recovery" in before or recovered
        kept.append(shortened(lines[-1], None if is_whole else before, places))
        before = lines[-1]
        if n == 3:
            c.recoveries.end()
    assert wholes(json.loads(json.dumps(kept)), {**PROMPTS, **ROWS}) == lines
    assert [line.get("recovery") for line in choices(kept)] == [None, None, hurt, hurt, None, None]
    assert lines[2]["mixture"][hurt] == 1 == sum(lines[2]["mixture"].values())
    assert [line["evidence"]["draw"] for line in lines] == [0, 1, 2, 2, 2, 3]
    assert [past.ran for past in replay(lines, Sequential())] == [past.replayed for past in replay(lines, Sequential())]
    assert len(replay(lines, Sequential())) == 4


def test_a_line_after_a_recovery_knows_the_evaluations_that_the_scheduler_knew():
    c = curriculum(Sequential())
    rows = [evaluation(0), evaluation(1), evaluation(2, recovery=True), evaluation(3)]
    for one in rows:
        c.record(one)
    line = decision_line(c.evidence(), Sequential().decide(c.evidence(), {}), [])
    assert evidence_from_json(line["evidence"], rows) == c.evidence()
    assert [one.step for one in c.evidence().evaluations] == [0, 1, 3]


MATH = Guardrail(domain="math", max_drop=0.1, action="recover")


def recovered(step, math, code):
    return Evaluation(
        trained=("math",), step=step, seed=0, scores={"math": tuple(math), "code": tuple(code)}, recovery=True
    )


def test_a_domain_is_regained_against_the_anchor_that_its_guardrail_was_broken_on():
    run = [
        row(0, math=ones(10), code=ones(10)),
        row(10, ("math",), math=ones(90), code=ones(10)),
        row(20, ("code",), math=ones(30), code=ones(90)),
    ]
    assert check([MATH], run)
    half_way = [*run, recovered(24, ones(60), ones(80))]
    change, since = regained(MATH, half_way)
    assert (since, change.high < 0) == ("since the end of its own stage", True)
    change, _ = regained(MATH, [*half_way, recovered(28, ones(88), ones(80))])
    assert change.mid == pytest.approx(-0.02) and change.high >= 0
    assert [stage.domain for stage in stages(half_way)] == ["math", "code"]


def test_a_domain_that_was_hurt_in_its_own_stage_is_not_held_to_the_damage():
    run = [
        row(0, math=ones(10), code=ones(10)),
        row(10, ("math",), math=ones(90), code=ones(10)),
        row(20, ("math",), math=ones(30), code=ones(10)),
    ]
    (verdict,) = check([MATH], run)
    assert verdict.since == "since its best evaluation"
    change, since = regained(MATH, [*run, recovered(24, ones(40), ones(10))])
    assert (since, change.high < 0) == ("since its best evaluation", True)
    after = [*run, recovered(24, ones(85), ones(10)), row(34, ("math",), math=ones(88), code=ones(10))]
    assert check([MATH], after) == []


# --- a run's recoveries -----------------------------------------------------------------------------------------------


def rescue(folder, *, knows_start=True, **guardrail):
    c = Curriculum(domains=DOMAINS[:2], prompts=PROMPTS, scheduler=Sequential(), total_draws=12)
    weights = {"weights": lambda policy, teacher: None, "knows_start": lambda policy: knows_start}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True),
        data=SimpleNamespace(domains=DOMAINS[:2], spare={}),
        curriculum=c,
        policy=None,
        own_best=SimpleNamespace(**weights),
    )
    rails = [Guardrail(domain="math", max_drop=0.1, action="recover", **guardrail)]
    return Rescue(trainer, rails, folder), c, rails


def looked(it, c, rails, step, math, *, recovery=False):
    """Record an evaluation; return the alarms and what each broken guardrail led to."""
    c.record(
        Evaluation(
            trained=("math", "code"),
            step=step,
            seed=0,
            scores={"math": tuple(math), "code": (1.0, 0.0)},
            recovery=recovery,
        )
    )
    alarms = [alarm.message for alarm in it.look(step)]
    return alarms, [it.begin(verdict) for verdict in check(rails, c.evaluations)]


def test_a_recovery_has_so_many_draws_and_a_run_so_many_recoveries(tmp_path):
    it, c, rails = rescue(tmp_path, by="refresh", draws=2, times=2)
    assert looked(it, c, rails, 0, ones(90)) == looked(it, c, rails, 1, ones(90)) == ([], [])
    for time in range(2):
        step = 10 * (time + 1)
        assert looked(it, c, rails, step, ones(20)) == ([], [c.recoveries.open.reason])
        assert c.recoveries.open.reason == "recovery: math is practised by its own reward for at most 2 draws"
        c.draw(4)
        assert not it.is_spent
        assert looked(it, c, rails, step + 1, ones(30), recovery=True) == ([], [""])  # it goes on
        assert it.metrics()["recovery/math/change"] == pytest.approx(-0.6)
        c.draw(4)
        assert it.is_spent
        (alarm,), done = looked(it, c, rails, step + 2, ones(30), recovery=True)
        assert alarm.startswith("math is not back after 2 draws: -0.600 (-0.") and done == [""]
        assert c.recoveries.open is None
    assert looked(it, c, rails, 30, ones(20)) == ([], ["warned: its recoveries are spent (2)"])
    assert (sum(c.recoveries.draws.values()), c.recoveries.begun, it.metrics()) == (
        4,
        {"math": 2},
        {"recovery/math/draws": 4.0},
    )


def test_a_regained_domain_is_left_and_the_scheduler_told(tmp_path):
    it, c, rails = rescue(tmp_path, draws=9)
    for step, level in enumerate((90, 90, 20)):
        looked(it, c, rails, step, ones(level))
    c.draw(4)
    (told,), done = looked(it, c, rails, 3, ones(89), recovery=True)
    assert told.startswith("math is back after 1 draw: +0.000 (-0.") and done == []
    assert c.recoveries.open is None and c.evidence().notes == (f"recovery: {told}",)


def whole(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    write_mark(path, ledgers={}, curriculum={})
    return path


def test_what_is_distilled_is_the_best_of_the_kept_checkpoints_and_the_start(tmp_path):
    it, c, rails = rescue(tmp_path)
    looked(it, c, rails, 0, ones(50))
    for step, level in ((1, 70), (2, 80), (3, 80), (4, 60)):
        looked(it, c, rails, step, ones(level))
        it.mark(whole(tmp_path, step))
        assert {path.name for path in it.kept} == {f"checkpoint-{min(step, 3)}"}  # of equals the newer
    assert looked(it, c, rails, 5, ones(10))[1][0].startswith(
        "recovery: math is distilled from checkpoint-3 for at most"
    )
    c.recoveries.end()
    (tmp_path / "checkpoint-3" / "polyphony.json").unlink()
    it.forget_gone()
    assert it.kept == set()
    looked(it, c, rails, 6, ones(30))
    assert c.recoveries.open.teacher == "self@start"
    c.recoveries.end()
    it.trainer.own_best.knows_start = lambda policy: False
    assert "no checkpoint was as good as its start" in looked(it, c, rails, 7, ones(10))[1][0]


# --- refused by the recipe, whose model has no weights ----------------------------------------------------------------

RECOVER = "guardrails.words={max_drop: 0.1, action: recover}"
WATCHED = [RECOVER, "domains.words.train=null"]
ALONE = ["algorithm=distil", "rollouts.engine=transformers", "teachers={t: {model: self}}", "domains.sums.teacher=t"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (WATCHED, "guardrails.words: action: recover needs prompts"),
        ([RECOVER, "guardrails.words.prompts=sums-train.jsonl"], "guardrails.words.prompts: a trained domain is rec"),
        ([*WATCHED, "guardrails.words.prompts=gone.jsonl"], "guardrails.words.prompts: "),
        (
            ["guardrails.words={max_drop: 0.1, prompts: sums-train.jsonl}"],
            "guardrails.words.prompts are for action: rec",
        ),
        ([RECOVER, "guardrails.words.draws=0"], "guardrails.words.draws: Input should be greater than or equal to 1"),
        ([RECOVER, "grpo.loss_type=vespo"], "grpo.loss_type=vespo with guardrails.words.by: distil"),
        ([RECOVER, "grpo.off_policy_mask_threshold=0.5"], "grpo.off_policy_mask_threshold=0.5 with guardrails.words"),
        (
            [RECOVER, "grpo.importance_sampling_level=sequence"],
            "grpo.importance_sampling_level=sequence with guardrails.words.by: distil",
        ),
        (
            [RECOVER, *ALONE, "guardrails.words.by=refresh", "distil.others=skip"],
            "guardrails.words.by: refresh, and dis",
        ),
    ],
)
def test_what_cannot_be_recovered_is_refused_in_one_line(recipe, overrides, line):
    from polyphony.launch.build import check_names  # late: without torch

    with pytest.raises(RecipeError) as refused:
        check_names(load_recipe(recipe, overrides))
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_rows_to_recover_a_watched_domain_with_are_read_and_those_that_are_held_out_left_out(recipe, tmp_path):
    from polyphony.launch.build import grpo_config, load_data  # late: with torch

    held = (tmp_path / "words-heldout.jsonl").read_text().splitlines()[:1]
    (tmp_path / "more.jsonl").write_text("\n".join([*(tmp_path / "words-train.jsonl").read_text().splitlines(), *held]))
    loaded = load_recipe(recipe, [*WATCHED, "guardrails.words.prompts=more.jsonl", "data.overlap=keep"])
    with pytest.warns(UserWarning, match="guardrails.words.prompts: 1 of 5 rows repeat held-out rows"):
        data = load_data(loaded, grpo_config(loaded, tmp_path))
    assert list(data.spare["words"].ids) == [f"train-{i}" for i in range(4)]
    assert (data.n_train, "guardrails.words.prompts" in data.tables) == (4, True)
    assert data.to_recover(["words"]) == {"words": [f"train-{i}" for i in range(4)]}


def test_a_trained_domain_that_keeps_rows_which_repeat_held_out_ones_is_recovered_with_the_others(recipe, tmp_path):
    from polyphony.launch.build import grpo_config, load_data  # late: with torch

    held = (tmp_path / "words-heldout.jsonl").read_text().splitlines()[:1]
    rows = (tmp_path / "words-train.jsonl").read_text().splitlines()
    (tmp_path / "more.jsonl").write_text("\n".join([*rows, *held]))
    loaded = load_recipe(recipe, [RECOVER, "domains.words.train=more.jsonl", "data.overlap=keep"])
    with pytest.warns(UserWarning, match="1 of 5 rows repeat held-out rows .* kept"):
        data = load_data(loaded, grpo_config(loaded, tmp_path))
    assert len(data.train["words"]) == 5
    assert data.to_recover(["words"]) == {"words": [f"train-{i}" for i in range(4)]}
    assert data.to_recover([]) == data.to_recover(["sums"]) == {}
    every = replace(data, repeating={"words": frozenset(data.train["words"].ids)})
    with pytest.raises(ValueError, match=r"guardrails\.words: action: recover, and all its training rows repeat"):
        every.to_recover(["words"])
