"""Which engine this machine can have: vLLM is a package of its own, and there is none for macOS. Imports nothing heavy."""

from __future__ import annotations

import functools
import sys
from importlib.util import find_spec
from typing import Any

from polyphony.trainer.run import say

OF_VLLM = ("vllm", "ray")
"""Engines that are vLLM."""
INSTEAD = "or engine transformers, which is slower"
INSTALL = {
    "linux": "is not installed: in the checkout's folder, pip install --extra-index-url "
    "https://download.pytorch.org/whl/cpu -c launch/constraints/cpu.txt -e '.[cpu]', then pip uninstall -y torchvision "
    "torchaudio torchcodec (with GPUs only pip install -c launch/constraints/gpu.txt -e '.[gpu]'), " + INSTEAD,
    "win32": f"does not run on Windows: use WSL2, {INSTEAD}",
    "darwin": f"does not run on macOS: {INSTEAD.removeprefix('or ')}",
}
"""By Python's name of a platform, what to do where there is no vLLM."""


def engine_here(engine: Any, *, use_vllm: bool = False, is_replaced: bool = False) -> Any:
    """Return the engine that is asked for; on macOS TRL's own generation in the place of the default, and say so.

    `use_vllm` asks for TRL's vLLM; where the engine `is_replaced`, a script samples in the place of the default. Raises
    ValueError, with what to do, where vLLM is asked for and is not here.
    """
    if is_replaced and engine == "vllm":
        engine = "transformers"
    if not (use_vllm or engine in OF_VLLM) or find_spec("vllm") is not None:
        return engine
    if sys.platform == "darwin" and engine == "vllm" and not use_vllm:
        _say_slow()
        return "transformers"
    asked = "use_vllm=True" if use_vllm else f"engine {engine}"
    raise ValueError(f"{asked}: vLLM {INSTALL.get(sys.platform, INSTALL['linux'])}")


@functools.cache
def _say_slow() -> None:
    say("there is no vLLM for macOS: the policy samples by itself (engine transformers), which is slower")
