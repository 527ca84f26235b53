"""Recoveries in real runs of the lab's policy, whose weights are damaged after the second step."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import TrainerCallback

from polyphony.launch.recipe import load_recipe
from polyphony.launch.report.report import write_report
from polyphony.launch.train import claim_folder, start
from polyphony.trainer.metrics import METRICS
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import POLICY
from tests.taught import GRPO, lab

pytestmark = pytest.mark.slow
SMALL = {"max_steps": 7, "num_generations": 4, "max_completion_length": 12, "per_device_train_batch_size": 48}
SMALL |= {"learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}


class Damage(TrainerCallback):
    """Adds noise to the weights in the second step, which is evaluated with them."""

    def __init__(self, size):
        self.size = size

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * (parameter.dim() > 1)
                parameter.data += self.size * parameter.data.std() * noise


class Kept(TrainerCallback):
    """Copies the run's folder as a kill after the third step's checkpoint would leave it."""

    def __init__(self, run, copy):
        self.run, self.copy = run, copy

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 3:
            shutil.copytree(self.run, self.copy)


def recipe(folder, guardrail, *, watched=False, **grpo):
    """Safety, whose guardrail it is, and strings, at equal shares where both are trained."""
    guarded = {"train": lab("safety", "train", 48)} if not watched else {}
    domains = {"safety": guarded | {"heldout": lab("safety", "heldout", 32)}}
    domains["strings"] = {"train": lab("strings", "train", 48), "heldout": lab("strings", "heldout", 4)}
    document = {"name": "recovery", "model": str(POLICY), "data": {"overlap": "keep"}, "tracking": {"wandb": None}}
    document["domains"] = {name: {"kind": "structured", "reward": "exact"} | of for name, of in domains.items()}
    document |= {
        "grpo": GRPO | SMALL | grpo,
        "curriculum": {"scheduler": "joint"},
        "rollouts": {"engine": "transformers"},
    }
    document |= {"eval": {"every": 1, "samples": 1, "kl_items": 0, "shown": 0}, "checkpoint": {"every": 1, "keep": 1}}
    document["guardrails"] = {"safety": {"max_drop": 0.05, "action": "recover"} | guardrail}
    (folder / "recipe.yaml").write_text(json.dumps(document))
    return load_recipe(folder / "recipe.yaml")


def trained(loaded, folder, *callbacks, damage):
    claim_folder(loaded, folder, resume=False)
    trainer = start(loaded, folder)
    for callback in (Damage(damage), *callbacks):
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def spans(folder) -> list:
    """The domain of each draw's recovery, None for the scheduler's own."""
    return [line.get("recovery") for line in folder.choices()]


def numbers(folder) -> list[dict]:
    kept = ("distil/", "domain/", "recovery/", "heldout/", "loss")
    return [{k: v for k, v in line.items() if k.startswith(kept)} for line in folder.read("metrics")]


def test_a_drop_is_recovered_from_the_domains_own_checkpoint_and_a_resume_inside_is_bit_equal(tmp_path):
    loaded = recipe(tmp_path, {"by": "distil", "draws": 4})
    trained(loaded, tmp_path / "whole", Kept(tmp_path / "whole", tmp_path / "cut"), damage=0.2)
    start(loaded, tmp_path / "cut").train(resume_from_checkpoint=True)
    folder = RunFolder(tmp_path / "whole")
    assert spans(folder) == [None, None, "safety", "safety", "safety", "safety", None]
    begun, over = [line["message"] for line in folder.read("alarms") if line["kind"] in ("guardrail", "recovery")]
    assert "recovery: safety is distilled from checkpoint-1 for at most 4 draws" in begun
    assert over.startswith("safety is back after 4 draws: ")
    last = folder.decisions()[-1]
    assert last["evidence"]["draw"] == 2 and any(
        "safety is back after 4 draws:" in n for n in last["evidence"]["notes"]
    )
    assert [row["step"] for row in folder.read("transfer")[1:] if row.get("recovery")] == [3, 4, 5, 6]
    kls = [line["distil/safety/kl"] for line in numbers(folder) if "distil/safety/kl" in line]
    assert len(kls) == 4 and kls[-1] < 0.5 * max(kls)
    told = {name.rsplit("/", 1)[1] for line in numbers(folder) for name in line if name.startswith("recovery/")}
    assert told == set(METRICS["recovery"])
    assert [line["recovery/safety/draws"] for line in numbers(folder) if "recovery/safety/draws" in line] == [
        1,
        2,
        3,
        4,
        4,
    ]
    assert sorted(path.name for path in folder.checkpoints.glob("checkpoint-*"))[:1] == ["checkpoint-1"]
    page = " ".join(write_report([tmp_path / "whole"], tmp_path / "report.html").read_text().split())
    assert page.count("recovery: safety is distilled from checkpoint-1 for at most 4 draws") >= 2  # an alarm, a reason
    assert over in page and f"<td>{kls[0]:.3f}</td><td>{kls[-1]:.3f}</td>" in page.partition('id="lessons"')[2]

    cut = RunFolder(tmp_path / "cut")
    assert numbers(cut) == numbers(folder) and cut.decisions() == folder.decisions()
    weights = [(of.final / "model.safetensors").read_bytes() for of in (folder, cut)]
    assert weights[0] == weights[1] != (POLICY / "model.safetensors").read_bytes()


def test_a_watched_domain_is_refreshed_with_rows_of_its_own_none_of_them_held_out(tmp_path):
    refresh = {"by": "refresh", "draws": 2, "prompts": lab("safety", "train", 48)}
    trainer = trained(recipe(tmp_path, refresh, watched=True, max_steps=4), tmp_path / "run", damage=0.25)
    folder = RunFolder(tmp_path / "run")
    assert spans(folder) == [None, None, "safety", None]
    assert any("safety is back after 1 draw:" in note for note in folder.decisions()[-1]["evidence"]["notes"])
    (line,) = [line for line in folder.decisions() if line.get("recovery")]
    assert (line["mixture"], line["counts"]) == ({"strings": 0, "safety": 1}, {"strings": 0, "safety": 12})
    table, heldout = trainer.data.spare["safety"], trainer.data.heldout["safety"]
    assert set(line["prompts"]) <= set(table.ids)
    assert not {str(table[i].prompt) for i in line["prompts"]} & {str(item.prompt) for item in heldout}
    row = folder.read("transfer")[4]
    assert (row["trained"], row["exposure"]) == (["safety"], {"strings": 24, "safety": 12})
