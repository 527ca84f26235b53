import pytest

from polyphony.curricula.monitors.signs import ENOUGH_CORRECT
from polyphony.trainer.data import Prompt
from polyphony.trainer.scoring import Graded, Sample
from polyphony.trainer.shortcuts import ShortcutWatch


def graded(reward, *, length=100, signs=()) -> Graded:
    return Graded(prompt_id="p", domain="math", length=length, truncated=False, reward=reward, signs=signs)


def watch() -> ShortcutWatch:
    return ShortcutWatch(["math"])


def sample(text, ids=50, **columns) -> Sample:
    prompt = Prompt(id="p", domain="math", prompt="?", columns=columns)
    return Sample(prompt=prompt, ids=[0] * ids, text=text, truncated=False)


def test_signs_of_one_completion():
    w = watch()
    assert w.inspect(sample(r"\boxed{4}", ids=4)) == ("bare_answer",)
    assert "repeated_ngrams" in w.inspect(sample("one two three four " * 10))
    assert "language_mixing" in w.inspect(sample("abc 数学"))
    solution = "2 + 3 = 5, 5 * 4 = 20, 20 - 1 = 19"
    assert "computation_skipping" in w.inspect(sample("it is 19", solution=solution))


def test_short_is_short_of_what_correct_answers_of_the_domain_were():
    w = watch()
    assert w.inspect(sample("so it is", ids=30)) == ()
    w.observe(1, [[graded(1.0), graded(1.0)]])
    assert w.inspect(sample("so it is", ids=30)) == ("computation_skipping",)


def test_a_rare_success_sets_no_standard():
    w = watch()
    w.observe(1, [[graded(1.0, length=3), graded(0.0)]])
    w.observe(1, [[graded(1.0, length=3, signs=("bare_answer",))] * 2 + [graded(0.0)] * 6])
    assert w.inspect(sample("so it is", ids=30)) == ()
    metrics = w.flush()
    assert (metrics["shortcuts/math/rare_successes"], metrics["shortcuts/math/suspects"]) == (3, 2)


def test_what_most_established_answers_show_is_the_domains_manner():
    w = watch()
    suspect, failure = graded(1.0, signs=("bare_answer",)), graded(0.0)
    assert w.suspects([suspect, failure, failure]) == [0]
    assert w.suspects([suspect, suspect, failure]) == []  # not rare, and the manner is not known yet
    w.observe(1, [[suspect, suspect, failure]] * 8)
    assert w.suspects([suspect, failure, failure]) == []
    assert w.suspects([graded(1.0, signs=("bare_answer", "repeated_ngrams")), failure, failure]) == [0]


def test_a_sign_that_came_later_is_foreign_however_many_show_it():
    w = watch()
    honest, suspect, failure = graded(1.0), graded(1.0, signs=("bare_answer",), length=3), graded(0.0)
    w.observe(1, [[suspect] * 3 + [failure] * 5])  # most are wrong: no manner
    w.observe(1, [[honest, honest, failure]] * 8)
    group = [honest, *[suspect] * 5, failure]
    assert w.suspects(group) == [1, 2, 3, 4, 5]
    for step in range(2, 40):
        w.observe(step, [group])
    assert w.suspects(group) == [1, 2, 3, 4, 5]
    w.flush()
    w.observe(40, [group])
    metrics = w.flush()
    assert metrics["shortcuts/math/suspects"] == 5
    assert w.domains["math"].median_length == 100  # suspects set no standard
    assert metrics["shortcuts/math/correct_length"] == 3  # and are seen


def test_length_collapse_rings_once_and_again_after_recovery():
    w = watch()
    long, short = [graded(1.0, length=100)] * 8, [graded(1.0, length=40)] * 8
    for step in range(8):
        w.observe(step, [long])
    assert w.take_alarms() == []
    for step in range(8, 20):
        w.observe(step, [short])
    (alarm,) = w.take_alarms()
    assert (alarm.domain, alarm.kind) == ("math", "length_collapse")
    assert alarm.message == "correct answers have shrunk to 40 tokens, 40% of the start's"
    # 4 draws make half of the last 64, then the median is between the two lengths
    assert alarm.step == 12
    for step in range(20, 40):
        w.observe(step, [long])
    for step in range(40, 60):
        w.observe(step, [short])
    assert [a.kind for a in w.take_alarms()] == ["length_collapse"]


@pytest.mark.parametrize("right", [[8], [5, 1, 0], [2, 1, 0]], ids=str)
@pytest.mark.parametrize("collapsed", [40, 30, 5])
def test_answers_that_shrink_ring_however_short_and_however_rare_they_are(right, collapsed):
    w = watch()
    prompt = Prompt(id="p", domain="math", prompt="?", columns={})

    def draw(length):
        words = " ".join(f"w{k}" for k in range(length))
        signs = w.inspect(Sample(prompt=prompt, ids=[0] * length, text=words, truncated=False))
        success = graded(1.0, length=length, signs=signs)
        return [[success] * n + [graded(0.0, length=100)] * (8 - n) for n in right]

    for step in range(40):
        w.observe(step, draw(100))
    assert w.take_alarms() == []
    for step in range(40, 80):
        w.observe(step, draw(collapsed))
    alarms = [a for a in w.take_alarms() if a.kind == "length_collapse"]
    assert [a.message for a in alarms] == [
        f"correct answers have shrunk to {collapsed} tokens, {collapsed}% of the start's"
    ]
    assert w.flush()["shortcuts/math/correct_length"] == collapsed


def test_a_lone_success_that_was_cut_off_is_suspect_unless_that_is_the_manner():
    w = watch()
    cut, failure = graded(1.0, signs=("truncation",)), graded(0.0)
    assert w.suspects([cut, *[failure] * 7]) == [0]
    w.observe(1, [[graded(1.0), graded(1.0), failure]] * 8)  # the manner is to end
    assert w.suspects([cut, *[failure] * 7]) == [0]
    assert w.suspects([cut, cut, cut, failure]) == []  # no accident: the limit is short
    other = watch()
    other.observe(1, [[cut, cut, failure]] * 8)
    assert other.suspects([cut, *[failure] * 7]) == []


def test_a_sign_that_spreads_rings():
    w = watch()
    for step in range(4):
        w.observe(step, [[graded(0.0)] * 64])
    for step in range(4, 10):
        w.observe(step, [[graded(0.0, signs=("answer_repetition",))] * 64])
    (alarm,) = w.take_alarms()
    # the share rises by a fifth of the way a draw: 0.20, 0.36
    assert (alarm.step, alarm.kind) == (5, "answer_repetition")


def test_memory_survives_a_restart():
    import json

    w = watch()
    w.observe(1, [[graded(1.0, signs=("bare_answer",)), graded(1.0)]] * ENOUGH_CORRECT)
    other = watch()
    other.load_state_dict(json.loads(json.dumps(w.state_dict())))
    assert other.state_dict() == w.state_dict()


def test_metrics_are_shares_since_the_last_log():
    w = watch()
    w.observe(1, [[graded(1.0, signs=("bare_answer",)), graded(1.0, length=50), graded(0.0), graded(None)]])
    metrics = w.flush()
    assert metrics["shortcuts/math/bare_answer"] == 0.25
    assert metrics["shortcuts/math/correct_length"] == 75
    assert w.flush() == {}
