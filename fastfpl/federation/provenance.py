"""Which preset a run came from, what it changed, and what the paper reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastfpl.config import Preset, Published, Settings
from fastfpl.federation.result import Result
from fastfpl.methods import check_options

__all__ = ["provenance"]

# what a preset leaves open, and what decides no figure
_OPEN = ("method", "seed", "root", "target_root", "cohort", "device", "threads", "options")


def provenance(preset: Preset, result: Result, model_given: bool) -> dict[str, Any]:
    """Return what `Result.preset` holds.

    Parameters
    ----------
    preset : Preset
        Where the run's settings came from.
    result : Result
        With every setting and option of the run.
    model_given : bool
        Whether the run was handed a CLIP in place of the one its settings name.
    """
    expected = _expected(preset, result.settings)
    changed = {
        key: [value, result.settings[key]]
        for key, value in expected.items()
        if value != result.settings[key]
    }
    # a model that was handed over stands for the one that is named
    named = {k: expected.get(k) for k in ("clip", "pretrained")} if model_given else {}
    if model_given:
        for key in named:
            changed.pop(key, None)
        changed["model"] = [expected["clip"], "one that was handed over"]
    options = check_options(
        result.method, preset.settings.get("options", {}).get(result.method, {})
    )
    for key, value in options.items():
        if value != result.settings["options"][key]:
            changed[f"{result.method}.{key}"] = [value, result.settings["options"][key]]
    return {
        "name": preset.name,
        "about": preset.about,
        "changed": changed,
        "published": [
            found
            for table in preset.published
            if (found := _figures(table, result, named)) is not None
        ],
    }


def _expected(preset: Preset, run: Mapping[str, Any]) -> dict[str, Any]:
    """Say which values a run has that changes nothing; nothing of what the preset leaves open."""
    expected = {}
    for key, field in Settings.model_fields.items():
        left_open = key in ("dataset", "target") and key not in preset.settings
        if key in _OPEN or left_open or key not in run:
            continue
        value = preset.settings.get(key, field.get_default(call_default_factory=True))
        expected[key] = None if key == "shots" and value == "all" else value
    return expected


def _figures(table: Published, result: Result, named: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table's figures of the run's data set and method, if it has some."""
    found = table.figures.get(result.settings["dataset"], {}).get(result.method)
    values = {**result.settings, **result.settings["options"], **named}
    if found is None or any(values.get(k) != v for k, v in table.where.items()):
        return None
    cautions = [table.caution, table.cautions.get(result.method)]
    return {
        "source": table.source,
        "cautions": [text for text in cautions if text],
        "where": sorted(table.where),
        "figures": dict(found),
    }
