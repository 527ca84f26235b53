import pytest

from polyphony.curricula.records import DomainStats, Evaluation, Evidence
from polyphony.curricula.schedulers.bwt import Bwt
from polyphony.curricula.transfer.matrix import TransferMatrix

NAMES = ("w", "a", "b")


def row(trained, scores, *, step=10, probe=False, exposure=None, n=200):
    items = {name: tuple(float(k < round(s * n)) for k in range(n)) for name, s in scores.items()}
    return Evaluation(trained=trained, step=step, seed=0, scores=items, probe=probe, exposure=exposure or {})


def probes(a_on_b=-0.1, b_on_a=0.0):
    """w is fragile: a and b take .3 from it. Each domain lifts itself from .4 to .8."""
    start = dict.fromkeys(NAMES, 0.4)
    rows = (
        row((), start, step=0, probe=True),
        row(("w",), start | {"w": 0.8}, probe=True),
        row(("a",), start | {"a": 0.8, "b": 0.4 + a_on_b, "w": 0.1}, probe=True),
        row(("b",), start | {"b": 0.8, "a": 0.4 + b_on_a, "w": 0.1}, probe=True),
    )
    return TransferMatrix(domains=NAMES, kinds=dict.fromkeys(NAMES, "structured"), rows=rows)


class Run:
    """Asks a scheduler draw by draw; evaluations come from the test."""

    def __init__(self, scheduler, total=30):
        self.scheduler, self.total, self.draw, self.state = scheduler, total, 0, {}
        self.evaluations, self.decisions = [], []

    def evidence(self, alarms=()):
        return Evidence(
            draw=self.draw,
            total_draws=self.total,
            domains=NAMES,
            kinds=("structured",) * 3,
            weights=(1.0,) * 3,
            sizes=(9,) * 3,
            drawn=(0,) * 3,
            last=(DomainStats(),) * 3,
            evaluations=tuple(self.evaluations),
            alarms=alarms,
        )

    def go(self, draws=1, alarms=()):
        for _ in range(draws):
            decision = self.scheduler.decide(self.evidence(alarms), self.state)
            self.state, self.draw = decision.state, self.draw + 1
            self.decisions.append(decision)
        return self.decisions[-1]

    def see(self, trained, exposure, **scores):
        self.evaluations.append(row(trained, scores, step=self.draw, exposure=exposure))


def test_stages_follow_the_planned_order_with_equal_lengths():
    run = Run(Bwt(transfer=probes()))
    run.go(30)
    assert [d.stage for d in run.decisions] == ["a"] * 10 + ["b"] * 10 + ["w"] * 10
    assert run.decisions[0].mixture == (0.0, 1.0, 0.0)


def test_earlier_domains_are_replayed_by_a_power_law_of_their_age():
    run = Run(Bwt(transfer=probes(), replay={"fraction": 0.3, "exponent": 1.0}))
    second = run.go(11)
    assert second.mixture == pytest.approx((0.0, 0.3, 0.7))
    third = run.go(10)  # draw 20: a ended 10 draws ago, b now: ages 11 and 1
    assert third.mixture == pytest.approx((0.7, 0.3 * (1 / 11) / (12 / 11), 0.3 / (12 / 11)))


def test_a_domain_that_is_being_forgotten_is_protected_until_it_is_back():
    run = Run(Bwt(transfer=probes(), replay={"fraction": 0.1}, protect={"max_drop": 0.05, "share": 0.2}))
    run.see((), None, w=0.4, a=0.4, b=0.4)
    run.go(5)
    run.see(("a",), {"a": 5}, w=0.4, a=0.8, b=0.4)
    run.go(6)
    assert run.decisions[-1].stage == "b"
    run.see(("b",), {"a": 10, "b": 1}, w=0.4, a=0.5, b=0.6)
    alarmed = run.go()
    assert alarmed.mixture == pytest.approx((0.0, 0.3, 0.7)) and "protected: a" in alarmed.reason
    run.see(("b",), {"a": 11, "b": 2}, w=0.4, a=0.7, b=0.6)  # still .1 below, though no longer with confidence
    assert "protected: a" in run.go().reason
    run.see(("b",), {"a": 12, "b": 3}, w=0.4, a=0.78, b=0.6)
    assert run.go().mixture == pytest.approx((0.0, 0.1, 0.9))


def test_a_loss_that_noise_could_explain_is_not_protected_against():
    run = Run(Bwt(transfer=probes(), protect={"max_drop": 0.05}))
    run.see((), None, w=0.4, a=0.4, b=0.4)
    run.go(5)
    run.see(("a",), {"a": 5}, w=0.4, a=0.8, b=0.4)
    run.go(6)
    run.see(("b",), {"a": 10, "b": 1}, w=0.4, a=0.76, b=0.6)
    assert "protected" not in run.go().reason


def test_a_stage_ends_early_when_its_score_has_stopped_rising_and_the_rest_share_the_draws():
    run = Run(Bwt(transfer=probes()))
    run.see((), None, w=0.4, a=0.4, b=0.4)
    run.go()
    for step in range(1, 5):
        run.see(("a",), {"a": step}, w=0.4, a=0.8, b=0.4)
        run.go()
    assert run.decisions[-2].stage == "a" and run.decisions[-1].stage == "b"
    assert "a ended because its score has stopped rising" in run.decisions[-1].reason
    run.go(30 - run.draw)
    assert [d.stage for d in run.decisions].count("b") == 13  # 26 draws were left for two stages


def test_draws_that_the_last_stage_leaves_over_go_to_all_domains_alike():
    run = Run(Bwt(transfer=probes()))
    run.go(21)
    for step in range(4):
        assert run.decisions[-1].stage == "w"
        run.see(("w",), {"w": step}, w=0.5, a=0.8, b=0.8)
        run.go()
    assert run.decisions[-1].stage is None and run.decisions[-1].mixture == pytest.approx((1 / 3,) * 3)
    assert "all stages are over: equal shares; w ended because its score has stopped rising" in run.decisions[-1].reason
    run.see(NAMES, {"w": 5}, w=0.5, a=0.8, b=0.8)
    assert run.go().mixture == pytest.approx((1 / 3,) * 3)
    assert [review["stage"] for review in run.state["reviews"]] == ["a", "b", "w"]


def test_a_stage_ends_when_practising_its_domain_lowers_it_beyond_noise():
    run = Run(Bwt(transfer=probes()))
    run.see((), None, w=0.4, a=0.6, b=0.4)
    run.go()
    run.see(("a",), {"a": 1}, w=0.4, a=0.58, b=0.4)
    assert run.go().stage == "a"  # 4 of 200 items: noise
    run.see(("a",), {"a": 2}, w=0.4, a=0.4, b=0.4)
    assert run.go().stage == "b" and "a ended because practising it lowers its score" in run.decisions[-1].reason


def test_no_plateau_means_no_early_end():
    run = Run(Bwt(transfer=probes(), plateau=None))
    run.see((), None, w=0.4, a=0.6, b=0.4)
    run.go()
    run.see(("a",), {"a": 2}, w=0.4, a=0.1, b=0.4)
    assert run.go().stage == "a"


def test_after_a_stage_predicted_and_measured_scores_stand_side_by_side():
    run = Run(Bwt(transfer=probes()))
    run.see((), None, w=0.4, a=0.4, b=0.4)
    run.go(9)
    run.see(("a",), {"a": 9}, w=0.2, a=0.7, b=0.35)
    assert "predicted/measured w 0.10/0.20, a 0.80/0.70, b 0.30/0.35" in run.go(2).reason
    (review,) = run.state["reviews"]
    assert review["predicted"] == pytest.approx({"w": 0.1, "a": 0.8, "b": 0.3})
    assert review["measured"] == pytest.approx({"w": 0.2, "a": 0.7, "b": 0.35})


def test_the_rest_is_planned_again_with_what_the_run_has_shown():
    """Probes put a first, then b before w by a hair (b takes .01 from w). The run shows that a took .8 from b."""
    start = dict.fromkeys(NAMES, 0.8)
    rows = (
        row((), start, step=0, probe=True),
        row(("w",), start, probe=True),
        row(("a",), start | {"b": 0.5, "w": 0.5}, probe=True),
        row(("b",), start | {"w": 0.79}, probe=True),
    )
    matrix = TransferMatrix(domains=NAMES, kinds=dict.fromkeys(NAMES, "structured"), rows=rows)

    def rest(b_after_a):
        run = Run(Bwt(transfer=matrix))
        run.see((), None, w=0.8, a=0.8, b=0.8)
        run.go(9)
        run.see(("a",), {"a": 9}, w=0.5, a=0.8, b=b_after_a)
        run.go(2)
        assert run.state["order"][0] == "a"
        return run.state["order"][1:]

    assert rest(0.5) == ["b", "w"]  # as predicted
    assert rest(0.0) == ["w", "b"]  # b suffers more than predicted: keep it for last


def test_a_broken_guardrail_protects_a_past_domain_and_ends_the_stage_for_any_other():
    run = Run(Bwt(transfer=probes()))
    run.go(11)
    protected = run.go(alarms=("a",))
    assert protected.stage == "b" and "protected: a" in protected.reason and "protected: a" in run.go().reason
    ended = run.go(alarms=("safety",))
    assert ended.stage == "w" and "b ended because it broke the guardrail of safety" in ended.reason


def test_more_domains_than_draws_is_no_reason_to_skip_the_first():
    run = Run(Bwt(transfer=probes()), total=2)
    assert [run.go().stage, run.go().stage] == ["a", "b"]


def test_the_last_stage_is_reviewed_when_the_run_is_over():
    run = Run(Bwt(transfer=probes()))
    run.see((), None, w=0.4, a=0.4, b=0.4)
    run.go(30)
    run.see(("w",), {"a": 10, "b": 10, "w": 10}, w=0.7, a=0.7, b=0.6)
    assert [review["stage"] for review in run.state["reviews"]] == ["a", "b"]
    evidence = run.evidence()
    reviews = run.scheduler.reviews(evidence, run.state)
    assert [review["stage"] for review in reviews] == ["a", "b", "w"]
    assert reviews[-1]["measured"] == pytest.approx({"w": 0.7, "a": 0.7, "b": 0.6})
    assert run.scheduler.reviews(evidence, {}) == []
