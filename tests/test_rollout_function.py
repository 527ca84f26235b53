"""A script's own `rollout_func`: heard as by stock TRL, for one domain; what it returns is checked, the rest is refused."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.records import Domain, Prompt
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.rollout_function import RolloutFunction
from tests.conftest import POLICY

G = 4


def settings(tmp_path, **changes) -> GRPOConfig:
    given = {"output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": G, "max_steps": 3}
    given |= {"max_completion_length": 8, "learning_rate": 2e-3, "bf16": False, "gradient_checkpointing": False}
    given |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 1}
    return GRPOConfig(**given | changes)


class Harness:
    """Says tokens by its own dice, which know the prompt; every third token is another's than the policy's."""

    def __init__(self):
        self.calls: list[tuple[int, bool, int]] = []
        self.seen: dict[str, int] = {}

    def __call__(self, prompts, trainer):
        self.calls.append((len(prompts), trainer.model.training, trainer.num_generations_eval))
        said = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": [], "luck": [], "game": "dice"}
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            dice = random.Random(f"{text}/{self.seen.setdefault(text, 0)}")
            self.seen[text] += 1
            ids = [dice.randrange(3, 60) for _ in range(dice.randrange(2, 8))]
            said["prompt_ids"].append(trainer.processing_class(f"Play: {text}")["input_ids"])
            said["completion_ids"].append(ids)
            said["logprobs"].append([-1.0] * len(ids))
            said["env_mask"].append([int(n % 3 != 2) for n in range(len(ids))])
            said["luck"].append(dice.randrange(5) / 4)  # exact in either precision
        return said


def lucky(completions, luck, game, **columns):
    assert set(game) == {"dice"}
    return luck


def brief(completion_ids, **columns):
    return [-len(ids) / 8 for ids in completion_ids]


def rows(first: int, count: int, **columns) -> list[dict]:
    return [{"prompt": f"{i} + 1 =", "answer": str(i + 1), **columns} for i in range(first, first + count)]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_rollout_func_has_stock_trls_losses(tmp_path):
    script = {"model": str(POLICY), "reward_funcs": [lucky, brief]}
    off = {"curriculum": "joint", "update": {"drop_dead": "never"}}
    data = Dataset.from_list(rows(0, 12))
    args = settings(tmp_path, reward_weights=[1.0, 0.5])
    ours = DomainGRPOTrainer(**script, args=args, train_dataset=data, rollout_func=Harness(), **off)
    drawn, roll_out = [], ours._roll_out
    ours._roll_out = lambda n: drawn.append(roll_out(n)) or drawn[-1]
    ours.train()

    asked = [rollout.rows[i].prompt for rollout in drawn for i in range(0, 8, G)]
    again = Dataset.from_list([{"prompt": p.prompt, "answer": p.columns["answer"]} for p in asked])
    args = settings(tmp_path, reward_weights=[1.0, 0.5], shuffle_dataset=False)
    stock = GRPOTrainer(**script, args=args, train_dataset=again, rollout_func=Harness())
    stock.train()
    assert losses(ours) == losses(stock)
    assert len(losses(ours)) == 3 and all(losses(ours))
    same = ("reward", "completions/mean_length", "completions/clipped_ratio", "num_tokens", "entropy", "grad_norm")
    of_both = zip(ours.state.log_history, stock.state.log_history, strict=True)
    assert all(mine.get(name) == its.get(name) for mine, its in of_both for name in same)
    assert ours.state.log_history[0]["domain/default/entropy"] > 0


@pytest.mark.slow
def test_held_out_rows_are_asked_of_it_as_trl_would_and_a_run_is_whole(tmp_path):
    harness = Harness()
    ours = DomainGRPOTrainer(
        str(POLICY),
        lucky,
        settings(tmp_path, max_steps=1, eval_steps=1),
        Dataset.from_list(rows(0, 12)),
        Dataset.from_list(rows(20, 3)),
        rollout_func=harness,
        evaluation={"samples": 2},
        run=tmp_path / "run",
    )
    ours.train()
    assert harness.calls == [(6, False, 2), (8, True, G), (6, False, 2)]
    assert ours.num_generations_eval == G and ours.policy.check() is None
    _, first, last = (json.loads(line) for line in (tmp_path / "run" / "transfer.jsonl").read_text().splitlines())
    assert len(first["scores"]["default"]) == 3 and first["entropy"]["default"] > 0 and last["step"] == 1
    assert ours.evaluate(Dataset.from_list(rows(30, 4)))["eval_reward"] > 0
    assert harness.calls[-1][1:] == (False, G)


class Silent:
    """A policy as far as a function's completions ask for it."""

    def __init__(self):
        model = SimpleNamespace(training=True, eval=lambda: None, train=lambda was: None)
        self.trainer = SimpleNamespace(use_vllm=False, model=model, num_generations=2, num_generations_eval=2)


WHOLE = {"prompt_ids": [[1], [1]], "completion_ids": [[5, 6], [7]], "logprobs": None}


def asked(returned):
    prompts = [Prompt(domain="d", id="a", prompt="?", columns={"answer": "1", "note": "own"})] * 2
    return RolloutFunction(lambda prompts, trainer: returned, Silent(), fits=list).complete(prompts, [], 2)  # type: ignore[arg-type]


def test_columns_go_to_the_row_that_they_are_of_and_a_short_list_leaves_others_their_own():
    first, second = asked(WHOLE | {"note": ["new"], "all": 3, "logprobs": [[None, -1.0], [-2.0]]})
    assert first.prompt.columns == {"answer": "1", "note": "new", "all": 3}
    assert second.prompt.columns == {"answer": "1", "note": "own", "all": 3}
    assert first.logps[0] != first.logps[0] and second.logps == [-2.0] and first.tool_mask is None


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[1], [2]], "expected it to return a dict, got list"),
        ({"completion_ids": [[1], [2]]}, "has no prompt_ids and no logprobs; it has completion_ids"),
        (
            WHOLE | {"completion_ids": None},
            "completion_ids is None: expected a list of token ids for each of 2 prompts",
        ),
        (
            WHOLE | {"completion_ids": [[5]] * 8},
            "completion_ids has 8 rows for 2 prompts: return one for each, in order",
        ),
        (WHOLE | {"completion_ids": [[5, 6], []]}, "completion_ids of row 2 are empty: a completion has a token"),
        (WHOLE | {"completion_ids": ["ab", [1]]}, "completion_ids of row 1: expected token ids, got 'ab'"),
        (WHOLE | {"prompt_ids": [[1], 3]}, "prompt_ids of row 2: expected token ids, got 3"),
        (WHOLE | {"logprobs": [[-1.0], [-1.0]]}, "logprobs of row 1 are 1 for 2 tokens of completion_ids"),
        (WHOLE | {"env_mask": [[1, 0], [1, 1]]}, "env_mask of row 2 are 2 for 1 tokens of completion_ids"),
    ],
)
def test_what_a_function_may_not_return_is_named(returned, message):
    with pytest.raises(ValueError, match=f"^rollout_func: .*{message}"):
        asked(returned)


def look_up(word: str) -> str:
    """Look a word up.

    Args:
        word: it.
    """
    return word


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollout_func": 3}, "rollout_func: expected a function of prompts and the trainer, got 3"),
        (
            {"engine": Harness},
            "rollout_func with engine=.*Harness.*: it samples in an engine's place: leave engine out",
        ),
        ({"pool": {"look": 2}}, "rollout_func with pool=PoolSettings.*: it is asked once a draw"),
        ({"tools": [look_up]}, "rollout_func with tools=.*look_up.*: it takes turns by itself"),
        ({"evaluation": {"greedy": True}}, "greedy evaluation needs an engine of ours"),
        (
            {"train_dataset": [*rows(0, 4, domain="a"), *rows(9, 4, domain="b")]},
            "rollout_func with 2 trained domains, a, b: it is heard for one",
        ),
        (
            {"guardrails": [Guardrail(domain="default", max_drop=0.1, action="recover")], "run": "runs/x"},
            r"rollout_func with guardrails.default.action='recover'",
        ),
    ],
)
def test_what_it_leaves_no_place_for_is_refused_in_one_line(tmp_path, given, message):
    script = {"reward_funcs": brief, "train_dataset": rows(0, 40), "rollout_func": Harness()}
    with pytest.raises(ValueError, match=message) as caught:
        DomainGRPOTrainer(str(POLICY), args=settings(tmp_path), **script | given)
    assert "\n" not in str(caught.value)


def test_a_domains_own_length_is_refused(tmp_path):
    domain = Domain(
        name="a", kind="open_ended", train=rows(0, 4), heldout=rows(9, 2), reward=brief, max_completion_length=4
    )
    with pytest.raises(ValueError, match=r"rollout_func with domains\.a\.max_completion_length=4: it samples as long"):
        DomainGRPOTrainer(str(POLICY), settings(tmp_path), domains=[domain], rollout_func=Harness())
