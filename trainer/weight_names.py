"""What a checkpoint calls a model's weights, and how many tensors it makes of one.

Transformers has some weights otherwise in memory than on disk: GPT-NeoX's head is `lm_head` here and `embed_out` there, the
experts of a mixture are one tensor here and many there. An engine reads what is on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def checkpoint_names(model: Any) -> dict[str, str]:
    """Return, for each parameter that is called otherwise on disk, its name there.

    Those that are several tensors on disk (experts) keep their name: vLLM reads them whole.
    """
    return {name: names[0] for name, names in _written(model).items() if len(names) == 1}


def load_converted(model: Any, checkpoint: Path) -> None:
    """Load what is otherwise on disk, which Transformers leaves as it is when it goes on from a checkpoint."""
    if isinstance(model, PeftModel) or not _written(model):  # of an adapter nothing is
        return
    with torch.random.fork_rng():
        saved = type(model).from_pretrained(checkpoint, dtype="auto").state_dict()
    model.load_state_dict(saved)


def _written(model: Any) -> dict[str, list[str]]:
    """Return the names on disk of each parameter that has others there."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves none
        names = list(revert_weight_conversion(model, {name: torch.empty(shape, dtype=parameter.dtype, device="meta")}))
        if names != [name]:
            found[name] = names
    return found
