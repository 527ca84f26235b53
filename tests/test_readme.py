"""The READMEs: short, every link there, every block of code and every command what it says."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest

from polyphony.curricula.prompts.estimate import find_sampling
from polyphony.curricula.records import DomainStats, Evidence
from polyphony.curricula.schedulers import build_scheduler
from polyphony.launch import cli
from polyphony.launch.build import build_trainer
from polyphony.launch.recipe import load_recipe
from polyphony.rewards import find_reward
from polyphony.rewards.partitions import find_partitioner
from polyphony.trainer import grpo
from polyphony.trainer.engine.vllm import Request
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.rows import load_rows
from tests.conftest import HOUSE, POLICY, RECIPES
from tests.draw_walk import FOLDERS

WINGS = [HOUSE / wing / "README.md" for wing in FOLDERS]
FRONT = HOUSE / "README.md"
MOST_WORDS = 900


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks(text, "sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "polyphony"]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A user's folder with a recipe, and every block of the READMEs that begins with a file's name, in that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    debug = (RECIPES / "debug.yaml").read_text().replace("../lab/policy", str(POLICY))
    (tmp_path / "recipe.yaml").write_text(debug + "pool: {}\n")
    found = {}
    for block in (block for path in WINGS for block in blocks(path.read_text(), "python")):
        name = re.match(r"# (\S+)\.py\n", block)[1]
        found[name] = block
        if "/" not in name:
            (tmp_path / f"{name}.py").write_text(block)
    yield found
    for name in found:
        sys.modules.pop(name, None)


def test_the_front_page_is_read_in_five_minutes():
    assert len(FRONT.read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("path", [FRONT, *WINGS], ids=lambda path: path.parent.name)
def test_every_link_leads_somewhere(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link.partition("#")[0]).exists()] == []
    for link in (link for link in links if "#" in link):
        heading = link.partition("#")[2]
        headings = re.findall(r"^#+ (.*)$", (path.parent / link.partition("#")[0]).read_text(), re.MULTILINE)
        assert heading in [h.lower().replace(" ", "-").replace("'", "") for h in headings]


@pytest.mark.parametrize("path", [FRONT, *WINGS], ids=lambda path: path.parent.name)
def test_every_file_that_is_named_exists(path):
    named = re.findall(r"`([\w/]+\.(?:py|yaml|md))`", path.read_text())
    written = {"recipe.yaml"}  # by the reader, and by a run
    places = [path.parent, HOUSE]
    assert [name for name in named if name not in written and not any((p / name).exists() for p in places)] == []


def test_the_front_page_has_every_verb_and_its_commands_parse():
    found = commands(FRONT.read_text())
    for words in found:
        assert cli.parse(words).verb == words[0]
    assert {words[0] for words in found} | {"demo"} == set(cli.VERBS)


def test_the_recipe_of_the_front_page_is_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "launch").symlink_to(HOUSE / "launch")
    (recipe,) = blocks(FRONT.read_text(), "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "recipe.yaml", "--dry-run"]) == 0
    assert str(tmp_path / "launch" / "lab") in capsys.readouterr().out or (tmp_path / "launch/lab/policy").is_dir()


def test_the_script_of_the_front_page_asks_for_what_there_is(monkeypatch):
    (script,) = blocks(FRONT.read_text(), "python")
    asked = []

    class Asked:
        def __new__(cls, *given, **named):
            asked.append(inspect.signature(DomainGRPOTrainer.__init__).bind(None, *given, **named).arguments)
            return SimpleNamespace(train=lambda: None)

    monkeypatch.setattr(grpo, "DomainGRPOTrainer", Asked)
    exec(script, {})
    ((domain,),) = [arguments["domains"] for arguments in asked]
    assert (HOUSE / asked[0]["model"]).is_dir()
    assert len(load_rows(domain.train, where="train")) == 64


def test_what_the_readmes_add_is_found_by_their_commands(modules, capsys, monkeypatch):
    monkeypatch.setattr(cli, "VERBS", dict(cli.VERBS))
    verb = ModuleType("polyphony.launch.verbs.sizes")
    exec(modules["launch/verbs/sizes"], vars(verb))
    monkeypatch.setitem(sys.modules, verb.__name__, verb)
    exec(modules["launch/cli"], vars(cli))
    tried = [words for path in WINGS for words in commands(path.read_text()) if words[0] in ("train", "sizes")]
    assert len(tried) == 8
    for words in tried:
        assert cli.main(words) == 0, words
    assert capsys.readouterr().out.endswith("2 trained, 1 watched\n")
    del cli._sizes  # type: ignore[attr-defined]


def test_what_the_readmes_add_does_what_it_says(modules):
    assert find_reward({"name": "my_rewards:Brief", "most": 2})([], ["4 .", "so 4 ."], ["4", "4"]) == [1.0, 0.0]
    (same,) = find_partitioner("my_partitioners:FirstWord").same([["a b", "a", "b"]], ["p"])
    assert same == [[True, True, False], [True, True, False], [False, False, True]]
    assert find_sampling("my_samplings:Hardest").choose([(9, 1), (1, 9), (5, 5)], 2, None) == [1, 2]
    lowest = build_scheduler("my_schedulers:Lowest", share=0.6)
    stats = (DomainStats(groups=1, reward=0.9), DomainStats(groups=1, reward=0.1))
    two = {"kinds": ("structured",) * 2, "weights": (1.0, 1.0), "sizes": (4, 4), "drawn": (1, 1)}
    decision = lowest.decide(Evidence(draw=1, total_draws=4, domains=("a", "b"), last=stats, **two), {})
    assert decision.mixture == pytest.approx((0.2, 0.8))
    rows = {
        split: load_rows({"generator": "my_rows:products", "split": split, "size": 60}, where=split)
        for split in ("train", "heldout")
    }
    assert (len(rows["train"]), len(rows["heldout"])) == (60, 19)


def test_the_engine_of_the_readme_follows_the_policy(modules, tmp_path):
    path = "rollouts.engine=my_engines:Plain"
    trainer = build_trainer(load_recipe(tmp_path / "recipe.yaml", [path, "tracking.wandb=null"]), tmp_path / "run")
    trainer.policy.sync()
    requests = [Request(prompt_ids=[5, 6], seed=1, max_tokens=2), Request(prompt_ids=[7], seed=2, max_tokens=1)]
    completions = trainer.policy.complete(requests, 1)
    sums = trainer.policy.logps([r.prompt_ids for r in requests], [c.ids for c in completions])
    assert [sum(c.logps) for c in completions] == pytest.approx(sums, abs=1e-4)
