"""The report of small run folders whose numbers are worked by hand, and of folders that are cut off or incomplete."""

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from polyphony.curricula.intervals import changed
from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.halves import halves
from polyphony.launch.cli import main
from polyphony.launch.report.charts import Layer, draw_stack, thin, ticks
from polyphony.launch.report.closing import closing
from polyphony.launch.report.numbers import budget, find
from polyphony.launch.report.report import summarise, write_replay, write_report
from polyphony.launch.report.run import read_run
from polyphony.launch.report.story import signed, tell
from polyphony.launch.report.theme import DARK, LIGHT
from polyphony.launch.verbs.watch import WIDE, picture
from polyphony.trainer.metrics import key
from polyphony.trainer.run.folder import RunFolder
from tests.benchmarks.synthetic_run import FOUR, write_run
from tests.test_old_run import run_folder

# R[s, k] of two stages, a then b, and of a watched domain w: 20 items each, scores 0 or 1.
# BWT of a = .6 - .8 = -.2; change of a = .6 - .2 = +.4, of b = .9 - .4 = +.5, of w = .4 - .5 = -.1
STAGES = {0: (0.2, 0.4, 0.5), 10: (0.8, 0.4, 0.5), 20: (0.6, 0.9, 0.4)}
NAMES = ("a", "b", "w")


def ones(share, n=20):
    return tuple(float(k < round(share * n)) for k in range(n))


def hand_run(folder, table=STAGES, trained=((), ("a",), ("b",)), entropy=(1.0, 0.9, 0.4)):
    """Write a run folder with a transfer file alone: no items, so that both halves are all items."""
    rows = [
        Evaluation(
            trained=who,
            step=step,
            seed=0,
            scores=dict(zip(NAMES, map(ones, levels), strict=True)),
            entropy={"a": nats},
        ).as_row()
        for (step, levels), who, nats in zip(table.items(), trained, entropy, strict=True)
    ]
    document = {"version": 1, "domains": NAMES, "kinds": dict.fromkeys(NAMES, "structured"), "rows": rows}
    folder.mkdir()
    (folder / "transfer.json").write_text(json.dumps(document | {"watch_only": ["w"]}))
    return folder


class Page(HTMLParser):
    """The report as elements: (tag, attributes, text until it closes); checks that every tag is closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "inside": [e["id"] for e in self.open if "id" in e]} | dict(attrs)
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open[-1]["tag"] == tag
        self.open.pop()

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, tag, section=None, **attributes):
        return [
            e
            for e in self.elements
            if e["tag"] == tag
            and (section is None or section in e["inside"])
            and all(e.get(key.replace("_", "-")) == value for key, value in attributes.items())
        ]

    def plots(self, section):
        """Return {title: hover data} of a section's charts."""
        titles = [e["text"].split("  ")[0].strip() for e in self.find("figcaption", section)]
        data = [json.loads(e["data-hover"]) for e in self.find("div", section) if "data-hover" in e]
        return {title.split(" ")[0]: plot for title, plot in zip(titles, data, strict=True)}

    @property
    def missing(self):
        return self.find("footer")[0]["text"]


def report(tmp_path, *runs):
    return Page(write_report(runs, tmp_path / "report.html"))


def test_summary_has_the_numbers_worked_by_hand(tmp_path):
    found = summarise(hand_run(tmp_path / "run"))
    assert found["domains"]["a"]["score"]["before"][1] == pytest.approx(0.2)
    assert found["domains"]["a"]["score"]["after"][1] == pytest.approx(0.6)
    assert found["domains"]["a"]["change"][1] == pytest.approx(0.4)
    assert found["domains"]["a"]["bwt"][1] == pytest.approx(-0.2)
    assert found["domains"]["b"]["bwt"] is None
    assert found["domains"]["w"]["watch_only"] is True
    assert found["domains"]["w"]["bwt"][1] == pytest.approx(-0.1)
    assert found["transfer"]["a"]["b"][1] == pytest.approx(0.0)
    assert found["transfer"]["b"]["a"][1] == pytest.approx(-0.2)
    assert found["domains"]["a"]["entropy"]["after"] == 0.4
    assert found["evaluations"] == 3 and found["steps"] == 20 and found["finished"] is False
    json.dumps(found, allow_nan=False)


def test_held_out_curves_show_the_mean_scores_at_their_steps(tmp_path):
    plots = report(tmp_path, hand_run(tmp_path / "run")).plots("score")
    assert list(plots) == list(NAMES)
    _, _, steps, values, low, high = plots["a"]["s"][0]
    assert steps == [0, 10, 20] and values == [0.2, 0.8, 0.6]
    assert all(below < value < above for below, value, above in zip(low, values, high, strict=True))


def test_dots_lie_where_the_axis_says(tmp_path):
    page = report(tmp_path, hand_run(tmp_path / "run"))
    dots = next(e["d"] for e in page.find("path", "score") if e["class"] == "dot")
    labels = [e for e in page.find("span", "score") if e["class"] == "y"]
    first = {float(e["text"]): float(e["style"].removeprefix("top:").rstrip("%")) for e in labels[:4]}
    (value_a, top_a), (value_b, top_b) = list(first.items())[:2]
    points = [tuple(map(float, xy)) for xy in re.findall(r"M([\d.]+) ([\d.]+)h0", dots)]
    assert [x for x, _ in points] == [0, 500, 1000]
    values = [value_a + (y / 10 - top_a) * (value_b - value_a) / (top_b - top_a) for _, y in points]
    assert values == pytest.approx([0.2, 0.8, 0.6], abs=2e-3)


def test_heatmap_marks_as_sure_only_effects_whose_interval_leaves_out_zero(tmp_path):
    page = report(tmp_path, hand_run(tmp_path / "run"))
    cells = [e for e in page.find("td", "transfer") if "--a" in e.get("style", "")]
    rows = {"a": cells[:3], "b": cells[3:]}
    assert [e["text"][:5] for e in rows["a"]] == ["+.600", "+.000", "+.000"]
    assert [e["text"][:5] for e in rows["b"]] == ["−.200", "+.500", "−.100"]
    assert rows["a"][0]["class"] == "gain sure own" and rows["b"][1]["class"] == "gain sure own"
    assert "open" in rows["a"][1]["class"] and "open" in rows["b"][2]["class"]


def test_sentences_name_what_the_intervals_carry(tmp_path):
    ran, learned, forgot, entropy, _, _ = tell(find(read_run(hand_run(tmp_path / "run"))))
    assert "20 steps on 2 domains (a and b), watching w" in ran
    assert "rose in b +0.500" in learned and "a +0.400" in learned
    assert "for w the change cannot be told from zero" in learned
    assert "Backward transfer is −0.200 on average over 1 domain" in forgot
    assert "a moved from 1.00 to 0.40" in entropy


def test_sentences_claim_nothing_where_nothing_moved(tmp_path):
    still = dict.fromkeys((0, 10, 20), (0.5, 0.4, 0.5))
    found = tell(find(read_run(hand_run(tmp_path / "run", table=still))))
    assert "no domain's held-out score can be told from where it started" in found[1]
    assert "no loss since the end of its own stage can be told from zero" in found[2]


def test_one_lucky_domain_among_twenty_is_not_claimed(tmp_path):
    # 36 of 100 items moved up and 20 down: alone its 95 % interval leaves out zero, at 1 - .05 / 20 it does not
    names = [f"d{k}" for k in range(20)]
    before = dict.fromkeys(names, (0.0, 1.0) * 50)
    lucky = [1.0, 0.0] * 20 + [1.0, 1.0] * 16 + [0.0, 1.0] * 14
    rows = [
        Evaluation(trained=(), step=0, seed=0, scores=before),
        Evaluation(trained=tuple(names), step=5, seed=0, scores=before | {"d3": tuple(lucky)}),
    ]
    document = {"version": 1, "domains": names, "kinds": dict.fromkeys(names, "structured")}
    (tmp_path / "transfer.json").write_text(json.dumps(document | {"rows": [row.as_row() for row in rows]}))
    found = find(read_run(tmp_path))
    rows = [found.evaluations[n].scores["d3"] for n in (1, 0)]
    assert changed(*rows).is_above_zero and not found.change["d3"].is_above_zero
    assert "d3" not in tell(found)[1] and "no domain's" in tell(found)[1]


def test_entropy_is_judged_against_the_recipes_multiples_of_the_base(tmp_path):
    run = hand_run(tmp_path / "run", entropy=(2.0, 1.8, 0.4))
    (run / "recipe.yaml").write_text("domains: {a: {train: x}, b: {train: y}, w: {}}\nentropy: {band: [0.5, 1.5]}\n")
    entropy = summarise(run)["domains"]["a"]["entropy"]
    assert entropy == {"before": 2.0, "after": 0.4, "band": [1.0, 3.0], "place": "below"}
    assert "below it in a" in summarise(run)["story"][3]


def test_mixtures_have_no_backward_transfer_but_a_drawdown(tmp_path):
    both = ((), ("a", "b"), ("a", "b"))
    found = summarise(hand_run(tmp_path / "run", trained=both))
    assert found["domains"]["a"]["bwt"] is None
    assert found["domains"]["a"]["drawdown"][1] == pytest.approx(-0.2)
    assert found["story"][2].startswith("Drawdown is ")
    heads = [e["text"] for e in report(tmp_path, tmp_path / "run").find("th", "domains")]
    assert "drawdown" in heads and "backward transfer" not in heads
    assert found["transfer"] == {}


def recorded(kind, folder):
    """Write one of four runs: two whose numbers are worked by hand, a synthetic one, a real one that was killed."""
    if kind == "killed":
        folder.mkdir()
        return run_folder(folder)
    make = {"stages": hand_run, "mixed": partial(hand_run, trained=((), ("a", "b"), ("a", "b"))), "full": write_run}[
        kind
    ]
    run = make(folder)
    if kind != "full":
        (run / "recipe.yaml").write_text(
            "domains: {a: {train: x}, b: {train: y}, w: {}}\nentropy: {band: [0.5, 1.5]}\n"
        )
        alarms = [{"step": 20, "kind": "collapse", "domain": "a", "message": "fell"}, {"step": 20, "kind": "stale"}]
        (run / "alarms.jsonl").write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms))
    return run


RECORDED = ("stages", "mixed", "full", "killed")


@pytest.mark.parametrize("kind", RECORDED)
def test_sentences_table_curves_and_closing_table_have_the_same_changes(tmp_path, kind):
    run = recorded(kind, tmp_path / "run")
    findings, page, told = find(read_run(run)), report(tmp_path, run), summarise(run)
    cells = columns_of(page)
    curves = [json.loads(e["data-hover"])["s"][0] for e in page.find("div", "forgetting") if "data-hover" in e]
    last = [ends(curve) for curve in curves]
    closing_lines = rows_of(closing(findings))
    story = " ".join(told["story"])
    for n, name in enumerate(told["domains"]):
        for of in ("change", "bwt", "drawdown"):
            low, mid, high = told["domains"][name][of] or (math.nan,) * 3
            column = cells.get({"bwt": "backward transfer"}.get(of, of))
            if column is None or math.isnan(mid):
                continue
            written = f"{signed(mid)}[{signed(low)}, {signed(high)}]"
            assert column[n] == written, (name, of)
            if of == "change":
                assert written.replace("[", " [") in closing_lines[name]
            elif kind == "full" or of != "bwt" or name not in findings.run.watch_only:
                assert any(point == pytest.approx((mid, low, high), rel=1e-3, abs=1e-6) for point in last), (name, of)
            if low > 0 or high < 0:
                said = re.findall(rf"{name} (\S+ \[[^\]]*\])", story)
                assert of != "change" or written.replace("[", " [") in said


@pytest.mark.parametrize("kind", RECORDED)
def test_scores_entropy_transfer_and_alarms_are_the_same_in_every_place(tmp_path, kind):
    run = recorded(kind, tmp_path / "run")
    findings, page, told = find(read_run(run)), report(tmp_path, run), summarise(run)
    cells, closing_lines, watched = columns_of(page), rows_of(closing(findings)), rows_of(picture_of(findings))
    held_out, nats = page.plots("score"), page.plots("entropy")
    for n, (name, of) in enumerate(told["domains"].items()):
        (_, before, _), (low, after, high) = of["score"]["before"], of["score"]["after"]
        assert cells["held-out score"][n].startswith(f"{before:.3f} → {after:.3f}")
        assert ends(held_out[name]["s"][0]) == pytest.approx((after, low, high), rel=1e-3, abs=1e-6)
        assert f" {before:.2f} → {after:.2f} " in closing_lines[name] and f" {after:.3f} " in watched[name]
        entropy = of["entropy"]
        if entropy["after"] is None:
            assert cells["entropy"][n][0] in ("–", *"0123456789") and "→" not in cells["entropy"][n]
            continue
        moved = f"{entropy['before']:.2f} → {entropy['after']:.2f}"
        assert cells["entropy"][n].startswith(moved) and moved in closing_lines[name]
        assert f" {entropy['after']:.2f} " in watched[name]
        assert nats[name]["s"][-1][3][-1] == pytest.approx(entropy["after"], rel=1e-3)
        place, outside = entropy["place"], ("below", "above")
        assert place in cells["entropy"][n] and (f"{place} its band" in closing_lines[name]) == (place in outside)
        assert (re.search(rf"{place} it in [^;]*{name}", told["story"][3]) is not None) == (place in outside)
        low, high = entropy["band"]
        mark = watched[name].split("●")
        assert ("─" in mark[0], "─" in mark[1]) == (entropy["after"] > low, entropy["after"] < high)
    written = [e["text"].partition("…")[0] for e in page.find("td", "transfer") if "--a" in e.get("style", "")]
    digits = 3 if len(told["domains"]) <= 6 else 2
    said = [cell[1] for row in told["transfer"].values() for cell in row.values()]
    assert [float(text.replace("−", "-")[: digits + 2]) for text in written] == pytest.approx(said, abs=6e-4)
    rung, n = told["alarms"], len(told["alarms"])
    assert len(page.find("tr", "alarms")) == (n + 1 if n else 0)
    assert (f"{n} alarm" if n else "no alarm") in told["story"][4].replace("no alarm is", "no alarm")
    assert closing(findings).splitlines()[-1].startswith(f"{n} alarm" if n else "no alarm")
    assert picture_of(findings).count(": ") >= n and all(str(alarm["step"]) in picture_of(findings) for alarm in rung)


def columns_of(page):
    """The table of domains by column, as its cells are read."""
    cells = {e["data-label"]: [] for e in page.find("td", "domains")}
    for e in page.find("td", "domains"):
        cells[e["data-label"]].append(e["text"].strip())
    return cells


def rows_of(said):
    """A terminal's lines by the domain that they begin with."""
    rows = [line.strip("│ ") + " " for line in said.splitlines()]
    return {row.split()[0]: row for row in reversed(rows) if row.strip()}


def picture_of(findings):
    """What `polyphony watch` shows."""
    out = io.StringIO()
    Console(file=out, width=WIDE).print(picture(findings))
    return out.getvalue()


def ends(curve):
    """(value, low, high) where a curve ends."""
    _, _, _, ys, low, high = curve
    return (ys[-1], low[-1], high[-1]) if low else (ys[-1],) * 3


def test_a_run_is_compared_with_the_one_of_its_name_before_it(tmp_path):
    for name, at, rate in (
        ("one", "2026-01-01T10:00:00", 1),
        ("two", "2026-01-02T10:00:00", 2),
        ("other", "2026-01-03", 3),
    ):
        run = hand_run(tmp_path / name, table=STAGES if name == "two" else {**STAGES, 20: (0.5, 0.9, 0.4)})
        named = "else" if name == "other" else "mine"
        (run / "recipe.yaml").write_text(
            f"name: {named}\ndomains: {{a: {{train: x}}}}\ngrpo: {{learning_rate: {rate}}}\n"
        )
        (run / "end.json").write_text(json.dumps({"how": "finished", "at": at}))
    page = report(tmp_path, tmp_path / "two")
    assert page.find("h1")[0]["text"] == "mine in two, 2026-01-02 10:00"
    assert "then → now" in page.find("section", id="changed")[0]["text"]
    rows = [e["text"].strip() for e in page.find("tr", "changed")]
    assert (
        rows[1].startswith("a+0.100")
        and rows[1].endswith("0.4 → 0.4−0.300 → −0.200")
        and rows[-1] == "grpo.learning_rate12"
    )
    assert "Against mine in one, 2026-01-01 10:00" in page.find("section", id="changed")[0]["text"]
    assert not report(tmp_path, tmp_path / "one").find("section", id="changed")


@pytest.mark.parametrize(
    ("alarms", "finished", "says"),
    [
        ([], False, "Next: it goes on with `polyphony train --resume run`"),
        (
            [{"kind": "collapse", "domain": "a", "step": 1, "remedy": "more rows"}],
            True,
            "more rows (for collapse of a)",
        ),
        ([], True, "Next: give a a guardrail"),
    ],
)
def test_the_last_sentence_says_what_to_do_next(tmp_path, alarms, finished, says):
    lost = {0: (0.9, 0.4, 0.5), 10: (0.1, 0.9, 0.5), 20: (0.1, 0.9, 0.5)}
    run = hand_run(tmp_path / "run", table=lost)
    (run / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in alarms))
    if finished:
        (run / "end.json").write_text("{}")
    assert says in tell(find(read_run(run)))[-1]


@pytest.mark.parametrize(
    ("dead", "says"), [(0.93, "hardly a group had a gradient. All wrong: easier rows"), (0.5, "more steps")]
)
def test_a_run_of_dead_groups_is_not_told_to_go_on(tmp_path, dead, says):
    run = hand_run(tmp_path / "run", table=dict.fromkeys((0, 10, 20), (0.1, 0.1, 0.5)))
    line = {"step": 10, "domain/a/n": 64.0, "domain/a/dead_completions": dead}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "end.json").write_text("{}")
    assert says in tell(find(read_run(run)))[-1]


def test_a_domain_that_knows_its_training_prompts_and_gains_nothing_is_told_so(tmp_path):
    run = hand_run(tmp_path / "run", table=dict.fromkeys((0, 10, 20), (0.5, 0.5, 0.5)))
    lines = [{"step": step, "domain/a/dead_correct": step / 20, "domain/b/dead_correct": 0.1} for step in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "end.json").write_text("{}")
    says = (
        "Next: a: training prompts are known, and no gain is told held out: more rows, or fewer steps; more held-out "
    )
    says += "items tell smaller gains."
    assert tell(find(read_run(run)))[-1] == says
    (run / "alarms.jsonl").write_text(json.dumps({"kind": "collapse", "domain": "a", "step": 1, "remedy": "x"}) + "\n")
    assert tell(find(read_run(run)))[-1] == f"Next, what may help: x (for collapse of a). {says.removeprefix('Next: ')}"


def test_a_full_run_shows_every_section_and_well_formed_drawings(tmp_path):
    out = write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    page = Page(out)
    sections = [e["id"] for e in page.find("section")]
    absent = {"plan", "quality"}
    assert sections == [e["href"][1:] for e in page.find("a")]
    assert len(sections) == 16 and not absent & set(sections)
    drawings = re.findall(r"<svg.*?</svg>", out.read_text(), re.S)
    assert len(drawings) > 40
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "pass@k" in page.missing and "entropy per domain" not in page.missing


def test_what_the_page_draws_is_what_a_run_logs(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    ours = [
        name.split("/") for name in run.metrics if "/" in name and not name.startswith(("completions/", "sampling/"))
    ]
    assert {family for family, *_ in ours} >= {"shortcuts", "diversity", "curriculum"}
    for family, *_, metric in ours:
        key(family, metric)  # raises KeyError for a name that no run has


def test_signs_that_no_completion_shows_are_a_sentence_and_others_are_drawn(tmp_path):
    folder = write_run(tmp_path / "run", domains=("math",), watch_only=(), extras=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def shown(**signs):
        rows = [line | {f"shortcuts/math/{sign}": share for sign, share in signs.items()} for line in lines]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        text = write_report([folder], tmp_path / "report.html").read_text()
        return text.partition('<section id="degeneration">')[2].partition("</section>")[0]

    assert "<svg" not in (calm := shown(bare_answer=0.0, truncation=0.0)) and "No completion" in calm
    loud = shown(bare_answer=0.0, truncation=0.25)
    assert loud.count("<svg") == 1 and "Cut at the length limit" in loud and "Bare" not in loud


def test_the_page_fetches_nothing(tmp_path):
    text = write_report([write_run(tmp_path / "run")], tmp_path / "report.html").read_text()
    page = Page(tmp_path / "report.html")
    assert not any("src" in e or e["tag"] == "link" for e in page.elements)
    assert all(e["href"].startswith("#") for e in page.find("a"))
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", text)


def test_the_same_runs_give_the_same_page(tmp_path):
    run = write_run(tmp_path / "run", steps=20, eval_every=10, items=20)
    first = write_report([run], tmp_path / "one.html").read_text()
    assert first == write_report([run], tmp_path / "two.html").read_text()


def test_published_scores_are_those_of_the_report_half(tmp_path):
    run = hand_run(tmp_path / "run")
    document = json.loads((run / "transfer.json").read_text())
    ids = [f"item-{k}" for k in range(20)]
    document["items"] = dict.fromkeys(NAMES, ids)
    (run / "transfer.json").write_text(json.dumps(document))
    published = [k for k, side in enumerate(halves(ids)) if side == "report"]
    expected = sum(k < 4 for k in published) / len(published)
    assert summarise(run)["domains"]["a"]["score"]["before"][1] == pytest.approx(expected)


def test_mixture_chart_stacks_shares_and_lists_each_reason_once(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run", steps=40, eval_every=20, items=20))
    plot = page.plots("mixture")["share"]
    assert [name for name, *_ in plot["s"]] == list(FOUR)
    assert [words for _, words in plot["w"]] == [f"stage {k + 1} of 4: {name}" for k, name in enumerate(FOUR)]
    assert [at for at, _ in plot["w"]] == [0, 10, 20, 30]
    cells = [e["text"] for e in page.find("td", "mixture")]
    assert cells[:2] == ["0–9", "stage 1 of 4: arithmetic"]


def test_a_stack_reaches_from_the_floor_to_the_sum():
    layers = [
        Layer(name="a", share=np.array([0.25, 1.0]), colour="red"),
        Layer(name="b", share=np.array([0.75, 0]), colour="blue"),
    ]
    drawn = [shape.attributes["d"] for shape in draw_stack("share", np.array([0.0, 1.0]), layers).shapes]
    # draw 0 is 0..500 and draw 1 is 500..1000 across; a fills the lower quarter, then everything
    assert drawn == ["M0 1000H0V750H500H500V0H1000V1000H500V1000H0Z", "M0 750H0V0H500H500V0H1000V0H500V750H0Z"]


def test_long_lines_are_thinned_to_means_and_ranges():
    x, mean, low, high = thin(np.arange(6.0), np.array([0.0, 2.0, 4.0, 4.0, 5.0, 9.0]), bins=3)
    assert x.tolist() == [0.5, 2.5, 4.5]
    assert mean.tolist() == [1.0, 4.0, 7.0]
    assert low.tolist() == [0.0, 4.0, 5.0] and high.tolist() == [2.0, 4.0, 9.0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (-0.31, 0.12, [-0.3, -0.2, -0.1, 0, 0.1]), (0, 2000, [0, 500, 1000, 1500, 2000])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


def test_a_single_point_is_drawn_as_a_dot(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    page = report(tmp_path, tmp_path)
    assert [e["class"] for e in page.find("path", "health") if "d" in e and e["class"] == "dot"] == ["dot"]


def test_samples_come_from_start_middle_and_end(tmp_path):
    run = write_run(tmp_path / "run", domains=("a", "b"), watch_only=(), steps=40, eval_every=10, items=10)
    page = report(tmp_path, run)
    said = [e["text"] for e in page.find("pre", "samples")]
    assert said[:3] == [f"After {step} steps I say <answer 1>." for step in (0, 20, 40)]
    assert len(said) == 2 * 2 * 3


def test_what_would_turn_or_hide_text_stands_as_its_escape(tmp_path):
    run = write_run(tmp_path / "run", steps=20, items=20)
    told = {"step": 0, "domain": "arithmetic", "prompt": "a\x1b[2Jb", "completion": "x\u202ey\n\tz\u2066", "score": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(told) + "\n")
    text = (write_report([run], tmp_path / "report.html")).read_text()
    assert "a\\x1b[2Jb" in text and "x\\u202ey\n\tz\\u2066" in text
    assert not set("\x1b\u202e\u2066") & set(text)


def test_names_and_words_of_a_run_cannot_become_markup(tmp_path):
    name = '<b>"x"&'
    rows = [{"step": 1, f"domain/{name}/reward": 0.5}, {"step": 2, f"domain/{name}/reward": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 1, "domain": name, "prompt": "</script>", "completion": "<img src=x><script>alert(1)</script>"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = report(tmp_path, tmp_path)
    assert not page.find("img") and len(page.find("script")) == 1
    assert name in page.find("figcaption", "reward")[0]["text"]
    assert [e["text"] for e in page.find("pre", "samples")] == [sample["completion"]]


def test_a_cut_off_log_shows_what_is_there_and_says_so(tmp_path):
    run = write_run(tmp_path / "run", steps=40, eval_every=20, items=20)
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:30]) + lines[30][:25])
    page = report(tmp_path, run)
    assert page.plots("reward")["arithmetic"]["s"][0][2][-1] == 10
    assert page.plots("health")["loss"]["s"][0][2][-1] == 30
    assert "metrics.jsonl: its last line is cut off" in page.missing


def test_a_broken_line_in_the_middle_is_left_out_and_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo\n[]\n{"step": 3, "loss": NaN}\n')
    run = read_run(tmp_path)
    assert run.metrics["loss"].steps.tolist() == [1]
    assert "metrics.jsonl: 2 unreadable lines were left out, the first is line 2" in run.missing


def test_a_run_without_any_evaluation_still_has_its_training_curves(tmp_path):
    run = write_run(tmp_path / "run", steps=20, eval_every=10, items=10)
    (run / "transfer.json").unlink()
    (run / "final").rmdir()
    page = report(tmp_path, run)
    assert "transfer.json is absent" in page.missing and "no transfer heatmap" in page.missing
    assert set(page.plots("reward")) == set(FOUR)
    story = summarise(run)["story"]
    assert "still being written" in story[0] and "cannot be said" in story[1]


def test_a_half_written_transfer_file_is_named_and_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=20, eval_every=10, items=10)
    text = (run / "transfer.json").read_text()
    (run / "transfer.json").write_text(text[: len(text) // 2])
    page = report(tmp_path, run)
    assert "transfer.json cannot be used" in page.missing
    # held-out scores were logged too: the curves are drawn from there, without intervals
    assert page.plots("score")["facts"]["s"][0][2] == [10, 20]


def test_only_the_baseline_is_one_dot_and_no_claim(tmp_path):
    run = hand_run(tmp_path / "run", table={0: STAGES[0]}, trained=((),), entropy=(1.0,))
    page = report(tmp_path, run)
    assert page.plots("score")["a"]["s"][0][3] == [0.2]
    assert "no forgetting curves" in page.missing
    assert summarise(run)["domains"]["a"]["change"] is None


def test_one_domain_is_enough(tmp_path):
    run = write_run(tmp_path / "run", domains=("math",), watch_only=(), steps=20, eval_every=10, items=20, probes=False)
    page = report(tmp_path, run)
    assert list(page.plots("score")) == ["math"]
    assert "hold for all" not in " ".join(summarise(run)["story"])


def test_two_runs_share_panels_and_name_what_each_lacks(tmp_path):
    first = write_run(tmp_path / "one", domains=("math", "code"), watch_only=(), steps=20, eval_every=10, items=30)
    second = write_run(
        tmp_path / "two", domains=("math", "qa"), watch_only=(), scheduler="joint", steps=20, eval_every=10, items=30
    )
    page = report(tmp_path, first, second)
    plots = page.plots("score")
    assert [name for name, *_ in plots["math"]["s"]] == ["one", "two"]
    assert [name for name, *_ in plots["qa"]["s"]] == ["two"]
    assert "A has no domain qa" in page.missing and "B has no domain code" in page.missing
    ends = [e["text"] for e in page.find("span", "score") if e.get("class") == "end"]
    assert ends.count("A") == 2 and ends.count("B") == 2


def test_a_report_of_several_runs_is_a_file_of_its_own_and_is_opened_if_asked(tmp_path, capsys, monkeypatch):
    runs = [write_run(tmp_path / at / "run", domains=("math",), watch_only=(), steps=20, items=30) for at in "ab"]
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", str(runs[0])]) == 0 and not opened
    own = (runs[0] / "report.html").read_bytes()
    assert main(["report", *map(str, runs), "--open"]) == 0
    both = runs[0] / "report-with-b-run.html"
    assert opened == [both.as_uri()] and (runs[0] / "report.html").read_bytes() == own
    assert capsys.readouterr().out.split() == [str(runs[0] / "report.html"), str(both)]
    assert [name for name, *_ in Page(both).plots("score")["math"]["s"]] == ["a/run", "b/run"]
    assert main(["report", *map(str, runs), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["a/run", "b/run"]  # two of one name: by their folders
    assert main(["report", str(runs[0]), str(runs[0] / "."), "--json"]) == 2
    assert "is given twice" in capsys.readouterr().err
    monkeypatch.chdir(runs[0])
    (runs[0] / "alarms.jsonl").write_text('{"step": 1, "kind": "stale", "value": NaN}\n')
    assert main(["report", ".", str(runs[1]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["a/run"]["alarms"][0]["value"] is None


def test_an_alarms_line_says_whose_it_is_where_there_are_two_runs(tmp_path):
    runs = []
    for name, steps in (("one", (5,)), ("two", (5, 15))):
        run = write_run(tmp_path / name, domains=("math",), watch_only=(), steps=20, eval_every=10, items=30)
        alarm = {"domain": "math", "kind": "collapse", "message": "fell"}
        (run / "alarms.jsonl").write_text("".join(json.dumps(alarm | {"step": step}) + "\n" for step in steps))
        runs.append(run)

    def whose(*shown):
        return [e["text"] for e in report(tmp_path, *shown).find("span", "entropy") if e.get("class") == "whose"]

    assert whose(*runs) == ["AB", "B"]
    assert whose(runs[1]) == []


def test_runs_are_compared_only_on_the_same_items(tmp_path):
    runs = [write_run(tmp_path / name, domains=("a", "b"), steps=10, eval_every=5, items=20) for name in ("x", "y")]
    document = json.loads((runs[1] / "transfer.json").read_text())
    document["items"]["b"].reverse()
    (runs[1] / "transfer.json").write_text(json.dumps(document))
    page = report(tmp_path, *runs)
    table = [e["text"] for e in page.find("tr", "domains", data_domain="a")][-1]
    other = [e["text"] for e in page.find("tr", "domains", data_domain="b")][-1]
    assert "+0.000[" in table
    assert other.endswith("–")


def test_predictions_stand_beside_what_was_measured(tmp_path):
    run = hand_run(tmp_path / "run")
    stages = [{"stage": "a", "step": 10, "predicted": {"a": 0.75}, "measured": {"a": 0.8}}]
    (run / "predicted.json").write_text(json.dumps(stages))
    page = report(tmp_path, run)
    assert [e["text"] for e in page.find("td", "plan")] == ["a", "a", "0.750", "0.800"]


@pytest.mark.parametrize("make", ["absent", "empty", "file"])
def test_a_folder_that_is_no_run_is_named(tmp_path, make):
    path = tmp_path / "nothing"
    if make == "empty":
        path.mkdir()
    if make == "file":
        path.write_text("")
    with pytest.raises(ValueError, match="nothing"):
        write_report([path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")


def test_it_needs_no_tensor_library_trainer_or_tracker():
    code = "import sys, polyphony.launch.report.report; print({'torch', 'trl', 'transformers', 'wandb'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Linear RGB as seen by eyes without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "normal": np.eye(3),
    "protan": np.array([[0.15229, 1.05258, -0.20487], [0.11450, 0.78628, 0.09922], [-0.00388, -0.04812, 1.05200]]),
    "deutan": np.array([[0.36732, 0.86065, -0.22797], [0.28009, 0.67250, 0.04741], [-0.01182, 0.04294, 0.96888]]),
    "tritan": np.array([[1.25553, -0.07675, -0.17878], [-0.07841, 0.93081, 0.14760], [0.00473, 0.69137, 0.30390]]),
}


def linear(colour):
    parts = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Return OKLab of linear RGB (Ottosson 2020)."""
    cones = rgb @ np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]).T
    mixed = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])
    return np.cbrt(cones) @ mixed.T


def luminance(colour):
    return float(linear(colour) @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize(("hues", "paper"), [(LIGHT, "#ffffff"), (DARK, "#1b1e25")])
def test_colours_stand_out_from_the_paper_and_from_each_other_for_all_eyes(hues, paper):
    for hue in hues:
        light, dark = sorted((luminance(hue), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, hue
    for eyes, matrix in EYES.items():
        seen = [oklab(np.clip(matrix @ linear(hue), 0, 1)) for hue in hues]
        nearest = min(math.dist(a, b) for k, a in enumerate(seen) for b in seen[:k])
        assert nearest >= (0.07 if eyes == "tritan" else 0.1), eyes


def test_entropy_outside_its_band_without_an_alarm_is_said_of_either_side(tmp_path):
    for name, last, where, kind in (("low", 0.3, "below", "collapse"), ("high", 1.8, "above", "explosion")):
        run = hand_run(tmp_path / name, entropy=(1.0, 0.9, last), table={**STAGES, 20: (0.9, 0.9, 0.5)})
        (run / "recipe.yaml").write_text(
            "domains: {a: {train: x}, b: {train: y}, w: {}}\nentropy: {band: [0.5, 1.5]}\n"
        )
        (run / "end.json").write_text("{}")
        told = tell(find(read_run(run)))
        assert f"{where} it in a (no alarm of a:" in told[3] and "entropy of a goes on leaving its band" in told[-1]
        (run / "alarms.jsonl").write_text(json.dumps({"step": 20, "kind": kind, "domain": "a", "message": "moved"}))
        assert "no alarm of" not in tell(find(read_run(run)))[3]


def test_a_run_that_is_running_is_not_told_to_be_resumed(tmp_path):
    run = hand_run(tmp_path / "run")
    (run / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    ran, *_, then = tell(find(read_run(run)))
    assert ran.endswith("it is still being written.") and "polyphony watch run" in then and "--resume" not in then
    with RunFolder(run).locked(say=print):  # a run that writes its own report is at its end
        assert tell(find(read_run(run)))[-1].startswith("Next: it goes on with `polyphony train --resume run`")
        (run / "end.json").write_text("{}")
        assert (
            tell(find(read_run(run)))[-1]
            == "Next: nothing stands out; a second seed would say how far this holds for the recipe."
        )
    (run / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    assert "watch" not in tell(find(read_run(run)))[-1]


@pytest.mark.parametrize("mixture", [{}, {"z": 1.0}, {"math": None}])
def test_decisions_without_a_share_of_a_known_domain_draw_nothing(tmp_path, mixture):
    run = write_run(tmp_path / "run", domains=("math",), watch_only=(), steps=20, items=20)
    (run / "decisions.jsonl").write_text(json.dumps({"draw": 0, "step": 0, "mixture": mixture, "reason": "r"}) + "\n")
    page = report(tmp_path, run)
    assert not page.find("section", id="mixture") and page.find("section", id="score")


def test_closing_lines_have_dashes_where_nothing_is_known(tmp_path):
    run = hand_run(tmp_path / "run", table={0: STAGES[0]}, trained=((),), entropy=(1.0,))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.json").write_text('{"checkpoint": "checkpoint-1"}')
    said = closing(find(read_run(run)))
    assert said.splitlines()[2].split() == ["a", "0.20", "–", "1.00"] and "nan" not in said
    assert "best checkpoint, by its worst trained domain: checkpoint-1" in said


def test_very_many_alarms_words_and_domains_stay_within_two_megabytes(tmp_path):
    names = [f"domain{n}" for n in range(40)]
    run = write_run(tmp_path / "run", domains=names, watch_only=(), steps=60, items=20)
    alarms = [{"step": n, "kind": "stale", "domain": names[n % 40], "message": "m" * 300} for n in range(20_000)]
    (run / "alarms.jsonl").write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms))
    samples = [
        json.loads(line) | {"completion": "語" * 3000} for line in (run / "samples.jsonl").read_text().splitlines()
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = write_report([run], tmp_path / "report.html")
    assert page.stat().st_size <= 2_000_000
    assert re.search(r"2\d,\d{3} alarms: the first of each kind and domain, and the newest", page.read_text())


@pytest.mark.slow
def test_two_thousand_steps_of_twenty_domains_take_ten_seconds_and_two_megabytes(tmp_path):
    domains = [f"domain{k}" for k in range(18)]
    run = write_run(tmp_path / "run", domains=domains, watch_only=("u", "v"), steps=2000, eval_every=50, items=200)
    start = time.perf_counter()
    out = write_report([run], tmp_path / "report.html")
    assert time.perf_counter() - start <= 10
    assert out.stat().st_size <= 2_000_000


def test_the_budget_is_of_completions_and_not_of_groups(tmp_path):
    folder = hand_run(tmp_path / "run")
    lines = ['"domain/a/dead_completions": 0.25, "domain/a/n": 16', '"domain/a/dead_completions": 0.5, "domain/a/n": 8']
    text = "".join(f'{{"step": {n}, "domain/a/frac_dead": 0.9, {line}}}\n' for n, line in enumerate(lines, 1))
    (folder / "metrics.jsonl").write_text(text)
    assert budget(read_run(folder)) == {"a": (24.0, 8.0)}


def test_a_replay_is_drawn_beside_the_run(tmp_path):
    run = write_run(tmp_path / "run", steps=40)
    lines = [{"draw": n, "mixture": {"arithmetic": 1.0}, "reason": "only sums"} for n in range(40)]
    page = write_replay(run, lines, scheduler="mine", out=tmp_path / "replay.html").read_text()
    assert page.count("share of each draw") >= 2 and "mine, replayed" in page and "only sums" in page
    assert "Held-out score" not in page


def test_quality_is_drawn_with_the_intervals_that_the_run_kept(tmp_path):
    run = write_run(tmp_path / "run", steps=40, eval_every=20, items=20)
    details = {"pass@1": [0.1, 0.2, 0.3], "pass@4": [0.4, 0.5, 0.6], "overconfidence": [-0.1, 0.0, 0.1]}
    lines = [
        {"step": step, "domains": {"facts": details | {"styles": {"bare": 0.75, "prose": 0.25}}}} for step in (0, 40)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path, run)
    curve = page.plots("quality")["facts"]["s"][0]
    assert curve[2] == [0, 40] and curve[3] in ([0.5, 0.5], [0.0, 0.0])
    assert "bare 75%, prose 25%" in page.find("section", id="quality")[0]["text"]


def test_the_headroom_is_told_where_score_followed_entropy(tmp_path):
    # R = .9 - .2 e^H at H = 1, .8, .5, .2: the rest of the entropy buys .2 (e^.2 - 1) = .044
    entropy = (1.0, 0.8, 0.5, 0.2)
    table = {10 * k: (0.9 - 0.2 * math.exp(h), 0.5, 0.5) for k, h in enumerate(entropy)}
    run = hand_run(tmp_path / "run", table, trained=((), ("a",), ("a",), ("a",)), entropy=entropy)
    text = report(tmp_path, run).find("section", id="exchange")[0]["text"]
    assert "using up the rest of the entropy would buy" in text
    assert "fewer than 4 evaluations, or entropy did not move" in text  # of b and w


def test_a_run_that_is_just_being_written_is_read_as_far_as_it_goes(tmp_path):
    run = write_run(tmp_path / "run", steps=40, eval_every=20, items=20)
    (run / "final").rmdir()
    (run / "evaluations.jsonl").write_text(
        '{"step": 0, "domains": {"facts": {"ece": [0.1, 0.2, 0.3]}}}\n{"step": 20, "dom'
    )
    page = report(tmp_path, run)
    assert "evaluations.jsonl: its last line is cut off" in page.missing
    assert page.plots("quality")["facts"]["s"][0][3] == [0.2]
