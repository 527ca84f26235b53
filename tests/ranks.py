"""One trainer rank of tests/test_training_group.py: train with full weights, then with LoRA, and write down what it saw.

Each run goes back to its first checkpoint after its second step.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from polyphony.launch.measures.rollouts import differing, parameters
from polyphony.launch.recipe import Recipe, load_recipe
from tests.conftest import RECIPES

STEPS = 3
# 24 rows a step, three groups of eight: over two ranks the middle group straddles
COMMON = [
    "tracking.wandb=null",
    "pool.refill.max_rounds=2",
    f"grpo.max_steps={STEPS}",
    "grpo.gradient_accumulation_steps=3",
    "eval.every=100",
    "checkpoint.every=1",
]
KINDS = {
    "full": [],
    "lora": ["lora={r: 4, alpha: 8, target_modules: [q_proj, v_proj]}", "grpo.learning_rate=1e-2"],
    # a rank has whole groups, as a look asks for
    "look": ["pool.look=4", "grpo.gradient_accumulation_steps=4", "grpo.max_steps=2"],
    # its adapter is of Python's, see `built`
    "dora": ["grpo.learning_rate=1e-2", "grpo.max_steps=2"],
}


def be_a_rank(folder: Path, kinds: Sequence[str], overrides: Sequence[str]) -> None:
    """Train once for each kind over one engine; write `rank-<n>.json`."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        let_fsdp_start_on_cpus()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_shared_memory_alone()
    seen: dict[str, Any] = {}
    engine = None
    for kind in kinds:
        recipe = load_recipe(RECIPES / "debug.yaml", [*COMMON, *overrides, *KINDS[kind]])
        trainer = built(recipe, folder / kind, kind=kind, engine=engine)
        final = folder / kind / "final"
        seen[kind] = {**trained(trainer), "unlike_saved": unlike_saved(trainer, final), "final": str(final)}
        engine = trainer.policy.engine
    (folder / f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
    engine.close()


def be_taught(folder: Path, overrides: Sequence[str]) -> None:
    """Distil for two steps from teachers of whom this rank has not all; write what it saw of the last draw."""
    from polyphony.launch.build import build_trainer

    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        let_fsdp_start_on_cpus()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_shared_memory_alone()
    trainer = build_trainer(load_recipe(folder / "recipe.yaml", overrides), folder / "run")
    outputs, keep = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(keep(inputs)) or outputs[-1]
    trainer.train()
    (first, _), rank = outputs, trainer.accelerator.process_index
    rows = list(trainer._rollout.rows.values())
    seen = {name: first[name].cpu() for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    logged = {k: v for line in trainer.state.log_history for k, v in line.items() if k.startswith("distil/")}
    seen |= {"advantages": first["advantages"].cpu(), "domains": [row.prompt.domain for row in rows], "logged": logged}
    torch.save(seen, folder / f"rank-{rank}.pt")


def be_recovered(recipe: Path, run: Path, overrides: Sequence[str]) -> None:
    """Train a domain that is lost after two steps and recovered in the third; write what this rank saw of that draw."""
    from polyphony.launch.train import start

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_shared_memory_alone()
    trainer = start(load_recipe(recipe, overrides), run)
    outputs, keep = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(keep(inputs)) or outputs[-1]
    trainer.train()
    logged = {k: v for line in trainer.state.log_history for k, v in line.items() if k.startswith(("distil/", "recov"))}
    seen = {name: outputs[2][name].cpu() for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    seen |= {"advantages": outputs[2]["advantages"].cpu(), "logged": logged}
    seen |= {"draws": trainer.curriculum.recoveries.draws}
    torch.save(seen, run.parent / f"rank-{trainer.accelerator.process_index}.pt")


def be_tuned(recipe: Path, folder: Path, overrides: Sequence[str]) -> None:
    """Fine-tune on answers; write what this rank saw."""
    from polyphony.launch.build_sft import build_sft

    trainer = build_sft(load_recipe(recipe, overrides), folder / "run")
    trainer.train()
    seen = {"losses": losses_of(trainer), "drawn": dict(trainer.curriculum.drawn)}
    (folder / f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def built(recipe: Recipe, out: Path, *, kind: str, engine: Any) -> Any:
    """Return the recipe's trainer, or one with a kind of adapter that no recipe has."""
    from polyphony.launch.build import build_trainer, grpo_config, load_data

    if kind != "dora":
        return build_trainer(recipe, out, engine=engine)
    from peft import LoraConfig

    from polyphony.trainer.grpo import DomainGRPOTrainer

    modules = ["q_proj", "down_proj"]
    adapter = LoraConfig(r=4, target_modules=modules, use_dora=True, use_rslora=True, task_type="CAUSAL_LM")
    args = grpo_config(recipe, out)
    return DomainGRPOTrainer(recipe.model, args, domains=load_data(recipe, args), engine=engine, peft_config=adapter)


class TakeBack(TrainerCallback):
    """Keep weights and optimizer as they are at the first checkpoint, and go back to it after the second step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.base = frozen(self.trainer)  # not earlier: under FSDP the second rank loads nothing itself

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.kept = held(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 2:
            return
        from polyphony.trainer.checkpoints import roll_back

        moved, rate = unlike(held(self.trainer), self.kept), self.rate
        roll_back(self.trainer, Path(args.output_dir) / "checkpoint-1")
        differing = unlike(held(self.trainer), self.kept)
        self.found = {"moved": len(moved), "differing": differing, "rates": [rate, self.rate]}

    @property
    def rate(self) -> float:
        return self.trainer.optimizer.param_groups[0]["lr"]


def held(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the policy's whole parameters, and what this rank's optimizer holds; collective."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [t for p, moments in optimizer.state.items() for t in (p, *moments.values()) if torch.is_tensor(t)]
    own = {f"optimizer {n}": getattr(t, "to_local", t.detach)().detach().clone() for n, t in enumerate(states)}
    return parameters(trainer) | own


def unlike(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    return [n for n in left | right if n not in left or n not in right or not torch.equal(left[n], right[n])]


def frozen(trainer: Any) -> dict[str, torch.Tensor]:
    """Return whole copies of what an adapter leaves untrained; collective."""
    from trl.distributed import DistributedBackend

    from polyphony.trainer.engine.engine import reshard

    reshard(trainer.model)
    found = {}
    for name, p in trainer.model.named_parameters():
        if not p.requires_grad:
            with DistributedBackend(trainer.accelerator).gather_params([p]):
                found[name] = getattr(p, "full_tensor", p.detach)().detach().clone()
    return found


def trained(trainer: Any) -> dict[str, Any]:
    """Train; return draws, rewards, losses, and how the engine's parameters compare after a last sync."""
    rollouts: list[Any] = []
    keep = trainer._roll_out
    trainer._roll_out = lambda n: rollouts.append(keep(n)) or rollouts[-1]
    watch = TakeBack(trainer)
    trainer.add_callback(watch)
    trainer.train()
    check = trainer.policy.check()
    trainer.policy.sync()
    wrapped = trainer.model_wrapped
    return {
        "rolled_back": watch.found,
        "rank": trainer.accelerator.process_index,
        "ranks": trainer.accelerator.num_processes,
        "wrapper": type(wrapped).__name__,
        "prompts": [[group.prompt_id for group in r.groups.values()] for r in rollouts],
        "rewards": [list(r.rewards) for r in rollouts],
        "sampled": [[len(g.rewards) for g in r.sampled] for r in rollouts],
        "rounds": [r.rounds for r in rollouts],
        "own_ids": [[list(c.ids) for c in r.rows.values()] for r in rollouts],
        "losses": losses_of(trainer),
        "drawn": dict(trainer.curriculum.drawn),
        "check": check.is_passed,
        "differing": differing(trainer),
        "compared": len(parameters(trainer)),
        "written": unlike(frozen(trainer), watch.base),
    }


def unlike_saved(trainer: Any, final: Path) -> list[str]:
    """Save the policy as a run does at its end; return the parameters that the file does not hold bit for bit."""
    from safetensors.torch import load_file

    from polyphony.trainer.checkpoints import save_final

    save_final(trainer.policy, final)
    trainer.accelerator.wait_for_everyone()
    saved, ours = load_file(final / "model.safetensors"), parameters(trainer)
    return unlike({name: tensor for name, tensor in saved.items() if name in ours}, ours)  # a head may be there twice


def let_fsdp_start_on_cpus() -> None:
    """Call ranks over gloo what accelerate (1.15, `AcceleratorState`) calls GPUs: it gives FSDP to no others."""
    as_it_is = PartialState.__init__

    def init(self: PartialState, *arguments: Any, **named: Any) -> None:
        as_it_is(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def leave_shared_memory_alone() -> None:
    """Let DeepSpeed sum over gloo: its kernel for ranks without GPUs takes a minute to compile, and is not ours."""
    module = importlib.import_module("deepspeed.comm.torch")  # the attribute of that name is PyTorch
    module.build_shm_op = lambda: None
