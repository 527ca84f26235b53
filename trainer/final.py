"""The policy as an ordinary Hugging Face folder: whole, its adapter merged, however it is spread over the ranks."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from trl.generation.vllm_generation import VLLMGeneration

from polyphony.trainer.policy import Policy
from polyphony.trainer.rollouts import reshard


class Walk(VLLMGeneration):
    """TRL's walk over whole parameters (ZeRO-3, FSDP and PEFT gathers) without an engine at its end."""

    def _init_vllm(self) -> None:
        """Start nothing."""


def save_final(policy: Policy, out: Path) -> None:
    """Save policy and tokenizer for `from_pretrained`; collective over ranks."""
    trainer = policy.trainer
    model, is_main = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.is_main_process
    if isinstance(model, PeftModel):
        reshard(model)
        whole = {}
        for name, parameter in Walk(model, trainer.accelerator, trainer.processing_class)._iter_named_params():
            if is_main:
                whole[name] = parameter.detach().cpu().clone()  # merged and gathered only until the next one
        if is_main:
            model.get_base_model().save_pretrained(out, state_dict=whole)  # type: ignore[operator]
    else:
        trainer.save_model(str(out))
    if is_main:
        trainer.processing_class.save_pretrained(out)
