"""The house's own rules: walls between packages, words that say what a module is, nothing of one machine in a file."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from polyphony.curricula.schedulers import REGISTRY, find_scheduler
from polyphony.launch.cli import VERBS
from polyphony.launch.recipe import Recipe, load_recipe
from polyphony.trainer.run.folder import BEST_FILE, POOL_FILE, STATE_FILE, UNFINISHED_FILE, RunFolder
from polyphony.trainer.settings import UpdateSettings
from tests.conftest import EXPERIMENTS, HOUSE, RECIPES

PACKAGES = ("trainer", "rewards", "curricula", "launch")
MEASURING = ("tests/benchmarks", "tests/experiments")
"""Not installed, but read and run by people like the rest."""
MODULES = [path for folder in (*PACKAGES, *MEASURING) for path in sorted((HOUSE / folder).rglob("*.py"))]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(HOUSE), "ls-files"], capture_output=True, text=True, check=True).stdout
    return [HOUSE / name for name in listed.splitlines() if (HOUSE / name).is_file()]


def test_the_walls_between_the_packages_hold():
    # in a process of its own: the linter switches off the loggers that are there
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "8 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("*.yaml"), *EXPERIMENTS.glob("*.yaml")]), ids=lambda path: path.name
)
def test_every_committed_recipe_loads_and_reads_back_as_itself(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "resolved.yaml").write_text(recipe.as_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_no_module_is_named_after_nothing_in_particular():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base2"}
    assert [path for path in tracked() if path.suffix == ".py" and path.stem in vague] == []


def test_no_file_knows_a_path_of_one_machine():
    machine = re.compile(rb"(?<![\w./])/(?:home|root|Users|work|workspace)/\w")
    texts = [path for path in tracked() if path.suffix not in {".safetensors", ".png", ".parquet"}]
    found = {path.name: match.group() for path in texts if (match := machine.search(path.read_bytes()))}
    assert found == {}


def test_every_module_says_what_it_is_for():
    assert [str(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_every_public_class_and_function_says_what_it_does():
    silent = [
        f"{path.relative_to(HOUSE)}: {node.name}"
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_no_finished_code_waits_to_be_done():
    later = re.compile(r"\b(TODO|FIXME|XXX)\b(?!.*#\d)")
    assert [str(path) for path in MODULES if later.search(path.read_text())] == []


def test_every_verb_of_the_command_has_a_module():
    modules = {
        path.stem for folder in ("", "verbs", "cluster", "report") for path in (HOUSE / "launch" / folder).glob("*.py")
    }
    assert {"evaluate" if verb == "eval" else verb for verb in VERBS} <= modules


def test_html_is_written_in_templates_only():
    tag = re.compile(r"</?(html|body|section|div|span|small|p|h[1-6]|table|t[rdh]|pre|figure|svg|path|rect)\b[^<>]*>")
    found = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found += [f"{path.relative_to(HOUSE)}:{node.lineno}" for _ in tag.finditer(node.value)]
    assert found == []


def test_no_function_is_longer_than_a_flat_recipe_may_be():
    found = {
        f"{path.relative_to(HOUSE)}: {node.name}"
        for wing in PACKAGES
        for path in (HOUSE / wing).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 60
    }
    assert found == set()


def test_only_the_run_folder_knows_the_names_of_run_files():
    folder = RunFolder(Path())
    paths = [getattr(folder, name) for name, made in vars(RunFolder).items() if isinstance(made, property)]
    names = {path.name for path in paths if isinstance(path, Path)} - {"wandb"}  # which is a word of others too
    names |= {STATE_FILE, UNFINISHED_FILE, BEST_FILE, POOL_FILE}
    assert {"recipe.yaml", "transfer.json", "end.json", "final", "logs"} < names
    found = []
    for path in (path for wing in PACKAGES for path in (HOUSE / wing).rglob("*.py")):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            is_name = (
                isinstance(node, ast.Constant) and node.value in names and "__file__" not in lines[node.lineno - 1]
            )
            is_ledger = isinstance(node, ast.JoinedStr) and ast.unparse(node).endswith((".jsonl'", '.jsonl"'))
            if (is_name or is_ledger) and path != HOUSE / "trainer" / "run" / "folder.py":
                found.append(f"{path.relative_to(HOUSE)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
    template = (HOUSE / "launch" / "cluster" / "slurm.sbatch").read_text()
    assert [name for name in names if f"/{name}" in template] == []


def imports_of(path: Path, known: Collection[str]) -> set[str]:
    """Return our modules that a file imports anywhere: inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {""}


def test_no_imports_go_round_in_a_circle():
    files = {
        path: path.relative_to(HOUSE).with_suffix("")
        for path in MODULES
        if path.is_relative_to(HOUSE / "tests") is False
    }
    modules = {"polyphony." + ".".join(file.parts).removesuffix(".__init__"): path for path, file in files.items()}
    graph = {name: imports_of(path, modules) - {name} for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 300  # imports are seen
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_two_classes_of_ours_have_one_name():
    names = Counter(
        node.name for path in MODULES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    assert [name for name, n in names.items() if n > 1] == []


def classes_of_settings(*holders: Any) -> dict[str, type]:
    """Every class that a recipe, or a script in its place, fills in: those that it holds, and what they build on."""
    found: dict[str, type] = {}
    waiting: list[Any] = list(holders or (Recipe, UpdateSettings))
    while waiting:
        kind = waiting.pop()
        waiting += get_args(kind)
        if hasattr(kind, "__pydantic_fields__") and kind is not BaseModel and kind.__name__ not in found:
            found[kind.__name__] = kind
            waiting += [*kind.__bases__, *(field.annotation for field in kind.__pydantic_fields__.values())]
    assert len(found) > 10
    return found


OF_THEIR_OWN = {
    "name": "of a run, and of a domain",
    "every": "of evaluations, and of checkpoints",
    "start": "of a probe's weights, and of what a pool knows",
    "keep": "how many checkpoints, and which weights of a probe",
    **dict.fromkeys(
        ("heldout", "reward", "diversity", "tools"), "of RecipeDomain, which is stricter than the Domain it builds on"
    ),
    "model": "the policy's, and a teacher's",
    "kind": "of a domain, and of an adapter",
    "target_modules": "of LoRA, and of another adapter",
    **dict.fromkeys(
        ("advantages", "guard", "rft", "distil", "sft", "teachers"), "top keys of a recipe, together UpdateSettings"
    ),
}
"""Names that two classes of settings have for different things, or for one thing by reference."""


SAME_BY_CHANCE = {
    ("EngineSettings", "tensor_parallel"): "a neutral 1: the trainer knows no recipe",
    ("settings", "tensor_parallel"): "handed on to it",
    ("__init__", "engine"): "the trainer's choice where a script does not say; a recipe may ask for Ray too",
    **{(grader, "timeout_s"): "not a worker's" for grader in ("Endpoint", "Math", "Procedural")},
    ("Sampling", "top_k"): "tokens, not accepted samples",
    ("Evaluation", "placebo"): "what a row is of; a recipe asks for some",
}
"""Defaults outside the classes of settings that bear the name of one inside."""


def test_no_setting_is_declared_twice():
    owners = Counter(name for kind in classes_of_settings().values() for name in inspect.get_annotations(kind))
    assert {name for name, n in owners.items() if n > 1} == set(OF_THEIR_OWN)


def test_no_class_or_function_has_a_default_for_what_is_a_setting():
    """Those of its value, and of any value where the name is of two words and so means one thing."""
    kinds = classes_of_settings()
    defaults = {(name, repr(f.default)) for kind in kinds.values() for name, f in kind.__pydantic_fields__.items()}
    unmistakable = {name for name, _ in defaults if "_" in name}
    repeated = set()
    for path in (path for wing in PACKAGES for path in (HOUSE / wing).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name not in kinds:
                given = [(a.target.id, a.value) for a in node.body if isinstance(a, ast.AnnAssign)]
            elif isinstance(node, ast.FunctionDef):
                positional = [*node.args.posonlyargs, *node.args.args]
                given = [*zip([a.arg for a in positional[::-1]], node.args.defaults[::-1], strict=False)]
                given += zip([a.arg for a in node.args.kwonlyargs], node.args.kw_defaults, strict=True)
            else:
                continue
            plain = [(n, v) for n, v in given if isinstance(v, (ast.Constant, ast.Tuple)) and ast.unparse(v) != "None"]
            repeated |= {(node.name, n) for n, v in plain if n in unmistakable or (n, ast.unparse(v)) in defaults}
    assert repeated == set(SAME_BY_CHANCE)


def test_every_number_among_the_settings_has_a_range_and_is_finite():
    # any reward; checked as pairs; any two rewards; checked one by one
    free = {"accept_from", "band", "entropy_band", "shape", "learning_rates"}
    kinds = classes_of_settings() | classes_of_settings(*map(find_scheduler, REGISTRY))
    assert {"Adaptive", "Guard", "Replay"} <= set(kinds)
    for kind in kinds.values():
        fields = kind.__pydantic_fields__
        own = {name: fields[name] for name in inspect.get_annotations(kind) if name in fields}
        numbers = {name: f for name, f in own.items() if {int, float} & {f.annotation, *get_args(f.annotation)}}
        assert [f"{kind.__name__}.{name}" for name, f in numbers.items() if not f.metadata and name not in free] == []
        config = getattr(kind, "model_config", None) or kind.__pydantic_config__
        assert config.get("allow_inf_nan") is False or not numbers, kind


def test_no_import_inside_a_function_is_cheap():
    """Walls and start-up time are the reasons for them: what costs nothing stands at the top."""
    light = ("polyphony.curricula", "polyphony.rewards", "polyphony.launch.recipe", "polyphony.trainer.settings")
    found = [
        f"{path.relative_to(HOUSE)}:{node.lineno}"
        for path in MODULES
        if path.name not in ("cli.py", "calls.py", "doctor.py")  # a verb a module; a package may be missing
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(light)
    ]
    assert found == []


def test_every_import_inside_a_function_has_its_reason():
    """Said once for a module in its docstring, or by a comment where the imports stand."""
    silent = []
    for path in (path for wing in PACKAGES for path in (HOUSE / wing).rglob("*.py")):
        tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
        if re.search(r"inside\s+functions|imported\s+only\s+when", ast.get_docstring(tree) or ""):
            continue
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found = [n for n in ast.walk(function) if isinstance(n, (ast.Import, ast.ImportFrom))]
                first, last = (
                    min((n.lineno for n in found), default=2),
                    max((n.end_lineno or 0 for n in found), default=0),
                )
                if found and "#" not in "".join(lines[first - 2 : last]):
                    silent.append(f"{path.relative_to(HOUSE)}: {function.name}")
    assert silent == []
