"""Domains that act, trained: against the real TRL and the real vLLM, on the lab's policy."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from polyphony.curricula.records import Completion, Domain
from polyphony.launch import cli
from polyphony.launch.build import missing_names
from polyphony.launch.lab.world import rows
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.report.report import write_report
from polyphony.launch.train import train
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer import scoring
from polyphony.trainer.engine.engine import Engine, InProcessEngine
from polyphony.trainer.engine.turns import converse
from polyphony.trainer.engine.vllm import Request, Sampling
from polyphony.trainer.environments.episodes import Episodes
from polyphony.trainer.environments.settings import EnvironmentSettings
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.metrics import METRICS
from polyphony.trainer.policy import Policy, sums_by_owner
from polyphony.trainer.run.folder import RunFolder
from tests.acted import Looking, look
from tests.acting import tokenizer
from tests.conftest import below
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


@pytest.mark.parametrize(("loss_type", "beta", "dead"), [("dapo", 0.0, "always"), ("grpo", 0.1, "never")])
def test_losses_of_episodes_are_those_of_stock_trl(tmp_path, engine, loss_type, beta, dead):
    changes = {"loss_type": loss_type, "beta": beta, "max_completion_length": 48, "max_tool_calling_iterations": 2}
    changes |= {"max_steps": 2, "gradient_accumulation_steps": 1}
    off = {"curriculum": "joint", "update": {"drop_dead": dead}, "engine": engine}
    acting = domain("arithmetic", reward=parity, tools=[look])
    ours = DomainGRPOTrainer(POLICY, config(tmp_path, **changes), domains=[acting], processing_class=tokenizer(), **off)
    rollouts = []
    keep = ours._roll_out
    ours._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    ours.train()
    acted = [c.episode for rollout in rollouts for c in rollout.rows.values()]
    assert {1, 2, 3} <= {e.turns for e in acted}

    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    prompts = [rollout.rows[i].prompt.prompt for rollout in rollouts for i in range(0, 16, 8)]
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
    assert losses(ours) == (losses(stock) if dead == "never" else pytest.approx(losses(stock), abs=1e-6))
    assert any(loss != 0 for loss in losses(ours))
    names = ("entropy", "num_tokens") if dead == "never" else ("num_tokens",)
    told, stock_told = ([[e[n] for n in names] for e in t.state.log_history if "loss" in e] for t in (ours, stock))
    assert told == stock_told
    for name in ("tools/call_frequency", "tools/failure_frequency", "completions/mean_length"):
        assert ours.state.log_history[0][name] == stock.state.log_history[0][name]


class Stepping:
    """A vLLM that samples a token a step of each request, as many as its prompt's last id says; out of memory where told."""

    def __init__(self, most=99):
        self.most, self.names, self.running, self.begun = most, itertools.count(), {}, []
        self.model_config = SimpleNamespace(max_model_len=99)
        self.llm_engine = self.engine = self
        self.output_processor = SimpleNamespace(request_states=self.running)

    def enqueue(self, prompts, params, use_tqdm, lora_request=None):
        found = [f"{next(self.names)}-x" for _ in prompts]
        for name, prompt in zip(found, prompts, strict=True):
            self.running[name.partition("-")[0]] = [prompt["prompt_token_ids"][-1], []]
            self.begun.append((prompt["prompt_token_ids"], dict(self.running)))
        return found

    def step(self):
        if len(self.running) > self.most:
            raise MemoryError
        for _, ids in self.running.values():
            ids.append(5)
        whole = [name for name, (size, ids) in self.running.items() if len(ids) == size]
        return [self.output(name, self.running.pop(name)[1]) for name in whole]

    @staticmethod
    def output(name, ids):
        logprobs = SimpleNamespace(logprobs=[-1.0] * len(ids))
        return SimpleNamespace(
            request_id=name, finished=True, outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)]
        )

    def abort_request(self, names, internal):
        self.running.clear()

    def reset_prefix_cache(self):
        pass


class TwoTurns:
    """Each place has two turns, the second of one token."""

    def __init__(self, *sizes):
        self.ready = [(i, Request(prompt_ids=[i, size], seed=i, max_tokens=9)) for i, size in enumerate(sizes)]
        self.taken = []

    def waiting(self, wait):
        ready, self.ready = self.ready, []
        return ready

    def take(self, place, completion):
        self.taken.append((place, len(completion.ids), completion.version))
        if place < 10:
            self.ready.append((place + 10, Request(prompt_ids=[place, 1], seed=0, max_tokens=9)))


def test_a_turn_is_begun_while_others_are_sampled():
    llm, turns = Stepping(), TwoTurns(2, 6, 4)
    converse(llm, turns, Sampling(), version=7)
    assert turns.taken == [(0, 2, 7), (10, 1, 7), (2, 4, 7), (12, 1, 7), (1, 6, 7), (11, 1, 7)]
    assert [len(there) for _, there in llm.begun] == [1, 2, 3, 3, 2, 1]


def test_an_interrupted_batch_leaves_nothing_in_the_engine():
    llm, turns = Stepping(), TwoTurns(2, 6, 4)
    turns.take = lambda place, completion: turns.nothing
    with pytest.raises(AttributeError):
        converse(llm, turns, Sampling(), version=7)
    assert llm.running == {}


def test_an_engine_that_only_knows_batches_samples_what_is_ready_at_a_time():
    batches = []

    def complete(requests):
        batches.append([request.prompt_ids[0] for request in requests])
        return [Completion(ids=[5], version=3) for _ in requests]

    turns = TwoTurns(2, 6)
    Engine.converse(SimpleNamespace(complete=complete), turns)
    assert batches == [[0, 1], [0, 1]]
    assert turns.taken == [(0, 1, 3), (1, 1, 3), (10, 1, 3), (11, 1, 3)]


def test_out_of_memory_the_turns_are_sampled_half_as_many_at_a_time():
    llm, turns = Stepping(most=2), TwoTurns(2, 2, 2, 2)
    converse(llm, turns, Sampling(), version=7)
    assert sorted(turns.taken) == sorted([*((i, 2, 7) for i in range(4)), *((i, 1, 7) for i in range(10, 14))])
    with pytest.raises(RuntimeError, match=r"ran out of memory on 2 completions: lower .* environments.episodes"):
        converse(Stepping(most=1), TwoTurns(2, 2, 2, 2), Sampling(), version=7)


def test_ranks_that_sample_together_hold_no_episodes():
    data = SimpleNamespace(acting={"sums": None}, context=None)
    shared = [
        Policy.is_shared.fget(SimpleNamespace(engine=SimpleNamespace(is_shared=engine.is_shared), world_size=n))
        for engine in (Engine, InProcessEngine)
        for n in (1, 2)
    ]
    assert shared == [False, True, False, False]
    for policy in (SimpleNamespace(joint="", is_shared=True), SimpleNamespace(joint="zero3", is_shared=False)):
        with pytest.raises(ValueError, match="domain 'sums' acts, over several turns: not with"):
            Episodes.of(data, policy, EnvironmentSettings())


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


class SimpleCallback(TrainerCallback):
    """Does something once a step is over."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, *args, **kwargs):
        self.do()


def heldout_rows():
    return rows(domain="arithmetic", split="heldout", size=8)


def nth_turns(completion):
    """In which turn each token was written; None for what others said."""
    turn, found = 0, []
    for own, before in zip(completion.tool_mask, [0, *completion.tool_mask], strict=False):
        turn += own > before
        found.append(turn if own else None)
    return found


def with_skills(domain):
    """The rows are of two skills, in turns."""
    parts = {
        split: [{**row, "skill": ("low", "high")[n % 2]} for n, row in enumerate(getattr(domain, split))]
        for split in ("train", "heldout")
    }
    return replace(domain, **parts)


def test_an_environment_of_trls_documentation_is_trained_and_evaluated_with_its_run(tmp_path, engine):
    one = domain("arithmetic", reward=by_counter, environment=IncrementEnv)
    with pytest.warns(UserWarning, match=r"domains.arithmetic.environment: its reset takes no `seed`"):
        trainer = DomainGRPOTrainer(
            POLICY,
            config(tmp_path, max_steps=1, seed=1, learning_rate=0.0, max_completion_length=40, eval_steps=1),
            domains=[with_skills(one), domain("strings")],
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
    # its skills together are the domain
    of_skill = [
        {m: told.get(f"skill/arithmetic/{s}/{m}", 0.0) for m in ("n", "reward", "entropy")} for s in ("low", "high")
    ]
    assert sum(s["n"] for s in of_skill) == told["domain/arithmetic/n"]
    owners = [trainer.data.skills["arithmetic", c.prompt.id].endswith("low") for c in found]
    low, high = sums_by_owner(entropy, own, [1 - is_low for is_low in owners], n=2).tolist()
    for (total, n), skill in zip((low, high), of_skill, strict=True):
        assert skill["entropy"] == pytest.approx(total / n if n else 0.0, rel=1e-4)
    scores = [told[f"skill/arithmetic/{s}/score"] for s in ("low", "high")]
    assert min(scores) <= told["heldout/arithmetic/score"] <= max(scores)
    assert told["skill/arithmetic/low/heldout_entropy"] > 0
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "Domains that act" in page and f"→ {told['environment/arithmetic/entropy_turn_2']:.3f}<br>" in page
    assert "Skill by skill" in page and f"→ {told['skill/arithmetic/high/score']:.3f}</td>" in page
    of_family = {name.rpartition("/")[2]: value for name, value in told.items() if name.startswith("environment/")}
    had = sorted({c.episode.turns for c in found})
    by_turn = {f"{m}_{n}" for n in range(1, 5) if n not in had for m in ("entropy_turn", "reward_turns")}
    assert METRICS["environment"].keys() - of_family.keys() == by_turn
    for n in had:
        in_turn = [
            (e, s) for row, c in zip(entropy, found, strict=True) for e, s in zip(row, nth_turns(c), strict=False)
        ]
        of_turn = [float(e) for e, turn in in_turn if turn == n]
        assert of_family[f"entropy_turn_{n}"] == pytest.approx(sum(of_turn) / len(of_turn), rel=1e-4)
        rewards = [c.reward for c in found if c.episode.turns == n and c.reward is not None]
        assert of_family[f"reward_turns_{n}"] == pytest.approx(sum(rewards) / len(rewards))
    assert of_family["turns"] == pytest.approx(sum(c.episode.turns for c in found) / len(found))
    assert of_family["calls"] == pytest.approx(sum(c.episode.calls for c in found) / len(found))
    assert told["heldout/arithmetic/entropy"] > 0
    assert told["heldout/arithmetic/pass_at_k"] >= told["heldout/arithmetic/score"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    of_acting = [line["completion"] for line in samples if line["domain"] == "arithmetic"]
    assert of_acting
    assert re.search(r"<summary>tool look: .*</summary><pre>", page)
    assert all(text.startswith("[assistant]") for text in of_acting)


@pytest.mark.parametrize(
    "settings", [{"pool": {"look": 2}}, {"update": {"rft": {}}, "entropy": {"control": "adaptive"}}]
)
def test_early_stop_refill_rft_and_entropy_control_take_episodes(tmp_path, engine, settings):
    acting = domain("arithmetic", reward=parity, tools=[look])
    changes = {"max_steps": 1, "max_completion_length": 40, "max_tool_calling_iterations": 2}
    trainer = DomainGRPOTrainer(
        POLICY, config(tmp_path, **changes), domains=[acting], engine=engine, processing_class=tokenizer(), **settings
    )
    trainer.train()
    (told,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert told["environment/arithmetic/turns"] > 1
    assert losses(trainer)[0] != 0


class Fading(Looking):
    """Rewards all, until told that nothing is worth anything."""

    worth = 1.0

    def get_reward(self) -> float:
        return self.worth


def test_a_guardrail_recovers_a_domain_that_acts_by_its_rewards(tmp_path, engine, monkeypatch):
    trainer = DomainGRPOTrainer(
        POLICY,
        config(tmp_path, max_steps=3, max_completion_length=24, gradient_accumulation_steps=1, eval_steps=1),
        domains=[domain("arithmetic", environment=Fading), domain("strings")],
        curriculum="joint",
        engine=engine,
        processing_class=tokenizer(),
        guardrails=[{"domain": "arithmetic", "max_drop": 0.05, "action": "recover", "by": "refresh", "draws": 1}],
        run=tmp_path / "run",
        callbacks=[SimpleCallback(lambda: monkeypatch.setattr(Fading, "worth", 0.0))],
    )
    trainer.train()
    folder = RunFolder(tmp_path / "run")
    assert [line.get("recovery") for line in folder.choices()] == [None, "arithmetic", None]
    assert any("recovery: arithmetic is " in line["message"] for line in folder.read("alarms"))


def test_a_run_that_goes_on_makes_the_episodes_that_it_would_have_made(tmp_path, engine):
    changes = {"max_steps": 2, "max_completion_length": 30, "max_tool_calling_iterations": 2}
    changes |= {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}

    def trained(resume=None):
        acting = domain("arithmetic", reward=parity, environment=Looking)
        trainer = DomainGRPOTrainer(
            POLICY, config(tmp_path, **changes), domains=[acting], engine=engine, processing_class=tokenizer()
        )
        rollouts = []
        keep = trainer._roll_out
        trainer._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
        trainer.train(resume)
        return [[(list(c.ids), c.reward) for c in rollout.rows.values()] for rollout in rollouts], losses(trainer)

    whole, whole_losses = trained()
    rest, rest_losses = trained(str(tmp_path / "checkpoint-1"))
    assert rest == whole[1:]
    # when a tool answers decides what vLLM samples together, and so the last digits of its log-probabilities
    assert rest_losses[-1] == pytest.approx(whole_losses[-1], rel=1e-4)
    assert all(loss != 0 for loss in whole_losses)


class Mortal(Looking):
    """Is out of reach once told so."""

    is_gone = False

    def reset(self, seed: int) -> str:
        if self.is_gone:
            raise OSError("the server is down")
        return super().reset(seed)


def test_a_run_whose_environments_are_gone_leaves_a_checkpoint(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(scoring, "FEWEST", 1)
    changes = {"max_steps": 2, "max_completion_length": 30, "max_tool_calling_iterations": 1, "save_strategy": "no"}
    acting = domain("arithmetic", reward=parity, environment=Mortal)
    trainer = DomainGRPOTrainer(
        POLICY,
        config(tmp_path, gradient_accumulation_steps=1, **changes),
        domains=[acting],
        engine=engine,
        processing_class=tokenizer(),
        max_grader_failures=0.2,
        callbacks=[SimpleCallback(lambda: monkeypatch.setattr(Mortal, "is_gone", True))],
    )
    with pytest.raises(GraderGoneError, match="domain 'arithmetic': its environment or reward failed on"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


class Asking:
    """Asks once more."""

    def reset(self, seed: int) -> None:
        self.asked = False

    def reply(self, message: dict) -> str | None:
        self.asked, before = True, self.asked
        return None if before else "and now"


def test_transformers_generates_the_turns_too(tmp_path):
    changes = {"max_steps": 1, "max_completion_length": 24, "max_tool_calling_iterations": 1}
    trainer = DomainGRPOTrainer(
        POLICY,
        config(tmp_path, **changes),
        domains=[
            domain("arithmetic", reward=parity, tools=[look]),
            domain("strings", reward=parity, environment=Asking),
        ],
        curriculum="joint",
        engine="transformers",
        processing_class=tokenizer(),
    )
    rollouts = []
    keep = trainer._roll_out
    trainer._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    trainer.train()
    found = list(rollouts[0].rows.values())
    assert all(len(c.ids) <= 24 for c in found)
    by_domain = {n: [c.episode for c in found if c.prompt.domain == n] for n in ("arithmetic", "strings")}
    assert {e.turns for e in by_domain["arithmetic"]} >= {1, 2}
    assert any([m["role"] for m in e.messages] == ["assistant", "user", "assistant"] for e in by_domain["strings"])
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
    assert below("environments") == []


def test_tools_are_shown_with_the_prompts_of_their_domain_alone(acting_recipe, capsys):
    assert cli.main(["train", str(acting_recipe), "--show-prompts", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("<|begin|>") == 4  # a row of each split of both domains
    assert shown.count("<|begin|><|system|>look<|end|>") == 2
    assert cli.main(["train", str(acting_recipe), "--dry-run"]) == 0


def load_recipe_text(tmp_path, text):
    (tmp_path / "resolved.yaml").write_text(text)
    return load_recipe(tmp_path / "resolved.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm=distil", "domains.acts.environment with algorithm distil: it learns from answers of one turn"),
        ("algorithm=sft", "domains.acts.environment with algorithm sft: it learns from answers of one turn"),
        (
            "guardrails={acts: {max_drop: 0.1, action: recover}}",
            "guardrails.acts.by: distil: a domain that acts is recovered by its rewards; say by: refresh",
        ),
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
