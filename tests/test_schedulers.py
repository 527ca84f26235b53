"""What every scheduler owes: valid mixtures, the same draws on two ranks and after a restart, exact quotas."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.decision_log import decision_line, replay
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.records import Domain
from polyphony.curricula.schedulers import REGISTRY, as_scheduler, build_scheduler, find_scheduler
from polyphony.curricula.schedulers.fixed import Joint
from tests.toy_world import ToyWorld

HARM = [[0, 0.2, -0.3, -0.6], [0, 0, 0, -0.6], [0, 0, 0, -0.6], [0, 0, 0, 0]]
TRANSFER = ToyWorld(HARM, seed=5).probe()
NEEDS_TRANSFER = ("bwt", "visatb")
SETTINGS = {"pac": {"cold_start": 5}, "e2h": {"kind": "gaussian"}} | {
    name: {"transfer": TRANSFER} for name in NEEDS_TRANSFER
}
CASES = [(name, SETTINGS.get(name, {})) for name in REGISTRY] + [
    ("auto", {"transfer": TRANSFER}),
    ("adaptive", {"transfer": TRANSFER}),
    ("e2h", {"order": ("d3", "d0", "d1", "d2")}),
    ("sequential", {"order": ("d3", "d0", "d1", "d2")}),
    ("sequential", {"order": (("d3", "d0"), "d1", ("d2",))}),
]
IDS = [f"{name}{n}" for n, (name, _) in enumerate(CASES)]
DRAWS, BATCH = 48, 7


class Rank:
    """One process's curriculum and its copy of a toy world that does not depend on what is drawn."""

    def __init__(self, name, settings):
        self.world = ToyWorld(HARM, seed=1)
        domains = [Domain(name=d, kind="structured", train=[0]) for d in self.world.names]
        ids = {d: [f"{d}/{k}" for k in range(11)] for d in self.world.names}
        scheduler = build_scheduler(name, **settings)
        self.curriculum = Curriculum(domains=domains, prompts=ids, scheduler=scheduler, total_draws=DRAWS, seed=3)
        self.lines = []

    def step(self, draw):
        """Evaluate now and then, draw, answer, observe; return what was drawn."""
        curriculum, world = self.curriculum, self.world
        world.rng = np.random.default_rng(draw)  # so that a restored run sees what the first one saw
        if draw % 4 == 0:
            stage = curriculum.decision.stage if curriculum.decision else None
            trained = () if draw == 0 else (stage,) if stage in world.names else world.names
            curriculum.record(world.evaluate(trained, step=draw, exposure=dict(curriculum.drawn)))
        refs = curriculum.draw(BATCH)
        self.lines.append(decision_line(curriculum.basis, curriculum.decision, refs))
        entropy = dict.fromkeys(world.names, 1 - draw / 100)
        curriculum.observe([world.answer(ref, draw) for ref in refs], entropy)
        world.practise(np.array([sum(r.domain == n for r in refs) / BATCH for n in world.names]))
        return refs


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_two_ranks_draw_the_same(name, settings):
    one, other = Rank(name, settings), Rank(name, settings)
    assert [one.step(d) for d in range(DRAWS)] == [other.step(d) for d in range(DRAWS)]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_a_run_goes_on_the_same_after_its_state_went_through_json(name, settings):
    rank = Rank(name, settings)
    for draw in range(21):
        rank.step(draw)
    saved, skill = json.loads(json.dumps(rank.curriculum.state_dict())), rank.world.skill.copy()
    stage = rank.curriculum.decision
    following = [rank.step(draw) for draw in range(21, DRAWS)]
    restored = Rank(name, settings)
    restored.curriculum.load_state_dict(saved)
    restored.curriculum.decision, restored.world.skill = stage, skill
    assert [restored.step(draw) for draw in range(21, DRAWS)] == following


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_mixtures_are_probabilities_and_counts_follow_them(name, settings):
    rank = Rank(name, settings)
    owed = dict.fromkeys(rank.world.names, 0.0)
    for draw in range(DRAWS):
        rank.step(draw)
        line = rank.lines[-1]
        assert sum(line["mixture"].values()) == pytest.approx(1)
        assert sum(line["counts"].values()) == BATCH and line["reason"]
        for domain in owed:
            owed[domain] += BATCH * line["mixture"][domain] - line["counts"][domain]
        assert max(map(abs, owed.values())) < 1 + math.log(4)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_a_saved_run_replays_to_itself(name, settings):
    rank = Rank(name, settings)
    for draw in range(DRAWS):
        rank.step(draw)
    lines = json.loads(json.dumps(rank.lines, allow_nan=False))
    for replayed in replay(lines, build_scheduler(name, **settings), rank.curriculum.evaluations):
        assert replayed.replayed == pytest.approx(replayed.ran)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_one_domain_gets_everything(name, settings):
    settings = {key: value for key, value in settings.items() if key != "order"}
    world = ToyWorld([[0.0]], seed=1)
    if "transfer" in settings:
        settings = {"transfer": world.probe()}
    skill, curriculum = world.train(build_scheduler(name, **settings), draws=12)
    assert curriculum.drawn == {"d0": 12 * 16} and skill[0] > 0.3


def test_a_group_of_domains_is_a_stage_as_long_as_its_domains_have_alone():
    rank = Rank("sequential", {"order": (("d3", "d0"), "d1", ("d2",))})
    for draw in range(8):
        rank.step(draw * 6)  # of 48 draws
        rank.curriculum.draws = (draw + 1) * 6
    assert [line["stage"] for line in rank.lines] == ["d3, d0"] * 4 + ["d1"] * 2 + ["d2"] * 2
    assert rank.lines[0]["mixture"] == {"d0": 0.5, "d1": 0.0, "d2": 0.0, "d3": 0.5}
    with pytest.raises(ValueError, match=r"order \[\('d0', 'd1'\), 'd2'\] must name each trainable domain once"):
        Rank("sequential", {"order": (("d0", "d1"), "d2")})


def test_a_scheduler_is_found_by_import_path():
    assert find_scheduler("polyphony.curricula.schedulers.sec:SEC") is find_scheduler("sec")


def test_a_script_may_name_a_scheduler_or_map_its_settings_as_a_recipe_does():
    asked = {"entropy": EntropySettings(control={"math": "sampling"}, band=(0.2, 2)), "domains": ("math", "talk")}
    made = as_scheduler({"scheduler": "adaptive", "floor": 0.3}, **asked)
    assert (made.floor, made.entropy_band, made.entropy_control) == (0.3, (0.2, 2.0), ("math",))
    assert as_scheduler("auto", **asked).inner.entropy_control == ("math",)
    assert as_scheduler(made, **asked) is made
    with pytest.raises(ValueError, match=r"scheduler 'joint' does not support `entropy\.control: sampling`"):
        as_scheduler("joint", **asked)


def test_an_unknown_scheduler_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="'bandit' does not exist; known: auto, joint"):
        find_scheduler("bandit")


def test_a_scheduler_that_is_called_otherwise_now_is_refused_with_its_name():
    with pytest.raises(ValueError, match="scheduler 'need' is called 'adaptive' now"):
        find_scheduler("need")


def test_an_unknown_setting_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"SEC: unknown key 'tau'; known: step_size, temperature"):
        build_scheduler("sec", tau=0.2)


@pytest.mark.parametrize("name", NEEDS_TRANSFER)
def test_a_missing_transfer_file_is_named(name):
    with pytest.raises(ValueError, match=f"(?i){name}: transfer: expected a TransferMatrix or the path .*, got None"):
        build_scheduler(name)


@pytest.mark.parametrize("name", ["bwt", "visatb", "adaptive"])
def test_a_transfer_file_of_other_domains_is_refused_before_the_first_draw(name):
    with pytest.raises(ValueError, match=r"d2|d3"):
        Rank(name, {"transfer": ToyWorld([[0, 0], [0, 0]], seed=1).probe()})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sec", {"step_size": 0}),
        ("sec", {"temperature": 0}),
        ("pac", {"window": 0}),
        ("mt_grpo", {"cap": 0.5}),
        ("dump", {"window": 0}),
        ("e2h", {"kind": "linear"}),
        ("adaptive", {"floor": 2}),
        ("adaptive", {"entropy_band": (1.5, 0.5)}),
        ("adaptive", {"focus": 0}),
        ("bwt", {"transfer": TRANSFER, "replay": {"kind": "uniform"}}),
        ("bwt", {"transfer": TRANSFER, "replay": {"fraction": 0.9}}),
        ("bwt", {"transfer": TRANSFER, "protect": {"max_drop": -1}}),
        ("bwt", {"transfer": TRANSFER, "plateau": {"window": 0}}),
        ("visatb", {"transfer": TRANSFER, "temperature": 0}),
    ],
)
def test_a_setting_out_of_range_is_refused(name, settings):
    with pytest.raises(ValueError):
        build_scheduler(name, **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduler": "pac", "seed": "x"}, "PAC: seed: Input should be a valid integer, got 'x'"),
        ({"scheduler": "adaptive", "seed": 3}, "adaptive has no 'seed' any more: nothing is sampled any more"),
        (
            {"adaptive": {"window": 8}},
            "adaptive has no 'window' any more: it goes by held-out scores, no longer by rewards",
        ),
        (
            {"scheduler": "polyphony.curricula.schedulers.adaptive:Adaptive", "alarm": 0.1},
            "adaptive has no 'alarm' any more: it is .05 for good",
        ),
        ({"scheduler": "adaptive", "ceiling": "own"}, "adaptive has no 'ceiling' any more: how far a domain may rise"),
        (
            {"scheduler": "adaptive", "strength": 0.5},
            "strength: 0.5: weighs measured transfer: give `transfer`, or leave",
        ),
        ({"adaptive": {"strength": 0.5}}, "strength: 0.5: weighs measured transfer: give `transfer`, or leave it out"),
        ({"scheduler": "need"}, "scheduler 'need' is called 'adaptive' now; how far a domain may rise"),
        (
            {"scheduler": "sequential", "order": "arithmetic"},
            "Sequential: order: Input should be a valid tuple, got 'ari",
        ),
        ({"adaptive": {"flor": 0.2}}, "Auto: unknown key 'adaptive.flor'; did you mean 'floor'?"),
        ({"adaptive": 3}, "Auto: adaptive: Input should be a dictionary or an instance of Adaptive, got 3"),
        ({"name": "sec"}, "Auto: unknown key 'name'; known: .. (`scheduler` is not given, so it is auto)"),
        ({"scheduler": Joint}, "scheduler <class .. does not exist; known: auto, joint"),
        ({"scheduler": "bwt", "transfer": "gone.json"}, "Bwt: transfer: the file does not exist; .. got 'gone.json'"),
        (
            {"scheduler": "tests.test_schedulers:Mine", "frist": True},
            "scheduler 'tests.test_schedulers:Mine' refuses {'fr",
        ),
        (None, "expected a scheduler, its name or a mapping of its settings, got None"),
        (Joint, "expected a scheduler, its name or a mapping of its settings, got <class "),
    ],
    ids=str,
)
def test_what_is_no_scheduler_or_no_setting_of_one_is_named_in_one_line(given, message):
    with pytest.raises(ValueError) as error:
        as_scheduler(given, entropy=EntropySettings(), domains=("math",))
    assert all(part in str(error.value) for part in message.split(" .. ")) and "\n" not in str(error.value)


@dataclass
class Mine:
    """A user's own, of their own making."""

    first: bool = True

    def decide(self, evidence, state):
        return Joint().decide(evidence, state)


def test_a_users_own_scheduler_needs_nothing_but_decide():
    asked = {"entropy": EntropySettings(), "domains": ("math",)}
    mine = {"scheduler": "tests.test_schedulers:Mine", "first": False}
    assert type(as_scheduler(mine, **asked)).__name__ == "Mine" and not as_scheduler(mine, **asked).first
    anything = SimpleNamespace(decide=Joint().decide)
    assert as_scheduler(anything, **asked) is anything
