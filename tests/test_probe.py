"""`polyphony probe`: one row a run, and a probe that is killed goes on with the next."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.planner import make_plan
from polyphony.launch.cli import main
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.report.report import write_report
from polyphony.launch.verbs.arms import Arm, cost, plan_arms, restricted
from polyphony.launch.verbs.claim import claim_probe
from polyphony.launch.verbs.experts import taught
from polyphony.launch.verbs.probe import Probe, probe
from polyphony.launch.verbs.rates import harm, proposal
from tests.conftest import RECIPES
from tests.experiments.options import WORLDS as PLANTED
from tests.forks import Fork


def recipe(*overrides):
    return load_recipe(RECIPES / "debug.yaml", ["tracking.wandb=null", *overrides])


def test_every_seed_measures_the_start_each_domain_and_all_of_them_for_the_same_total():
    arms = plan_arms(recipe("probe.seeds=2"), ["arithmetic", "stories"])
    assert [(arm.seed, arm.label, arm.steps) for arm in arms] == [
        (1, "start", 0),
        (1, "arithmetic", 2),
        (1, "stories", 2),
        (1, "joint", 4),
        (2, "start", 0),
        (2, "arithmetic", 2),
        (2, "stories", 2),
        (2, "joint", 4),
    ]


def test_without_the_joint_arm_a_probe_costs_half():
    names = ["arithmetic", "stories"]
    whole, half = recipe(), recipe("probe.joint_arm=false")
    # a step generates 16 x 2 completions of at most 32 tokens: 1024
    assert cost(whole, plan_arms(whole, names), items=100).startswith(
        "8 optimizer steps and 4 evaluations: at most 0.0082 million rollout tokens to train on, and "
    )
    assert cost(half, plan_arms(half, names), items=100).startswith(
        "4 optimizer steps and 3 evaluations: at most 0.0041 million rollout tokens to train on, and "
    )


def test_the_cost_of_a_probe_has_its_warm_up_and_its_evaluations_in_it():
    warmed = recipe("probe.from=joint:6", "probe.seeds=2", "eval.samples=4", "domains.stories.max_completion_length=64")
    said = cost(warmed, plan_arms(warmed, ["arithmetic", "stories"]), items=100)
    # 2 x (8 + 6) steps of 32 completions, 8 evaluations of 100 items with 4 samples, each of up to 64 tokens
    assert said == (
        "28 optimizer steps and 8 evaluations: at most 0.057 million rollout tokens to train on, "
        "and 0.2 million to evaluate 100 held-out items, 4 times each"
    )


def test_placebos_follow_their_domains_and_other_rates_are_tried_for_one_seed_without_the_joint_run():
    tried = recipe(
        "probe.placebo=true", "probe.seeds=2", "probe.joint_arm=false", "probe.learning_rates=[1e-3, 2e-4, 1e-4]"
    )
    arms = plan_arms(tried, ["arithmetic", "stories"])
    of_a_rate = ["arithmetic", "stories", "arithmetic, placebo", "stories, placebo"]
    assert [arm.label for arm in arms if arm.rate is None] == 2 * ["start", *of_a_rate]
    others = [f"{label}, at {rate}" for rate in ("0.0001", "0.001") for label in of_a_rate]  # the recipe's own is 2e-4
    assert [(arm.label, arm.seed) for arm in arms if arm.rate] == [(label, 1) for label in others]
    assert restricted(tried, arms[-1], "start").grpo["learning_rate"] == 1e-3


def test_other_ways_to_one_model_follow_what_they_build_on():
    tried = recipe("probe.keep=last", "probe.merge=[ties, slerp]", "probe.ways=[groups, distil]")
    assert [(arm.label, arm.steps) for arm in plan_arms(tried, ["arithmetic", "stories"])][3:] == [
        ("joint", 4), ("merge ties", 0), ("merge slerp", 0), ("groups", 4), ("distil", 2),
    ]  # fmt: skip
    assert [arm.label for arm in plan_arms(recipe(), ["arithmetic", "stories"])][3:] == ["joint"]  # no weights are kept
    groups = plan_arms(tried, ["arithmetic", "stories"])[-2]
    staged = restricted(tried, groups, "start", stages=[["stories"], ["arithmetic"]]).curriculum
    assert (staged.scheduler, staged.model_extra) == ("sequential", {"order": [["stories"], ["arithmetic"]]})
    pupil = taught(restricted(tried, plan_arms(tried, ["arithmetic", "stories"])[-1], "start"), {"stories": "kept/s"})
    assert pupil.algorithm == "distil" and pupil.teachers["stories"].model == "kept/s"
    assert [section.teacher for section in pupil.domains.values()] == [None, "stories", None]


def test_the_report_has_other_ways_and_who_shares_parameters(tmp_path):
    base, *rest = judged().rows[:3]
    arms = [{}, {"kind": "merge", "method": "ties"}, {"kind": "groups", "stages": [["a"], ["b"]]}]
    rows = [base, *rest, *(replace(rest[0], trained=("a", "b"), arm=arm) for arm in arms)]
    told = {"a": {"b": {"core_overlap": 0.125, "sign_conflicts": 0.5, "cosine": None}}}
    replace(judged(), rows=tuple(rows), shared=told).save(tmp_path / "transfer.json")
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert all(words in page for words in ("all at once", "merge ties", "groups a → b", "<td>0.125</td>", "<td>–</td>"))


def judged(own=0.9, watched=0.5, kl=0.2):
    """Two domains and a watched one, 100 items each: all score .5 before, `own` after practice, the watched one `watched`
    after the placebo of a; `kl` nats a token from the start after 4 steps."""

    def row(trained, means, **fields):
        scores = {name: tuple(float(k < 100 * means.get(name, 0.5)) for k in range(100)) for name in ("a", "b", "w")}
        pairs = dict.fromkeys(trained, ((10 * kl, 10),) + 99 * (None,))
        return Evaluation(trained=trained, step=4, seed=0, scores=scores, probe=True, kl_items=pairs, **fields)

    rows = [row((), {}), *(row((name,), {name: own}) for name in "ab")]
    rows += [row((name,), {name: 0.1, "w": watched if name == "a" else 0.5}, placebo=True) for name in "ab"]
    kinds = dict.fromkeys(("a", "b", "w"), "structured")
    return TransferMatrix(domains=("a", "b", "w"), kinds=kinds, rows=tuple(rows), watch_only=("w",))


def test_a_rate_does_harm_that_moves_the_policy_far_lowers_what_is_practised_or_lowers_others_by_noise_alone():
    assert harm(judged()) == harm(judged(own=0.48, watched=0.48, kl=0.4)) == []  # nothing is shown
    far, also_far = harm(judged(kl=0.5))
    assert (
        far == "practising a moved the policy by 0.12 nats a token in each step, more than 0.1"
        and "b moved" in also_far
    )
    assert [line[:36] for line in harm(judged(own=0.3))] == [f"{n}, practised alone, lost at least 0." for n in "ab"]
    (noise,) = harm(judged(watched=0.3))
    assert noise.startswith("shuffled rewards on a took 0.200 from w, at least 0.")


def test_the_rate_proposed_is_the_highest_below_all_that_did_harm():
    assert proposal({5e-4: ["x"], 1e-4: [], 2e-4: []}).startswith(
        "of the learning rates 0.0001, 0.0002, 0.0005 take 0.0002 "
    )
    assert "take 0.0001 " in proposal({1e-4: [], 2e-4: ["x"], 5e-4: []})  # luck
    assert "try higher ones" in proposal({1e-4: [], 2e-4: []})
    assert "even the lowest does harm" in proposal({1e-4: ["x"]})


def test_an_arm_trains_its_domain_and_watches_the_others():
    (_, arithmetic, _, _) = plan_arms(recipe(), ["arithmetic", "stories"])
    alone = restricted(recipe("curriculum.scheduler=sequential"), arithmetic, "start")
    assert [name for name, section in alone.domains.items() if section.train is not None] == ["arithmetic"]
    assert list(alone.domains) == ["arithmetic", "stories", "safety"]
    assert (alone.model, alone.curriculum.scheduler) == ("start", "joint")
    assert (alone.grpo["max_steps"], alone.grpo["seed"]) == (2, 1)


def test_a_folder_holds_the_probe_of_one_recipe(tmp_path):
    assert claim_probe(recipe(), tmp_path / "probe")
    assert not claim_probe(recipe(), tmp_path / "probe")
    with pytest.raises(RecipeError, match="holds a probe of another recipe; choose another --out"):
        claim_probe(recipe("probe.steps=3"), tmp_path / "probe")
    more = recipe("probe.ways=[distil]", "probe.merge=[cpi]")  # is measured beside what is there
    assert not claim_probe(more, tmp_path / "probe") and load_recipe(tmp_path / "probe" / "recipe.yaml") == more


def rows(folder) -> list[dict]:
    path = folder / "transfer.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def kill_after_the_first_row(folder) -> None:
    command = ["probe", str(RECIPES / "debug.yaml"), "tracking.wandb=null", "--out", str(folder)]
    process = Fork(main, command, log=folder.parent / "log")
    deadline = time.monotonic() + 300
    while process.is_running and not rows(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.is_running, f"the probe ended before it could be killed: {process.said[-2000:]}"
    process.kill()


@pytest.mark.slow
def test_a_killed_probe_goes_on_with_the_next_run_and_repeats_none(tmp_path, engine):
    folder = tmp_path / "probe"
    kill_after_the_first_row(folder)
    before = rows(folder)
    assert 1 <= len(before) < 4
    probe(recipe(), folder, engine=engine)
    after = rows(folder)
    assert after[: len(before)] == before
    assert [(row["trained"], row["step"], row["probe"]) for row in after] == [
        ([], 0, True),
        (["arithmetic"], 2, True),
        (["stories"], 2, True),
        (["arithmetic", "stories"], 4, True),
    ]
    assert [row["exposure"] for row in after[1:3]] == [{"arithmetic": 8}, {"stories": 8}]  # 2 steps of 32 / 8 prompts
    written = (folder / "transfer.json").stat().st_mtime_ns
    probe(recipe(), folder, engine=engine)
    assert (folder / "transfer.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_weights_are_kept_with_what_they_are_and_another_rate_has_a_file_of_its_own(tmp_path, engine, capsys):
    small = ["probe.steps=1", "probe.placebo=true", "probe.keep=last", "probe.learning_rates=[1e-3]", "lora={r: 2}"]
    tried, folder = recipe("eval.samples=1", *small), tmp_path / "probe"
    start, *arms = plan_arms(tried, ["arithmetic", "stories"])
    arms = [start, *(arm for arm in arms if arm.trained == ("stories",))][:-1]  # of the other rate no placebo
    claim_probe(tried, folder)
    Probe(tried, folder, engine).run(arms)
    assert "probe: of the learning rates 0.0002, 0.001 " in capsys.readouterr().err
    own, other = (TransferMatrix.load(at / "transfer.json") for at in (folder, folder / "rate-0.001"))
    of_stories = [(("stories",), False), (("stories",), True)]
    for matrix, rate, measured in ((own, 2e-4, of_stories), (other, 1e-3, of_stories[:1])):
        assert [(row.trained, row.placebo) for row in matrix.rows] == [((), False), *measured]
        assert matrix.provenance["learning_rate"] == rate and "harm" in matrix.provenance
        assert matrix.probes[0].kl_items["stories"][0] is not None
    kept = folder / "kept" / "stories-1"
    assert (kept / "adapter_model.safetensors").is_file() and not (kept / "model.safetensors").exists()
    about = json.loads((kept / "provenance.json").read_text())
    assert (about["trained"], about["seed"], about["learning_rate"]) == (["stories"], 1, 2e-4)
    assert about["start"] == about["model"]["name"] == tried.model

    # an expert merged with its copy is the expert
    shutil.copytree(kept, kept.with_name("arithmetic-1"))
    merged = Arm(trained=("arithmetic", "stories"), steps=0, seed=1, kind="merge", method="linear")
    again = Probe(tried, folder, engine)
    again.run([merged])
    assert again.matrices[None].arms[0].scores == own.probes[0].scores
    assert again.matrices[None].shared["arithmetic"]["stories"]["cosine"] == pytest.approx(1)
    shutil.rmtree(kept.with_name("arithmetic-1"))

    # killed between the weights and their row
    replace(own, rows=own.rows[::2]).save(folder / "transfer.json")
    (kept / "adapter_model.safetensors").write_text("of a run that is not on record")
    Probe(tried, folder, engine).run(arms)
    again = TransferMatrix.load(folder / "transfer.json")
    assert [row.scores for row in again.rows] == [own.rows[n].scores for n in (0, 2, 1)]
    assert load_file(kept / "adapter_model.safetensors") and [path.name for path in kept.parent.iterdir()] == [
        "stories-1"
    ]


class Chooses(Probe):
    """A probe whose runs are rows that are there already."""

    def __init__(self, out, whole):
        self.recipe, self.out, self.whole, self.made = recipe(), out, whole, []
        self.experts = SimpleNamespace(domains=whole.trainable)
        self.matrices = {None: replace(whole, rows=whole.baselines(probe=True))}

    def _all(self, arms):
        for arm in (arm for arm in arms if arm.trained and arm.trained not in self.made):
            rows = [r for r in self.whole.rows if (r.trained, r.seed, r.arm) == (arm.trained, 0, {})]
            self.matrices[None] = replace(self.matrices[None], rows=(*self.matrices[None].rows, *rows))
            self.made.append(arm.trained)

    def _compare(self):
        pass


def test_a_budget_probes_so_many_domains_and_its_plan_is_to_mix(tmp_path, capsys):
    whole = PLANTED["sequence"].matrix(np.random.default_rng(0))
    names = whole.trainable
    arms = [Arm(seed=0, trained=trained, steps=1) for trained in ((), *((name,) for name in names), names)]
    some = Chooses(tmp_path, whole)
    some._chosen(arms, 2)
    assert len(some.made) == 2 and names not in some.made
    assert "2 domains were probed" in capsys.readouterr().err
    kept = TransferMatrix.load(tmp_path / "transfer.json")
    assert kept.provenance["budget"] == 2 and make_plan(kept).options[0].kind == "mix"
    every = Chooses(tmp_path, whole)
    every._chosen(arms, len(names))
    assert set(every.made) == {names, *((name,) for name in names)}
