"""`python -m tests.experiments.families [NAME ..] [--out FOLDER] [--precision bfloat16]`: which families train with vLLM.

Each family is a tiny random model of its own configuration class (tests/families.py) and a process of its own, whose line
goes to `FOLDER/results.jsonl`; families that have one are not run again. What is asked of each: does the check of weights
pass before the first step; do four steps train and change the weights; after them, does the engine follow the weights still;
do two steps, a checkpoint and two more give the same weights as four.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyphony.curricula.records import Domain
from tests.families import FAMILIES
from tests.forks import Fork

STEPS = 4
ROWS = [{"id": str(i), "prompt": f"What is {i} + {i} ?", "answer": str(2 * i)} for i in range(12)]


def evenness(prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Return the share of tokens with an even number: any random model gets some."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trained(model: str, folder: Path, *, engine: Any, precision: str = "float32", **changes: Any) -> Any:
    """Return a trainer of one domain over a model, ready to train."""
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.grpo import DomainGRPOTrainer

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "model_init_kwargs": {"dtype": precision},
        "bf16": False,
        "gradient_checkpointing": False,
        "save_steps": STEPS // 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }
    domain = Domain(name="even", kind="structured", train=ROWS[:8], heldout=ROWS[8:], reward=evenness)
    of_vllm: dict[str, Any] = {} if engine == "transformers" else {"vllm_max_model_length": 64}
    args = GRPOConfig(**settings | of_vllm | changes)
    return DomainGRPOTrainer(model, args, domains=[domain], curriculum="joint", engine=engine)


def weights(trainer: Any) -> dict[str, Any]:
    """Return copies of a policy's parameters."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def asked(name: str, folder: Path, *, precision: str = "float32", resumes: bool = True) -> dict[str, Any]:
    """Return what became of one family; `said` where it was refused or broke."""
    import torch

    began = time.process_time()
    found: dict[str, Any] = {"family": name, "precision": precision, "shape": FAMILIES[name].shape}
    try:
        model = str(FAMILIES[name].make(folder / name / "model"))
        how = {"precision": precision, "trust_remote_code": FAMILIES[name].has_own_code}
        if FAMILIES[name].has_own_code:  # vLLM has no class of it
            how["vllm_model_impl"] = "transformers"
        trainer = trained(model, folder / name / "whole", engine="vllm", **how)
        served = trainer.policy.engine.llm.apply_model(lambda model: type(model).__name__)[0]
        found["engine"] = served
        found["check"] = _told(trainer.policy.check())
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        found["trains"] = sum(not torch.equal(after[n], before[n]) for n in before) / len(before)
        found["sync"] = _told(trainer.policy.check())
        if resumes:
            again = trained(model, folder / name / "again", engine=trainer.policy.engine, **how)
            again.train(resume_from_checkpoint=str(folder / name / "whole" / f"checkpoint-{STEPS // 2}"))
            found["resumes"] = all(torch.equal(p, after[n]) for n, p in weights(again).items())
    except Exception as error:  # whatever it is, it is what is looked for
        found["said"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    found["cpu_s"] = round(time.process_time() - began, 1)
    return found


def answer(name: str, out: Path, precision: str) -> None:
    """Append one family's line to the results."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # what vLLM asks of a class, seven seconds of imports apart
    found = asked(name, out / precision, precision=precision)
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def _told(check: Any) -> dict[str, Any]:
    return {
        "passed": check.is_passed,
        "before": check.before,
        "changed": check.changed,
        "after": check.after,
        "moved": check.moved,
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    rows = [
        "| family | shape | trains | weight check | syncs | resumes | engine |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "said" in line:
            said = " ".join(line["said"].split())
            rows.append(f"| {line['family']} | {line['shape']} | no: {said[:300]} | | | | {line.get('engine', '')} |")
            continue
        rows.append(
            f"| {line['family']} | {line['shape']} | {_yes(line['trains'] > 0)}, {line['trains']:.0%} of parameters | "
            f"{_compared(line['check'])} | {_compared(line['sync'])} | {_yes(line['resumes'])} | {line['engine']} |"
        )
    return "\n".join(rows)


def _compared(check: dict[str, Any]) -> str:
    worst = max(check["before"], check["after"])
    return f"{_yes(check['passed'])}, {worst:.0e} of {check['moved']:.2f}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "**no**"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the families that have no line yet; print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.families", description="Families with vLLM.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)}; none: all")
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(argv)
    if unknown := set(given.names) - set(FAMILIES):
        parser.error(f"no family {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
    results = given.out / "results.jsonl"
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.names or list(FAMILIES)
    for name in names:
        if name not in _done(results, given.precision):
            log = given.out / f"{name}.{given.precision}.log"
            Fork(answer, name, given.out, given.precision, log=log).wait(timeout_s=1200)
    done = _done(results, given.precision)
    print(table([done[name] for name in names if name in done]))
    return int(any("said" in done.get(name, {"said": ""}) for name in names))


def _done(results: Path, precision: str) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, results.read_text().splitlines()) if results.is_file() else ()
    return {line["family"]: line for line in lines if line["precision"] == precision}


if __name__ == "__main__":
    sys.exit(main())
