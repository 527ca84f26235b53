"""The live view in a real terminal emulation of rich, and the plain lines where there is none."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from polyphony.trainer.run.progress import ProgressLine, mean_reward, track

METRICS = {
    "heldout/math/score": 0.25,
    "domain/math/entropy": 0.7,
    "domain/math/entropy_place": 0.5,
    "domain/math/reward": 0.5,
    "domain/math/n": 8,
    "curriculum/math/mixture": 1.0,
    "transfer/safety/drawdown": -0.125,
    "heldout/safety/entropy": 0.15,
    "rollout/tokens_per_s": 1234.0,
}


def shown(*, terminal: bool, width: int = 100) -> str:
    out = io.StringIO()
    line = ProgressLine(
        "demo", 2, domains=["math", "safety"], console=Console(file=out, force_terminal=terminal, width=width)
    )
    line.update(1, METRICS)
    line.update(2, {"reward": 0.1, "domain/math/reward": 0.75, "domain/math/n": 24, "domain/code/n": 8})
    line.close()
    return out.getvalue()


def test_a_terminal_shows_every_domain_with_its_score_entropy_and_share():
    said = shown(terminal=True)
    for text in ("math", "safety", "0.250", "0.700", "-0.125", "0.150", "1.000", "1,234 tokens/s", "2/2", "●"):
        assert text in said, text
    assert "reward 0.750" in said  # the last reward, and the domain's values of the step before


def test_the_reward_is_over_all_completions_and_not_over_the_rows_of_the_update():
    metrics = {"reward": 0.9, "domain/a/reward": 0.5, "domain/a/n": 8, "domain/b/reward": 0.25, "domain/b/n": 24}
    assert mean_reward(["a", "b", "watched"], metrics) == (0.5 * 8 + 0.25 * 24) / 32
    assert math.isnan(mean_reward(["watched"], metrics))


def test_a_narrow_terminal_is_no_error():
    assert "math" in shown(terminal=True, width=40)


def test_without_a_terminal_there_are_plain_lines():
    said = shown(terminal=False)
    assert said.splitlines()[0] == "demo  reward 0.500  step 1/2"
    assert said.splitlines()[-1].startswith("demo  reward 0.750  step 2/2")
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("place", "drawn", "style"),
    [
        (0.5, "··───●───··", "green"),
        (0.0, "··●──────··", "green"),
        (1.0, "··──────●··", "green"),
        (-9.0, "●·───────··", "bold red"),
        (9.0, "··───────·●", "bold red"),
    ],
)
def test_the_mark_lies_where_the_entropy_lies_in_its_band(place, drawn, style):
    assert track(place).plain == drawn and track(place).style == style


def test_an_unknown_entropy_has_no_scale():
    assert track(math.nan).plain == ""
