"""What tests of distillation share: weights for teachers, and a recipe whose domains are taught by them."""

from __future__ import annotations

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyphony.launch.recipe import load_recipe
from tests.conftest import POLICY

GRPO = {
    "learning_rate": 1e-3,
    "max_steps": 1,
    "per_device_train_batch_size": 6,
    "num_generations": 1,
    "max_completion_length": 16,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "seed": 1,
}


def lab(domain, split, size):
    return {"generator": "polyphony.launch.lab.world:rows", "domain": domain, "split": split, "size": size}


def recipe_of(folder, teachers, *overrides, **domains):
    """A recipe over the lab's policy whose domains, rows of the lab's, are taught by the teachers that they name."""
    sections = {
        name: {"kind": "structured", "reward": "exact", "train": lab(of, "train", 24), "heldout": lab(of, "heldout", 4)}
        | ({"teacher": teacher} if teacher else {})
        for name, (of, teacher) in domains.items()
    }
    document = {"name": "distil", "model": str(POLICY), "algorithm": "distil", "teachers": teachers}
    document |= {"domains": sections, "grpo": GRPO, "curriculum": {"scheduler": "joint"}, "data": {"overlap": "keep"}}
    document |= {"rollouts": {"engine": "transformers"}, "eval": {"every": 4, "samples": 1, "kl_items": 0}}
    (folder / "recipe.yaml").write_text(json.dumps(document))
    return load_recipe(folder / "recipe.yaml", overrides)


def right(completions, **columns):
    """A reward that is always the same."""
    return [1.0] * len(completions)


def odd(completion_ids, **columns):
    """A reward that most groups have both of."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def lost_after_two(completions, trainer_state=None, **columns):
    """A reward that finds all right, but nothing while two steps have been taken."""
    return [float(trainer_state is None or trainer_state.global_step != 2)] * len(completions)


def drawn(trainer) -> dict:
    """Train; return what TRL got of the last draw, before it was shuffled."""
    outputs, keep = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(keep(inputs)) or outputs[-1]
    trainer.train()
    return outputs[-1]


def fill(shelf):
    """Save weights: the policy with rows of padding in its embedding, an expert, an adapter that does nothing, one that
    does."""
    torch.manual_seed(0)
    padded = AutoModelForCausalLM.from_pretrained(POLICY)
    padded.resize_token_embeddings(704, mean_resizing=False)
    expert = AutoModelForCausalLM.from_pretrained(POLICY)
    for parameter in expert.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * (parameter.dim() > 1)
    for name, model in {"padded": padded, "expert": expert}.items():
        model.save_pretrained(shelf / name)
        AutoTokenizer.from_pretrained(POLICY).save_pretrained(shelf / name)
    for name in ("idle", "moved"):
        layers = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(POLICY), layers)
        for key, parameter in adapted.named_parameters():
            if name == "moved" and "lora_B" in key:
                parameter.data += 0.3 * torch.randn_like(parameter)
        adapted.save_pretrained(shelf / name)
    return shelf
