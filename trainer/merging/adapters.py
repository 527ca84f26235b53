"""Adapters of one base become one adapter, by PEFT's `add_weighted_adapter`.

`linear` and `task_arithmetic` are exact: the ranks add up (PEFT's `cat`). TIES and DARE are of whole differences, cut to
that rank again by singular values: nearer to each other than to TIES of whole models (two experts of rank 4 were apart by
half of what they changed). DARE is PEFT's here, which multiplies what it keeps by 1 / density.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polyphony.trainer.merging.settings import MergeSettings
from polyphony.trainer.merging.sources import Source
from polyphony.trainer.merging.tensors import Checkpoint
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.teachers.weights import ADAPTER, TeacherWeights, as_checkpoint

COMBINED = {
    "linear": "cat",
    "task_arithmetic": "cat",
    "ties": "ties_svd",
    "dare_linear": "dare_linear_svd",
    "dare_ties": "dare_ties_svd",
    "interpolate": "linear",  # of one adapter nothing is mixed
}
"""What PEFT calls it."""
UNCOMBINED = tuple(
    """
    use_dora use_rslora modules_to_save alora_invocation_tokens trainable_token_indices target_parameters layer_replication
    lora_bias
    """.split()  # noqa: SIM905
)
"""Options of LoRA that `add_weighted_adapter` leaves out or does not know."""
BESIDE = "adapter"
"""The folder of the adapter alone, beside the weights that it is merged into; as in a run's final weights."""


def are_combined(sources: Sequence[Source], settings: MergeSettings) -> bool:
    """Whether PEFT can combine them: plain LoRA all, and a method that it has; others are merged as whole models."""
    return settings.method in COMBINED and all(source.is_adapter and _is_plain(source) for source in sources)


def _is_plain(source: Source) -> bool:
    # slow to import
    from polyphony.trainer.engine.merge import INITS

    said = read_object(source.folder / ADAPTER)
    plain = said.get("peft_type") == "LORA" and said.get("bias", "none") == "none"
    plain = plain and said.get("init_lora_weights", True) in INITS
    return plain and not any(said.get(option) for option in UNCOMBINED)


def combine(sources: Sequence[Source], base: Source, settings: MergeSettings, out: Path) -> None:
    """Write the combined adapter beside what the base becomes with it. Raises ValueError where they do not fit."""
    # slow to import
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for source in (*sources, base):
        weights = Checkpoint.of(source.name, source.folder)
        for name in weights.shapes:
            weights.numbers(name)
    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype="auto")
    names = [f"expert-{n}" for n in range(len(sources))]
    for name, source in zip(names, sources, strict=True):
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(source.folder), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(source.folder), adapter_name=name)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"expert {source.name} does not fit the base {base.name}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model.add_weighted_adapter(names, _weights(settings, len(names)), "default", **_how(model, names, settings))
    model.set_adapter("default")
    model.save_pretrained(str(out / BESIDE), selected_adapters=["default"], save_embedding_layers=False)
    with as_checkpoint(TeacherWeights("adapter", str(out / BESIDE)), base=str(base.folder)) as whole:
        shutil.copytree(whole, out, dirs_exist_ok=True)


def _weights(settings: MergeSettings, experts: int) -> list[float]:
    """Return PEFT's weights, which are no proportions."""
    weights = settings.of(experts)
    if settings.method == "linear":
        return [w / sum(weights) for w in weights]
    if settings.method == "ties":  # its mean is over the experts that agree, whatever their weights
        return [w * experts / sum(weights) for w in weights]
    return list(weights)


def _how(model: Any, names: Sequence[str], settings: MergeSettings) -> dict[str, Any]:
    kind = COMBINED[settings.method]
    how: dict[str, Any] = {"combination_type": kind}
    if kind.endswith("_svd"):
        layers = [m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
        narrowest = min(min(layer.in_features, layer.out_features) for layer in layers)
        ranks = sum(model.peft_config[name].r for name in names)
        how |= {"density": settings.kept, "svd_rank": min(ranks, narrowest), "svd_full_matrices": False}
    return how
