from functools import reduce

import pytest

from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.signs import ENOUGH_CORRECT
from polyphony.curricula.records import Completion, Group, Prompt
from polyphony.trainer.shortcuts import ShortcutWatch


def graded(reward, *, length=100, signs=()) -> Group:
    """A group of one, to be joined with others."""
    return Group(
        prompt_id="p",
        domain="math",
        draw=0,
        rewards=(reward,),
        lengths=(length,),
        truncated=(False,),
        surprisals=(None,),
        signs=(tuple(signs),),
    )


def observe(watch, step, groups) -> None:
    watch.observe(step, [reduce(Group.joined, members) for members in groups])


def suspects(watch, members) -> list[int]:
    return watch.suspects(reduce(Group.joined, members))


def taken(watch) -> list[Alarm]:
    alarms, watch.pending = watch.pending, []
    return alarms


def watch() -> ShortcutWatch:
    return ShortcutWatch(["math"])


def sample(text, ids=50, **columns) -> Completion:
    prompt = Prompt(id="p", domain="math", prompt="?", columns=columns)
    return Completion(prompt=prompt, ids=[0] * ids, text=text, truncated=False)


def test_signs_of_one_completion():
    w = watch()
    assert w.inspect([sample(r"\boxed{4}", ids=4)])[0] == ("bare_answer",)
    assert "repeated_ngrams" in w.inspect([sample("one two three four " * 10)])[0]
    assert "language_mixing" in w.inspect([sample("abc 数学")])[0]
    solution = "2 + 3 = 5, 5 * 4 = 20, 20 - 1 = 19"
    assert "computation_skipping" in w.inspect([sample("it is 19", solution=solution)])[0]


def test_short_is_short_of_what_correct_answers_of_the_domain_were():
    w = watch()
    assert w.inspect([sample("so it is", ids=30)])[0] == ()
    observe(w, 1, [[graded(1.0), graded(1.0)]])
    assert w.inspect([sample("so it is", ids=30)])[0] == ("computation_skipping",)


def test_a_rare_success_sets_no_standard():
    w = watch()
    observe(w, 1, [[graded(1.0, length=3), graded(0.0)]])
    observe(w, 1, [[graded(1.0, length=3, signs=("bare_answer",))] * 2 + [graded(0.0)] * 6])
    assert w.inspect([sample("so it is", ids=30)])[0] == ()
    metrics = w.flush()
    assert (metrics["shortcuts/math/rare_successes"], metrics["shortcuts/math/suspects"]) == (3, 2)


def test_what_most_reference_completions_show_is_the_reference_style():
    w = watch()
    suspect, failure = graded(1.0, signs=("bare_answer",)), graded(0.0)
    assert suspects(w, [suspect, failure, failure]) == [0]
    assert suspects(w, [suspect, suspect, failure]) == []  # not rare, and the reference style is not learned yet
    observe(w, 1, [[suspect, suspect, failure]] * 8)
    assert suspects(w, [suspect, failure, failure]) == []
    assert suspects(w, [graded(1.0, signs=("bare_answer", "repeated_ngrams")), failure, failure]) == [0]


def test_a_sign_that_came_later_is_foreign_however_many_show_it():
    w = watch()
    honest, suspect, failure = graded(1.0), graded(1.0, signs=("bare_answer",), length=3), graded(0.0)
    observe(w, 1, [[suspect] * 3 + [failure] * 5])  # most are wrong: no reference style
    observe(w, 1, [[honest, honest, failure]] * 8)
    group = [honest, *[suspect] * 5, failure]
    assert suspects(w, group) == [1, 2, 3, 4, 5]
    for step in range(2, 40):
        observe(w, step, [group])
    assert suspects(w, group) == [1, 2, 3, 4, 5]
    w.flush()
    observe(w, 40, [group])
    metrics = w.flush()
    assert metrics["shortcuts/math/suspects"] == 5
    assert w.domains["math"].median_length == 100  # suspects set no standard
    assert metrics["shortcuts/math/correct_length"] == 3  # and are seen


def test_length_collapse_rings_once_and_again_after_recovery():
    w = watch()
    long, short = [graded(1.0, length=100)] * 8, [graded(1.0, length=40)] * 8
    for step in range(8):
        observe(w, step, [long])
    assert taken(w) == []
    for step in range(8, 20):
        observe(w, step, [short])
    (alarm,) = taken(w)
    assert (alarm.domain, alarm.kind) == ("math", "length_collapse")
    assert alarm.message == "correct answers have shrunk to 40 tokens, 40% of the start's"
    # 4 draws make half of the last 64, then the median is between the two lengths
    assert alarm.step == 12
    for step in range(20, 40):
        observe(w, step, [long])
    for step in range(40, 60):
        observe(w, step, [short])
    assert [a.kind for a in taken(w)] == ["length_collapse"]


@pytest.mark.parametrize("right", [[8], [5, 1, 0], [2, 1, 0]], ids=str)
@pytest.mark.parametrize("collapsed", [40, 30, 5])
def test_answers_that_shrink_ring_however_short_and_however_rare_they_are(right, collapsed):
    w = watch()
    prompt = Prompt(id="p", domain="math", prompt="?", columns={})

    def draw(length):
        words = " ".join(f"w{k}" for k in range(length))
        signs = w.inspect([Completion(prompt=prompt, ids=[0] * length, text=words, truncated=False)])[0]
        success = graded(1.0, length=length, signs=signs)
        return [[success] * n + [graded(0.0, length=100)] * (8 - n) for n in right]

    for step in range(40):
        observe(w, step, draw(100))
    assert taken(w) == []
    for step in range(40, 80):
        observe(w, step, draw(collapsed))
    alarms = [a for a in taken(w) if a.kind == "length_collapse"]
    assert [a.message for a in alarms] == [
        f"correct answers have shrunk to {collapsed} tokens, {collapsed}% of the start's"
    ]
    assert w.flush()["shortcuts/math/correct_length"] == collapsed


def test_a_lone_success_that_was_cut_off_is_suspect_unless_that_is_the_reference_style():
    w = watch()
    cut, failure = graded(1.0, signs=("truncation",)), graded(0.0)
    assert suspects(w, [cut, *[failure] * 7]) == [0]
    observe(w, 1, [[graded(1.0), graded(1.0), failure]] * 8)  # the group is to end
    assert suspects(w, [cut, *[failure] * 7]) == [0]
    assert suspects(w, [cut, cut, cut, failure]) == []  # no accident: the limit is short
    other = watch()
    observe(other, 1, [[cut, cut, failure]] * 8)
    assert suspects(other, [cut, *[failure] * 7]) == []


def test_a_sign_that_spreads_rings():
    w = watch()
    for step in range(4):
        observe(w, step, [[graded(0.0)] * 64])
    for step in range(4, 10):
        observe(w, step, [[graded(0.0, signs=("answer_repetition",))] * 64])
    (alarm,) = taken(w)
    # the share rises by a fifth of the way a draw: 0.20, 0.36
    assert (alarm.step, alarm.kind) == (5, "answer_repetition")


def test_memory_survives_a_restart():
    import json

    w = watch()
    observe(w, 1, [[graded(1.0, signs=("bare_answer",)), graded(1.0)]] * ENOUGH_CORRECT)
    other = watch()
    other.load_state_dict(json.loads(json.dumps(w.state_dict())))
    assert other.state_dict() == w.state_dict()


def test_metrics_are_shares_since_the_last_log():
    w = watch()
    observe(w, 1, [[graded(1.0, signs=("bare_answer",)), graded(1.0, length=50), graded(0.0), graded(None)]])
    metrics = w.flush()
    assert metrics["shortcuts/math/bare_answer"] == 0.25
    assert metrics["shortcuts/math/correct_length"] == 75
    assert w.flush() == {}


def test_a_checkpoint_of_an_older_version_keeps_its_reference_style():
    w, other = watch(), watch()
    observe(w, 1, [[graded(1.0)] * 8])
    saved = w.state_dict()
    for domain in saved.values():
        domain["manner"] = domain.pop("style")
    other.load_state_dict(saved)
    assert other.state_dict() == w.state_dict()
