import copy
import io
import json
import math
import random

import pytest

from polyphony.curricula.transfer.halves import half
from polyphony.curricula.transfer.matrix import TransferMatrix, copy_document

IDS = ["abc", "", "hello", "x"]  # by sha256: report, report, steer, and "x" is report


def document():
    return {
        "version": 1,
        "domains": ["math", "writing"],
        "kinds": {"math": "structured", "writing": "open_ended"},
        "rows": [
            {"trained": [], "step": 0, "seed": 0, "scores": {"math": [0, 1, 0, 1], "writing": [0.5, 0.5, 0.5, 0.5]}},
            {
                "trained": ["math"],
                "step": 5,
                "seed": 0,
                "probe": True,
                "scores": {"math": [1, 1, 1, 1], "writing": [0.1, 0.2, 0.3, 0.4]},
                "entropy": {"math": 0.25},
            },
            {
                "trained": ["writing"],
                "step": 5,
                "seed": 0,
                "probe": True,
                "scores": {"math": [0, 1, 0, 1], "writing": [1, 1, 1, 1]},
            },
            {
                "trained": ["math", "writing"],
                "step": 10,
                "seed": 0,
                "probe": True,
                "scores": {"math": [1, 1, 0, 1], "writing": [1, 0, 1, 1]},
            },
        ],
    }


def changed(path, value):
    """Return the document with one entry set, or removed where `value` is KeyError."""
    whole = copy.deepcopy(document())
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return whole


def test_a_file_is_read_and_written_back_the_same(tmp_path):
    matrix = TransferMatrix.from_json(document() | {"items": {"math": IDS, "writing": IDS}, "provenance": {"k": 1}})
    matrix.save(tmp_path / "deep" / "transfer.json")
    assert TransferMatrix.load(tmp_path / "deep" / "transfer.json") == matrix
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["transfer.json"]


def test_probes_joint_arm_and_baseline_are_told_apart():
    matrix = TransferMatrix.from_json(document())
    assert [row.trained for row in matrix.probes] == [("math",), ("writing",)]
    assert [row.trained for row in matrix.joint_arm] == [("math", "writing")]
    assert [row.trained for row in matrix.baselines(probe=True)] == [()]
    assert list(matrix.runs()) == []


def test_a_probe_that_starts_elsewhere_than_the_run_has_its_own_baseline():
    rows = document()["rows"]
    warm = rows[0] | {"step": 60, "probe": True}
    run = rows[1] | {"probe": False}
    matrix = TransferMatrix.from_json(document() | {"rows": [rows[0], warm, run]})
    assert [row.step for row in matrix.baselines(probe=True)] == [60]
    assert [[row.step for row in rows] for rows in matrix.runs()] == [[0, 5]]


def test_null_is_as_good_as_absent_where_a_key_may_be_left_out_and_ids_may_be_integers():
    whole = document() | {"items": None, "provenance": None}
    whole["rows"][1]["entropy"] = None
    assert TransferMatrix.from_json(whole).rows[1].entropy == {}
    numbered = TransferMatrix.from_json(document() | {"items": {"math": [1, 2, 3, 4], "writing": IDS}})
    assert numbered.items == {"math": ("1", "2", "3", "4"), "writing": tuple(IDS)}


def test_decisions_see_the_steer_half_where_the_file_names_its_items():
    assert [half(i) for i in IDS] == ["report", "report", "steer", "report"]
    matrix = TransferMatrix.from_json(document() | {"items": {"math": IDS, "writing": IDS}})
    assert matrix.on("steer").rows[1].scores == {"math": (1,), "writing": (0.3,)}
    assert matrix.on("report").rows[1].scores == {"math": (1, 1, 1), "writing": (0.1, 0.2, 0.4)}


def test_without_items_both_halves_are_all_items():
    matrix = TransferMatrix.from_json(document())
    assert matrix.on("steer") is matrix


def test_with_row_checks_the_row_against_the_others():
    matrix = TransferMatrix.from_json(document())
    with pytest.raises(ValueError, match="rows 1 and 4 are the same measurement"):
        matrix.with_row(matrix.rows[1])


BAD = [
    (("version",), 5, "version 5 .* only 1 to 4"),
    (("rows", 3, "arm"), {"kind": "merge"}, "`arm` or `tokens`, and `shared`, are of version 4 of the file, got 1"),
    (("rows", 3, "arm"), {"kind": "blend"}, "row 3: an arm is a probe of all of .* whose kind is one of sequence"),
    (("rows", 1, "arm"), {"kind": "merge"}, r"row 1: an arm is a probe of all of .* got probe True of \['math'\]"),
    (("rows", 1, "tokens"), -1, "row 1: tokens must be an integer >= 0, got -1"),
    (("shared",), {"math": {"code": {}}}, r"shared: unknown domains \['code'\]"),
    (
        ("shared",),
        {"math": {"writing": {"cosine": 1.0}}},
        "'math' and 'writing' core_overlap, sign_conflicts, cosine are told",
    ),
    (("rows", 1, "placebo"), True, "row 1: a placebo is of version 3 of the file, got 1"),
    (
        ("rows", 3, "placebo"),
        True,
        r"row 3: a placebo is a probe of one domain, got probe True of \['math', 'writing'\]",
    ),
    (("rows",), KeyError, "an object with version, domains, kinds, rows"),
    (("itmes",), {}, r"unknown keys \['itmes'\]"),
    (("rows", 0, "trained"), ["math"], "no baseline"),
    (("rows", 1, "trained"), ["maths"], r"row 1: trained: unknown domains \['maths'\]"),
    (("rows", 1, "trained"), "math", "row 1: trained must be a list, got 'math'"),
    (("rows", 1, "trained"), ["math", "math"], "names a domain twice"),
    (("rows", 1, "scores", "math"), [1, 1, 1], "row 1, domain 'math': 3 items, but row 0 has 4"),
    (("rows", 1, "scores", "math"), [], "row 1, domain 'math': no scores"),
    (("rows", 1, "scores", "math"), [1, 1, 1, math.nan], "row 1, domain 'math', item 3: .* got nan"),
    (("rows", 1, "scores", "math"), [1, 1, 1, None], "row 1, domain 'math', item 3: version 1 .* got None"),
    (("rows", 1, "scores", "math"), [1, 1, 1, "1"], "item 3: .* got '1'"),
    (("rows", 1, "scores", "math"), [1, 1, 1.5, 1], r"item 2: a score must be a number in \[0, 1\], or null, got 1.5"),
    (("rows", 1, "scores", "math"), 0.7, "must be a list"),
    (("rows", 1, "scores", "math"), KeyError, "scores must name each of"),
    (("rows", 1, "scores", "code"), [1, 1, 1, 1], "scores must name each of"),
    (("rows", 1, "entropy"), {"math": -0.1}, "entropy must be finite"),
    (("rows", 1, "step"), KeyError, "row 1: a row is an object with"),
    (("rows", 1, "step"), 1.5, "row 1: step must be an integer"),
    (("rows", 1, "seed"), "0", "row 1: seed must be an integer"),
    (("rows", 1, "prbe"), True, r"row 1: unknown keys \['prbe'\]"),
    (("rows", 2, "trained"), ["math"], "rows 1 and 2 are the same measurement"),
    (("domains",), ["math"], "kinds must name each domain once"),
    (("domains",), ["math", "math"], "different, non-empty names"),
    (("domains",), [], "at least one"),
    (("kinds", "math"), "verifiable", "kind is structured or open_ended, got 'verifiable'"),
    (("items",), {"math": IDS}, "items must name each of"),
    (("items",), {"math": IDS, "writing": IDS[:3]}, "'writing': 3 item ids for 4 scores"),
    (("items",), {"math": IDS, "writing": ["x"] * 4}, "'writing': items to be split"),
    (("watch_only",), ["math"], r"trained on watch-only domains \['math'\]"),
    (("watch_only",), ["math", "writing"], "every domain is watch-only"),
    (("watch_only",), ["qa"], r"unknown domains \['qa'\]"),
    (("version",), True, "version must be an integer, got True"),
    (("domains",), None, "an object with version, domains, kinds, rows"),
    (("domains",), "math", "domains must be a list, got 'math'"),
    (("domains",), [["math"]], "different, non-empty names"),
    (("kinds",), ["math"], "kinds must be an object"),
    (("rows",), {"trained": []}, "rows must be a list"),
    (("rows", 1), 7, "row 1: a row is an object with trained, step, seed, scores, got 7"),
    (("rows", 1, "scores"), [1, 1], "row 1: scores must be an object"),
    (("rows", 1, "trained"), [["math"]], r"row 1: trained: unknown domains \[\['math'\]\]"),
    (("rows", 1, "scores", "math"), [1, 1, 1, 10**400], "item 3: a score must be a number"),
    (("rows", 1, "probe"), "false", "row 1: probe must be true or false, got 'false'"),
    (("rows", 1, "entropy"), [], "row 1: entropy must be an object"),
    (("rows", 1, "exposure"), {"math": -1}, "exposure counts prompts, an integer >= 0, got -1"),
    (("items",), {"math": IDS, "writing": [None] * 4}, "items of 'writing' must be a list of ids"),
    (("watch_only",), 1, "watch_only must be a list, got 1"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_a_wrong_file_is_refused_by_name(tmp_path, path, value, message):
    file = tmp_path / "transfer.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ValueError, match=message) as raised:
        TransferMatrix.load(file)
    assert str(file) in str(raised.value)


def test_a_probe_of_some_domains_is_neither_a_probe_nor_the_joint_arm():
    names = ["math", "code", "writing"]
    rows = [
        {"trained": t, "step": 1, "seed": 0, "scores": {n: [0, 1] for n in names}, "probe": True}
        for t in ([], names[:2])
    ]
    whole = {"version": 1, "domains": names, "kinds": dict.fromkeys(names, "structured"), "rows": rows}
    with pytest.raises(ValueError, match="a probe trains one domain, or all"):
        TransferMatrix.from_json(whole)
    assert len(TransferMatrix.from_json(whole | {"watch_only": ["writing"]}).joint_arm) == 1


def test_a_file_cut_in_the_middle_is_refused_by_name(tmp_path):
    file = tmp_path / "transfer.json"
    file.write_text(json.dumps(document())[:-20])
    with pytest.raises(ValueError, match=r"transfer\.json"):
        TransferMatrix.load(file)


def gappy() -> TransferMatrix:
    whole = document() | {"version": 2, "items": {"math": IDS, "writing": IDS}}
    whole["rows"][1]["scores"]["math"] = [1, None, 1, 1]
    return TransferMatrix.from_json(whole)


def test_an_item_without_a_verdict_is_null_in_a_file_of_version_2_and_in_no_other(tmp_path):
    path = tmp_path / "transfer.json"
    for matrix, version in ((gappy(), 2), (TransferMatrix.from_json(document()), 1)):
        matrix.save(path)
        assert TransferMatrix.load(path) == matrix and json.loads(path.read_text())["version"] == version
    assert gappy().on("report").rows[1].scores["math"] == (1, None, 1) and gappy().rows[1].mean_score("math") == 1


def test_a_placebo_is_no_probe_and_makes_a_file_and_a_ledger_of_version_3(tmp_path):
    base, *rows = document()["rows"]
    rows = [base | {"probe": True}, *rows, *(row | {"placebo": True} for row in rows[:2])]
    matrix = TransferMatrix.from_json(document() | {"version": 3, "rows": rows})
    assert (
        [row.trained for row in matrix.probes] == [row.trained for row in matrix.placebo] == [("math",), ("writing",)]
    )
    matrix.save(tmp_path / "transfer.json")
    assert TransferMatrix.load(tmp_path / "transfer.json") == matrix and matrix.as_json()["version"] == 3
    assert (
        matrix.head_line()["version"] == 3 and TransferMatrix.from_lines([matrix.head_line()]).placebo == matrix.placebo
    )


def test_an_arm_is_no_joint_run_and_makes_a_file_and_a_ledger_of_version_4(tmp_path):
    *rows, joint = (row | {"probe": True} for row in document()["rows"])
    arms = [joint | {"arm": {"kind": "merge", "method": method}} for method in ("ties", "linear")]
    shared = {"math": {"writing": {"core_overlap": 0.2, "sign_conflicts": 0.5, "cosine": 0.1}}}
    whole = {"version": 4, "shared": shared, "rows": [*rows, joint | {"tokens": 70}, *arms]}
    matrix = TransferMatrix.from_json(document() | whole)
    assert [row.tokens for row in matrix.joint_arm] == [70]
    assert [row.arm["method"] for row in matrix.arms] == ["ties", "linear"]
    matrix.save(tmp_path / "transfer.json")
    assert TransferMatrix.load(tmp_path / "transfer.json") == matrix
    assert TransferMatrix.from_lines([matrix.head_line()]).arms == matrix.arms
    with pytest.raises(ValueError, match="rows 4 and 6 are the same measurement"):
        matrix.with_row(matrix.arms[0])


def test_a_ledger_whose_head_was_written_before_becomes_a_file_of_version_2():
    run = [row | {"probe": False} for row in document()["rows"][:2]]
    run[1]["scores"] = {"math": [1, 1, None, 1], "writing": [0, 0, 0, 0]}
    whole = TransferMatrix.from_json(document() | {"version": 2, "rows": run})
    lines = [
        TransferMatrix.from_json(document() | {"rows": run[:1]}).head_line(),
        *(row.as_row() for row in whole.rows),
    ]
    out = io.BytesIO()
    compact = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    copy_document(io.BytesIO(compact.encode()), out)
    assert json.loads(out.getvalue())["version"] == 2
    assert TransferMatrix.from_lines(lines).rows == whole.rows


def test_any_byte_of_a_file_that_changes_is_seen(tmp_path):
    path = tmp_path / "transfer.json"
    gappy().save(path)
    whole, rng = path.read_bytes(), random.Random(0)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"transfer\.json: "):
            TransferMatrix.load(path)
