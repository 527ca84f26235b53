"""Plans of worked matrices, and the calibration of the decision over simulated ones."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.halves import half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.planner import PlanSettings, make_plan
from polyphony.launch.cli import main
from polyphony.launch.verbs.tables import transfer_table
from tests.experiments.decisions import (
    OWN,
    World,
    chain,
    gain,
    no_transfer,
    random,
    share_of_sequences,
    simulate,
    standard_error,
)
from tests.experiments.options import WORLDS as PLANTED
from tests.experiments.options import recommended

QUICK = PlanSettings(resamples=200)


def row(trained, means, *, n=100, seed=0, step=1, probe=True, entropy=None):
    """A row whose domains score exactly `means`; which items are solved is scattered, the same for equal means."""
    scattered = np.random.default_rng(7).permutation(n)
    scores = {name: tuple((scattered < round(m * n)).astype(float)) for name, m in means.items()}
    return Evaluation(trained=tuple(trained), step=step, seed=seed, scores=scores, probe=probe, entropy=entropy or {})


def matrix(rows, *, kinds=None, **fields):
    names = tuple(rows[0].scores)
    kinds = kinds or dict.fromkeys(names, "structured")
    return TransferMatrix(domains=names, kinds=kinds, rows=tuple(rows), **fields)


def fragile_writing(n=100, **fields):
    """Base all .4; each domain lifts itself to .8; a takes .1 from b, and a and b each take .3 from w."""
    names = ("w", "a", "b")
    start = dict.fromkeys(names, 0.4)
    rows = [row((), start, n=n, **fields)]
    rows.append(row("w", start | {"w": 0.8}, n=n, **fields))
    rows.append(row("a", start | {"a": 0.8, "b": 0.3, "w": 0.1}, n=n, **fields))
    rows.append(row("b", start | {"b": 0.8, "w": 0.1}, n=n, **fields))
    return rows


def test_the_fragile_domain_goes_last_and_the_prediction_adds_what_comes_after():
    plan = make_plan(matrix(fragile_writing()), QUICK)
    assert plan.order == ("a", "b", "w")
    assert plan.is_promising and plan.decision == "mix"  # nothing was trained in this order
    assert plan.predicted == pytest.approx({"w": 0.8, "a": 0.8, "b": 0.8})
    assert plan.transfer["a"] == pytest.approx({"w": -0.3, "a": 0.4, "b": -0.1})
    # the mean order loses half of .3 + .3 + .1 over three domains: (.7 / 2) / 3
    assert plan.over_mean_order.mid == pytest.approx(0.35 / 3)
    assert plan.over_joint is None and plan.measured is None


def test_what_is_only_predicted_is_to_be_measured_and_not_followed():
    names = ("w", "a", "b")
    plan = make_plan(matrix([*fragile_writing(), row(names, dict.fromkeys(names, 0.7), step=3)]), QUICK)
    (sequence,) = [option for option in plan.options if option.kind == "sequence"]
    assert sequence.source == "predicted" and sequence.over_mix.is_above_zero and not sequence.is_shown
    assert "probe.ways=[sequence] --out FOLDER` would" in sequence.note
    assert plan.options[0].kind == "mix" and "probe.ways=[sequence] would measure it, so train on all" in plan.explain()


def test_gain_over_the_joint_arm_decides_too():
    names = ("w", "a", "b")
    # the order reaches .8 everywhere; a joint run at .7 is worse, one at .9 better
    worse = [*fragile_writing(), row(names, dict.fromkeys(names, 0.7), step=3)]
    better = [*fragile_writing(), row(names, dict.fromkeys(names, 0.9), step=3)]
    assert make_plan(matrix(worse), QUICK).over_joint.mid == pytest.approx(0.1)
    assert make_plan(matrix(worse), QUICK).is_promising
    assert make_plan(matrix(better), QUICK).over_joint.mid == pytest.approx(-0.1)
    assert not make_plan(matrix(better), QUICK).is_promising


def test_a_watch_only_domain_is_predicted_and_has_no_place_in_the_order():
    rows = fragile_writing()
    plan = make_plan(matrix([rows[0], rows[2], rows[3]], watch_only=("w",)), QUICK)
    assert sorted(plan.order) == ["a", "b"]
    assert plan.predicted["w"] == pytest.approx(0.4 - 0.3 - 0.3)  # additive: it may leave [0, 1]


def test_structured_goes_first_only_where_the_evidence_is_silent():
    start = {"talk": 0.5, "math": 0.5}
    kinds = {"talk": "open_ended", "math": "structured"}

    def order(harm):  # training on math takes `harm` from talk: talk should come after math
        rows = [row((), start), row(("talk",), start | {"math": 0.5 - harm}), row(("math",), start)]
        return make_plan(matrix(rows, kinds=kinds), QUICK).order

    assert order(0.0) == ("math", "talk")
    assert order(0.3) == ("talk", "math")


def test_a_pair_within_noise_is_a_tie_and_the_prior_decides_it():
    rng = np.random.default_rng(0)
    kinds = {"talk": "open_ended", "math": "structured"}
    firsts = []
    for _ in range(40):
        rows = [
            Evaluation(
                trained=trained,
                step=1,
                seed=0,
                scores={name: tuple((rng.random(60) < 0.5).astype(float)) for name in kinds},
                probe=True,
            )
            for trained in ((), ("talk",), ("math",))
        ]
        firsts.append(make_plan(matrix(rows, kinds=kinds), QUICK).order[0])
    assert firsts.count("math") >= 34  # 95 % but for intervals that miss zero by chance


def test_entropy_that_would_fall_below_its_floor_enters_the_objective():
    start = {"a": 0.5, "b": 0.5}
    kinds = dict.fromkeys(start, "structured")
    # by score alone nothing matters; but training on b takes .7 of a's .8 nats (floor .4): a must come after b
    rows = [
        row((), start, entropy={"a": 0.8, "b": 0.8}),
        row("a", start, entropy={"a": 0.8, "b": 0.8}),
        row("b", start, entropy={"a": 0.1, "b": 0.8}),
    ]
    assert make_plan(matrix(rows, kinds=kinds), QUICK).order == ("b", "a")
    assert make_plan(matrix(rows, kinds=kinds), PlanSettings(resamples=200, entropy_penalty=0.0)).order == ("a", "b")


def test_decisions_come_from_the_steer_half_and_published_numbers_from_report():
    ids = [f"item-{n}" for n in range(120)]
    steer = np.array([half(i) == "steer" for i in ids])

    def scored(trained, on_steer, on_report):
        scores = {k: tuple(np.where(steer, on_steer[k], on_report[k])) for k in ("a", "b")}
        return Evaluation(trained=trained, step=1, seed=0, scores=scores, probe=True)

    flat = {"a": 0.5, "b": 0.5}
    # steer says that a harms b (so a first); report says that b harms a
    rows = [
        scored((), flat, flat),
        scored(("a",), flat | {"b": 0.2}, flat),
        scored(("b",), flat, flat | {"a": 0.2}),
    ]
    plan = make_plan(matrix(rows, items={"a": tuple(ids), "b": tuple(ids)}), QUICK)
    assert plan.order == ("a", "b")
    assert plan.transfer["a"]["b"] == pytest.approx(0) and plan.transfer["b"]["a"] == pytest.approx(-0.3)
    assert plan.predicted["a"] == pytest.approx(0.5 - 0.3)


def test_one_domain_has_nothing_to_order():
    plan = make_plan(matrix([row((), {"a": 0.2}), row("a", {"a": 0.6})]), QUICK)
    assert (plan.order, plan.decision, plan.over_mean_order) == (("a",), "mix", (0, 0, 0))
    assert plan.predicted == pytest.approx({"a": 0.6})
    assert "nothing to order" in plan.explain()


def test_a_domain_without_a_probe_is_refused_by_name():
    with pytest.raises(ValueError, match=r"domains \['b'\] have neither a probe nor a stage"):
        make_plan(matrix(fragile_writing()[:3]), QUICK)


def test_one_item_a_domain_decides_nothing():
    plan = make_plan(matrix(fragile_writing(n=1)), QUICK)
    assert plan.decision == "mix" and math.isnan(plan.over_mean_order.low)


def test_a_run_of_stages_is_measured_and_planned_from_its_stages():
    names = ("a", "b")
    rows = [
        row((), dict.fromkeys(names, 0.2), step=0, probe=False),
        row("a", {"a": 0.8, "b": 0.2}, step=1, probe=False),
        row("b", {"a": 0.5, "b": 0.7}, step=2, probe=False),
    ]
    document = make_plan(matrix(rows), QUICK).as_json()
    assert document["measured"]["bwt"] == pytest.approx(-0.3)
    assert document["measured"]["forgetting"]["b"] is None
    assert document["transfer"]["b"]["a"] == pytest.approx(-0.3)
    assert document["order"] == ["b", "a"]


def test_the_json_object_has_the_documented_keys_and_no_nan():
    plan = make_plan(matrix(fragile_writing()), QUICK)
    document = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    assert set(document) == {
        *("order", "decision", "is_promising", "gain", "confidence", "predicted", "interval", "transfer", "options"),
    }
    assert set(document["gain"]) == {"over_mean_order", "over_joint"}
    low, mid, high = document["gain"]["over_mean_order"]
    assert low <= mid <= high
    assert document["confidence"]["precedence"]["a"]["w"] > 0.99
    assert document["confidence"]["expected_regret"] == pytest.approx(0, abs=0.01)
    assert document["interval"]["w"][0] <= document["predicted"]["w"] <= document["interval"]["w"][1]


@pytest.mark.parametrize(
    ("size", "search", "note"),
    [
        (12, None, ""),
        (13, {"order": "exact", "resamples": "insertions"}, "The order is proven best; those of the resamples"),
        (17, {"order": "insertions", "resamples": "insertions"}, "The order of 17 domains was searched by insertions"),
    ],
)
def test_a_plan_of_more_domains_than_exact_search_serves_says_how_orders_were_found(size, search, note):
    whole = World(size=size, items=1).matrix(np.random.default_rng(0), OWN * np.eye(size))
    plan = make_plan(whole, PlanSettings(resamples=10))
    assert plan.as_json().get("search") == search
    assert note in plan.explain() and (search or "insertions" not in plan.explain())


def test_the_command_prints_the_object_alone_and_beside_it_what_limits_the_evidence(capsys, tmp_path):
    matrix(fragile_writing(n=30)).save(tmp_path / "transfer.json")
    assert main(["plan", str(tmp_path / "transfer.json"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["order"] == ["a", "b", "w"]
    assert "One seed a probe: the intervals hold evaluation noise only" in said.err


def test_transfer_is_told_beyond_the_placebo_and_decided_as_a_whole_and_a_rate_that_does_harm_is_said(capsys, tmp_path):
    rows, start = fragile_writing(), dict.fromkeys(("w", "a", "b"), 0.4)
    noise = [replace(row(name, start | {"w": 0.3}), placebo=True) for name in ("w", "a", "b")]
    found = {"learning_rate": 5e-4, "harm": ["shuffled rewards on a took 0.1 from w"]}
    whole, plain = matrix([*rows, *noise], provenance=found), make_plan(matrix(rows), QUICK)
    plan = make_plan(whole, QUICK)
    assert (plan.order, plan.predicted) == (plain.order, plain.predicted)
    assert plan.transfer["a"]["w"] == pytest.approx(-0.2) and plain.transfer["a"]["w"] == pytest.approx(-0.3)
    assert plan.as_json()["placebo"]["a"]["w"] == pytest.approx(-0.1) and "placebo" not in plain.as_json()
    assert "takes 0.200 from w, beyond the -0.100 of shuffled rewards" in plan.explain()
    beyond, _, alone = transfer_table(whole).partition("shuffled rewards by themselves:")
    assert beyond.startswith("beyond shuffled rewards:") and "-0.200±" in beyond and "-0.200±" not in alone
    whole.save(tmp_path / "transfer.json")
    assert main(["plan", str(tmp_path / "transfer.json")]) == 0
    said = "made at a learning rate of 0.0005, which is too high: shuffled rewards on a took 0.1 from w"
    assert said in capsys.readouterr().err


def test_the_explanation_says_what_to_do_why_and_how_sure_it_is():
    text = make_plan(matrix(fragile_writing()), QUICK).explain()
    for said in (
        "a, b, w",
        "that is predicted, and such predictions did not come true where they were tried",
        "would measure it, so train on all domains together (scheduler: adaptive)",
        "takes 0.300 from w",
        "Least certain",
        "One seed a probe",
        "joint run",
    ):
        assert said in text


def test_the_same_file_gives_the_same_plan():
    assert make_plan(matrix(fragile_writing()), QUICK) == make_plan(matrix(fragile_writing()), QUICK)


def test_a_joint_arm_of_other_length_is_noted():
    names = ("w", "a", "b")
    rows = [*fragile_writing(step=10), row(names, dict.fromkeys(names, 0.7), step=50)]
    rows[0] = row((), dict.fromkeys(names, 0.4), step=0)
    assert "ran 50 steps and the probes 30 together: not the same" in make_plan(matrix(rows), QUICK).explain()


def test_a_joint_arm_that_had_less_training_than_the_probes_is_left_out():
    names = ("w", "a", "b")
    probes = fragile_writing(step=10)
    probes[0] = row((), dict.fromkeys(names, 0.4), step=0)
    short = make_plan(matrix([*probes, row(names, dict.fromkeys(names, 0.42), step=1)]), QUICK)
    none = make_plan(matrix(probes), QUICK)
    assert short.over_joint is None
    assert (short.order, short.decision, short.over_mean_order) == (none.order, none.decision, none.over_mean_order)
    assert "ran 1 steps and the probes 30 together: too few to compare with, so it was left out" in short.explain()


@pytest.mark.parametrize("world", PLANTED)
def test_what_is_truly_best_is_recommended_and_nothing_but_mixing_where_nothing_is(world):
    best = {"nothing": "mix"}.get(world, world)
    assert max(PLANTED[world].truth().values()) == PLANTED[world].truth()[best]
    assert [recommended(world, seed) for seed in range(5)].count(best) >= 4  # the command makes 20: RESULTS.md


def test_a_plan_says_one_thing():
    plan = make_plan(PLANTED["groups"].matrix(np.random.default_rng(0)), QUICK)
    assert plan.options[0].kind == "groups"
    assert "Best is to train in groups" in plan.explain() and "together (scheduler" not in plan.explain()


def test_the_order_that_was_trained_is_the_one_that_is_recommended():
    whole = PLANTED["sequence"].matrix(np.random.default_rng(0))
    other = ["b", "a", "c", "d"]
    rows = [
        replace(row, arm={"kind": "sequence", "stages": [[name] for name in other]})
        if row.arm.get("kind") == "sequence"
        else row
        for row in whole.rows
    ]
    plan = make_plan(replace(whole, rows=tuple(rows)), QUICK)
    assert make_plan(whole, QUICK).order != tuple(other)
    assert (plan.order, plan.decision, plan.options[0].kind) == (tuple(other), "sequence", "sequence")
    assert "Train in this order" in plan.explain()
    # by one seed nothing measured is shown to be better
    alone = make_plan(replace(whole, rows=tuple(r for r in rows if r.seed == 0)), QUICK)
    assert not next(o for o in alone.options if o.source == "measured" and o.kind == "sequence").is_shown


def test_without_a_joint_run_what_was_trained_asks_for_one():
    whole = PLANTED["merge"].matrix(np.random.default_rng(0))
    rows = tuple(row for row in whole.rows if row.trained != whole.trainable or row.arm)
    notes = {o.kind: o.note for o in make_plan(replace(whole, rows=rows), QUICK).options}
    assert set(notes.values()) == {"not measured: `polyphony probe RECIPE probe.joint_arm=true --out FOLDER` would"}
    short = tuple(replace(r, step=1) if r.trained == whole.trainable and not r.arm else r for r in whole.rows)
    notes = {o.kind: o.note for o in make_plan(replace(whole, rows=short), QUICK).options}
    assert "probe.joint_arm=true --out ANOTHER" in notes["mix"]


def test_options_are_ranked_and_what_was_not_measured_names_the_command_that_would(capsys, tmp_path):
    whole = PLANTED["merge"].matrix(np.random.default_rng(1))
    kept = [row for row in whole.rows if row.arm.get("kind") not in ("groups", "distil")]
    conflict = [replace(row, scores=row.scores | {"b": (0.0,) * 400}) if row.trained == ("a",) else row for row in kept]
    (tmp_path / "recipe.yaml").write_text("")
    replace(whole, rows=tuple(conflict), provenance={"probe": {"keep": None}}).save(tmp_path / "transfer.json")
    assert main(["plan", str(tmp_path / "transfer.json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    options = {option["option"]: option for option in document["options"]}
    assert document["options"][0]["option"] == "merge" and options["merge"]["how"] == {"method": "ties"}
    assert (
        options["merge"]["is_shown"] and options["merge"]["over_mix"][0] > 0 and options["mix"]["over_mix"] == [0, 0, 0]
    )
    # experts 4 x 100, a pupil half as long as the joint run; of two seeds the probes: experts, joint run, four arms
    assert [options[k]["tokens"] for k in ("mix", "sequence", "merge", "distil")] == [400, 400, 400, 600]
    assert (options["mix"]["probes"], options["merge"]["probes"]) == (0, 4000)
    assert options["groups"]["over_mix"] is options["distil"]["over_mix"] is None
    first, last = options["groups"]["how"]["stages"]
    assert set(first) == {"a", "c", "d"} and last == ["b"]  # what a did to b, b's own stage makes up for
    again = f"`polyphony probe {tmp_path / 'recipe.yaml'} probe.ways=[groups] --out {tmp_path}` would"
    assert options["groups"]["note"] == f"not measured: {again}"
    assert "probe.keep=last probe.ways=[distil] --out ANOTHER` would" in options["distil"]["note"]
    assert main(["plan", str(tmp_path / "transfer.json")]) == 0
    said = capsys.readouterr().out
    assert "Best is to merge experts (method ties): it gains +0." in said and "\nmerge " in said


def mirrored(rng, size):
    """Transfer that is large and the same both ways: no order gains anything."""
    table = rng.normal(size=(size, size)) * 0.05
    return table + table.T


def share(kind, *, worlds=150, error=0.0, **fields):
    world = World(**fields)
    return share_of_sequences(simulate(world, kind, worlds, np.random.default_rng(3), error=error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seeds", "joint"),
    [(no_transfer, 1, None), (no_transfer, 2, None), (no_transfer, 2, 0.1), (mirrored, 2, None)],
)
def test_where_no_order_matters_a_sequence_is_called_in_at_most_a_tenth_of_150_matrices(kind, seeds, joint):
    luck = 0.03 if seeds == 2 else 0.0  # with one seed its noise cannot be seen
    assert share(kind, size=4, seeds=seeds, luck=luck, joint=joint) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [chain, random])
@pytest.mark.parametrize(("size", "marks"), [(4, "binary"), (5, "graded")])
def test_a_gain_of_four_standard_errors_is_called_a_sequence_in_four_fifths_of_matrices(size, marks, kind):
    world = World(size=size, marks=marks)
    rng = np.random.default_rng(4)
    error = standard_error(simulate(world, no_transfer, 200, rng))
    assert share(kind, size=size, marks=marks, worlds=60, error=error) >= 0.8


@pytest.mark.slow
def test_the_interval_holds_the_true_gain_of_the_chosen_order_in_nineteen_of_twenty():
    world = World(size=4)
    rng = np.random.default_rng(5)
    inside = []
    for _ in range(100):
        table = random(rng, 4) * 0.05
        plan = make_plan(world.matrix(rng, OWN * np.eye(4) + table), QUICK)
        low, _, high = plan.over_mean_order
        inside.append(low <= gain(table, np.array([int(name[1]) for name in plan.order])) <= high)
    assert np.mean(inside) >= 0.9


@pytest.mark.slow
def test_twelve_domains_are_planned_within_five_seconds():
    rng = np.random.default_rng(0)
    whole = World(size=12, items=200, joint=0.0).matrix(rng, OWN * np.eye(12))
    start = time.process_time()
    make_plan(whole)
    assert time.process_time() - start < 5
