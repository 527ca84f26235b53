"""`polyphony eval`: who is asked about, on what, and what is said of one model or of two."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from polyphony.launch.recipe import RecipeError
from polyphony.launch.verbs.evaluate import _distance, compare_results, parse
from polyphony.launch.verbs.tables import changes_table, statistics_table
from polyphony.trainer.evaluation.answers import Answer
from polyphony.trainer.evaluation.result import HeldoutResult
from tests.conftest import POLICY, RECIPES


@pytest.fixture
def run(tmp_path, recipe):
    folder = tmp_path / "run"
    (folder / "final").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.read_text().replace('"model": "model"', f'"model": "{POLICY}"'))
    for file in tmp_path.glob("*.jsonl"):
        (folder / file.name).write_text(file.read_text())
    return folder


def test_a_run_folder_stands_for_its_weights_and_brings_its_recipe(run):
    request = parse([str(run), "eval.samples=2"])
    assert request.models == (str(run / "final"),) and request.recipe.eval.samples == 2


@pytest.mark.parametrize("inside", ["final", "checkpoints/checkpoint-2"])
def test_a_model_inside_a_run_folder_brings_its_recipe(run, inside):
    request = parse([str(run / inside), "org/other"])
    assert request.models == (str(run / inside), "org/other") and set(request.recipe.domains) == {"sums", "words"}


def test_a_recipe_that_is_named_counts(run):
    assert set(parse([str(run), str(RECIPES / "debug.yaml")]).recipe.domains) == {"arithmetic", "stories", "safety"}


def test_a_run_without_weights_says_what_to_name_instead(run):
    (run / "final").rmdir()
    with pytest.raises(RecipeError, match="has no final/ yet: name one of its checkpoints/"):
        parse([str(run)])


def result(*scores) -> HeldoutResult:
    answers = tuple((Answer(score=s, vote=str(s), confidence=0.5, is_valid=True, style="bare"),) for s in scores)
    items = {"math": tuple(map(str, range(len(scores))))}
    return HeldoutResult(
        items=items, samples={"math": tuple((s,) for s in scores)}, entropy={}, answers={"math": answers}
    )


def test_a_difference_is_told_where_its_interval_excludes_zero():
    worse, better = result(*[0.0] * 30, *[1.0] * 10), result(*[0.0] * 10, *[1.0] * 30)
    found = compare_results(worse, better)
    assert found["math"]["score"].mid == 0.5 and found["math"]["score"].is_above_zero
    assert "+0.500 [" in changes_table(found) and "]*" in changes_table(found)


def test_few_items_that_did_not_move_are_not_taken_for_certainty():
    same = result(*[1.0] * 8)
    low, mid, high = compare_results(same, same)["math"]["score"]
    assert mid == 0.0 and low < -0.1 and high > 0.1
    assert "*" not in changes_table({"math": {"score": compare_results(same, same)["math"]["score"]}})


def test_many_domains_stand_in_several_blocks():
    found = {f"d{n}": compare_results(result(1.0, 0.0), result(1.0, 0.0))["math"] for n in range(6)}
    assert statistics_table(found).count("\n\n") == 1 and max(map(len, statistics_table(found).split("\n"))) <= 125


def test_models_of_other_tokens_have_no_distance_and_that_is_said(capsys):
    model = SimpleNamespace(dtype=None, config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=7)))
    assert _distance(SimpleNamespace(model=model), str(POLICY)) == {}
    assert re.search(r"polyphony eval: no KL: \S+ has \d+ tokens, the model 7\n", capsys.readouterr().err)


@pytest.mark.slow
def test_two_models_are_compared_on_the_same_items_and_seeds(tmp_path, capsys):
    """The lab's policy against itself with its final norm doubled: sharper, so less entropy and some distance."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from polyphony.launch.cli import main

    model = AutoModelForCausalLM.from_pretrained(POLICY)
    with torch.no_grad():
        model.model.norm.weight *= 2
    model.save_pretrained(tmp_path / "sharp")
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(tmp_path / "sharp")
    common = [str(RECIPES / "debug.yaml"), "eval.kl_items=8", "eval.samples=4"]
    capsys.readouterr()  # what libraries say where the command has not told them not to
    assert main(["eval", str(tmp_path / "sharp"), *common, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    _, kl, _ = alone["arithmetic"]["statistics"]["kl"]
    assert kl > 0.05 and alone["arithmetic"]["items"] == 16
    assert {"score", "pass@1", "pass@4", "majority", "greedy", "ece", "auroc", "overconfidence"} <= set(
        alone["arithmetic"]["statistics"]
    )
    assert "ece" not in alone["stories"]["statistics"] and alone["stories"]["styles"]["prose"] > 0.5
    assert main(["eval", str(POLICY), str(tmp_path / "sharp"), *common, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["b"]["arithmetic"]["score"] == alone["arithmetic"]["score"]  # the same seeds
    entropy = both["difference"]["stories"]["entropy"]
    assert entropy["excludes_zero"] and entropy["interval"][2] < 0
    assert "kl" not in both["a"]["arithmetic"]["statistics"]  # the recipe's own model
