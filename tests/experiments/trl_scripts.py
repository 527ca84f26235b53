"""TRL's own example scripts for GRPO with the import changed: `python -m tests.experiments.trl_scripts CHECKOUT`.

Each script of the checkout's `examples/scripts` that names GRPOTrainer, and that of the installed TRL (`trl grpo`),
runs in a process of its own, with DomainGRPOTrainer imported in its place and nothing else of it changed, or is left out by
name. Its model is a tiny random one, its rows are
made here, and it takes two steps of short completions. `--side stock` runs the same without the change. Nothing of the
checkout is kept.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.experiments.trl_suite import tokenizer

IMAGES = "images"
SERVER = "its environment is a server, or another repository's package"
LEFT_OUT = {
    "async_grpo": "another trainer, of TRL's experimental ones",
    "grpo_vlm": IMAGES,
    "gspo_vlm": IMAGES,
    "harbor/data_agent": SERVER,
    **{
        f"openenv/{name}": SERVER
        for name in ("browsergym_llm", "carla", "catch", "echo", "multi_env", "opencode", "sudoku", "wordle")
    },
    **{f"openenv/{name}": IMAGES for name in ("browsergym", "carla_vlm", "carla_vlm_gemma")},
    "openreward/seta": SERVER,
}
"""Scripts that cannot run here, and why."""
GSPO = "--importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4 --loss_type grpo --use_peft"
SCRIPTS = {
    "grpo_2048": "",
    "grpo_agent": "--model_name_or_path MODEL --output_dir OUT",
    "grpo_continuous_batching": "--model_name_or_path MODEL --output_dir OUT --use_peft",
    "trl/scripts/grpo": "--model_name_or_path MODEL --output_dir OUT --dataset_name trl-lib/DeepMath-103K "
    "--reward_funcs accuracy_reward think_format_reward --reward_weights 1 0.5 --eval_strategy steps --eval_steps 1 "
    "--use_peft --lora_target_modules q_proj v_proj",
    "gspo": f"--model_name_or_path MODEL --output_dir OUT {GSPO} --lora_target_modules q_proj v_proj",
}
"""Scripts that run, with their arguments; `trl/..` is the installed package's."""
MODEL = re.compile(r'"Qwen/[\w.-]+"')
"""What a script calls a model that it names itself."""
IMPORTED = re.compile(r"^( *)from trl import (\([^)]*\bGRPOTrainer\b[^)]*\)|.*\bGRPOTrainer\b.*)$", re.MULTILINE)
OURS = "from polyphony.trainer.grpo import DomainGRPOTrainer as GRPOTrainer\n"


def with_our_import(script: str) -> str:
    """Return a script's text in which the name of TRL's trainer is ours from the import on."""
    return IMPORTED.sub(lambda found: f"{found[0]}\n{found[1]}{OURS}", script, count=1)


def make_model(folder: Path) -> None:
    """Write a random model with the chat template of Qwen3, as the installed TRL knows it."""
    if (folder / "tokenizer.json").exists():
        return
    import torch
    import transformers
    import trl

    read = tokenizer(600)
    read.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 8192, "eos_token_id": read.eos_token_id}
    config = transformers.Qwen3Config(vocab_size=600, bos_token_id=None, pad_token_id=read.pad_token_id, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    read.save_pretrained(folder)


def load_dataset(path: str, *names: str, split: Any = None, **given: Any) -> Any:
    """Stand for that of `datasets`: rows with the columns that a script reads; a `prompt` is a chat."""
    import datasets

    made = {
        "qgallouedec/biogrid": {"Alt IDs Interactor A": "gene{i}", "Taxid Interactor A": "taxid:9606"},
        "qgallouedec/biogrid_qa": {"question": "Does the gene G{i} interact?", "answer": "Yes"},
        "openai/gsm8k": {"question": "{i} + 1 =", "answer": "One more. #### {j}"},
        "AI-MO/NuminaMath-TIR": {"problem": "What is {i} + 1?", "solution": r"It is $\boxed{{{j}}}$.", "messages": "-"},
        "trl-lib/DeepMath-103K": {"prompt": "What is {i} + 1?", "solution": "${j}$"},
    }[path]

    def rows(first: int) -> Any:
        numbers = range(first, first + 24)
        said = [{k: v.format(i=i, j=i + 1) for k, v in made.items()} for i in numbers]
        asked = [{"prompt": [{"role": "user", "content": row["prompt"]}]} if "prompt" in row else {} for row in said]
        return datasets.Dataset.from_list([row | chat for row, chat in zip(said, asked, strict=True)])

    if split is None:
        return datasets.DatasetDict({"train": rows(0), "test": rows(100)})
    return rows(0) if isinstance(split, str) else [rows(100 * n) for n in range(len(split))]


def run_inside(script: Path, *, engine: str) -> None:
    """Run a script in this process, as its main program, at sizes of this machine."""
    import datasets
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.grpo import DomainGRPOTrainer

    datasets.load_dataset = load_dataset
    by_default: Any = DomainGRPOTrainer.__init__.__kwdefaults__
    by_default["engine"] = engine
    complete = GRPOConfig.__post_init__

    def shortened(self: Any) -> None:
        self.max_steps, self.max_completion_length, self.num_generations = 2, 24, 4
        self.per_device_train_batch_size, self.gradient_accumulation_steps, self.steps_per_generation = 4, 2, None
        self.bf16, self.report_to, self.trackio_space_id = False, "none", None
        self.output_dir = self.output_dir or "out"
        complete(self)

    GRPOConfig.__post_init__ = shortened
    runpy.run_path(str(script), run_name="__main__")


def run(name: str, checkout: Path, *, out: Path, side: str, engine: str) -> tuple[bool, str, float]:
    """Return whether a script ended well, the last that it said, and its seconds."""
    text = source(name, checkout).read_text()
    text = MODEL.sub(repr(str(out / "model")), text)
    folder = out / side / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(with_our_import(text) if side == "ours" else text)
    words = SCRIPTS[name].replace("MODEL", str(out / "model")).replace("OUT", str(folder / "out")).split()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.experiments.trl_scripts",
        "--inside",
        str(folder / "script.py"),
    ]
    here = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    began = time.monotonic()
    command += ["--engine", engine, "--", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith((" ", "\x1b"))]
    return done.returncode == 0, "" if done.returncode == 0 else (said or ["-"])[-1][:300], time.monotonic() - began


def source(name: str, checkout: Path) -> Path:
    """Return where a script is."""
    import trl

    of_package = name.startswith("trl/")
    return (Path(trl.__file__).parents[1] if of_package else checkout / "examples" / "scripts") / f"{name}.py"


def named(checkout: Path) -> list[str]:
    """Return the scripts of a checkout that name TRL's trainer, after the installed package's."""
    folder = checkout / "examples" / "scripts"
    found = (path for path in sorted(folder.rglob("*.py")) if "GRPOTrainer" in path.read_text())
    return ["trl/scripts/grpo", *(str(path.relative_to(folder).with_suffix("")) for path in found)]


def main() -> int:
    """Run the scripts, print the table; return 1 where one failed or none was there, else 0."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("checkout", type=Path, help="of TRL, at any version near the installed one")
    arguments.add_argument("--out", type=Path, default=Path("runs/trl-scripts"), help="model, scripts, what they said")
    arguments.add_argument(
        "--engine", default="vllm", help="what samples with ours; vllm is what a script gets by itself"
    )
    arguments.add_argument("--side", choices=("ours", "stock"), default="ours")
    arguments.add_argument("-k", dest="part", default="", help="scripts with this in their name")
    given = arguments.parse_args()
    out, checkout = given.out.resolve(), given.checkout.resolve()
    make_model(out / "model")
    lines, failed, ran = ["| script | result | seconds |", "| --- | --- | --- |"], 0, 0
    for name in (name for name in named(checkout) if given.part in name):
        if name in SCRIPTS:
            is_well, said, seconds = run(name, checkout, out=out, side=given.side, engine=given.engine)
            ran, failed = ran + 1, failed + (not is_well)
            lines.append(f"| `{name}` | {'runs' if is_well else said} | {seconds:.0f} |")
        else:
            lines.append(f"| `{name}` | left out: {LEFT_OUT.get(name, 'not known here')} | |")
    print("\n".join(lines))
    return int(failed > 0 or ran == 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        script, engine = Path(sys.argv[2]), sys.argv[4]
        sys.argv = [str(script), *sys.argv[6:]]
        run_inside(script, engine=engine)
    else:
        sys.exit(main())
