"""A sequence classifier as a reward, as TRL asks it: its one number for a prompt with its completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.data_utils import apply_chat_template
from trl.trainer.grpo_config import GRPOConfig

from polyphony.trainer.script_shape import first_line


class RewardModel:
    """Score by a model, whole on every rank, on its policy's device.

    Example: `RewardModel.of("org/reward-model", None, args)(prompts=["2+2 ="], completions=["4"])`
    """

    def __init__(self, model: Any, tokenizer: Any, *, device: Any, chat_template_kwargs: Mapping[str, Any]) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device, self.chat_template_kwargs = device, dict(chat_template_kwargs)
        self.__name__ = str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2] or "reward_model"

    @classmethod
    def of(cls, model: Any, tokenizer: Any, args: GRPOConfig) -> RewardModel:
        """Load a model of a name, or take one that is loaded, with its tokenizer or the one of its own name.

        Raises ValueError that names a model that cannot be loaded.
        """
        revision, trusts = None, args.trust_remote_code
        if isinstance(model, str):
            given = {"trust_remote_code": trusts, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]  # as TRL reads it
            revision = given.get("revision")
            try:
                model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **given)
            except OSError as error:
                how = f"{first_line(error)} (a function is given itself, not its name)"
                raise ValueError(f"reward_funcs: model {model!r} cannot be loaded: {how}") from error
        if not hasattr(model, "config"):
            raise ValueError(f"reward_funcs: expected a model of Transformers, got {type(model).__name__}")
        name = getattr(model.config, "_name_or_path", "")
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusts)
            except (OSError, ValueError) as error:
                lacks = f"model {name!r}" if name else f"a loaded {type(model).__name__} without a name"
                how = "give reward_processing_classes, the tokenizer of each model"
                raise ValueError(f"reward_funcs: {lacks} has no tokenizer: {how}") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # it scores the last token that is none
        return cls(model, tokenizer, device=args.device, chat_template_kwargs=args.chat_template_kwargs or {})  # type: ignore[arg-type]

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Return the model's numbers."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if not isinstance(prompts[0], str):
            kwargs = self.chat_template_kwargs
            texts = [apply_chat_template({"messages": m}, self.tokenizer, **kwargs)["text"] for m in texts]
        asked = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
        rows = self.tokenizer(text=texts, **asked).to(self.device)
        with torch.inference_mode():
            return self.model.to(self.device)(**rows).logits[:, 0].tolist()
