"""textarena's games, the real package, as a domain that acts."""

from __future__ import annotations

import pytest
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.records import Domain
from polyphony.trainer.domains import DomainData
from polyphony.trainer.environments.calls import Instance
from tests.acting import tokenizer

GAME = {"name": "textarena", "game": "GuessTheNumber-v0"}


def guessed(game: Instance, number: int, *, moves: int = 9) -> list[str]:
    """Play by halving; return what was said."""
    low, high = 1, 20
    said = [game.ask("reset", {"columns": {"game_seed": number, "prompt": "Play this game."}, "names": {"id": "x"}})]
    while said[-1] is not None and len(said) <= moves:
        guess = (low + high) // 2
        said.append(game.ask("reply", {"role": "assistant", "content": f"I say [{guess}]."}))
        low, high = (guess + 1, high) if "higher" in (said[-1] or "") else (low, guess - 1)
    return said


def test_a_game_is_played_to_its_end_and_rewards():
    game = Instance.made(GAME, [])
    assert game.functions == {}
    first = guessed(game, 7)
    assert "between 1 and 20" in first[0] and first[-1] is None and game.ask("reward", None) == 1.0
    assert "is higher" in first[1] and "I say" not in first[1]  # its own words alone
    assert guessed(game, 7) == first  # the game of that number
    assert {tuple(guessed(game, n)) for n in range(6)} != {tuple(first)}
    game.ask("reset", {"columns": {"game_seed": 7}, "names": {}})
    assert game.ask("reward", None) == 0.0  # not ended


@pytest.mark.parametrize("game", ["Chess-v0", "Chss-v0"])
def test_a_game_that_does_not_begin_for_one_player_is_told_in_a_line(game):
    with pytest.raises(ValueError, match=f"textarena: game '{game}' does not begin for one player: ") as told:
        Instance.made({"name": "textarena", "game": game}, [])
    assert "\n" not in str(told.value)


def test_it_is_a_domain_with_rows_of_its_own():
    rows = {"environment": GAME, "count": 12}
    domain = Domain(
        name="guessing",
        kind="structured",
        environment=GAME,
        train={**rows, "seed": 1},
        heldout={**rows, "seed": 2},
    )
    args = GRPOConfig(bf16=False, report_to="none", max_completion_length=32)
    with pytest.warns(UserWarning, match="its reset takes no `seed`"):
        data = DomainData.load([domain], tokenizer=tokenizer(), args=args)
    assert (len(data.train["guessing"]), len(data.heldout["guessing"])) == (12, 12)
    acting = data.acting["guessing"]
    assert acting.has_reply and acting.has_reward and acting.needs == ("game_seed",)
