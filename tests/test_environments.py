"""Domains that act, trained: against the real TRL and the real vLLM, on the lab's policy."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from polyphony.curricula.records import Domain
from polyphony.launch.build import missing_names
from polyphony.launch.lab.world import rows
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.train import train
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.metrics import METRICS
from polyphony.trainer.policy import sums_by_owner
from tests.acted import look
from tests.acting import tokenizer
from tests.test_trainer import POLICY, config, domain, losses

pytestmark = pytest.mark.slow


def parity(prompts, completions, completion_ids, **columns):
    """Pass completions of an odd number of tokens."""
    return [float(len(ids) % 2) for ids in completion_ids]


class Playing:
    """Plays episodes back to a stock trainer, turn by turn; what it is asked must be what the policy was asked."""

    def __init__(self, rollouts):
        self.rollouts = rollouts
        room = SimpleNamespace(model_config=SimpleNamespace(max_model_len=256))
        self.llm = SimpleNamespace(llm_engine=room)
        self.left = []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        if not self.left:
            self.left = [turns for c in self.rollouts.pop(0).rows.values() for turns in [self.turns_of(c)]]
        said, seen = [], set()
        for ids in prompts:
            place = next(i for i, t in enumerate(self.left) if i not in seen and t and t[0][0] == list(ids))
            seen.add(place)
            said.append(self.left[place].pop(0)[1:])
        if not any(self.left):
            self.left = []
        return prompts, [ids for ids, _ in said], [[[p] for p in logps] for _, logps in said], None

    @staticmethod
    def turns_of(c):
        starts = [i for i in range(len(c.ids)) if c.tool_mask[i] and (i == 0 or not c.tool_mask[i - 1])]
        ends = [next((j for j in range(i, len(c.ids)) if not c.tool_mask[j]), len(c.ids)) for i in starts]
        spans = zip(starts, ends, strict=True)
        return [([*c.prompt.ids, *c.ids[:i]], list(c.ids[i:j]), list(c.logps[i:j])) for i, j in spans]


@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.0), ("grpo", 0.1)])
def test_losses_of_episodes_are_those_of_stock_trl(tmp_path, engine, loss_type, beta):
    changes = {"loss_type": loss_type, "beta": beta, "max_completion_length": 48, "max_tool_calling_iterations": 2}
    changes |= {"max_steps": 2}
    off = {"curriculum": "joint", "update": {"drop_dead": "never"}, "engine": engine}
    acting = domain("arithmetic", reward=parity, tools=[look])
    ours = DomainGRPOTrainer(POLICY, config(tmp_path, **changes), domains=[acting], processing_class=tokenizer(), **off)
    rollouts = []
    keep = ours._roll_out
    ours._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    ours.train()
    acted = [c.episode for rollout in rollouts for c in rollout.rows.values()]
    assert {1, 2, 3} <= {e.turns for e in acted}

    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    prompts = [rollout.rows[i].prompt.prompt for rollout in rollouts for i in range(0, 32, 8)]
    stock = GRPOTrainer(
        POLICY,
        lambda prompts, completions, **columns: [rewards.pop(0) for _ in prompts],
        args=config(tmp_path, shuffle_dataset=False, **changes),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer(),
        tools=[look],
    )
    stock.vllm_generation, stock.use_vllm, stock._last_loaded_step = Playing(list(rollouts)), True, -1
    stock.train()
    assert losses(ours) == losses(stock)
    assert any(loss != 0 for loss in losses(ours))
    logged = [
        [e[n] for e in t.state.log_history if "loss" in e] for t in (ours, stock) for n in ("entropy", "num_tokens")
    ]
    assert logged[:2] == logged[2:]
    for name in ("tools/call_frequency", "tools/failure_frequency", "completions/mean_length"):
        assert ours.state.log_history[0][name] == stock.state.log_history[0][name]


class IncrementEnv:
    """As TRL's documentation has it."""

    def reset(self, **kwargs) -> str | None:
        self.counter = 0
        return " Increment the counter."

    def look(self, what: str) -> int:
        """
        Increment the internal counter.

        Args:
            what: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += int(what)
        return self.counter


def by_counter(completions, environments, **kwargs):
    """As TRL hands over instances: reward what they hold."""
    assert len(completions) == len(environments)
    return [float(environment.counter % 2) for environment in environments]


def heldout_rows():
    return rows(domain="arithmetic", split="heldout", size=8)


def test_an_environment_of_trls_documentation_is_trained_and_evaluated_with_its_run(tmp_path, engine):
    one = domain("arithmetic", reward=by_counter, environment=IncrementEnv)
    with pytest.warns(UserWarning, match=r"domains.arithmetic.environment: its reset takes no `seed`"):
        trainer = DomainGRPOTrainer(
            POLICY,
            config(tmp_path, max_steps=1, learning_rate=0.0, max_completion_length=40, eval_steps=1),
            domains=[one, domain("strings")],
            curriculum="joint",
            engine=engine,
            processing_class=tokenizer(),
            pool={"refill": {"max_rounds": 0}},
            guardrails=[{"domain": "strings", "max_drop": 0.5, "action": "stop"}],
            run=tmp_path / "run",
        )
    assert "look" not in trainer.data.tokenizer.decode(
        next(iter(trainer.data.tokenized(trainer.data.train["strings"]))).ids
    )
    rollouts = []
    keep = trainer._roll_out
    trainer._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    trainer.train()
    found = [c for c in rollouts[0].rows.values() if c.episode]
    assert found
    assert max(c.episode.turns for c in found) > 1
    assert all(c.reward in (0.0, 1.0) for c in found if c.episode.fault is None)

    # entropy and lengths by hand, of what the policy wrote alone; the weights have not moved
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = next(line for line in lines if "domain/arithmetic/entropy" in line)
    _, entropy, mask = trainer.policy.forward([c.prompt.ids for c in found], [c.ids for c in found])
    own = torch.zeros_like(mask)
    for i, c in enumerate(found):
        own[i, : len(c.ids)] = torch.tensor(c.tool_mask)
    (sums,) = sums_by_owner(entropy, own, [0] * len(found), n=1).tolist()
    assert told["domain/arithmetic/entropy"] == pytest.approx(sums[0] / sums[1], rel=1e-4)
    assert told["domain/arithmetic/mean_length"] == pytest.approx(sum(c.length for c in found) / len(found))
    assert mask.sum() > own.sum()
    of_family = {name.rpartition("/")[2]: value for name, value in told.items() if name.startswith("environment/")}
    assert of_family.keys() == METRICS["environment"].keys()
    assert of_family["turns"] == pytest.approx(sum(c.episode.turns for c in found) / len(found))
    assert of_family["calls"] == pytest.approx(sum(c.episode.calls for c in found) / len(found))
    assert told["heldout/arithmetic/entropy"] > 0
    assert told["heldout/arithmetic/pass_at_k"] >= told["heldout/arithmetic/score"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    of_acting = [line["completion"] for line in samples if line["domain"] == "arithmetic"]
    assert of_acting
    assert all(text.startswith("[assistant] ") for text in of_acting)


def test_transformers_generates_the_turns_too(tmp_path):
    changes = {"max_steps": 1, "max_completion_length": 24, "max_tool_calling_iterations": 1}
    trainer = DomainGRPOTrainer(
        POLICY,
        config(tmp_path, **changes),
        domains=[domain("arithmetic", reward=parity, tools=[look])],
        engine="transformers",
        processing_class=tokenizer(),
    )
    rollouts = []
    keep = trainer._roll_out
    trainer._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    trainer.train()
    found = list(rollouts[0].rows.values())
    assert {c.episode.turns for c in found} >= {1, 2}
    assert all(len(c.ids) <= 24 for c in found)
    assert losses(trainer)[0] != 0


@pytest.fixture
def acting_recipe(tmp_path):
    """A recipe of a domain that acts in worker processes, and one that does not."""
    tokenizer().save_pretrained(shutil.copytree(POLICY, tmp_path / "model"))
    domains: dict[str, Any] = {"acts": {"environment": "tests.acted:Looking"}, "strings": {"reward": "exact"}}
    for name, section in domains.items():
        section["kind"] = "structured"
        of = {"domain": "arithmetic" if name == "acts" else name, "size": 8}
        for split in ("train", "heldout"):
            section[split] = {"generator": "polyphony.launch.lab.world:rows", "split": split, **of}
    grpo = {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 40}
    grpo |= {"bf16": False, "gradient_checkpointing": False, "max_tool_calling_iterations": 2}
    document = {"name": "acts", "model": "model", "domains": domains, "grpo": grpo, "eval": {"samples": 2}}
    document |= {"environments": {"tool_timeout_s": 20, "episodes": 6}, "curriculum": {"scheduler": "joint"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))
    return tmp_path / "recipe.yaml"


def test_a_recipe_trains_a_domain_whose_environments_live_in_processes(tmp_path, engine, acting_recipe):
    recipe = load_recipe(acting_recipe)
    assert load_recipe_text(tmp_path, recipe.as_yaml()) == recipe
    train(recipe, tmp_path / "run", engine=engine)
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = next(line for line in told if "environment/acts/turns" in line)
    assert seen["environment/acts/faults"] == seen["environment/acts/forfeits"] == 0
    assert seen["environment/acts/turns"] >= 1
    assert 0 <= seen["domain/acts/reward"] <= 1
    assert seen["domain/acts/grader_failures"] == 0
    assert "environment/strings/turns" not in seen
    children = [c for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE]
    assert [c for c in children if any("environments" in word for word in c.cmdline())] == []


def load_recipe_text(tmp_path, text):
    (tmp_path / "resolved.yaml").write_text(text)
    return load_recipe(tmp_path / "resolved.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollouts.engine=ray", "domains.acts.environment with engine ray: its workers hold no episodes yet"),
        ("algorithm=distil", "domains.acts.environment with algorithm distil: it learns from answers of one turn"),
        ("domains.acts.environment=null", "domains.acts.reward: required, but not given"),
        ("domains.acts.tools=[1]", "domains.acts.tools: expected a name"),
        ("domains.acts.environmnt=a:b", "unknown key 'domains.acts.environmnt'; did you mean 'environment'"),
        ("environments.tool_timeout_s=0", "environments.tool_timeout_s: Input should be greater than 0"),
    ],
)
def test_a_recipe_says_in_a_line_what_does_not_go_with_acting(acting_recipe, override, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe(acting_recipe, [override])
    assert any(message in line for line in refused.value.problems), refused.value.problems


def test_names_of_environments_and_tools_are_looked_up_before_anything_is_loaded(acting_recipe):
    recipe = load_recipe(acting_recipe, ["domains.acts.environment=tests.acted:Nothing", "domains.acts.tools=[pythn]"])
    lines = missing_names(recipe)["acts"]
    assert any("domains.acts.environment: environment 'tests.acted:Nothing' cannot be imported" in li for li in lines)
    assert any("domains.acts.tools: tool 'pythn' does not exist; did you mean 'python'?" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": {"use_vllm": True}}, "with use_vllm=true, TRL's own engine"),
        ({"args": {"use_transformers_continuous_batching": True}, "engine": "transformers"}, "cannot be cut"),
        ({"update": {"distil": {}}}, "domains.arithmetic.tools with algorithm distil"),
    ],
)
def test_what_does_not_go_with_acting_is_refused_before_weights_are_loaded(tmp_path, changes, message):
    model = shutil.copytree(POLICY, tmp_path / "model")
    (model / "model.safetensors").unlink()  # who comes to load them fails with another message
    args = config(tmp_path, **changes.pop("args", {}))
    with pytest.raises(ValueError, match=message):
        DomainGRPOTrainer(
            str(model), args, domains=[domain("arithmetic", tools=[look])], processing_class=tokenizer(), **changes
        )


def test_a_limit_of_turns_without_a_domain_that_acts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_tool_calling_iterations=3: no domain has `environment` or `tools`"):
        DomainGRPOTrainer(POLICY, config(tmp_path, max_tool_calling_iterations=3), domains=[domain("arithmetic")])


def test_rows_with_tools_of_their_own_and_rows_that_lack_a_column_are_refused(tmp_path):
    class Needs:
        def reset(self, board: str, seed: int = 0) -> None: ...

        def reply(self, message: dict) -> str | None: ...

    def made(**changes):
        one = Domain(name="a", kind="structured", reward="exact", heldout=heldout_rows(), **changes)
        DomainGRPOTrainer(POLICY, config(tmp_path), domains=[one], processing_class=tokenizer())

    with pytest.raises(ValueError, match=r"row 1: the environment's reset needs 'board'; there are answer, "):
        made(environment=Needs, train=rows(domain="arithmetic", split="train", size=8))
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    with pytest.raises(ValueError, match=r"row 1: has a column `tools`, and the domain its own that are called"):
        made(tools=[look], train=[{"prompt": "1+1", "answer": "2", "tools": tools}])
