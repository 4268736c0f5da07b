"""What a report says to a client: the best method for it, gains over training alone, data sets."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from fastfpl.cli import main
from fastfpl.cli.compare import several_datasets
from fastfpl.errors import Damaged, InputError, Missing
from fastfpl.federation import Comparison, Sweep
from fastfpl.federation.comparison import SWEEP, value_folders
from fastfpl.report import (
    decision,
    decision_table,
    html_page,
    load_comparisons,
    load_sweep,
    markdown_table,
    sweep_table,
    write_report,
    write_sweep,
)
from fastfpl.report.deciding import SHOWN, clients_csv
from fastfpl.report.matrix import across
from fastfpl.report.words import NONE
from tests.results import pair, result, save


def deal(one, word="same"):
    return replace(one, data={**one.data, "deal": {"train": word, "test": word}})


def three(seeds=(0,), deals="same", **settings):
    """Two clients: the first is better off alone, the second with the others."""
    return Comparison(
        {
            "local": [
                deal(result("local", [[0.8, 0.4]], seed=s, **settings), deals) for s in seeds
            ],
            "promptfl": [
                deal(result("promptfl", [[0.6, 0.7]], seed=s, **settings), deals) for s in seeds
            ],
            "zeroshot": [
                deal(result("zeroshot", [[0.1, 0.7]], seed=s, trains=False, **settings), deals)
                for s in seeds
            ],
        }
    )


def shown(sheet):
    out = io.StringIO()
    Console(file=out, width=200).print(sheet)
    return out.getvalue()


def test_each_client_has_its_best_method_and_gains_over_local():
    found = decision(three())
    first, second = found.lines
    assert (first.best, second.best) == (("local",), ("promptfl", "zeroshot"))
    assert first.gain("promptfl") == pytest.approx(-0.2)
    assert second.gain("promptfl") == pytest.approx(0.3)
    assert found.answers == [
        "promptfl: better than training alone for 1 of 2 clients, worse for 1; +5.0 points in the "
        "mean, from -20.0 (client 0) to +30.0 (client 1)"
    ]
    assert found.cells(second) == [("40.0", False), ("70.0 (+30.0)", True), ("70.0 (+30.0)", True)]
    assert [text.partition(":")[0] for text in found.cautions] == ["one seed", "few test images"]
    assert "one of client 0's 20 is 5.0 points" in found.cautions[1]


def test_page_markdown_terminal_and_csv_say_the_same(tmp_path):
    comparison = three()
    markdown, page = markdown_table(comparison), html_page(comparison)
    assert "| 1 | 48 | 20 | 40.0 | **70.0 (+30.0)** | **70.0 (+30.0)** |" in markdown
    assert "> **Caution.** one seed" in markdown
    assert '<td class="best">70.0 (+30.0)</td>' in page
    assert "better than training alone for 1 of 2 clients" in page
    assert "70.0 (+30.0)*" in shown(decision_table(comparison))
    write_report(comparison, tmp_path)
    lines = list(csv.DictReader((tmp_path / "clients.csv").read_text().splitlines()))
    (mine,) = (x for x in lines if (x["client"], x["method"]) == ("1", "promptfl"))
    assert float(mine["gain_over_local"]) == pytest.approx(0.3)
    assert (mine["best"], mine["seed"], mine["test_images"]) == ("True", "0", "20")


def test_seeds_are_averaged_only_over_the_same_clients():
    same = decision(three((0, 1)))
    assert [line.label for line in same.lines] == ["0", "1"]
    assert not any("one seed" in text for text in same.cautions)
    other = three((0, 1))
    runs = {
        m: [deal(r, f"deal {r.settings['seed']}") for r in rs] for m, rs in other.results.items()
    }
    apart = decision(Comparison(runs))
    assert [line.label for line in apart.lines] == [
        *("0, seed 0", "1, seed 0"),
        *("0, seed 1", "1, seed 1"),
    ]
    seeds = [line["seed"] for line in csv.DictReader(io.StringIO(clients_csv([("", other)])))]
    assert set(seeds) == {"0 1"}


def test_named_clients_are_called_by_their_names():
    runs = {
        m: [replace(r, data={**r.data, "clients": ["Apple", "=cmd()"]}) for r in rs]
        for m, rs in three((0, 1), deals="x").results.items()
    }
    comparison = Comparison(runs)
    assert [line.label for line in decision(comparison).lines] == ["Apple", "=cmd()"]
    assert ",'=cmd()," in clients_csv([("", comparison)])


def test_nothing_is_decided_where_nothing_may_be_ranked():
    for refused in (
        replace(three(), missing=("local seed 1: not begun",)),
        Comparison({**three().results, "fedprox": [result("fedprox", [[0.9, 0.9]], shots=3)]}),
    ):
        found = decision(refused)
        assert found.answers == []
        assert not any(best for line in found.lines for _, best in found.cells(line))
        assert "(+" not in markdown_table(refused)
    assert decision(Comparison({"local": three().results["local"]})) is None


def test_without_local_it_is_said():
    (answer,) = decision(pair()).answers
    assert "local is not among the methods" in answer


def test_clients_without_test_images_and_many_clients():
    runs = {}
    for method, start in (("local", 0.2), ("promptfl", 0.3)):
        one = result(method, [[start] * (SHOWN + 5)])
        one.rounds[0]["clients"][3] = None
        one.data["test_images"][3] = 0
        runs[method] = [one]
    found = decision(Comparison(runs))
    assert "nothing can be said of 3, without test images" in " ".join(found.cautions)
    assert "44 clients" in found.answers[0]
    assert found.lines[3].best == ()
    assert "5 more clients stand in clients.csv" in markdown_table(Comparison(runs))
    assert clients_csv([("", Comparison(runs))]).count("\n") == 1 + 2 * (SHOWN + 5)


# -- several data sets -----------------------------------------------------------------------------


def of_sets(**more):
    """Two data sets of different classes."""
    return {
        "digits": pair(dataset="digits"),
        "glyphs": Comparison(
            {
                "zeroshot": [result("zeroshot", [[0.3, 0.3]], trains=False, classes=tuple("abcd"))],
                "promptfl": [result("promptfl", [[0.5, 0.5]], classes=tuple("abcd"))],
            }
        ),
        **more,
    }


def test_data_sets_are_columns_with_their_mean(tmp_path):
    swept = Sweep("dataset", of_sets())
    text = shown(sweep_table(swept))
    assert re.search(r"method +digits +glyphs +mean", text)
    assert re.search(r"promptfl +60.0\* +50.0\* +55.0\*", text)
    assert "glyphs: 4 classes, 2 clients" in text
    written = write_sweep(swept, tmp_path)
    assert tmp_path / "index.html" in written
    page = (tmp_path / "index.html").read_text()
    assert page.count('<td class="best">55.0</td>') == 1
    assert "dataset=digits" in page
    assert "| promptfl | **60.0** | **50.0** | **55.0** |" in (tmp_path / "sweep.md").read_text()


def test_a_mean_is_of_all_data_sets_or_none():
    lacking = Comparison({"zeroshot": of_sets()["glyphs"].results["zeroshot"]}, ("promptfl: 1",))
    text = shown(sweep_table(Sweep("dataset", of_sets(glyphs=lacking))))
    assert re.search(rf"promptfl +60.0\* +{NONE} +{NONE}", text)
    assert re.search(r"zeroshot +20.0 +30.0 +25.0", text)
    assert "missing: glyphs: promptfl: 1" in " ".join(text.split())


def test_comparisons_of_one_setting_but_the_data_set_stand_side_by_side():
    both = list(of_sets().values())
    assert across(both).titles == ["method", "digits", "glyphs", "mean"]
    assert "| promptfl | **60.0** | **50.0** | **55.0** |" in markdown_table(both)
    assert "Side by side" in html_page(both)
    other = [both[0], pair(dataset="glyphs", shots=3)]
    assert across(other) is None
    assert across(both[0]) is None


def test_a_list_of_data_sets_is_taken_apart_at_commas():
    assert several_datasets("glyphs") == ["glyphs"]
    assert several_datasets("glyphs,digits,nope") == ["glyphs", "digits", "nope"]
    assert several_datasets("folder:a,b,digits,folder:c") == ["folder:a,b", "digits", "folder:c"]


def test_folders_of_values_have_names_of_their_own():
    found = value_folders("dataset", ["folder:/a/emoji", "folder:/b/emoji", "digits"])
    assert list(found.values()) == [
        *("dataset=folder-emoji", "dataset=folder-emoji-2"),
        "dataset=digits",
    ]
    assert value_folders("root", ["../x"]) == {"../x": "root=..%2Fx"}


QUICK = [
    *("--rounds", "1", "--shots", "2", "--clients", "2", "--local-epochs", "1", "--threads", "1"),
]


def shapes(folder):
    """A data set of a few files."""
    for split, count in (("train", 4), ("test", 4)):
        for name, colour in (("red square", "red"), ("blue square", "blue")):
            place = folder / split / name
            place.mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (20 + n, 20), colour).save(place / f"{n}.png")
    return f"folder:{folder}"


@pytest.mark.slow
def test_compare_over_data_sets_resumes_and_reports_what_is_missing(tmp_path, capsys):
    out, own = tmp_path / "o", shapes(tmp_path / "shapes")
    cache = ["--cache", str(tmp_path / "cache"), "--partition", "iid"]
    call = ["compare", "local", "promptfl", "--dataset", f"digits,{own}", *QUICK, *cache]
    main([*call, "--out", str(out)])
    said = capsys.readouterr().out
    whole = re.search(r"method +digits +folder:…/shapes +mean\n.*\n.*\n.*\n", said).group()
    figures = (out / "sweep.md").read_text()
    second = out / "dataset=folder-shapes"
    # as a kill leaves it in the second data set
    (second / "promptfl-seed0" / "result.json").unlink()
    main(["report", str(out)])
    said = capsys.readouterr().out
    missing = "folder:…/shapes: promptfl seed 0: not "
    assert missing + "finished, 1 of 1 rounds" in " ".join(said.split())
    assert re.search(rf"promptfl +[\d.]+\*? +{NONE} +{NONE}", said)
    # and as one leaves it before that
    for name in ("local-seed0", "promptfl-seed0", "comparison.json"):
        if (path := second / name).is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    main(["report", str(out)])
    assert missing + "begun" in " ".join(capsys.readouterr().out.split())
    main([*call, "--out", str(out), "--resume"])
    assert whole in capsys.readouterr().out
    assert (out / "sweep.md").read_text() == figures


def test_a_sweep_plan_that_is_damaged_or_has_no_run(tmp_path):
    assert load_sweep(tmp_path) is None
    plan = {"key": "shots", "values": [1, 2], "methods": ["local"], "seeds": [0], "rounds": 2}
    (tmp_path / SWEEP).write_text(json.dumps({**plan, "values": []}))
    with pytest.raises(Damaged, match="values"):
        load_sweep(tmp_path)
    (tmp_path / SWEEP).write_text(json.dumps(plan))
    with pytest.raises(Missing, match="a sweep must have finished runs; got none"):
        load_sweep(tmp_path)
    save(pair(shots=2), tmp_path / "shots=2")
    found = load_sweep(tmp_path)
    assert found.comparisons[1] == Comparison({}, ("local seed 0: not begun",))
    assert list(found.comparisons[2].results) == ["zeroshot", "promptfl"]
    with pytest.raises(Missing):
        load_comparisons(tmp_path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--sweep", "shots=1,2"], "sweep must be left out with several data sets"),
        (["--scenario", "leave-one-domain-out"], "dataset must be one with leave-one-domain-out"),
        ([], "must be a data set"),
    ],
)
def test_lists_without_sense_are_refused(more, sentence, tmp_path, capsys):
    names = "digits,nope" if not more else "digits,glyphs"
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "local", "--dataset", names, *QUICK, *more, "--out", str(tmp_path / "o")])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_an_empty_sweep_has_no_report(tmp_path):
    with pytest.raises(InputError, match="sweep must hold a finished run"):
        write_sweep(Sweep("shots", {1: Comparison({}, ("local: not begun",))}), tmp_path)
