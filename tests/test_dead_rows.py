"""Dead rows leave the update and the gradient stays TRL's: against the real TRL, on the lab's policy."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.launch.lab.rewards import StoryRubric
from polyphony.trainer.dead_rows import KEPT_SHARE, live_counts, without_dead
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.settings import UpdateSettings
from tests.test_trainer import POLICY, Recording, config, domain, losses


def micro_batch(advantages, lengths, **more):
    mask = (torch.arange(6) < torch.tensor(lengths).unsqueeze(1)).long()
    rows = len(lengths)
    prompts = torch.arange(rows * 6).reshape(rows, 6)  # as wide as the completions
    values = {"prompt_ids": prompts, "completion_mask": mask, "advantages": torch.tensor(advantages)}
    return values | {"num_items_in_batch": torch.tensor(99)} | more


def test_live_rows_stay_in_order_with_their_own_values_and_padding_goes():
    batch = micro_batch([0.0, 1.0, 0.0, -1.0], [6, 2, 1, 3], domain_index=torch.tensor([7, 8, 9, 10]))
    (cut,) = without_dead([batch], [2], "grpo")
    assert cut["advantages"].tolist() == [1.0, -1.0]
    assert cut["domain_index"].tolist() == [8, 10]
    assert cut["completion_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert cut["prompt_ids"].tolist() == [[6, 7, 8, 9, 10, 11], [18, 19, 20, 21, 22, 23]]
    assert cut["num_items_in_batch"] == 99
    assert cut[KEPT_SHARE] == 0.5


def test_another_ranks_live_rows_are_matched_by_the_shortest_dead_ones():
    (cut,) = without_dead([micro_batch([0.0, 1.0, 0.0, 0.0], [6, 2, 4, 3])], [2], "dapo")
    assert cut["advantages"].tolist() == [1.0, 0.0]
    assert cut["completion_mask"].sum(1).tolist() == [2, 3]
    assert cut[KEPT_SHARE] == 1.0  # dapo divides by the tokens of the whole draw


def test_with_nothing_alive_one_row_is_left():
    assert live_counts([micro_batch([0.0, 0.0], [1, 1]), micro_batch([1.0, 2.0], [1, 1])]).tolist() == [1, 2]


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to use."""

    def __init__(self):
        self.of_step = []
        self.rows = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of_step.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))


def half_dead(prompts, completions, completion_ids, **columns):
    """Fail every other prompt, and pass completions of odd length of the rest."""
    return [
        float(len(i) % 2) if len(p[0]["content"]) % 2 else 0.0 for p, i in zip(prompts, completion_ids, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_stock_trl(tmp_path, engine, loss_type, accumulation):
    changes = {"loss_type": loss_type, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    changes |= {"learning_rate": 0.0, "steps_per_generation": 2, "max_grad_norm": 0.0}
    domains = [domain("arithmetic", reward=half_dead), domain("stories", kind="open_ended", reward=StoryRubric())]
    ours = DomainGRPOTrainer(
        POLICY,
        config(tmp_path, **changes),
        domains=domains,
        engine=engine,
        update=UpdateSettings(drop_dead="always"),
    )
    rollouts, rows = [], []
    keep, cut = ours._roll_out, ours._compute_loss
    ours._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    ours._compute_loss = lambda model, inputs: rows.append(len(inputs["advantages"])) or cut(model, inputs)
    mine = Gradients()
    ours.add_callback(mine)
    ours.train()

    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    prompts = [rollout.rows[i].prompt.prompt for rollout in rollouts for i in range(0, 32, 8)]
    stock = GRPOTrainer(
        POLICY,
        lambda prompts, completions, **columns: [rewards.pop(0) for _ in prompts],
        args=config(tmp_path, shuffle_dataset=False, **changes),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    stock.vllm_generation, stock.use_vllm, stock._last_loaded_step = Recording(list(rollouts)), True, -1
    theirs = Gradients()
    stock.add_callback(theirs)
    stock.train()

    assert sum(rows) < 0.95 * 16 * len(rows)  # something did leave
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-6)
    for a, b in zip(mine.of_step, theirs.of_step, strict=True):
        assert b.norm() > 1e-3
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("drop_dead", ["always", "never"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient_nor_entropies(tmp_path, engine, drop_dead):
    def logged(*, checkpointed):
        trainer = DomainGRPOTrainer(
            POLICY,
            config(tmp_path, gradient_checkpointing=checkpointed, learning_rate=0.0, max_steps=2),
            domains=[domain("arithmetic", reward=half_dead), domain("strings")],
            engine=engine,
            update=UpdateSettings(drop_dead=drop_dead),
        )
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointed
        return trainer.state.log_history[:2]

    names = ("loss", "grad_norm", "domain/arithmetic/entropy", "domain/strings/entropy")
    for plain, less in zip(logged(checkpointed=False), logged(checkpointed=True), strict=True):
        assert [less[name] for name in names] == pytest.approx([plain[name] for name in names], abs=1e-6)
        assert less["grad_norm"] > 1e-3


def half_hopeless(prompts, completions, completion_ids, **columns):
    """Fail prompts by their first digit, and pass every other completion of the rest, whichever half of a group this is."""
    return [float(i % 2) if ord(p[0]["content"][0]) % 2 else 0.0 for i, p in enumerate(prompts)]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_look_leaves_the_gradient_as_it_is_where_what_it_leaves_is_dead(tmp_path, engine, loss_type):
    changes = {"loss_type": loss_type, "steps_per_generation": 2, "max_steps": 1, "max_grad_norm": 0.0}
    seen = {}
    for look in (None, 4):
        trainer = DomainGRPOTrainer(
            POLICY,
            config(tmp_path, **changes),
            domains=[domain("arithmetic", reward=half_hopeless)],
            engine=engine,
            pool=PoolSettings(look=look, refill={"max_rounds": 0}),
            update=UpdateSettings(drop_dead="always"),
        )
        rollouts = []
        keep = trainer._roll_out
        trainer._roll_out = lambda n, keep=keep, rollouts=rollouts: rollouts.append(keep(n)) or rollouts[-1]
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        seen[look] = rollouts[0], gradients.of_step[0], trainer.state.log_history[0]
    (whole, theirs, _), (looked, ours, log) = seen[None], seen[4]
    live = [g.has_signal for g in whole.groups.values()]
    assert 0 < sum(live) < len(live) == 4
    assert [len(g.rewards) for g in looked.groups.values()] == [8 if lives else 4 for lives in live]
    assert looked.rewards == whole.rewards
    for start, lives in zip(range(0, 32, 8), live, strict=True):
        sampled = range(start, start + (8 if lives else 4))
        assert [looked.rows[i].ids for i in sampled] == [whole.rows[i].ids for i in sampled]
    assert log["domain/arithmetic/n"] == sum(len(g.rewards) for g in looked.groups.values())
    assert theirs.norm() > 1e-3
    if (
        loss_type == "dapo"
    ):  # divided by the tokens of the draw, in which what is repeated stands for what was not sampled
        ours = ours * (theirs @ ours) / (ours @ ours)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss_type": "bnpo"}, "loss_type 'bnpo' normalises by the rows' own tokens"),
        ({"loss_type": "vespo"}, "loss_type 'vespo'"),
        ({"beta": 0.1}, "beta=0.1 pulls every row"),
        ({"entropy_coef": 0.1}, "the entropy bonus acts on every row"),
        ({"top_entropy_quantile": 0.5}, r"top_entropy_quantile=0\.5 is taken over all rows"),
    ],
)
def test_where_the_gradient_would_change_dead_rows_stay(tmp_path, engine, changes, reason):
    def build(drop_dead):
        update = UpdateSettings(drop_dead=drop_dead)
        return DomainGRPOTrainer(
            POLICY, config(tmp_path, **changes), domains=[domain("arithmetic")], engine=engine, update=update
        )

    with pytest.raises(ValueError, match=f"drop_dead: always would change the gradient: {reason}"):
        build("always")
    assert not build("auto").drops_dead
