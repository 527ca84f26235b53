"""Games of textarena (the extra `games`) as an environment: the policy's turns are its moves, the game answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

MOST = 2**31
SEEDING = threading.Lock()
"""textarena's games begin from Python's own random numbers, which threads share."""


class TextArena:
    """A game for one player, by its name in textarena. Those that download word lists or ask a model work where that works.

    The reward is the game's own at its end, 0 where it is negative or the game was not ended. One that goes on drawing by
    chance after it began is not exactly resumable.

    Example: `environment: {name: textarena, game: GuessTheNumber-v0}`, `train: {environment: textarena, count: 9, seed: 1}`
    """

    def __init__(self, game: str = "GuessTheNumber-v0") -> None:
        self._game, self._reward = game, 0.0
        try:
            self._environment = self._begun(0)
        except ImportError as error:
            raise ValueError("textarena needs its package: pip install 'polyphony-rl[games]'") from error
        except Exception as error:  # a game may raise anything
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"textarena: game {game!r} does not begin for one player: {why}") from error

    def reset(self, game_seed: int) -> str:
        """Begin the game of that number; return what it tells the player."""
        self._environment, self._reward = self._begun(game_seed), 0.0
        return self._told()

    def reply(self, message: Mapping[str, Any]) -> str | None:
        """Make a move; return what the game says, None where it is over."""
        is_over, _ = self._environment.step(message["content"])
        if is_over:
            rewards, _ = self._environment.close()
            self._reward = max(0.0, float(rewards[0]))
            return None
        return self._told()

    def get_reward(self) -> float:
        """Return the game's reward."""
        return self._reward

    @classmethod
    def rows(cls, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield so many games, other ones for every seed, as far as the game has them."""
        return ({"prompt": "Play this game.\n", "game_seed": (seed * 1_000_003 + n) % MOST} for n in range(count))

    def _begun(self, seed: int) -> Any:
        # slow to import, and an extra
        import textarena

        environment = textarena.make(f"{self._game}-raw")
        with SEEDING:
            environment.reset(num_players=1, seed=seed)
        return environment

    def _told(self) -> str:
        _, said = self._environment.get_observation()
        return "\n".join(text for who, text, *_ in said if who != 0).strip()
