"""Names of parameters as a checkpoint has them, which is what an engine reads.

Transformers gives some weights other names in memory than on disk (GPT-NeoX's head is `lm_head` here and `embed_out` there).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def checkpoint_names(model: Any) -> dict[str, str]:
    """Return, for each parameter that is called otherwise on disk, its name there.

    Those that are several tensors on disk (fused experts) keep their name: vLLM reads them whole.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves none
        shaped = torch.empty(shape, dtype=parameter.dtype, device="meta")
        written = list(revert_weight_conversion(model, {name: shaped}))
        if len(written) == 1 and written != [name]:
            found[name] = written[0]
    return found
