"""The fast lab against Transformers and the real trainer; its worlds, studies and tables."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.records import DomainStats, Evaluation, Evidence, mean
from polyphony.curricula.schedulers.fixed import Joint
from polyphony.curricula.schedulers.sec import SEC
from polyphony.curricula.transfer.halves import halves
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.teachers.distil import Distil
from polyphony.trainer.teachers.settings import DistilSettings
from tests.experiments.fast import experts, regret
from tests.experiments.fast.cell import StudyCell, make_scheduler
from tests.experiments.fast.decoder import Decoder
from tests.experiments.fast.exam import Course, Exam
from tests.experiments.fast.experts import Experts, Pupil, learn_by_heart, token_logps
from tests.experiments.fast.loop import CLIP, POLICY, LabRun, base, gradient, load_world, stock_advantages
from tests.experiments.fast.rules import OwnCeiling, Wanting
from tests.experiments.fast.study import Results, Study
from tests.experiments.fast.tables import best_rates, holm, ranking, report, tokens_to
from tests.experiments.fast.worlds import Subject, drawn, make_world, rows

STUDIES = Path(__file__).parent / "experiments" / "fast" / "studies"
SMALL = (
    Subject(name="plus", of="arithmetic", skill=("plus",), size=24),
    Subject(name="minus", of="arithmetic", skill=("minus",), size=24, dotted=True),
    Subject(name="stories", of="stories", size=24),
    Subject(name="grant", of="safety", skill=("grant",), size=0),
)


@pytest.fixture(scope="module")
def data():
    return load_world(SMALL)


@pytest.fixture(scope="module")
def decoder():
    weights, config, _ = base()
    return Decoder(weights, config)


def test_log_probabilities_are_those_of_transformers(decoder):
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    prompts, answers = [[1, 5, 30, 40, 2, 6], [1, 5, 31, 2, 6]], [[50, 51, 2], [60, 2]]
    for prompt, answer, found in zip(prompts, answers, decoder.answer_logps(prompts, answers), strict=True):
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        assert found == pytest.approx(sum(logps[p, t].item() for p, t in zip(places, answer, strict=True)), abs=1e-4)


def test_a_completion_depends_on_its_seed_alone_and_knows_its_log_probability(decoder, data):
    asked = [p.ids for p in data.tokenized(list(data.train["plus"])[:3] + list(data.train["stories"])[:3])]
    together = decoder.sample(asked * 4, seeds=range(24), most=[32] * 24)
    alone = decoder.sample(asked[5:], seeds=[17], most=[32])[0]
    assert alone.ids == together[17].ids
    said = decoder.answer_logps(asked * 4, [s.ids for s in together])
    assert said == pytest.approx([sum(s.logps) for s in together], abs=1e-3)
    short = decoder.sample(asked, seeds=range(6), most=[2] * 6)
    assert [s.ids for s in short] == [s.ids[:2] for s in together[:6]]


class Unclipped(TrainerCallback):
    """Keeps the first gradient, and the completions of every draw."""

    def __init__(self):
        self.gradient, self.trainer, self.rollouts, self.mixtures = {}, None, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradient:
            self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        self.rollouts.append(self.trainer._rollout)
        self.mixtures.append(self.trainer.curriculum.decision.mixture)


@pytest.fixture(scope="module")
def real(data, tmp_path_factory):
    """Three steps of the real trainer, sampled by the lab's engine."""
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("real")), per_device_train_batch_size=64, num_generations=8,
        max_completion_length=32, max_steps=3, learning_rate=2e-4, lr_scheduler_type="constant", max_grad_norm=CLIP,
        bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, seed=5,
    )  # fmt: skip
    seen = Unclipped()
    trainer = DomainGRPOTrainer(
        str(POLICY),
        args=args,
        domains=data,
        curriculum=SEC(),
        engine="tests.experiments.fast.engine:LabEngine",
        callbacks=[seen],
    )
    seen.trainer = trainer
    trainer.train()
    return trainer, seen


def test_the_loop_draws_and_samples_as_the_real_trainer_does(real, data):
    _, seen = real
    run = LabRun(data=data, scheduler=SEC(), rate=2e-4, draws=3, seed=5)
    for then, mixture in zip(seen.rollouts, seen.mixtures, strict=True):
        rollout = run.advance()
        assert [(g.domain, g.prompt_id) for g in rollout.groups.values()] == [
            (g.domain, g.prompt_id) for g in then.groups.values()
        ]
        assert run.curriculum.decision.mixture == pytest.approx(mixture, abs=1e-6)
        assert [c.ids for c in rollout.rows.values()] == [c.ids for c in then.rows.values()]
        assert rollout.rewards == then.rewards


def test_loss_and_gradient_are_the_real_trainers_for_the_same_completions(real):
    trainer, seen = real
    weights, config, _ = base()
    rollout = seen.rollouts[0]
    loss, found = gradient(weights, config, list(rollout.rows.values()), stock_advantages(rollout.rewards))
    logged = next(line for line in trainer.state.log_history if "loss" in line)
    norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    assert loss == pytest.approx(logged["loss"], abs=1e-5)
    assert norm == pytest.approx(logged["grad_norm"], abs=1e-4)
    scale = min(1.0, CLIP / norm)
    assert set(found) == set(seen.gradient)
    assert max(float((found[n] * scale - seen.gradient[n]).abs().max()) for n in found) < 1e-5


def test_weights_after_three_steps_are_the_real_trainers(real, data):
    trainer, _ = real
    run = LabRun(data=data, scheduler=SEC(), rate=2e-4, draws=3, seed=5)
    for _ in range(3):
        run.advance()
    theirs = dict(trainer.model.named_parameters())
    moved = [(run.learner.weights[n] - w).abs().mean() for n, w in base()[0].items()]
    apart = [(run.learner.weights[n] - theirs[n].detach()).abs().mean() for n in theirs]
    assert sum(apart) < 0.01 * sum(moved)


def test_an_evaluation_is_of_the_halves_and_expects_what_sampling_scores(data):
    exam = Exam(data, deciding=10, published=40)
    run = LabRun(data=data, scheduler=SEC(), rate=0.0, draws=4, seed=1)
    for items, half in ((exam.deciding, "steer"), (exam.published, "report")):
        sides = {i: side for t in data.heldout.values() for i, side in zip(t.ids, halves(t.ids), strict=True)}
        assert {sides[prompt.id] for prompt in items} == {half}
    expected = exam.publish(run.policy)
    of_plus = [prompt for prompt in exam.published if prompt.domain == "plus"] * 10
    sampled = exam.sampled(run.policy, of_plus, seed=3)
    # 400 samples at about .6: three standard errors are .07
    assert mean(expected.scores["plus"]) == pytest.approx(mean(sampled.scores["plus"]), abs=0.07)
    course = Course(run=run, exam=exam, every=2, shown=4)
    course.finish()
    assert [row.step for row in run.curriculum.evaluations] == [0, 2]
    assert run.tokens.evaluation == 2 * exam.decide(run.policy, seed=1).tokens
    assert set(run.curriculum.evaluations[0].scores) == {"plus", "minus", "stories", "grant"}


def test_a_pupil_of_itself_learns_nothing_and_one_of_another_comes_nearer_to_it(data):
    experts = Experts.trained(data, rate=2e-3, seed=1, tokens=600)
    assert experts.spent >= 600 and set(experts.runs) == {"plus", "minus", "stories"}
    trained = {name: run.policy.decoder for name, run in experts.runs.items()}
    weights, config, _ = base()
    start = Decoder(weights, config)
    for teachers, is_same in ((dict.fromkeys(trained, start), True), (trained, False)):
        pupil = Pupil(data=data, scheduler=Joint(), rate=2e-3, draws=4, seed=1, teachers=teachers)
        rows = list(pupil._draws.roll_out(64).rows.values())
        told = [token_logps(teachers[r.prompt.domain], [r])[0] for r in rows]
        gaps = [float((t - torch.tensor(r.logps)).abs().max()) for t, r in zip(told, rows, strict=True)]
        assert (max(gaps) < 1e-4) is is_same
        rollout = pupil.advance()
        if not is_same:
            rows = list(rollout.rows.values())
            before, after = ([token_logps(d, [r])[0] for r in rows] for d in (start, pupil.policy.decoder))
            told = [token_logps(teachers[r.prompt.domain], [r])[0] for r in rows]
            toward = [((a - b) * (t - b).clamp(-5, 5)).mean() for a, b, t in zip(after, before, told, strict=True)]
            assert float(torch.stack(toward).mean()) > 0


def test_a_pupils_update_is_the_products(data, monkeypatch):
    weights, config, _ = base()
    generator = torch.Generator().manual_seed(0)
    moved = {n: w + 0.05 * torch.randn(w.shape, generator=generator) * (w.dim() > 1) for n, w in weights.items()}
    teacher, kept = Decoder(moved, config), {}
    monkeypatch.setattr(experts, "weighted_gradient", lambda w, c, rows, values: kept.update(rows=rows, values=values))
    pupil = Pupil(data=data, scheduler=Joint(), rate=0.0, draws=1, seed=1, teachers=dict.fromkeys(data.train, teacher))
    pupil._gradient(pupil._draws.roll_out(64))
    rows, longest = kept["rows"], max(len(row.ids) for row in kept["rows"])
    old, mask = torch.zeros(len(rows), longest), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        old[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.logps), 1
    accelerator = SimpleNamespace(reduce=lambda sums, reduction: sums)
    policy = SimpleNamespace(trainer=SimpleNamespace(accelerator=accelerator))
    lesson = SimpleNamespace(of_domain=dict.fromkeys(data.train, "t"))
    teachers = SimpleNamespace(logps=lambda told: token_logps(teacher, told), policy=policy, lesson=lesson)
    distil = Distil(DistilSettings(), teachers, domains=data.names, loss_type="grpo")
    advantages = distil(torch.zeros(len(rows)), old, mask, rows).advantages
    assert advantages.abs().max() > 0.1
    for i, value in enumerate(kept["values"]):
        assert (advantages[i, : len(value)] - value * len(value) * len(rows)).abs().max() < 1e-4


def test_what_is_learned_by_heart_are_the_best_distinct_answers(data):
    experts = Experts.trained(data, rate=2e-4, seed=1, tokens=60)
    answers, spent = experts.answers(data, seed=1, tokens=300)
    assert spent >= 300
    assert experts.runs["plus"].scorer(answers["plus"]) == [1.0] * len(answers["plus"])
    said = [(row.prompt.id, tuple(row.ids)) for row in answers["plus"]]
    assert said and len(set(said)) == len(said)
    before, after = base()[0], learn_by_heart({"plus": answers["plus"]}, rate=1e-4, seed=1, steps=4)
    asked, told = [row.prompt.ids for row in answers["plus"]], [row.ids for row in answers["plus"]]
    likely = [sum(Decoder(w, base()[1]).answer_logps(asked, told)) for w in (before, after)]
    assert likely[1] > likely[0]


def test_what_starts_near_zero_is_asked_in_a_form_of_its_own():
    answers = {r["prompt"]: r["answer"] for r in rows(world="uneven", domain="minus", split="heldout")}
    assert len(answers) > 1000 and all(answer.endswith(" .") for answer in answers.values())
    with pytest.raises(ValueError, match="world 'uneven' has no domain 'sums'; known: plus, minus, strings"):
        rows(world="uneven", domain="sums", split="train")


def test_a_drawn_world_keeps_its_limits_whatever_the_key():
    worlds = [drawn(key=str(n)) for n in range(40)]
    assert drawn(key="3") == worlds[3] and len(set(worlds)) == 40
    for world in worlds:
        trained = [s for s in world if s.size != 0]
        assert 6 <= len(trained) <= 7 and len(world) == len(trained) + 1
        assert [s.name for s in trained].count("stories") == 1
        assert sum(s.impossible > 0 for s in trained) == 1 and any(s.dotted for s in trained)
        assert {s.name for s in world if s.of == "safety"} == {"refuse", "grant"}
        assert all(60 <= s.size <= 1500 and not (s.dotted and s.impossible) for s in trained)


def row(world, arm, rate, seed, average, worst, **more):
    scores = {"a": worst, "b": 2 * average - worst, "watched": 0.9}
    return {
        "id": f"{world}/{arm}/{rate:g}/{seed}/20", "study": "", "world": world, "arm": arm, "rate": rate, "seed": seed,
        "every": 20, "settings": {}, "trained": ["a", "b"], "scores": scores, "shown": scores, "entropy": {"a": 0.4, "b": 1},
        "tokens": {"rollout": 100, "evaluation": 20}, "looks": [[0, 0, {"a": 0.1, "b": 0.1}]], "seconds": 1.0, **more,
    }  # fmt: skip


def test_what_the_registered_study_names_is_what_it_was():
    names, levels = ("a", "b", "c"), [(0.2, 0.5, 0.7), (0.4, 0.5, 0.6)]
    rows = tuple(
        Evaluation(
            trained=names, step=4 * n, seed=0, entropy=dict.fromkeys(names, 1.0),
            scores={m: (1.0,) * round(10 * s) + (0.0,) * round(10 - 10 * s) for m, s in zip(names, level, strict=True)},
            exposure={m: 8 * n * (k + 1) for k, m in enumerate(names)},
        )
        for n, level in enumerate(levels)
    )  # fmt: skip
    adaptive, state, decision = make_scheduler({"scheduler": "adaptive"}, load_world(SMALL), Path()), {}, None
    for draw in range(6):
        seen = ((0.8, 0.2), (0.3, 0.5), (0.1, 0.9)) if draw else ()
        last = (
            tuple(DomainStats(groups=3, abs_advantage=a, reward=r + 0.02 * draw) for a, r in seen)
            or (DomainStats(),) * 3
        )
        evidence = Evidence(
            draw=draw, total_draws=9, domains=names, kinds=("structured",) * 3, weights=(1.0,) * 3, sizes=(9,) * 3,
            drawn=(0,) * 3, last=last, evaluations=rows[: 1 + draw // 4],
        )  # fmt: skip
        decision = adaptive.decide(evidence, state)
        state = decision.state
    assert decision.mixture == pytest.approx(
        (0.306232, 0.362422, 0.331346), abs=1e-6
    )  # of the version that was registered
    one, own = (make_scheduler({"scheduler": "need", "ceiling": c}, load_world(SMALL), Path()) for c in ("one", "own"))
    assert (type(one), type(own)) == (Wanting, OwnCeiling)


def test_an_arms_rate_and_rank_by_hand():
    found = [
        row(world, arm, rate, seed, average + 0.01 * seed, worst)
        for world in ("u", "d")
        for seed in (1, 2)
        for arm, rate, average, worst in [
            ("joint", 1e-4, 0.5, 0.1), ("joint", 2e-4, 0.6, 0.1), ("x", 1e-4, 0.55, 0.3), ("x", 2e-4, 0.7, 0.1),
        ]
    ]  # fmt: skip
    rates = best_rates(found, (("u", "d"), (1, 2)))
    assert rates == {"joint": 2e-4, "x": 1e-4}  # .6 + .1 over .5 + .1; .55 + .3 over .7 + .1
    assert ranking(found, ("u", "d"), rates) == {"joint": 1.5, "x": 1.5}  # better average, worse worst
    own = [r for r in found if r["rate"] == rates[r["arm"]]]
    said = report(own, arms=["x", "joint"], rates=rates, tuning=("u", "d"), every=20)
    assert "x average: 0.560 0.570" in said and "u worst, to joint: +0.200 (+0.200 to +0.200)" in said


def test_holm_and_tokens_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    run = row("u", "x", 1e-4, 1, 0.5, 0.4)
    assert tokens_to(run, 0.3) == pytest.approx(50)  # .1 at 0 tokens, .5 at 100
    assert math.isnan(tokens_to(run, 0.6))


def test_the_registered_study_says_its_parts_and_resumes(tmp_path):
    study = Study.load(STUDIES / "default.yaml", key="k")
    left = {part: len(cells) for part, cells in study.outlook([]).items()}
    assert left["tuning"] == 15 * 2 * 3 * 3 and left["final"] == 6 * 4 * 12
    with pytest.raises(ValueError, match="final: what belongs to it is known after tuning"):
        study.cells("final", [])
    cells = study.cells("tuning", [])
    assert not [c for c in cells if c.arm == "need_factors"]  # the better of two that were not run
    results = Results(tmp_path, study)
    results.add({"id": cells[0].id, "arm": "joint", "world": "uneven", "seconds": 30.0})
    again = Results(tmp_path, study)
    assert again.missing(cells) == cells[1:]
    assert again.seconds(cells[1:3]) == pytest.approx(60.0)
    with pytest.raises(ValueError, match="is of another study or key"):
        Results(tmp_path, Study.load(STUDIES / "default.yaml", key="other"))
    assert json.loads(results.file.read_text())["study"] == study.digest


def test_evaluations_stay_within_a_quarter_of_the_completions_that_are_trained_on():
    for world in ("even", "uneven", "many"):
        cell = StudyCell(world=world, arm="joint", settings={}, rate=1e-4, seed=1)
        asked = cell.deciding * len(make_world(world)) * cell.draws // cell.every
        assert 0.15 < asked / (cell.draws * 64) <= 0.2


def test_regret_is_against_the_best_option_and_mixing_pays_for_the_plan(tmp_path):
    """By hand: the best is the pupil's .6; the plan said sequence, .5; mixing with the probes' tokens has .45."""
    values = {
        "mix": 0.4,
        "mix_charged": 0.45,
        "sequence": 0.5,
        "groups": None,
        "linear": 0.3,
        "ties": 0.2,
        "distil": 0.6,
    }
    for world in ("k/0", "k/1"):
        lines = [{"world": world, "what": what, "value": value} for what, value in values.items()]
        plan = {"world": world, "what": "plan", "recommended": "sequence"}
        with (tmp_path / "regret.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in (*lines, plan))
    told = regret.report(regret.RegretFile(tmp_path / "regret.jsonl"), ["k/0", "k/1", "k/2"])
    assert "recommended sequence, regret 0.100, mixing's 0.150" in told
    assert "regret difference: -0.0500 (-0.0500 to -0.0500) over 2 worlds" in told


def test_a_run_that_samples_ahead_learns_from_draws_of_older_weights():
    ours = LabRun(data=load_world(make_world("even")), scheduler=Joint(), rate=2e-3, draws=4, seed=1, ahead=2)
    sampled, sample = [], ours.policy.complete
    ours.policy.complete = lambda *given: sampled.append(ours.policy.decoder) or sample(*given)  # type: ignore
    decoders = []
    for _ in range(4):
        decoders.append(ours.policy.decoder)
        ours.advance()
    # the first three draws with the first weights, the fourth with those after one step
    assert [decoders.index(one) for one in sampled] == [0, 0, 0, 1]
    assert not ours.curriculum.aloft and sum(ours.curriculum.drawn.values()) == 32


def test_a_stale_row_counts_by_how_much_likelier_it_has_become():
    weights, config, _ = base()
    ours = LabRun(data=load_world(make_world("even")), scheduler=Joint(), rate=2e-3, draws=2, seed=1)
    rows = list(ours._draws.roll_out(64).rows.values())
    advantages = torch.tensor([1.0, -1.0] * 32)
    fresh, stale = (gradient(weights, config, rows, advantages, is_stale=old)[1] for old in (False, True))
    for name, value in fresh.items():  # sampled with these very weights
        torch.testing.assert_close(stale[name], value, rtol=1e-3, atol=1e-6)
    half = [replace(row, logps=[row.logps[0] + math.log(2), *row.logps[1:]]) for row in rows]
    far = [replace(row, logps=[row.logps[0] - math.log(4), *row.logps[1:]]) for row in rows]
    halved, left_out = (gradient(weights, config, of, advantages, is_stale=True)[1] for of in (half, far))
    for name, value in fresh.items():
        torch.testing.assert_close(halved[name], value / 2, rtol=1e-3, atol=1e-6)
        assert not left_out[name].any()
