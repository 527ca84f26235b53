"""The wall between the halves: each is given numbers of its own, and none of one is found in what the other is used for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import pytest

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.monitors.guardrails import Guardrail, check
from polyphony.curricula.records import Completion, Domain, Evaluation, Prompt
from polyphony.curricula.schedulers.adaptive import Adaptive
from polyphony.curricula.transfer.halves import halves
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.planner import PlanSettings, make_plan
from polyphony.launch.report.numbers import as_json, find
from polyphony.launch.report.run import read_run
from polyphony.launch.verbs.plan import plan
from polyphony.trainer.entropy import DomainEntropy
from polyphony.trainer.evaluation.answers import Answer, Variety
from polyphony.trainer.evaluation.result import HeldoutResult
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.recorder import Recorder

NAMES = ("math", "stories")
IDS = tuple(f"item {n}" for n in range(24))
SIDES = halves(IDS)
TOKENS = 10


@dataclass(frozen=True)
class Told:
    """What one half says at three evaluations: scores, nats and KL a token, and one confidence."""

    score: tuple[float, ...]
    nats: tuple[float, ...]
    kl: float
    confidence: float
    text: str


RISING = Told(score=(0.2, 0.5, 0.9), nats=(0.9, 0.5, 0.1), kl=0.125, confidence=0.75, text="rose")
FALLING = Told(score=(0.8, 0.4, 0.1), nats=(0.2, 0.6, 1.4), kl=0.5, confidence=0.25, text="fell")
FLAT = Told(score=(0.5, 0.5, 0.5), nats=(0.5, 0.5, 0.5), kl=2.0, confidence=0.5, text="lay")


def result(steer: Told, report: Told, n: int) -> HeldoutResult:
    told = [steer if side == "steer" else report for side in SIDES]
    scores = tuple((float(t.score[n] > k / 24),) for k, t in enumerate(told))
    answers = tuple(
        (Answer(score=s[0], vote=t.text, confidence=t.confidence, is_valid=s[0] > 0, style=t.text),)
        for s, t in zip(scores, told, strict=True)
    )
    pairs = tuple((t.nats[n] * TOKENS, TOKENS) for t in told)
    variety = tuple(
        Variety(distinct_2=t.kl, self_bleu=t.kl, vendi=t.kl, unique_correct=t.kl, classes=t.kl) for t in told
    )
    shown = [
        Completion(prompt=Prompt(domain=name, id=i, prompt="?"), ids=(), text=t.text, reward=t.score[n])
        for name in NAMES
        for i, t in zip(IDS, told, strict=True)
    ]
    return HeldoutResult(
        items=dict.fromkeys(NAMES, IDS),
        samples=dict.fromkeys(NAMES, scores),
        entropy=dict.fromkeys(NAMES, sum(nats for nats, _ in pairs) / TOKENS / len(IDS)),
        item_entropy=dict.fromkeys(NAMES, pairs),
        answers=dict.fromkeys(NAMES, answers),
        greedy=dict.fromkeys(NAMES, tuple(row[0] for row in answers)),
        variety=dict.fromkeys(NAMES, variety),
        base_kl={name: {i: (t.kl * TOKENS, TOKENS) for i, t in zip(IDS, told, strict=True)} for name in NAMES},
        shown=tuple(shown),
    )


def run(folder, steer: Told, report: Told) -> tuple[str, str]:
    """Return all that was decided and all that was published in a run of three evaluations."""
    folder = folder / "run"  # whose name a report has
    folder.mkdir(parents=True)
    domains = tuple(Domain(name=name, kind="structured", train=[0], heldout=[0]) for name in NAMES)
    scheduler = Adaptive(entropy_control=NAMES)
    curriculum = Curriculum(domains=domains, prompts={n: ["p", "q"] for n in NAMES}, scheduler=scheduler, total_draws=9)
    ours = Recorder(folder=RunFolder(folder), domains=domains, curriculum=curriculum, seed=0)
    monitor = DomainEntropy(NAMES, EntropySettings())
    decided, published = [], []
    for n in range(3):
        said = result(steer, report, n)
        published.append(ours.record_heldout(n, said))
        monitor.after_evaluation(n, ours.steer_entropy(said))
        curriculum.draw(3 + n)
        alarms, monitor.pending = [asdict(alarm) for alarm in monitor.pending], []
        verdicts = check([Guardrail(domain="math", max_drop=0.0)], curriculum.evaluations)
        decided += [asdict(curriculum.decision), alarms, list(map(str, verdicts)), ours.worst_steer_score]
    decided += [curriculum.state_dict(), monitor.state_dict()]
    ours.save()
    published += [ours.folder.read("evaluations"), ours.folder.read("samples"), as_json(find(read_run(folder)))]
    return json.dumps(decided), json.dumps(published)


def test_what_decides_knows_nothing_of_what_is_published_and_the_other_way_round(tmp_path):
    decided, published = run(tmp_path / "a", RISING, FALLING)
    assert run(tmp_path / "b", RISING, FLAT)[0] == decided
    assert run(tmp_path / "c", FLAT, FALLING)[1] == published
    assert run(tmp_path / "d", FLAT, FLAT) != (decided, published)
    assert "fell" in published and "rose" not in published and "entropy" in decided


def probes(steer: Told, report: Told, *, by_item: bool = True) -> TransferMatrix:
    """Return probes of both domains: what training on either did is told by the second and third evaluation."""
    rows = []
    for n, trained in enumerate(((), ("math",), ("stories",))):
        about = {"trained": trained, "step": 9 * bool(trained), "seed": 0, "probe": True}
        row = result(steer, report, n).as_evaluation(**about)
        entropies = {"math": row.entropy["math"], "stories": row.entropy["stories"] / (n + 1)}
        items = {name: row.entropy_items[name] for name in ("math",)}
        items["stories"] = tuple((nats / (n + 1), tokens) for nats, tokens in row.entropy_items["stories"])
        rows.append(replace(row, entropy=entropies, entropy_items=items if by_item else {}, kl_items={}))
    kinds = dict.fromkeys(NAMES, "structured")
    return TransferMatrix(domains=NAMES, kinds=kinds, rows=tuple(rows), items=dict.fromkeys(NAMES, IDS))


def test_an_order_is_chosen_by_one_half_and_its_worth_published_from_the_other():
    few = PlanSettings(resamples=50, entropy_penalty=1.0)
    first, same_steer, same_report = (
        make_plan(probes(*told), few) for told in ((RISING, FALLING), (RISING, FLAT), (FLAT, FALLING))
    )
    for chosen in ("order", "decision", "over_mean_order", "precedence", "expected_regret"):
        assert getattr(first, chosen) == getattr(same_steer, chosen), chosen
    assert (first.predicted, first.interval, first.transfer) != (
        same_steer.predicted,
        same_steer.interval,
        same_steer.transfer,
    )
    assert first.transfer == same_report.transfer


def test_each_half_has_its_own_entropy_where_the_file_tells_it_by_item():
    steer, report = (probes(RISING, FALLING).on(which).rows for which in ("steer", "report"))
    assert [row.entropy["math"] for row in steer] == pytest.approx(RISING.nats)
    assert [row.entropy["math"] for row in report] == pytest.approx(FALLING.nats)


def test_both_halves_have_the_entropy_of_all_items_where_the_file_does_not_and_plan_says_so(tmp_path, capsys):
    matrix = probes(RISING, FALLING, by_item=False)
    assert matrix.on("steer").rows[1].entropy == matrix.on("report").rows[1].entropy == matrix.rows[1].entropy
    for name, told in (
        ("whole", matrix),
        ("split", probes(RISING, FALLING)),
        ("nameless", replace(matrix, items=None)),
    ):
        told.save(tmp_path / f"{name}.json")
        plan(tmp_path / f"{name}.json")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "whole.json has no entropy_items in some rows: their entropy is of all items" in said[0]
    assert "nameless.json names no items: both halves are all items" in said[1]


def test_a_row_comes_back_from_its_file_with_what_it_says_by_item():
    matrix = probes(RISING, FALLING)
    kl = {"math": tuple((0.5, 3) if n % 2 else None for n in range(len(IDS)))}
    matrix = replace(matrix, rows=tuple(replace(row, kl_items=kl) for row in matrix.rows))
    assert TransferMatrix.from_json(json.loads(json.dumps(matrix.as_json()))) == matrix


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("entropy_items", {"math": [[1.0, 2]]}, "row 0, domain 'math': 1 entropy_items for 24 scores"),
        ("entropy_items", {"math": [None] * 24}, r"item 0: entropy_items holds \[nats, tokens\], got None"),
        ("entropy_items", {"math": [[-1.0, 2]] * 24}, r"item 0: entropy_items holds .*, got \(-1.0, 2\)"),
        ("kl_items", {"math": [[1.0, 2.5]] * 24}, r"item 0: kl_items holds .*, got \(1.0, 2.5\)"),
        ("kl_items", {"math": 3}, "row 0: kl_items of 'math' must be a list"),
        ("kl_items", {"cooking": []}, r"row 0: kl_items: unknown domains \['cooking'\]"),
    ],
)
def test_what_is_told_by_item_is_checked(key, value, message):
    document = json.loads(json.dumps(probes(RISING, FALLING).as_json()))
    document["rows"][0][key] = value
    with pytest.raises(ValueError, match=message):
        TransferMatrix.from_json(document)


def test_an_evaluation_on_a_half_without_a_token_has_no_entropy_there():
    silent = [(0.0, 0) if side == "steer" else (5.0, 10) for side in SIDES]
    row = Evaluation(
        trained=(), step=0, seed=0, scores={"math": (0.5,) * 24}, entropy={"math": 0.5}, entropy_items={"math": silent}
    )
    matrix = TransferMatrix(domains=("math",), kinds={"math": "structured"}, rows=(row,), items={"math": IDS})
    assert matrix.on("steer").rows[0].entropy == {} and matrix.on("report").rows[0].entropy == {"math": 0.5}
