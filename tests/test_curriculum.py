import math

import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.records import Decision, Domain, Evaluation, Group
from polyphony.curricula.schedulers.fixed import Joint

DOMAINS = [
    Domain(name="math", kind="structured", train=[0], weight=3.0),
    Domain(name="talk", kind="open_ended", train=[0]),
    Domain(name="safety", kind="structured"),
]
PROMPTS = {name: [f"{name}/{k}" for k in range(20)] for name in ("math", "talk")}


class Fixed:
    """Always the same mixture."""

    def __init__(self, *mixture):
        self.mixture = mixture

    def decide(self, evidence, state):
        return Decision(mixture=self.mixture, reason="fixed")


def curriculum(scheduler=None):
    return Curriculum(domains=DOMAINS, prompts=PROMPTS, scheduler=scheduler or Joint(), total_draws=10)


def group(domain, *rewards):
    n = len(rewards)
    return Group(prompt_id="p", domain=domain, draw=0, rewards=rewards, lengths=(5,) * n, truncated=(False,) * n)


def test_quotas_follow_the_weights_and_watch_only_domains_are_never_drawn():
    c = curriculum()
    assert [ref.domain for ref in c.draw(8)] == ["math"] * 6 + ["talk"] * 2
    assert c.metrics() == {"math/mixture": 0.75, "talk/mixture": 0.25}


def test_evidence_of_a_draw_is_what_its_groups_showed():
    c = curriculum()
    c.draw(4)
    c.observe([group("math", 1.0, 0.0), group("math", 1.0, 1.0), group("talk", None, None)], {"math": 0.7})
    math_stats, talk_stats = c.evidence().last
    assert (math_stats.groups, math_stats.reward, math_stats.pass_rate) == (2, 0.75, 0.75)
    assert (math_stats.abs_advantage, math_stats.frac_dead, math_stats.entropy) == (0.5, 0.5, 0.7)
    assert math_stats.tokens == 20
    assert talk_stats.groups == 1 and math.isnan(talk_stats.reward) and math.isnan(talk_stats.entropy)


def test_the_basis_of_a_decision_is_the_evidence_before_its_draw():
    c = curriculum()
    c.note("rolled back")
    c.draw(4)
    assert (c.basis.draw, c.basis.drawn, c.basis.notes) == (0, (0, 0), ("rolled back",))
    assert c.evidence().drawn == (3, 1) and c.evidence().notes == ()


def test_an_alarm_is_told_once_and_survives_a_restart():
    c = curriculum()
    c.note("safety fell", domain="safety")
    restored = curriculum()
    restored.load_state_dict(c.state_dict())
    assert restored.evidence().alarms == ("safety",)
    restored.draw(4)
    assert restored.basis.alarms == ("safety",) and restored.evidence().alarms == ()


def test_save_and_restore_in_the_middle_gives_the_same_prompts():
    c = curriculum(Fixed(0.3, 0.7))
    for _ in range(3):
        c.draw(5)
    c.record(Evaluation(trained=("math",), step=3, seed=0, scores={"math": (1.0,)}))
    state = c.state_dict()
    following = [c.draw(5) for _ in range(5)]
    restored = curriculum(Fixed(0.3, 0.7))
    restored.load_state_dict(state)
    assert [restored.draw(5) for _ in range(5)] == following
    assert restored.evaluations == c.evaluations


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ((1.0,), "1 shares for 2 domains"),
        ((0.5, math.nan), "domain 'talk'"),
        ((1.5, -0.5), "domain 'talk'.*-0.5"),
        ((0.5, 0.4), "sum to 1"),
    ],
)
def test_a_mixture_that_is_none_is_refused(mixture, message):
    with pytest.raises(ValueError, match=message):
        curriculum(Fixed(*mixture)).draw(4)


def test_a_group_of_a_domain_that_is_not_trained_is_refused():
    with pytest.raises(ValueError, match="'safety', which this run does not train"):
        curriculum().observe([group("safety", 1.0)])


def test_a_state_of_other_domains_is_refused():
    c = Curriculum(domains=DOMAINS[:1], prompts=PROMPTS, scheduler=Joint(), total_draws=10)
    with pytest.raises(ValueError, match="saved domains"):
        c.load_state_dict(curriculum().state_dict())


@pytest.mark.parametrize(("domains", "draws"), [(DOMAINS[2:], 10), (DOMAINS, 0)])
def test_nothing_to_train_or_no_draws_are_refused(domains, draws):
    with pytest.raises(ValueError):
        Curriculum(domains=domains, prompts=PROMPTS, scheduler=Joint(), total_draws=draws)
