"""Quality and difference in the trainer: who compares what, what the update gets, what the curriculum is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from polyphony.curricula.decision_log import Choice
from polyphony.curricula.records import Completion, Decision, Domain, Episode, Fused, Group, Prompt, mean
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.advantages import Advantages
from polyphony.trainer.diversity_reward import Fusion, find_diversity
from polyphony.trainer.draws import Draws
from polyphony.trainer.metrics import Meter
from polyphony.trainer.scoring import Failures, Scorer, together
from polyphony.trainer.settings import Diversity, UpdateSettings
from polyphony.trainer.shortcuts import ShortcutWatch
from tests.forks import forked_ranks


def domain(name="stories", kind="open_ended", **diversity) -> Domain:
    return Domain(name=name, kind=kind, diversity={"partitioner": "exact"} | diversity)


def group(rewards, domain="stories", prompt="p", texts="", fused=None) -> Group:
    n = len(rewards)
    return Group(
        prompt_id=prompt,
        domain=domain,
        draw=0,
        rewards=rewards,
        lengths=(3,) * n,
        truncated=(False,) * n,
        texts=tuple(texts),
        fused=fused,
    )


def prompt_of(group):
    return f"about {group.prompt_id}"


class Noting:
    """Compares exactly, remembers what it was asked, and fails on a group with a question mark."""

    def __init__(self):
        self.asked = []

    def same(self, groups, prompts):
        if any("?" in text for group in groups for text in group):
            raise KeyError("?")
        self.asked += zip(map(tuple, groups), prompts, strict=True)
        return [[[a == b for b in group] for a in group] for group in groups]


def test_quality_stays_and_the_fused_reward_stands_beside_it():
    # n = 4, classes a a b c: div 2/3 2/3 1 1
    (fused,) = Fusion.of([domain()])([group((1.0, 0.5, 0.25, None), texts="aabc")], prompt_of)
    assert fused.rewards == (1.0, 0.5, 0.25, None)
    assert fused.fused == Fused(
        rewards=(pytest.approx(2 / 3), pytest.approx(1 / 3), 0.25, None),
        diversity=(pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0, 1.0),
        classes=(0, 0, 1, 2),
    )
    assert fused.learned == fused.fused.rewards


def test_a_domain_without_diversity_is_left_alone():
    groups = [group((1.0, 0.0), "math"), group((1.0, 1.0), texts="ab")]
    fusion = Fusion.of([Domain(name="math", kind="structured"), domain()])
    assert fusion.domains == ("stories",)
    left, fused = fusion(groups, prompt_of)
    assert left == groups[0]
    assert fused.fused is not None
    assert fusion(groups[:1], prompt_of) == groups[:1]


@pytest.mark.parametrize(("compare", "classes"), [("answers", (0, 0, 1)), ("transcripts", (0, 1, 2))])
def test_a_domain_that_acts_is_compared_by_its_answers_or_by_all_that_was_said(compare, classes):
    def said(*turns):
        episode = Episode(messages=tuple({"role": "assistant", "content": turn} for turn in turns))
        asked = Prompt(domain="stories", id="p")
        return Completion(ids=[1], prompt=asked, text=turns[-1], reward=1.0, episode=episode)

    fusion = Fusion.of([replace(domain(compare=compare), environment="a:b")])
    rows = [said("look", "4"), said("4"), said("5")]
    (fused,) = fusion([Group.of(rows, draw=0, compare=fusion.compares(())["stories"])], prompt_of)
    assert fused.fused.classes == classes


def test_what_does_not_act_has_no_transcripts_to_compare():
    with pytest.raises(ValueError, match=r"domains.stories.diversity: compare: transcripts: the domain does not act"):
        find_diversity(domain(compare="transcripts"))


def test_the_curriculum_sees_quality_and_the_signal_is_that_of_the_update():
    # all as good as each other, not all alike: solved for the pass rate, yet not dead
    (fused,) = Fusion.of([domain()])([group((1.0, 1.0, 1.0), texts="aab")], prompt_of)
    assert (fused.pass_rate, fused.mean_reward) == (1.0, 1.0)
    assert fused.learned == (0.5, 0.5, 1.0)
    assert fused.has_signal
    assert fused.abs_advantage == pytest.approx((2 / 9 + 2 / 9) / (2 / 36) ** 0.5 / 2)  # (1/6, 1/6, 1/3): std .2357
    assert not group((1.0, 1.0, 1.0)).has_signal


def test_a_text_that_was_not_gathered_is_an_error_and_not_an_empty_answer():
    with pytest.raises(ValueError, match="domain 'stories': 1 of 2 texts of a group were gathered"):
        Fusion.of([domain()])([group((1.0, 1.0), texts="a")], prompt_of)


def test_ranks_share_the_comparing_and_agree_on_the_result():
    groups = [group((1.0, 0.5), prompt=f"p{i}", texts="aa" if i % 2 else "ab") for i in range(5)]
    alone = Fusion.of([domain()])(groups, prompt_of)
    partitioners, said = [Noting(), Noting()], []
    for rank, partitioner in enumerate(partitioners):  # what each rank puts into the gather
        diversity = {"stories": Diversity(partitioner=partitioner)}
        fusion = Fusion(by_domain=diversity, rank=rank, world_size=2, gather=lambda told: said.append(told) or [])
        with pytest.raises(KeyError):  # a verdict that never came is no verdict
            fusion(groups, prompt_of)
    assert [prompt for _, prompt in partitioners[0].asked] == ["about p0", "about p2", "about p4"]
    assert [prompt for _, prompt in partitioners[1].asked] == ["about p1", "about p3"]
    assert replace(fusion, gather=lambda told: said[0] + said[1])(groups, prompt_of) == alone


class Gone(Noting):
    """Asks a judge that answers only the first time."""

    is_slow = True

    def same(self, groups, prompts):
        if self.asked:
            raise GraderGoneError("nobody answers")
        return super().same(groups, prompts)


def test_a_partitioner_whose_judge_is_gone_is_not_asked_group_by_group_and_ends_the_run():
    judge = Gone()
    fusion = Fusion.of([replace(domain(), diversity=Diversity(partitioner=judge))])
    assert fusion.slow == {"stories"}
    asked = list(judge.asked)  # on a trial
    with pytest.raises(GraderGoneError, match="nobody answers"):
        fusion([group((1.0, 0.5), prompt=f"p{i}", texts="ab") for i in range(3)], prompt_of)
    assert judge.asked == asked


def advantages() -> Advantages:
    kinds = {"math": "group", "stories": "mean_only"}
    return Advantages(settings=UpdateSettings(), kinds=kinds, find_suspects=lambda group: ())


class Going:
    """A judge that logs what it is asked, and goes away from rank 1."""

    is_slow = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, prompts, completions, log_metric, **columns):
        log_metric("words", self.rank + len(prompts))
        if self.rank == 1 and len(prompts) > 1:
            raise GraderGoneError("nobody answers rank 1")
        return [1.0] * len(prompts)


def graded_by_a_rank(state: PartialState) -> list:
    """Return what this rank hears of scores that both have, of those that one of them lacks, and of what was logged."""
    scorer = Scorer([Domain(name="stories", kind="open_ended", reward=Going(state.process_index))])
    one = Completion(prompt=Prompt(domain="stories", id="p", columns={}), ids=[1], text="a")
    scores = together(lambda: scorer([one]), scorer.slow, gather_object)
    try:
        scores += together(lambda: scorer([one, one]), scorer.slow, gather_object)
    except GraderGoneError as error:
        scores.append(str(error))
    return [*scores, scorer.logged.flush("domain", gather_object), list(scorer.logged.whole.values())]


def be_a_rank(folder: Path) -> None:
    """Grade, fuse and weigh this rank's half of twelve rows, and write down what comes of all of them."""
    state = PartialState(cpu=True)
    rows = zip("ppppqqqqrrrr", "aabcxxxxabab", strict=True)
    sampled = [Completion(prompt=Prompt(domain="stories", id=i), ids=[1], text=t, reward=0.5) for i, t in rows]
    share = len(sampled) // state.num_processes
    start = state.process_index * share
    policy = SimpleNamespace(group_size=4, rank=state.process_index, world_size=state.num_processes)
    fusion = Fusion.of([domain()]).on(state)
    gathered = walk(policy, fusion)._gathered(0, {i: sampled[i] for i in range(start, start + share)}, 4)
    groups = fusion(list(gathered.values()), prompt_of)
    worth = advantages()(torch.full((share,), 9.0), groups, start)
    said = json.dumps([[g.learned for g in groups], gather_object(worth.tolist()), graded_by_a_rank(state)])
    (folder / f"{state.process_index}-of-{state.num_processes}.json").write_text(said)
    state.wait_for_everyone()
    state.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks of six rows each write down: the second of three groups lies on both."""
    folder = tmp_path_factory.mktemp("ranks")
    for process in (ranks := forked_ranks(be_a_rank, folder, log=folder / "log")):
        assert process.wait() == 0, process.said
    return [json.loads((folder / f"{rank}-of-{len(ranks)}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_a_judge_gone_from_one_rank_is_gone_on_all_and_what_was_logged_is_of_all(ranks):
    for *_, graded in ranks:
        # logged: by rank 0 of one and of two prompts 1 and 2, by rank 1 of one 2, and of those it never graded nothing
        assert graded == [1.0, "nobody answers rank 1", {"domain/stories/logged/words": pytest.approx(5 / 3)}, [5.0]]


@pytest.mark.slow
def test_groups_that_straddle_real_ranks_are_fused_as_whole_ones(ranks):
    first, second = ranks
    assert first == second
    # classes a a b c: div 2/3 2/3 1 1, halved by the quality; all alike: the floor; a b a b: div 2/3
    fused = [[1 / 3, 1 / 3, 0.5, 0.5], [0.05] * 4, [1 / 3] * 4]
    assert first[0] == [pytest.approx(rewards) for rewards in fused]
    assert first[1] == pytest.approx([-1 / 12, -1 / 12, 1 / 12, 1 / 12] + [0] * 8, abs=1e-6)


def test_a_partitioner_that_fails_on_a_group_costs_that_group_and_is_counted(caplog):
    fusion = Fusion.of([domain(partitioner=Noting())])
    groups = fusion([group((1.0, 1.0), texts="ab"), group((1.0, 0.5), texts="?c")], prompt_of)
    assert groups[0].learned == (1.0, 1.0)
    assert groups[1].fused == Fused(rewards=(None, None), diversity=None, classes=None)
    assert groups[1].rewards == (1.0, 0.5)
    assert "domain 'stories': the partitioner raised KeyError: '?'" in caplog.text
    meter = Meter(domains=("stories",))
    meter.add(groups, {}, 1.0)
    metrics = meter.flush()
    assert metrics["diversity/stories/failures"] == 1
    assert metrics["domain/stories/grader_failures"] == 0
    assert metrics["domain/stories/reward"] == 3.5 / 4


class Silent:
    """A judge that answers the trial and is gone then."""

    def __init__(self):
        self.asked = 0

    def same(self, groups, prompts):
        self.asked += 1
        if self.asked > 1:
            raise TimeoutError("no judge")
        return [[[True] * len(group)] * len(group) for group in groups]


def test_a_partitioner_whose_judge_is_silent_is_asked_once(caplog):
    silent = Silent()
    groups = Fusion.of([domain(partitioner=silent)])([group((1.0, 1.0), texts="ab")] * 3, prompt_of)
    assert [g.fused for g in groups] == [Fused(rewards=(None, None), diversity=None, classes=None)] * 3
    assert silent.asked == 2
    assert caplog.text.count("domain 'stories': the partitioner raised TimeoutError: no judge") == 1


def test_a_partitioner_that_fails_too_often_stops_the_run():
    groups = Fusion.of([domain(partitioner=Noting())])([group((1.0, 1.0), texts="?c")], prompt_of)
    with pytest.raises(RuntimeError, match="domain 'stories': the reward failed on 64 of the last 64 completions"):
        Failures(most=0.5).see(groups * 32)


class Broken:
    """Raises, or returns what it should not."""

    def __init__(self, told=None):
        self.told = told

    def same(self, groups, prompts):
        if self.told is None:
            raise ImportError("no such package")
        return self.told if groups[0][0] == "a" else [[[True] * 2] * 2 for _ in groups]


def test_a_partitioner_that_cannot_work_is_found_before_the_run():
    with pytest.raises(
        ValueError, match=r"domains\.stories\.diversity: the partitioner failed on a trial: ImportError"
    ):
        Fusion.of([domain(partitioner=Broken())])


@pytest.mark.parametrize("told", [[], [[[True]]], [[[True] * 3] * 3], [None, None]])
def test_an_answer_of_the_wrong_size_stops_the_run(told):
    with pytest.raises(ValueError, match="domain 'stories': the partitioner did not return one matrix"):
        Fusion.of([domain(partitioner=Broken(told))])([group((1.0, 1.0), texts="ab")], prompt_of)


def test_a_quality_that_cannot_be_multiplied_stops_the_run_with_its_domains_name():
    with pytest.raises(ValueError, match=r"domain 'stories': diversity: mul needs qualities >= 0, got -1\.0"):
        Fusion.of([domain()])([group((1.0, -1.0), texts="ab")], prompt_of)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "need fuse: mul and an explicit shape"),
        ({"fuse": "add", "shape": (1, 0)}, "need fuse: mul and an explicit shape"),
        ({"shape": (2, 1)}, r"shape \[2, 1\] with floor 0.1 lets a different wrong answer earn as much"),
        ({"shape": (1, 0), "floor": 0.0}, "lets a different wrong answer earn as much"),
        ({"shape": (0, -1)}, "lets a different wrong answer earn as much"),
    ],
)
def test_difference_never_decides_about_an_answer_that_is_right_or_wrong(settings, message):
    with pytest.raises(ValueError, match=rf"domains\.math\.diversity: .*{message}"):
        find_diversity(domain("math", "structured", **settings))


@pytest.mark.parametrize("settings", [{"shape": (1, 0)}, {"shape": (1, -1)}, {"shape": (2, 1), "floor": 0.6}])
def test_where_a_structured_domain_asks_for_it_every_right_answer_outscores_every_wrong_one(settings):
    found = find_diversity(domain("math", "structured", **settings))
    for right in (7, 1):
        (same,) = found.found.same([["r"] * right + ["w"] * (8 - right)], ["p"])
        rewards = found.fused(same, [1.0] * right + [0.0] * (8 - right)).rewards
        assert min(rewards[:right]) > max(rewards[right:])


@pytest.mark.parametrize("spec", ["embedding", {"partitoner": "exact"}, {"partitioner": "magic"}, {"floor": 2}])
def test_settings_that_do_not_exist_are_refused_with_their_place(spec):
    with pytest.raises(ValueError, match=r"domains\.stories\.diversity: "):
        find_diversity(Domain(name="stories", kind="open_ended", diversity=spec))


def test_advantages_of_fused_groups_are_centred_and_not_scaled():
    plain = group((1.0, 0.0), "math")
    fused = group((1.0, 1.0, 0.5), fused=Fused(rewards=(0.5, None, 0.2), diversity=None, classes=None))
    theirs = torch.tensor([1.4, -1.4, 7.0, 7.0, 7.0])
    ours = advantages()(theirs, [plain, fused], 0)
    assert ours.tolist() == pytest.approx([1.4, -1.4, 0.15, 0.0, -0.15])
    assert advantages()(theirs[3:], [plain, fused], 3).tolist() == pytest.approx([0.0, -0.15])
    assert theirs.tolist()[2:] == [7.0] * 3
    assert sum(ours.tolist()) == pytest.approx(0, abs=1e-6)


def test_metrics_keep_classes_difference_and_reward_apart():
    groups = Fusion.of([domain()])(
        [group((1.0, 1.0), texts="aa"), group((0.5, None), texts="ab"), group((1.0, 0.0), "math")], prompt_of
    )
    meter = Meter(domains=("stories", "math"))
    meter.add(groups, {}, 1.0)
    metrics = meter.flush()
    # classes 1 and 2; one of two collapsed; div .1 .1 1 1; fused .1 .1 .5
    assert {name: value for name, value in metrics.items() if name.startswith("diversity/")} == {
        "diversity/stories/classes": 1.5,
        "diversity/stories/collapsed": 0.5,
        "diversity/stories/mean": pytest.approx(0.55),
        "diversity/stories/reward": pytest.approx(0.7 / 3),
        "diversity/stories/failures": 0,
    }
    assert metrics["domain/stories/reward"] == pytest.approx(mean([1.0, 1.0, 0.5]))
    assert metrics["domain/stories/frac_dead"] == 1.0  # both pairs earn the same throughout
    meter.add(groups[2:], {}, 1.0)
    assert not [name for name in meter.flush() if name.startswith("diversity/")]


class Walk:
    """Stands for data, curriculum, policy and tokenizer: completions are the letters that it was given."""

    train = {"stories": {"p": Prompt(id="p", domain="stories", prompt="about p", columns={})}}  # noqa: RUF012
    limits = {"stories": 4}  # noqa: RUF012
    names = ("stories",)
    draws = 0
    rank, world_size, group_size = 0, 1, 4

    def __init__(self, letters):
        self.letters, self.aloft = letters, []

    def choose(self, n, *, unseen):
        prompts, decision = [Prompt(domain="stories", id="p")] * n, Decision(mixture=(1.0,), reason="one domain")
        self.aloft.append(Choice(draw=0, prompts=prompts, decision=decision, places={}, unseen=unseen))
        return self.aloft[-1]

    def begin(self):
        return self.aloft.pop()

    def rows_of(self, domain):
        return self.train[domain]

    def tokenized(self, prompts):
        return [replace(prompt, ids=[1]) for prompt in prompts]

    def complete(self, requests, copies, on_finished=None):
        return [Completion(ids=[ord(letter)]) for letter in self.letters]

    def read(self, prompts, completions):
        return [replace(c, prompt=p, text=chr(c.ids[0])) for p, c in zip(prompts, completions, strict=True)]


def walk(policy, fusion, letters="") -> Draws:
    stands = Walk(letters)
    half = Domain(name="stories", kind="open_ended", reward=lambda prompts, **columns: [0.5] * len(prompts))
    return Draws(
        data=stands,
        curriculum=stands,
        policy=policy or stands,
        scorer=Scorer([half]),
        fusion=fusion,
        advantages=advantages(),
        shortcuts=ShortcutWatch(["stories"]),
        seed=1,
        failures=Failures(most=0.5),
    )


def test_a_draw_hands_the_fused_reward_to_the_update_and_the_quality_to_the_curriculum():
    draws = walk(None, Fusion.of([domain()]), "aabcxxxx")
    rollout = draws.roll_out(8)
    groups = rollout.groups_of_rows
    assert [r for group in groups for r in group.learned] == pytest.approx([1 / 3, 1 / 3, 0.5, 0.5] + [0.05] * 4)
    assert [group.rewards for group in groups] == [(0.5,) * 4] * 2
    assert [group.has_signal for group in groups] == [True, False]
