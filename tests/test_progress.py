"""The live view in a real terminal emulation of rich, and the plain lines where there is none."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from polyphony.trainer.run.progress import ProgressLine, mean_reward, track

METRICS = {
    "heldout/math/score": 0.25,
    "heldout/math/entropy": 0.7,
    "heldout/math/entropy_place": 0.5,
    "domain/math/entropy": 0.6,
    "domain/math/entropy_place": -0.5,
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
    for text in ("math", "safety", "0.250", "0.700", "-0.125", "0.150", "0.600", "1.000", "1,234 tokens/s", "2/2", "●"):
        assert text in said, text
    assert "reward 0.750" in said  # the last reward, and the domain's values of the step before


def test_the_reward_is_over_all_completions_and_not_over_the_rows_of_the_update():
    metrics = {"reward": 0.9, "domain/a/reward": 0.5, "domain/a/n": 8, "domain/b/reward": 0.25, "domain/b/n": 24}
    assert mean_reward(["a", "b", "watched"], metrics) == (0.5 * 8 + 0.25 * 24) / 32
    assert math.isnan(mean_reward(["watched"], metrics))


def test_a_narrow_terminal_is_no_error():
    assert "math" in shown(terminal=True, width=40)


def test_without_a_terminal_there_are_plain_lines():
    said = shown(terminal=False).splitlines()
    # where an entropy lies in its band is said of held-out items, as the report does
    math = "math score 0.250 entropy 0.70 (in its band), in training reward {} entropy 0.60; safety entropy 0.15"
    assert said[0] == f"demo  reward 0.500  step 1/2: {math.format('0.500')}"
    assert said[-1].startswith("demo  reward 0.750  step 2/2, ") and said[-1].endswith(f": {math.format('0.750')}")
    assert "\x1b" not in "".join(said)


def test_plain_lines_come_at_every_evaluation_and_seldom_between():
    out = io.StringIO()
    line = ProgressLine("[red]demo[/]", 99, domains=["math"], console=Console(file=out, width=40))
    for step in range(0, 40, 10):
        line.update(step, {"heldout/math/score": 0.5, "heldout/math/entropy_place": 1.5, "heldout/math/entropy": 2.0})
        for between in range(1, 10):
            line.update(step + between, {"domain/math/reward": 0.25, "domain/math/n": 8})
    said = out.getvalue().splitlines()
    assert len(said) == 4 and all(f"step {10 * n}/99" in text for n, text in enumerate(said))
    assert said[0].startswith("[red]demo[/]  ")  # a run's name is no markup
    assert said[0].endswith("math score 0.500 entropy 2.00 (above its band)")  # in one line, however narrow


@pytest.mark.parametrize("terminal", [True, False])
def test_alarms_stand_in_every_further_picture(terminal):
    out = io.StringIO()
    line = ProgressLine("demo", 9, domains=["math"], console=Console(file=out, force_terminal=terminal, width=200))
    line.ring("collapse of math")
    line.update(1, {"heldout/math/score": 0.5})
    line.ring("spread")
    line.update(2, {"heldout/math/score": 0.5})
    line.close()
    said = out.getvalue()
    assert "1 alarm, collapse of math" in said or terminal  # a terminal may skip a picture
    assert "2 alarms, the last spread" in said


@pytest.mark.parametrize(
    ("place", "drawn", "style"),
    [
        (0.5, "··───●───··", "green"),
        (0.0, "··●──────··", "green"),
        (1.0, "··──────●··", "green"),
        (-0.01, "·●───────··", "bold red"),
        (1.01, "··───────●·", "bold red"),
        (-9.0, "●·───────··", "bold red"),
        (9.0, "··───────·●", "bold red"),
    ],
)
def test_the_mark_lies_where_the_entropy_lies_in_its_band(place, drawn, style):
    assert track(place).plain == drawn and track(place).style == style


def test_an_unknown_entropy_has_no_scale():
    assert track(math.nan).plain == ""
