"""The spine on this machine's GPU: `python -m tests.benchmarks.run gpu` prints what step, token and sync cost.

Two policies, the lab's and a random one of 0.5 B parameters, each in processes of two kinds, by turns: ours with the
in-process engine, beside stock TRL on that engine and a bare vLLM; and stock TRL with its own colocated engine. Without a
GPU the lab's policy alone is measured, on the CPU: that the benchmark runs is all that it shows. Nothing was measured on a
GPU so far.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polyphony.launch.recipe import Recipe, load_recipe
from tests.benchmarks.commands import HOUSE, RECIPES
from tests.benchmarks.result import Result, Target, Timing, paired

LAB = HOUSE / "launch" / "lab" / "policy"
PROCESSES = 2
"""Of each kind, in turns."""
PAIRS = 3
"""Within a process."""
STEPS = 6
WARM_UP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFigures:
    """What one process saw."""

    results: list[dict[str, Any]]
    """Fields of Results that have their baseline within the process."""
    step: Timing
    tokens_a_step: float
    sync: Timing
    peak_gib: float
    """Of the GPU's memory, the engine's included; of the process's, where there is no GPU."""
    device: str


def bench_gpu() -> list[Result]:
    """Measure every policy by both arms."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in _policies(Path(scratch)).items():
            pairs = [(_measure("ours", folder), _measure("colocate", folder)) for _ in range(PROCESSES)]
            results += [_read(fields, policy=name) for fields in pairs[0][0].results]
            results += _compared(name, pairs)
    return results


def _read(fields: dict[str, Any], *, policy: str) -> Result:
    """Return a Result that came from another process."""
    target = fields["target"] and Target(**fields["target"])
    return Result(**{**fields, "name": f"{policy} {fields['name']}", "target": target})


def _compared(name: str, pairs: Sequence[tuple[GpuFigures, GpuFigures]]) -> list[Result]:
    ours, colocate = pairs[-1]
    note = f"baseline: stock TRL, its own engine; {ours.device}"
    tokens = f"{ours.tokens_a_step:.0f} and {colocate.tokens_a_step:.0f} tokens a step"
    peak, baseline = (max(measured.peak_gib for measured in arm) for arm in zip(*pairs, strict=True))
    return [
        paired(f"{name} step, TRL's colocate", "s", [(a.step, b.step) for a, b in pairs], note=f"{tokens}; {note}"),
        paired(f"{name} sync", "s", [(a.sync, b.sync) for a, b in pairs], note=note),
        Result(name=f"{name} peak memory", value=peak, unit="GiB", baseline=baseline, ratio=peak / baseline, note=note),
    ]


def _policies(scratch: Path) -> dict[str, Path]:
    import torch

    if not torch.cuda.is_available():
        return {"lab": LAB}
    return {"lab": LAB, "0.5B": random_policy(scratch / "half-billion")}


def random_policy(folder: Path, **changes: Any) -> Path:
    """Write a random policy of the shape of Qwen2.5-0.5B with the lab's tokenizer; `changes` are of its config."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    }
    shape |= {"num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 4096} | changes
    ids = {name: json.loads((LAB / "config.json").read_text())[name] for name in ("bos_token_id", "eos_token_id")}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **ids, tie_word_embeddings=True))
    # logits as far apart as a trained policy's: else nothing that is done to the weights would show in them
    model.model.norm.weight.data.fill_(5.0)
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(LAB / name, folder / name)
    return folder


def _measure(arm: str, policy: Path) -> GpuFigures:
    words = [sys.executable, "-m", "tests.benchmarks.gpu", arm, str(policy)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=HOUSE)
    seen = json.loads(done.stdout.splitlines()[-1])
    return GpuFigures(**seen | {name: Timing(**seen[name]) for name in ("step", "sync")})


def recipe_of(policy: Path) -> Recipe:
    """Return the demo's recipe over a policy, with weights that stay still and as little evaluation as there can be."""
    import torch

    on_gpu, is_lab = torch.cuda.is_available(), policy == LAB
    overrides = [f"model={policy}", "name=bench", "grpo.learning_rate=0.0", "eval={every: 1000, samples: 1}"]
    overrides += [f"grpo.max_steps={WARM_UP + STEPS + 1}", "tracking.wandb=null", f"grpo.bf16={on_gpu}".lower()]
    overrides += [f"domains.{name}.heldout.size=8" for name in load_recipe(RECIPES / "demo.yaml").domains]
    if not is_lab:
        overrides += ["grpo.max_completion_length=256", "grpo.per_device_train_batch_size=16"]
        overrides += ["grpo.gradient_accumulation_steps=4"]
    return load_recipe(RECIPES / "demo.yaml", overrides)


def ours(policy: Path, folder: Path) -> GpuFigures:
    """Measure our trainer and stock TRL on our engine, in turns; then the engine beside a bare vLLM."""
    from tests.benchmarks import rollouts
    from tests.benchmarks.side_by_side import SideBySide, twin_engine
    from tests.benchmarks.training import step_result

    recipe = recipe_of(policy)
    engine = twin_engine(recipe, folder / "engine")
    sides = SideBySide(recipe=recipe, engine=engine, folder=folder, warm_up=WARM_UP)
    sides.ours()
    peak = peak_gib()  # before a second trainer adds to it
    step, blocks = step_result(sides, pairs=PAIRS)
    trainer = sides.our_trainer()
    bare = rollouts.against_bare(engine, rollouts.requests_of(trainer))
    return GpuFigures(
        results=[asdict(step), asdict(bare)],
        step=Timing(step.value, step.cpu or 0.0),
        tokens_a_step=statistics.mean(block.tokens for block in blocks),
        sync=_median(rollouts.sync_seconds(engine.sync_weights)),
        peak_gib=peak,
        device=device(),
    )


def colocate(policy: Path, folder: Path) -> GpuFigures:
    """Measure stock TRL with its own engine."""
    import torch
    from trl.generation import vllm_generation

    from polyphony.launch.build import grpo_config, load_data
    from polyphony.trainer.engine.cpu_build import prepare_cpu_build
    from tests.benchmarks.rollouts import sync_seconds
    from tests.benchmarks.side_by_side import StepClock, stock_trainer

    recipe = recipe_of(policy)
    recipe = recipe.model_copy(update={"grpo": {**recipe.grpo, "use_vllm": True, "save_strategy": "no"}})
    if not torch.cuda.is_available():
        prepare_cpu_build()
        # compiling takes minutes on a CPU
        vllm_generation.LLM = partial(vllm_generation.LLM, enforce_eager=True)  # type: ignore[misc,assignment]
    data = load_data(recipe, grpo_config(recipe, folder))
    prompts = [table[i] for table in data.train.values() for i in table.ids[:64]]
    trainer = stock_trainer(recipe, prompts, folder)
    lengths: list[int] = []
    generate = trainer.vllm_generation.generate

    def counted(*arguments: Any, **named: Any) -> Any:
        answer = generate(*arguments, **named)
        lengths.extend(map(len, answer[1]))
        return answer

    trainer.vllm_generation.generate = counted  # type: ignore[method-assign]
    clock = StepClock(lambda: sum(lengths))
    trainer.add_callback(clock)
    trainer.train()
    block = clock.block(WARM_UP)
    return GpuFigures(
        results=[],
        step=block.sample,
        tokens_a_step=block.tokens,
        sync=_median(sync_seconds(trainer.vllm_generation.sync_weights)),
        peak_gib=peak_gib(),
        device=device(),
    )


def _median(samples: Sequence[Timing]) -> Timing:
    return Timing(statistics.median(s.clock for s in samples), statistics.median(s.cpu for s in samples))


def peak_gib() -> float:
    """Return the most memory that this process has held."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device() -> str:
    """Name what was measured on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: says nothing about one"


BENCHMARKS = {"gpu": bench_gpu}

if __name__ == "__main__":
    from polyphony.launch.cli import set_environment

    set_environment()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(asdict({"ours": ours, "colocate": colocate}[sys.argv[1]](Path(sys.argv[2]), Path(scratch)))))
