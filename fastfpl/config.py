"""Typed settings of a run, from flags, a YAML file or a preset; nothing is rewritten silently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastfpl.errors import InputError, cut, near, shown
from fastfpl.ops.memory import parse_bytes
from fastfpl.plain_yaml import parse_yaml, read_yaml

__all__ = [
    "COUNTED",
    "PROFILED",
    "Bytes",
    "Preset",
    "Published",
    "Settings",
    "column_names",
    "for_methods",
    "load_preset",
    "load_yaml",
    "make_settings",
    "parse_preset",
    "preset_names",
    "quirk_names",
]


# what fits in 64 bits with a sign; and what UTF-8 or a path cannot say
_LARGEST = 2**63 - 1
_NO_TEXT = re.compile("[\0\ud800-\udfff]")

#: Partitions of which the data set says how many clients there are.
COUNTED = ("domain", "given")
#: A number of bytes; `make_settings` also reads it from a text such as "2GiB".
Bytes = Annotated[int, "bytes"]


#: What a profile sets by itself: two rounds of one epoch, both evaluated.
PROFILED = {"rounds": 2, "local_epochs": 1, "evaluate_every": 1}


class Settings(BaseModel):
    """Everything that decides the figures of a run.

    Unknown keys, wrong types, numbers that are not finite and combinations without a meaning are
    refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    method: str = Field(description="the algorithm")
    dataset: str = Field(
        "glyphs",
        description="the data set: a name, or your own as folder:PATH (or a zip file), "
        "manifest:FILE, hf:PATH_OR_NAME (docs/own_images.md)",
    )
    root: str | None = Field(
        None,
        description="folder of a data set that lives in files, or that paths of a manifest begin "
        "in",
    )
    layout: str | None = Field(
        None, description="what the folders of folder: are, as domain/class; told by the tree"
    )
    columns: dict[str, str] | None = Field(
        None, description="what manifest: or hf: calls its columns, as path=file,label=kind"
    )
    digest: Literal["time", "content"] | None = Field(
        None,
        description="what tells one version of your images from another: size and time, or a "
        "digest of the content, for which all are read  [time]",
    )
    on_corrupt: Literal["refuse", "skip"] = Field(
        "refuse", description="what becomes of image files that do not decode; skipped are counted"
    )
    statistics: Literal["clip", "dataset"] = Field(
        "clip",
        description="mean and deviation that pixels are normalised by: the CLIP's, or the "
        "data set's own as released codes do on CIFAR",
    )
    scenario: Literal[
        "personal",
        "global",
        "base-to-novel",
        "leave-one-domain-out",
        "multi-domain",
        "cross-dataset",
        "unseen-clients",
    ] = Field("personal", description="what is trained on and what is asked (docs/protocols.md)")
    target: str | None = Field(
        None, description="the domain left out, or the data set that is only tested on"
    )
    target_root: str | None = Field(
        None, description="folder of the target data set, if it lives in files"
    )
    unseen: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the clients of unseen-clients that never train with the others (0.2)",
    )
    clip: str = Field("tiny", description="the frozen CLIP: tiny or a name of open_clip")
    pretrained: str | None = Field(
        None, description="weights of the CLIP: a tag, a local file or folder, or random"
    )
    quick_gelu: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="whether the weights were trained with QuickGELU, as OpenAI's were; auto is "
        "what tag, file or name say",
    )
    position: Literal["end", "middle", "front"] = Field(
        "end", description="where the class name stands in the prompt"
    )
    n_ctx: int | None = Field(None, ge=1, le=10_000, description="context vectors (16)")
    ctx_init: str | None = Field(
        None, min_length=1, description="words that initialise the context; they decide its length"
    )
    partition: Literal[
        "iid",
        "iid-fewshot",
        "pathological",
        "dirichlet",
        "labeldir100",
        "labeluni",
        "domain",
        "domain-dirichlet",
        "given",
    ] = Field(
        "pathological",
        description="how the data set is dealt to clients; given: as its folders or file say",
    )
    partition_seed: int | None = Field(
        None,
        ge=0,
        description="of the whole deal, the class deal of pathological too; without it a deal is "
        "the published one where there is one, and of the seed elsewhere",
    )
    beta: float | None = Field(
        None, gt=0, description="concentration of the Dirichlet partitions and of labeldir100 (0.3)"
    )
    classes_per_client: int | None = Field(
        None, ge=1, description="classes of a client of labeluni (2 of 10 classes, 10 of 100)"
    )
    repeat_rate: float = Field(
        0.0, ge=0, lt=1, description="share of the classes that all clients of pathological hold"
    )
    split_test: bool = Field(
        True,
        description="whether domain-dirichlet cuts test lists too, or clients have their domain's",
    )
    shots: int | None = Field(
        16, ge=1, description="training images per client and class; 'all' keeps every one"
    )
    transductive: bool = Field(
        False, description="train on the test images, for methods that look at no label"
    )
    clients: int | None = Field(
        10,
        ge=1,
        description="clients that hold the training data; known by the data set where the "
        "partition is domain or given",
    )
    participation: float = Field(
        1.0, gt=0, le=1, description="share of the clients that train in a round"
    )
    sampling: Literal["uniform", "domain"] = Field(
        "uniform", description="who trains in a round: a share of all, or one client of each domain"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability that a trained client's upload is lost"
    )
    merge: Literal["mean", "median", "trimmed", "krum"] = Field(
        "mean",
        description="what the server makes of uploads: their mean by training images as the method "
        "has it, or robust, of clients that count alike: median or trimmed mean of every number, "
        "or Krum",
    )
    trim: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="share of the uploads cut off at either end, with merge=trimmed (0.2)",
    )
    krum_malicious: int | None = Field(
        None, ge=0, description="hostile clients that a round is to bear, with merge=krum"
    )
    krum_kept: int | None = Field(
        None, ge=1, description="uploads of which Krum takes the mean, with merge=krum (1)"
    )
    clip_update: float | None = Field(
        None,
        gt=0,
        le=1e15,
        description="norm to which the server cuts what a client moved what it had downloaded",
    )
    dp_noise: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="differential privacy: deviation of the noise on merged prompts, or on the "
        "gradients of a step, in multiples of dp_clip",
    )
    dp_clip: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="norm to which a client's move, or an image's gradient, is cut, with dp_noise",
    )
    dp_unit: Literal["client", "image"] = Field(
        "client",
        description="whose presence dp_noise hides: a client's, from whoever sees merged prompts; "
        "or an image's, from the server too",
    )
    dp_delta: float = Field(1e-5, gt=0, lt=1, description="δ at which ε is reported, with dp_noise")
    rounds: int = Field(10, ge=1, description="rounds of download, local training and merge")
    local_epochs: int = Field(5, ge=1, description="epochs of a client in a round")
    batch_size: int = Field(16, ge=1, le=1 << 20, description="images of a training step")
    lr: float = Field(0.002, gt=0, description="learning rate of prompts")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD, fresh every round")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of SGD")
    schedule: Literal["constant", "cosine", "cosine-rounds"] = Field(
        "constant", description="learning rate of prompts over local epochs, or over rounds"
    )
    augment: str = Field(
        "none", description="none, views:V (V fixed random crops an image) or fresh (new crops)"
    )
    crop: float = Field(
        0.08, gt=0, le=1, description="smallest area of a random crop, as a part of the image"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring a random crop")
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; the last always")
    evaluate_clients: float | int | None = Field(
        None,
        gt=0,
        description="clients that are asked: a number, or a share such as 0.1; drawn once for the "
        "whole run; all if left out",
    )
    cohort: int | None = Field(
        None,
        ge=1,
        description="clients that share a pass at most; all who train, or what max_memory allows",
    )
    max_memory: Bytes | None = Field(
        None,
        ge=1,
        description="what the whole run may take on its device, such as 8GiB; decides how many "
        "clients and classes share a pass, not figures",
    )
    cuda_graphs: Literal["auto", "off", "on"] = Field(
        "auto",
        description="replay training steps and text passes of evaluations as CUDA graphs: where "
        "they can be, never, or refuse where they cannot; decides speed, not figures",
    )
    feature_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="of image features on disk, which training and evaluation widen again; auto is "
        "the CLIP's",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="threads that read, decode and crop images while the image tower is at work; 0 "
        "does it in between; chosen by device and cores if left out; decides speed, not figures",
    )
    resident: Bytes | None = Field(
        None,
        ge=0,
        description="decoded images that stay in memory where they are used again, by fresh crops "
        "or several views, such as 4GiB (1GiB); 0 keeps none; decides speed, not figures",
    )
    resident_features: Bytes | None = Field(
        None,
        ge=0,
        description="stored image features that stay on a CUDA device, training's first, such as "
        "8GiB (a quarter of what is free there); 0 keeps none; decides speed, not figures",
    )
    device: str = Field("auto", description="cpu, cuda or auto")
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = Field(
        "float32", description="of the frozen CLIP; prompts train in float32 or wider"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; all cores if left out"
    )
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    as_released: list[str] = Field(
        [], description="quirks of released code to reproduce, separated by commas, or all"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")

    @field_validator("*")
    @classmethod
    def _bound(cls, value: Any) -> Any:
        """Refuse numbers that no machine counts to, and texts that no file can hold."""
        if isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"input should be at most {_LARGEST}")
        for text in value if isinstance(value, list) else (value,):
            if isinstance(text, str) and (_NO_TEXT.search(text) or len(text) > 4096):
                raise ValueError(
                    "input should be text of at most 4096 letters without NUL and lone surrogates"
                )
        return value

    @model_validator(mode="before")
    @classmethod
    def _count(cls, values: Any) -> Any:
        """Leave the number of clients to the data set where that decides it."""
        decided = isinstance(values, dict) and values.get("partition") in COUNTED
        return {"clients": None, **values} if decided else values

    @model_validator(mode="after")
    def _combine(self) -> Settings:
        if self.clients is None and self.partition not in COUNTED:
            raise ValueError(
                f"clients must be a number with partition={self.partition!r}; got None"
            )
        if self.n_ctx is not None and self.ctx_init is not None:
            raise ValueError("n_ctx must be left out with ctx_init, whose words decide the length")
        drawn = "dirichlet" in self.partition or self.partition == "labeldir100"
        if self.beta is not None and not drawn:
            raise ValueError(
                f"beta must be left out with partition={self.partition!r}, which draws no shares"
                " from a Dirichlet distribution"
            )
        for name, given, home in (
            ("classes_per_client", self.classes_per_client is not None, "labeluni"),
            ("repeat_rate", self.repeat_rate > 0, "pathological"),
            ("split_test", not self.split_test, "domain-dirichlet"),
        ):
            if given and self.partition != home:
                raise ValueError(
                    f"{name} must be left out with partition={self.partition!r}; it is for {home!r}"
                )
        if self.partition == "iid-fewshot" and self.shots is None:
            raise ValueError(
                "shots must be a number with partition='iid-fewshot'; use partition='iid' for all"
            )
        if self.transductive and self.shots is not None:
            raise ValueError(
                "shots must be 'all' with transductive=true, which trains on every test image; got "
                f"{self.shots}"
            )
        if (self.scenario in ("leave-one-domain-out", "cross-dataset")) != (
            self.target is not None
        ):
            raise ValueError(
                "target must be given for the scenarios leave-one-domain-out and cross-dataset, "
                f"and for no other; got {self.target!r} with scenario={self.scenario!r}"
            )
        if self.target_root is not None and self.scenario != "cross-dataset":
            raise ValueError("target_root must be left out but with scenario='cross-dataset'")
        if self.unseen is not None and self.scenario != "unseen-clients":
            raise ValueError("unseen must be left out but with scenario='unseen-clients'")
        if self.scenario == "multi-domain" and not self.partition.startswith("domain"):
            raise ValueError(
                "partition must be domain or domain-dirichlet with scenario='multi-domain'; got "
                f"{self.partition!r}"
            )
        if self.sampling == "domain" and self.participation != 1.0:
            raise ValueError(
                "participation must be left out with sampling='domain', one client of each domain"
            )
        for name, rule in (("trim", "trimmed"), ("krum_malicious", "krum"), ("krum_kept", "krum")):
            if getattr(self, name) is not None and self.merge != rule:
                raise ValueError(
                    f"{name} must be left out with merge={self.merge!r}; it is for {rule!r}"
                )
        if self.merge == "krum" and self.krum_malicious is None:
            raise ValueError(
                "krum_malicious must be given with merge='krum': how many hostile clients a round "
                "is to bear"
            )
        robust = self.merge != "mean" or self.clip_update is not None
        if robust and self.dp_noise is not None and self.dp_unit == "client":
            raise ValueError(
                "merge must be mean and clip_update left out with dp_noise of clients, which cuts "
                f"by dp_clip; got {self.merge} and {self.clip_update}"
            )
        if (self.dp_noise is None) != (self.dp_clip is None):
            raise ValueError(
                f"dp_clip must be given with dp_noise and without it left out; got {self.dp_clip} "
                f"with dp_noise={self.dp_noise}"
            )
        if self.dp_noise is None and self.dp_delta != 1e-5:
            raise ValueError("dp_delta must be left out without dp_noise")
        if self.dp_noise is None and self.dp_unit != "client":
            raise ValueError("dp_unit must be left out without dp_noise")
        if not re.fullmatch(r"none|fresh|views:[1-9][0-9]*", self.augment):
            raise ValueError(
                f"augment must be none, fresh or views:V with V ≥ 1; got {self.augment!r}"
            )
        if isinstance(self.evaluate_clients, float) and not self.evaluate_clients < 1:
            raise ValueError(
                "evaluate_clients must be a whole number of clients, or a share below 1; got "
                f"{self.evaluate_clients}"
            )
        if self.evaluate_clients is not None and self.scenario == "unseen-clients":
            raise ValueError(
                "evaluate_clients must be left out with scenario='unseen-clients', which says who "
                "is asked"
            )
        for name, default in (("crop", 0.08), ("flip", 0.5)):
            if self.augment == "none" and getattr(self, name) != default:
                raise ValueError(f"{name} must be left out with augment=none, which crops nothing")
        return self

    @property
    def views(self) -> int:
        """Number of fixed augmented views, 0 if the images are not augmented or freshly so."""
        return int(self.augment[6:]) if self.augment.startswith("views:") else 0


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Check values and fill in defaults, or refuse with a sentence that names the key.

    ``shots`` also takes ``"all"``, ``as_released`` names separated by commas, ``max_memory``,
    ``resident`` and ``resident_features`` a text such as ``"2GiB"``, ``columns`` a text such as
    ``"path=file,label=kind"``, ``cuda_graphs`` and ``quick_gelu`` the truth values that YAML makes
    of on and off, yes and no, and numbers may come as integers where a float is meant.
    """
    known = Settings.model_fields
    for key in values:
        if key not in known:
            raise InputError(
                f"fastfpl.Settings: key must be a known one; got {shown(key)}"
                + near(cut(str(key)), known)
            )
    clean = dict(values)
    shots = clean.get("shots")
    if isinstance(shots, int) and shots < 1:
        raise InputError(
            "fastfpl.Settings: shots is refused: it must be at least 1, or 'all' for every image; "
            f"got {shown(shots)}"
        )
    if shots == "all":
        clean["shots"] = None
    for key in ("max_memory", "resident", "resident_features"):
        value = clean.get(key)
        if key != "max_memory" and value in (0, "0") and value is not False:
            clean[key] = 0
        elif value is not None:
            clean[key] = parse_bytes("fastfpl.Settings", value, key)
    for key, on, off in (("cuda_graphs", "on", "off"), ("quick_gelu", "yes", "no")):
        if isinstance(clean.get(key), bool):
            clean[key] = on if clean[key] else off
    if isinstance(clean.get("evaluate_clients"), str):
        clean["evaluate_clients"] = _number(clean["evaluate_clients"])
    if isinstance(clean.get("columns"), str):
        clean["columns"] = column_names(clean["columns"])
    clean["as_released"] = quirk_names(clean.get("as_released", []))
    for key, value in clean.items():
        if isinstance(value, Path):
            clean[key] = str(value)
    try:
        return Settings(**clean)
    except ValidationError as error:
        first = error.errors()[0]
        # of a field that takes two kinds of numbers the kind is no part of its name
        key = ".".join(str(part) for part in first["loc"] if part not in ("int", "float"))
        rule = first["msg"].removeprefix("Value error, ")
        if not key:
            raise InputError(f"fastfpl.Settings: {rule}") from None
        raise InputError(
            f"fastfpl.Settings: {key} is refused: {rule[0].lower() + rule[1:]}; "
            f"got {shown(first['input'])}"
        ) from None


def _number(text: str) -> int | float | str:
    """Read a whole number or a share; what is neither comes back as it is."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def column_names(text: str) -> dict[str, str]:
    """Read names of columns from ``path=file,label=kind``."""
    pairs = [part.partition("=") for part in text.split(",")]
    names = {key.strip(): value.strip() for key, _, value in pairs}
    if len(names) < len(pairs) or not all(key and value for key, value in names.items()):
        raise InputError(
            "fastfpl.Settings: columns is refused: it must read path=file,label=kind, each once; "
            f"got {shown(text)}"
        )
    return names


def quirk_names(value: Any) -> Any:
    """Split names of quirks at commas; what is neither text nor a tuple comes back as it is."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    return list(value) if isinstance(value, tuple) else value


def for_methods(options: Any) -> dict[str, dict[str, Any]]:
    """Check options by method, as files and presets hold them: ``{method: {key: value}}``."""
    good = isinstance(options, Mapping) and all(isinstance(v, Mapping) for v in options.values())
    if not good:
        raise InputError(
            "fastfpl.Settings: options in a file must be a mapping from methods to their options; "
            f"got {shown(options)}"
        )
    return {str(method): dict(mine) for method, mine in options.items()}


def load_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file: one mapping of known keys."""
    return _mapping(read_yaml(path, "fastfpl.Settings"), str(path))


def _mapping(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise InputError(
            f"fastfpl.Settings: {name} must hold one mapping of settings; "
            f"got {type(values).__name__}"
        )
    return values


def preset_names() -> list[str]:
    """Names of the papers' settings that ship with the library."""
    folder = resources.files("fastfpl.presets")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


#: A published figure in per cent as it was printed, with its spread if there is one.
_FIGURE = re.compile(r"[0-9]{1,3}(\.[0-9]+)?( ± [0-9]+(\.[0-9]+)?)?")


class Published(BaseModel):
    """Figures of a paper that belong to a preset.

    Attributes
    ----------
    source : str
        Paper and table, and what its ± is.
    caution : str or None
        Why the whole table must not be trusted.
    cautions : dict from method to str
        Why the figures of one method must not be trusted.
    where : dict
        Settings, or options of the method, under which the figures were taken where they are not
        the preset's: the figures are of a run that has these values.
    figures : dict from data set to method to name to str
        Per cent, as printed: ``"98.41 ± 0.04"``. The name is that of a question of the scenario or
        of a visual domain, or ``"accuracy"`` for the headline; a bare figure is the headline.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str = Field(min_length=1)
    caution: str | None = None
    cautions: dict[str, str] = Field(default_factory=dict)
    where: dict[str, Any] = Field(default_factory=dict)
    figures: dict[str, dict[str, dict[str, str]]] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, values: Any) -> Any:
        """Give bare figures their name, and numbers their text."""
        if not isinstance(values, dict) or not isinstance(values.get("figures"), dict):
            return values
        named = {}
        for dataset, methods in values["figures"].items():
            if not isinstance(methods, dict):
                return values
            named[dataset] = {
                method: {k: str(v) for k, v in found.items()}
                if isinstance(found, dict)
                else {"accuracy": str(found)}
                for method, found in methods.items()
            }
        return {**values, "figures": named}

    @model_validator(mode="after")
    def _read(self) -> Published:
        for methods in self.figures.values():
            for found in methods.values():
                for text in found.values():
                    if not _FIGURE.fullmatch(text) or float(text.partition(" ")[0]) > 100:
                        raise ValueError(
                            f"a figure must read 98.41 or 98.41 ± 0.04, in per cent; got {text!r}"
                        )
        return self


@dataclass(frozen=True)
class Preset:
    """A paper's settings, and what the paper reports under them.

    Attributes
    ----------
    name, about : str
    settings : dict
        Fields of `Settings` but ``method``; ``options``, if there, is a mapping from methods to
        their options. What a preset leaves out is a default, but the data set and the target
        domain: those it leaves open.
    published : tuple of Published
    """

    name: str
    about: str
    settings: dict[str, Any]
    published: tuple[Published, ...]

    def on_top(self, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Lay settings of one run over the preset's; its options of the method are kept."""
        base = dict(self.settings)
        mine = {**base.pop("options", {}).get(method, {}), **settings.get("options", {})}
        return {**base, **settings, "method": method, "options": mine}


def load_preset(name: str) -> Preset:
    """Read a preset that ships with the library."""
    if name not in preset_names():
        raise InputError(
            f"fastfpl.Settings: preset must be a known one; got {name!r}"
            + near(name, preset_names())
        )
    text = (resources.files("fastfpl.presets") / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_preset(name, text)


def parse_preset(name: str, text: str) -> Preset:
    """Read a preset from YAML: ``about``, settings, ``options`` by method, ``published``.

    Raises
    ------
    InputError
        If a key is unknown, a setting is refused, or a published figure is none.
    """
    values = _mapping(parse_yaml(text, f"fastfpl.Settings: preset {name}"), f"preset {name}")
    about = values.pop("about", None)
    if not isinstance(about, str) or not about:
        raise InputError(
            f"fastfpl.Settings: preset {name} must say what it is about; got {about!r}"
        )
    published = values.pop("published", [])
    if not isinstance(published, list):
        raise InputError(
            f"fastfpl.Settings: published of preset {name} must be a list of tables; "
            f"got {type(published).__name__}"
        )
    tables = []
    for number, table in enumerate(published, 1):
        try:
            tables.append(Published.model_validate(table))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the table"
            rule = first["msg"].removeprefix("Value error, ")
            raise InputError(
                f"fastfpl.Settings: table {number} of preset {name} is refused: {key}: "
                f"{rule[0].lower() + rule[1:]}"
            ) from None
    if "method" in values:
        raise InputError(f"fastfpl.Settings: method must be left out of preset {name}")
    if "options" in values:
        values["options"] = for_methods(values["options"])
    plain = {k: v for k, v in values.items() if k != "options"}
    if plain.get("scenario") == "leave-one-domain-out":
        plain.setdefault("target", "any")  # left open: every domain in turn
    make_settings({**plain, "method": "any"})
    return Preset(name, about, values, tuple(tables))
