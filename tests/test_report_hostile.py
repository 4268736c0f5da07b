"""Names that would act and results that are damaged: a report, or a sentence."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastfpl.cli import main
from fastfpl.errors import Damaged, FastfplError
from fastfpl.federation import Comparison, Sweep
from fastfpl.federation.result import summarise
from fastfpl.report import (
    csv_table,
    html_page,
    load_comparisons,
    markdown_table,
    sweep_table,
    write_report,
    write_sweep,
)
from tests.damage import JUNK, places
from tests.results import Page, pair, result, terminal

ODD = "=a|b\x1b[2J$x^{$<i>\u202e[b]\udcff\n`~"


def test_no_name_acts_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # settings refuse half a letter; a result that was made elsewhere may name one
    made = result("local", [[0.5, 0.6]] * 2, classes=(ODD, "b"), name=ODD, environment={ODD: ODD})
    made = replace(made, method=ODD, settings={**made.settings, "method": ODD, "clip": ODD})
    made.data["notes"] = [ODD]
    for row in made.rounds:
        row["exams"] = {ODD: {**row["exams"]["own"], "domains": {ODD: 0.5, ODD + "2": 0.5}}}
    made.data["exams"] = {ODD: ODD}
    made = replace(made, final=summarise(made.rounds), faces={ODD: [ODD]})
    comparison = Comparison({ODD: [made]}, (ODD,))
    plan = {"name": ODD, "about": ODD, "changed": {ODD: [ODD, ODD]}}
    published = {"source": ODD, "cautions": [ODD], "where": [], "figures": {ODD: ODD}}
    plan["published"] = [published]
    both = [comparison, Comparison({ODD: [replace(made, preset=plan)]})]
    files = write_report(both, tmp_path)
    text = {p.name: p.read_text(encoding="utf-8") for p in files if p.suffix != ".png"}
    for content in (*text.values(), terminal(comparison)):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", content)
    assert "\\x1b[2J$x" in Page(text["index.html"]).text
    assert "<i>" not in text["index.html"] + text["table.md"]
    cells = list(csv.reader(io.StringIO(text["table.csv"])))[1]
    assert cells[1].startswith("'=a|b")
    # no cell of a Markdown table ends early, and no line
    for line in text["table.md"].splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3 + 7, 3 + 3, 3 + 2, 3 + 8)
    assert not re.search(r"(?<!\\)[$`~]", text["table.md"].replace("`", "", 0))
    out = tmp_path / "[/b]x"
    pair().results["promptfl"][0].save(out)
    main(["report", str(out)])
    assert str(out / "index.html") in capsys.readouterr().out


@pytest.mark.usefixtures("plots_are_known")
def test_values_of_a_sweep_are_text(tmp_path: Path) -> None:
    values = ["$x^{$", "a|b", "<i>", "../../up", "a/b", "%2F"]
    swept = Sweep("ctx_init", {value: pair(ctx_init=value) for value in values})
    files = write_sweep(swept, tmp_path / "o")
    assert list(tmp_path.iterdir()) == [tmp_path / "o"]
    assert len({path.parent for path in files}) == 1 + len(values)
    assert (tmp_path / "o" / "ctx_init=..%2F..%2Fup" / "index.html") in files
    table = (tmp_path / "o" / "sweep.md").read_text(encoding="utf-8")
    assert "ctx\\_init=\\$x^{\\$ | ctx\\_init=a\\|b | ctx\\_init=&lt;i&gt;" in table
    shown = io.StringIO()
    Console(file=shown, width=200).print(sweep_table(swept))
    assert "a|b" in shown.getvalue()


def damaged(text: str, draw: random.Random) -> str:
    """Change a result in one or two places, as JSON or as text."""
    if draw.random() < 0.2:
        at, end = sorted(draw.randrange(len(text)) for _ in range(2))
        return draw.choice(
            (
                text[:at],
                text[:at] + text[end:],
                text[:at] + draw.choice('{}[]",:9e\\\x00') + text[at + 1 :],
                text.replace("0.5", draw.choice(("NaN", "1e999", "-Infinity", "9" * 5000, "05"))),
            )
        )
    content = json.loads(text)
    for _ in range(draw.choice((1, 1, 2))):
        container, key = draw.choice(list(places(content)))
        kind = draw.random()
        if kind < 0.25:
            del container[key]
        elif kind < 0.9 or isinstance(container, list):
            container[key] = draw.choice(JUNK)
        else:
            container[key + "2"] = container.pop(key)
    return json.dumps(content)


@pytest.mark.usefixtures("plots_are_known")
def test_a_damaged_result_is_a_report_or_a_sentence(tmp_path: Path) -> None:
    for one in pair().results.values():
        one[0].save(tmp_path / one[0].method)
    path = tmp_path / "promptfl" / "result.json"
    text = path.read_text()
    draw = random.Random(0)
    taken = refused = longest = 0
    for _ in range(300):
        path.write_text(damaged(text, draw))
        try:
            groups = load_comparisons(tmp_path / "promptfl", tmp_path / "zeroshot")
        except FastfplError as error:
            refused += 1
            longest = max(longest, len(str(error)))
            continue
        taken += 1
        html_page(groups)
        csv_table(groups)
        markdown_table(groups)
        for group in groups:
            terminal(group)
        if taken % 20 == 0:
            write_report(groups, tmp_path / "o")
    assert taken > 40
    assert refused > 150
    assert longest < 700


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"seed": 0', '"seed": "0"', "settings.seed: input should be a valid integer; got '0'"),
        ('"seed": 0', '"seed": ' + "9" * 5000, "what is not JSON: Exceeds the limit"),
        ('"seed": 0', '"seed": ' + "9" * 40, "a whole number of more than 64 bits"),
        ('"loss": 1.5', '"loss": 1e999', "the number inf"),
        ('"loss": 1.5', '"loss": NaN', "the number nan"),
        ('"options": {}', '"options": {"a": ' + "[" * 60 + "]" * 60 + "}", "more than 32 levels"),
        ('"options": {}', '"options": ' + "[" * 200_000, "nested too deeply"),
        ('"round": 1', '"round": 2', "rounds must be numbered from 0"),
        ('"rounds": 3', '"rounds": 4', "rounds must be 4 where a run is finished; not 3"),
        ('"own": "its', '"mine": "its', "round 0 must answer the exams of data"),
        ('"method": "promptfl"', '"method": "local"', "settings must name the method"),
        ('"accuracy": 0.6', '"accuracy": 60.0', "accuracy: input should be less than or equal to"),
        ('"weights"', '"weight"', "data.weights: field required"),
        ('"data": {', '"more": 1, "data": {', "more: extra inputs are not permitted; got 1"),
    ],
)
def test_what_is_wrong_with_a_result_is_said(
    old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    pair().results["promptfl"][0].save(tmp_path)
    path = tmp_path / "result.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(Damaged, match=r"fastfpl\.Result: .*result\.json must be a result") as told:
        load_comparisons(tmp_path)
    assert sentence in str(told.value)
