"""The bench behind docs/results.md: its runs can be asked for, its tables are of its figures."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from bench import glyphs_table
from bench.glyphs_table import (
    BUDGET,
    DOMAINS,
    OWN_BUDGETS,
    PROTOCOLS,
    SHOTS,
    figures,
    settings_of,
    tables,
)
from fastfpl.config import make_settings
from fastfpl.federation.preparation import plan, settled
from fastfpl.methods import METHODS


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_run_of_the_table_can_be_asked_for(protocol):
    for method in PROTOCOLS[protocol].settings:
        # with its options and its views
        asked = make_settings({"method": method, **settings_of(protocol, method, seed=0)})
        settings, kind, _ = settled(asked)
        assert (settings.batch_size, kind.name) == (16, method)
        assert settings.partition in ("pathological", "dirichlet", "domain")


def test_all_methods_are_in_all_protocols_but_that_of_own_budgets():
    for protocol, asked in PROTOCOLS.items():
        wanted = OWN_BUDGETS if protocol == "own budgets" else METHODS
        assert list(asked.settings) == list(wanted)
    assert {f"unseen {name}" for name in DOMAINS} | {f"{n} shots" for n in SHOTS} < set(PROTOCOLS)


@pytest.mark.parametrize(
    ("protocol", "names"),
    [
        ("pathological", {"own"}),
        ("domains", {"own"}),
        ("base-to-novel", {"local", "base", "novel"}),
        ("unseen sketch", {"target", "own"}),
    ],
)
def test_runs_are_asked_what_the_tables_show(protocol, names):
    asked = PROTOCOLS[protocol].settings["promptfl"]
    planned = plan(make_settings({"method": "promptfl", **BUDGET, **asked}))
    assert {question.name for question in planned.scenario.questions} == names


def made_up(seeds=2):
    """Results that say which run they are of."""
    results = {}
    for place, (protocol, asked) in enumerate(PROTOCOLS.items()):
        for nth, method in enumerate(asked.settings):
            base = place / 100 + nth / 10_000
            finals = []
            for seed in range(seeds):
                value = base + seed / 1000
                names = ["own"]
                if protocol == "base-to-novel":
                    names = ["local", "base", "novel"]
                if protocol.startswith("unseen"):
                    names = ["target", "own"]
                final = {"exams": {n: value + 0.01 * k for k, n in enumerate(names)}}
                final["domains"] = dict.fromkeys(DOMAINS, value)
                if protocol == "base-to-novel":
                    final["harmonic_mean"] = value
                finals.append(final)
            results.setdefault(protocol, {})[method] = finals
    return results


def cells(text, first, row):
    """Row of the table whose heading begins with ``first``."""
    block = next(b for b in text.split("\n\n") if b.startswith(f"| {first}"))
    heading = block.splitlines()[0].strip("| ").split(" | ")
    line = next(x for x in block.splitlines() if x.startswith(f"| {row} |"))
    return dict(zip(heading, line.strip("| ").split(" | "), strict=True))


def test_tables_are_of_the_figures():
    text = tables(figures(made_up()))
    places = {protocol: place for place, protocol in enumerate(PROTOCOLS)}
    order = {method: nth for nth, method in enumerate(METHODS)}

    def wanted(protocol, nth, plus=0.0):
        return f"{places[protocol] + nth / 100 + 0.05 + plus:.1f} ± 0.1"

    top = cells(text, "method | pathological", "fedotp")
    assert top["pathological, 2 seeds"] == wanted("pathological", order["fedotp"])
    assert top["six domains, 2 seeds"] == wanted("domains", order["fedotp"])
    novel = cells(text, "base to novel, 2 seeds", "fedpgp")
    assert novel["novel"] == wanted("base-to-novel", order["fedpgp"], 2.0)
    left = cells(text, "domain left out, 2 seeds", "fedapt")
    assert left["sketch"] == wanted("unseen sketch", order["fedapt"])
    ends = places["unseen clipart"], places["unseen sketch"]
    assert left["mean"] == f"{sum(ends) / 2 + order['fedapt'] / 100 + 0.05:.1f} ± 0.1"
    few = cells(text, "shots, pathological, 2 seeds", "local")
    assert few["1"] == wanted("1 shots", order["local"])
    assert few["16"] == wanted("pathological", order["local"])
    own = cells(text, "method | played, 2 seeds", "fedpgp")
    assert own["own budget"] == "25 rounds of 2 epochs"
    assert own["accuracy"] == wanted("own budgets", list(OWN_BUDGETS).index("fedpgp"))
    assert own["in 10 rounds of 1"] == wanted("pathological", order["fedpgp"])
    assert cells(text, "method | played", "fedapt")["played, 2 seeds"] == "six domains"


def test_a_table_of_which_something_is_missing_is_left_out():
    results = made_up(1)
    del results["unseen sketch"], results["own budgets"]
    text = tables(figures(results))
    assert "domain left out" not in text
    assert "own budget" not in text
    assert cells(text, "shots, pathological, 1 seed", "local")["16"].count("±") == 0


def test_columns_of_other_seeds_say_so():
    results = made_up(2)
    for protocol in ("unseen sketch", "1 shots"):
        results[protocol] = {method: finals[:1] for method, finals in results[protocol].items()}
    text = tables(figures(results))
    left = cells(text, "domain left out | clipart", "fedapt")
    assert "mean" not in left
    assert left["clipart, 2 seeds"].count("±") == 1
    assert left["sketch, 1 seed"].count("±") == 0
    few = cells(text, "shots, pathological | 1", "local")
    assert [few["1, 1 seed"].count("±"), few["16, 2 seeds"].count("±")] == [0, 1]


def test_other_seeds_that_are_written_down_stay():
    results = made_up(3)
    whole = figures(results)

    def each(*seeds):
        return {protocol: list(seeds) for protocol in PROTOCOLS}

    every = each(0, 1, 2)

    def part(seeds, of=tuple(PROTOCOLS)):
        return figures({p: {m: [f[s] for s in seeds] for m, f in results[p].items()} for p in of})

    def merged(mine, seeds, committed, its):
        return glyphs_table.with_committed(
            mine, seeds, {**glyphs_table.facts(), "seeds": its, **committed}
        )

    for mine, others in (((0, 2), (1,)), ((1,), (0, 2)), ((0, 1), (1, 2)), ((0, 1, 2), ())):
        here, there = (each(*seeds) for seeds in (mine, others))
        assert merged(part(mine), here, part(others), there if others else {}) == (whole, every)
    few = {"pathological": [2]}
    found, seeds = merged(part((2,), few), few, part((0, 1)), each(0, 1))
    assert seeds == {p: [0, 1, 2] if p in few else [0, 1] for p in PROTOCOLS}
    assert found["pathological"] == whole["pathological"]
    assert found["dirichlet"] == part((0, 1))["dirichlet"]
    # of other weights nothing is taken
    old = {**glyphs_table.facts(), "weights": "another", "seeds": every, **whole}
    assert glyphs_table.with_committed(part((0,), few), few, old) == (part((0,), few), few)


def test_without_finished_runs_nothing_is_written(tmp_path):
    done = CliRunner().invoke(glyphs_table.main, ["--work", str(tmp_path), "--finished"])
    assert done.exit_code == 1
    assert "run without --finished" in done.output
