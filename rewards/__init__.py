"""Text in, numbers out: the graders. Every reward has TRL's form and works in any process, without a trainer.

`f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async; None where the grader itself
failed, never 0.
"""

from polyphony.rewards.registry import REGISTRY, Reward, find_reward

__all__ = ["REGISTRY", "Reward", "find_reward"]
