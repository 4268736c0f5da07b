"""Scenarios, sampling, drop-out, memory banks and fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from fastfpl.config import make_settings
from fastfpl.data import Dataset, Shard, Split, base_novel, load_dataset, partition, split_domain
from fastfpl.errors import InputError
from fastfpl.federation import run, sweep
from fastfpl.federation.exams import marks
from fastfpl.federation.preparation import plan
from fastfpl.federation.result import Result, summarise
from fastfpl.federation.scenarios import arrange
from fastfpl.methods import Batch, State
from fastfpl.methods.promptfl import PromptFL
from fastfpl.training.cohort import train
from fastfpl.training.gathering import stack
from fastfpl.training.scoring import Scores
from tests.worlds import SIZES, World, small_clip


class Numbers(Split):
    """Images that are their own index."""

    def __init__(self, name: str, classes: int, domains: int, each: int) -> None:
        index = np.arange(classes * domains * each)
        self.labels = index % classes
        self.domains = index // classes % domains
        self.fingerprint = f"numbers-{name}"

    def images(self, indices):
        return [np.full((1, 1, 3), i, np.uint8) for i in np.asarray(indices)]


def numbers(classes: int = 5, domains: int = 3) -> Dataset:
    return Dataset(
        "numbers",
        tuple(f"class {c}" for c in range(classes)),
        tuple(f"domain {d}" for d in range(domains)),
        Numbers("train", classes, domains, 4),
        Numbers("test", classes, domains, 2),
    )


def laid_out(dataset: Dataset, kind: str = "iid", clients: int = 3, **settings):
    chosen = make_settings(
        {"method": "promptfl", "partition": kind, "clients": clients, **settings}
    )

    def deal(mine: Dataset) -> list[Shard]:
        return partition(
            kind,
            mine.train.labels,
            mine.test.labels,
            mine.train.domains,
            mine.test.domains,
            classes=len(mine.classnames),
            clients=clients,
            seed=0,
        )

    return arrange(chosen, dataset, deal)


# --- what is asked --------------------------------------------------------------------------------


def test_personal_asks_for_the_own_test_images_alone():
    dataset = numbers()
    scenario = laid_out(dataset)
    (own,) = scenario.questions
    assert own.split is dataset.test
    assert own.classnames == dataset.classnames
    assert sorted(np.concatenate(own.images)) == list(range(len(dataset.test)))


def test_global_asks_every_client_for_everything_first():
    dataset = numbers()
    whole, own = laid_out(dataset, scenario="global").questions
    assert [len(i) for i in whole.images] == [len(dataset.test)] * 3
    assert (whole.name, own.name) == ("all", "own")


def test_base_to_novel_trains_on_the_first_half_and_asks_for_both():
    dataset = numbers(classes=5)
    scenario = laid_out(dataset, scenario="base-to-novel")
    local, base, novel = scenario.questions
    assert scenario.dataset.classnames == ("class 0", "class 1", "class 2")
    assert novel.classnames == ("class 3", "class 4")
    assert local.classnames == base.classnames == scenario.dataset.classnames
    kept, rest = base_novel(5)
    assert len(base.split) == np.isin(dataset.test.labels, kept).sum()
    assert len(novel.split) == np.isin(dataset.test.labels, rest).sum()
    assert set(novel.split.labels) == {0, 1}
    assert all(len(i) == len(novel.split) for i in novel.images)


def test_leave_one_domain_out_trains_on_the_others_and_asks_for_all_of_it():
    dataset = numbers(domains=3)
    scenario = laid_out(dataset, "domain", 2, scenario="leave-one-domain-out", target="domain 1")
    target, own = scenario.questions
    assert scenario.dataset.domains == ("domain 0", "domain 2")
    assert scenario.client_domains == (0, 1)
    outside = (dataset.train.domains == 1).sum() + (dataset.test.domains == 1).sum()
    assert len(target.split) == outside
    # the pixels tell the index in the original split
    seen = [int(i[0, 0, 0]) for i in target.split.images(np.arange(outside))]
    border = int((dataset.train.domains == 1).sum())
    assert [dataset.train.domains[i] for i in seen[:border]] == [1] * border
    assert [dataset.test.domains[i] for i in seen[border:]] == [1] * (outside - border)
    assert list(target.split.labels[:border]) == [dataset.train.labels[i] for i in seen[:border]]
    mixed = target.split.images([border, 0, border + 1])
    assert [int(i[0, 0, 0]) for i in mixed] == [seen[border], seen[0], seen[border + 1]]
    assert own.domains == ("domain 0", "domain 2")


def test_multi_domain_asks_for_the_whole_test_list_of_the_clients_domain():
    dataset = numbers()
    scenario = laid_out(dataset, "domain", 3, scenario="multi-domain")
    first = scenario.questions[0]
    for u, images in enumerate(first.images):
        assert set(dataset.test.domains[images]) == {u}
        assert len(images) == (dataset.test.domains == u).sum()


def test_a_client_of_several_domains_has_none():
    assert laid_out(numbers()).client_domains is None


def test_an_unknown_target_names_the_domains():
    with pytest.raises(InputError, match=r"one of several domains of numbers: domain 0, domain 1"):
        split_domain(numbers(), "clipart")
    with pytest.raises(InputError, match="must be one of several domains"):
        split_domain(numbers(domains=1), "domain 0")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scenario": "leave-one-domain-out"}, "target must be given"),
        ({"target": "sketch"}, "target must be given"),
        ({"scenario": "multi-domain"}, "partition must be domain"),
        ({"target_root": "x"}, "target_root must be left out"),
        ({"sampling": "domain", "participation": 0.5}, "participation must be left out"),
        ({"dropout": 1.0}, "dropout is refused"),
    ],
)
def test_settings_without_meaning_are_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        make_settings({"method": "promptfl", **values})


# --- figures --------------------------------------------------------------------------------------


def test_scores_equal_scikit_learns():
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(3)
    for classes, count in ((2, 5), (7, 40), (30, 12)):
        answers, labels = draw.integers(0, classes, (2, count))
        mine = Scores(answers, labels, np.zeros_like(labels))
        wanted = f1_score(labels, answers, labels=np.unique(labels), average="macro")
        assert mine.macro_f1 == pytest.approx(wanted, abs=1e-12)
        assert mine.accuracy == np.mean(answers == labels)


def test_marks_average_over_clients_not_images():
    many = Scores(np.zeros(10, int), np.zeros(10, int), np.array([0] * 4 + [1] * 6))
    few = Scores(np.zeros(2, int), np.array([0, 1]), np.array([1, 1]))
    found = marks([many, few], ("ink", "photo", "never"))
    assert found["accuracy"] == 0.75
    assert found["clients"] == [1.0, 0.5]
    assert found["domains"] == {"ink": 1.0, "photo": 0.75}


def test_the_harmonic_mean_is_of_base_and_novel():
    def exam(accuracy):
        return {"accuracy": accuracy, "macro_f1": 0.1, "clients": [accuracy], "domains": {}}

    row = {"accuracy": 0.9, "clients": [0.9]}
    row["exams"] = {"local": exam(0.9), "base": exam(0.6), "novel": exam(0.3)}
    final = summarise([row])
    assert final["harmonic_mean"] == pytest.approx(2 * 0.6 * 0.3 / 0.9)
    assert final["exams"] == {"local": 0.9, "base": 0.6, "novel": 0.3}


# --- who trains, whose upload arrives -------------------------------------------------------------


def test_sampling_by_domain_takes_one_client_of_each():
    federation = World(settings={"sampling": "domain"}).federation()
    drawn = [federation.sampling.sample(t) for t in range(40)]
    assert {len(s) for s in drawn} == {2}
    assert all({c % 2 for c in s} == {0, 1} for s in drawn)
    assert {c for s in drawn for c in s} == set(range(len(SIZES)))


def test_all_train_first_if_the_method_wants_it(monkeypatch):
    monkeypatch.setattr(PromptFL, "all_first", True)
    federation = World(settings={"participation": 0.2}).federation()
    assert federation.sampling.sample(0) == list(range(len(SIZES)))
    assert len(federation.sampling.sample(1)) == 1


def test_a_lost_upload_changes_nothing_but_the_bytes():
    lossy = World(settings={"dropout": 0.5}).federation()
    lost = lossy.sampling.lost(0, range(len(SIZES)))
    assert 0 < len(lost) < len(SIZES)
    row = lossy.round()
    assert row["lost"] == sorted(lost)
    whole = World().federation()
    everyone = whole.sampling.sample
    whole.sampling.sample = lambda round_: [c for c in everyone(round_) if c not in lost]
    assert row["bytes_up"] == whole.round()["bytes_up"]
    torch.testing.assert_close(lossy.server["ctx"], whole.server["ctx"], rtol=1e-5, atol=1e-7)


def test_a_round_in_which_every_upload_is_lost_keeps_the_server():
    federation = World(settings={"dropout": 0.5}).federation()
    federation.sampling.lost = lambda round_, selected: set(selected)
    before = federation.server["ctx"].clone()
    federation.round()
    assert torch.equal(federation.server["ctx"], before)


# --- memory banks and fine-tuning -----------------------------------------------------------------


class Banked(PromptFL):
    """Remembers what every image looked like and how often it was seen."""

    def surveys(self, fixed: State) -> bool:
        return True

    def survey(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> State:
        assert batch.mask.all()
        return {"bank": batch.image.clone(), "seen": torch.zeros_like(batch.labels)}

    def after_step(self, text: Tensor, trained: State, fixed: State, batch: Batch) -> State:
        once = torch.zeros_like(fixed["seen"]).scatter_add_(1, batch.positions, batch.mask.long())
        return {"seen": fixed["seen"] + once}

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        return {"ctx": trained["ctx"]}, {"bank": fixed["bank"], "seen": fixed["seen"]}


def test_banks_hold_each_clients_images_and_count_its_steps():
    world = World()
    federation = world.federation()
    federation.trainer.method = Banked(federation.method.task)
    federation.round()
    for u, client in enumerate(world.clients):
        kept = federation.clients[u]
        torch.testing.assert_close(kept["bank"], client.train.float())
        size = len(client.train)
        steps = size if size < 4 else size // 4 * 4
        assert int(kept["seen"].sum()) == 2 * steps  # two epochs, the rest of an epoch is dropped
        assert kept["seen"].max() <= 2


def test_a_cohort_that_is_masked_leaves_the_others_banks():
    world = World(sizes=(4, 12))
    federation = world.federation()
    method = Banked(federation.method.task)

    class Unequal(Banked):
        def surveys(self, fixed: State) -> bool:
            return False

        def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
            trained, _ = super().start(down, own, training=training)
            return trained, {
                "seen": torch.zeros(2, 12, dtype=torch.int64),
                "bank": torch.zeros(2, 1),
            }

    method = Unequal(federation.method.task)
    downs = stack([method.download(federation.server, c, 0) for c in (0, 1)])
    images = {c: federation.shards[c].train for c in (0, 1)}
    done = train(
        method, (0, 1), downs, {}, federation.trainer.feed, images, world.config, 0, lambda *a: None
    )
    # two epochs of one step and of three
    assert done.own["seen"].sum(dim=1).tolist() == [8, 24]


class Tuned(PromptFL):
    """PromptFL whose clients train once more before they are asked."""

    personal: ClassVar[bool] = True
    epochs = 3

    @property
    def tune_epochs(self) -> int:
        return self.epochs

    def start(self, down: State, own: State, *, training: bool) -> tuple[State, State]:
        return {"ctx": own["ctx"] if not training and "ctx" in own else down["ctx"]}, {}

    def finish(self, trained: State, fixed: State, own: State) -> tuple[State, State]:
        return {"ctx": trained["ctx"]}, {"ctx": trained["ctx"]}


def test_fine_tuning_serves_the_evaluation_and_is_forgotten():
    federation = World(settings={"lr": 0.5}).federation()
    federation.trainer.method = Tuned(federation.method.task)
    plain = World(settings={"lr": 0.5}).federation()
    federation.examiner.exams[0] = type(federation.examiner.exams[0])(
        **{**federation.examiner.exams[0].__dict__, "method": federation.method}
    )
    row, other = federation.round(), plain.round()
    assert torch.equal(federation.server["ctx"], plain.server["ctx"])
    assert row["clients"] != other["clients"]
    # what a client is asked with is what three epochs from the merged prompt give
    down = stack([{"ctx": federation.server["ctx"]}] * len(SIZES))
    tuned = federation.trainer.tuned(list(range(len(SIZES))), down, {}, 0)
    assert all(not torch.equal(ctx, federation.server["ctx"]) for ctx in tuned["ctx"])


# --- what images are ------------------------------------------------------------------------------


def test_statistics_of_the_set_change_the_pixels(store, clip, monkeypatch):
    """The run sees what a CLIP with these statistics would see."""
    from fastfpl.data import Statistics
    from fastfpl.federation import preparation

    digits = load_dataset("digits")
    own = Statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    monkeypatch.setattr(
        preparation, "load_dataset", lambda *a, **more: replace(digits, statistics=own)
    )
    plain, special = (
        run("promptfl", model=clip, cache=store, **SMALL, statistics=kind)
        for kind in ("clip", "dataset")
    )
    assert plain.rounds[0]["loss"] != special.rounds[0]["loss"]
    clip.mean, clip.std, before = own.mean, own.std, (clip.mean, clip.std)
    try:
        wanted = run("promptfl", model=clip, cache=store, **SMALL)
    finally:
        clip.mean, clip.std = before
    assert special.rounds[0]["loss"] == wanted.rounds[0]["loss"]


def test_a_set_without_statistics_of_its_own_says_so(store, clip):
    with pytest.raises(InputError, match="statistics must be 'clip' for digits"):
        run("promptfl", model=clip, cache=store, **SMALL, statistics="dataset")


def test_notes_on_the_images_reach_the_report(store, clip, monkeypatch):
    from fastfpl.federation import Comparison, preparation
    from fastfpl.report import markdown_table

    digits = replace(load_dataset("digits"), skipped=3, notes=("the split was drawn here",))
    asked = []

    def load(name, root, *, on_corrupt):
        asked.append(on_corrupt)
        return digits

    monkeypatch.setattr(preparation, "load_dataset", load)
    result = run("zeroshot", model=clip, cache=store, **SMALL, on_corrupt="skip")
    assert asked == ["skip"]
    assert (result.data["skipped"], result.data["notes"]) == (3, ["the split was drawn here"])
    text = markdown_table(Comparison({"zeroshot": [result]}))
    assert "digits: the split was drawn here" in text


# --- a deal's own seed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"partition": "pathological"},
        {"partition": "pathological", "shots": "all", "repeat_rate": 0.3},
        {"partition": "iid"},
        {"partition": "iid-fewshot"},
        {"partition": "dirichlet", "beta": 5.0, "shots": "all"},
        {"partition": "labeluni", "classes_per_client": 4},
        {"partition": "domain", "clients": 1},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_partition_seed_decides_the_whole_deal(more):
    sets = {("digits", None, "refuse"): load_dataset("digits")}

    def dealt(**seeds):
        values = {"dataset": "digits", "clients": 5, "shots": 4, **more, **seeds}
        chosen = make_settings({"method": "promptfl", **values})
        shards = plan(chosen, datasets=sets).scenario.shards
        return [(s.train.tolist(), s.test.tolist()) for s in shards]

    mine = dealt(seed=0, partition_seed=7)
    assert mine == dealt(seed=1, partition_seed=7)
    assert mine != dealt(seed=0, partition_seed=8)
    assert mine != dealt(seed=0)
    # left out, a deal is what it was
    (digits,) = sets.values()
    train, test = digits.train, digits.test
    options = {"beta": 0.3, "shots": 4, "clients": 5, **more}
    options["shots"] = None if options["shots"] == "all" else options["shots"]
    before = partition(
        options.pop("partition"),
        *(train.labels, test.labels, train.domains, test.domains),
        **{"classes": 10, "seed": 3, **options},
    )
    assert dealt(seed=3) == [(s.train.tolist(), s.test.tolist()) for s in before]


# --- whole runs -----------------------------------------------------------------------------------

SMALL = {
    "dataset": "digits",
    "clients": 2,
    "partition": "iid",
    "rounds": 1,
    "local_epochs": 1,
    "shots": 1,
    "n_ctx": 2,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.mark.parametrize("method", ["promptfl", "local", "pfedmoap", "zeroshot"])
def test_base_to_novel_is_played_to_its_end(method, store, clip):
    options = {"gate_width": 4, "heads": 2} if method == "pfedmoap" else {}
    result = run(
        method,
        model=clip,
        cache=store,
        scenario="base-to-novel",
        **{**SMALL, "rounds": 2},
        options=options,
    )
    assert list(result.final["exams"]) == ["local", "base", "novel"]
    assert result.data["classes"] == ["zero", "one", "two", "three", "four"]
    assert set(result.data["exams"]) == {"local", "base", "novel"}
    assert result.final["accuracy"] == result.final["exams"]["local"]


def test_cross_dataset_asks_for_the_other_sets_classes(store, clip):
    result = run(
        "promptfl", model=clip, cache=store, scenario="cross-dataset", target="digits", **SMALL
    )
    # the same set as its own target: the target question is the whole test list
    assert result.data["test_images"] == [599, 599]
    with pytest.raises(InputError, match="name must be a data set"):
        run("promptfl", model=clip, scenario="cross-dataset", target="digitz", **SMALL)


def test_a_prompt_that_does_not_fit_the_novel_classes_is_refused_before_images(store, clip):
    asked = []
    with pytest.raises(InputError, match="must fit into"):
        run(
            "promptfl",
            model=clip,
            cache=store,
            scenario="base-to-novel",
            observer=lambda what, done, total: asked.append(what),
            **{**SMALL, "n_ctx": 40},
        )
    assert not asked


def test_a_sweep_plays_every_value(store, clip, tmp_path):
    from fastfpl.report import sweep_table, write_sweep

    swept = sweep(
        ["zeroshot", "promptfl"],
        "shots",
        [1, 2],
        out=tmp_path,
        model=clip,
        cache=store,
        **{k: v for k, v in SMALL.items() if k != "shots"},
    )
    assert list(swept.comparisons) == [1, 2]
    for value, comparison in swept.comparisons.items():
        assert comparison.results["promptfl"][0].settings["shots"] == value
        assert (tmp_path / f"shots={value}" / "promptfl-seed0" / "result.json").is_file()
    written = write_sweep(swept, tmp_path)
    assert all(path.is_file() for path in written)
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    accuracy = swept.comparisons[2].results["promptfl"][0].final["accuracy"]
    assert "| method | shots=1 | shots=2 |" in text
    assert f"{100 * accuracy:.1f} |" in text
    assert len(sweep_table(swept).lines) == 2


@pytest.mark.parametrize(
    ("key", "values", "sentence"),
    [
        ("shot", [1], "key must be a setting; got 'shot'; did you mean 'shots'"),
        ("seed", [1], "key must be a setting"),
        ("shots", [], "values must be one or more"),
        ("shots", [1, 1], "each once"),
        ("shots", [4, -1], "shots is refused"),
    ],
)
def test_a_sweep_without_sense_is_refused(key, values, sentence, clip):
    with pytest.raises(InputError, match=sentence):
        sweep(["zeroshot"], key, values, model=clip, dataset="digits")


def test_leave_one_domain_out_on_glyphs_counts_source_domains():
    glyphs = load_dataset("glyphs")
    sources, images = split_domain(glyphs, "sketch")
    assert "sketch" not in sources.domains
    assert len(sources.train) == len(glyphs.train) * 5 // 6
    assert len(images) == (len(glyphs.train) + len(glyphs.test)) // 6


SCENARIOS = {
    "personal": ["--partition", "pathological", "--clients", "4"],
    "personal, uneven": ["--partition", "dirichlet", "--clients", "4", "--shots", "4"],
    "global": ["--partition", "iid", "--clients", "3"],
    "base-to-novel": ["--clients", "4"],
    "leave-one-domain-out": ["--partition", "domain", "--clients", "5", "--target", "sketch"],
    "multi-domain": ["--partition", "domain", "--clients", "6", "--sampling", "domain"],
    "cross-dataset": ["--clients", "4", "--target", "digits", "--dropout", "0.3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SCENARIOS)
def test_every_system_plays_every_scenario(case, tmp_path, store, monkeypatch, capsys):
    """On a thinned-out `glyphs`, through the command line."""
    from fastfpl.cli import main
    from fastfpl.data.glyphs import stream

    monkeypatch.setattr(stream, "TRAIN_EACH", 4)
    monkeypatch.setattr(stream, "TEST_EACH", 2)
    systems = ["fedotp", "fedpgp", "fedapt", "pfedmoap"]
    if case == "personal":
        systems += ["promptfl", "local", "zeroshot"]
    short = ["--rounds", "2", "--local-epochs", "1", "--n-ctx", "4", "--threads", "1"]
    shots = [] if "--shots" in SCENARIOS[case] else ["--shots", "1"]
    scenario = case.partition(",")[0]
    places = ["--out", str(tmp_path), "--cache", str(store)]
    main(["compare", *systems, "--scenario", scenario, *SCENARIOS[case], *short, *shots, *places])
    printed = capsys.readouterr().out
    for system in systems:
        assert system in printed
        result = Result.load(tmp_path / f"{system}-seed0")
        assert all(0 <= a <= 1 for a in result.final["exams"].values())
    assert (tmp_path / "index.html").is_file()


@pytest.mark.slow
def test_leaving_one_domain_out_without_a_target_leaves_out_each(tmp_path, monkeypatch, capsys):
    from fastfpl.cli import main
    from fastfpl.data.glyphs import DOMAINS, stream

    monkeypatch.setattr(stream, "TRAIN_EACH", 1)
    monkeypatch.setattr(stream, "TEST_EACH", 1)
    places = ["--out", str(tmp_path), "--cache", str(tmp_path / "store")]
    domains = ["--partition", "domain", "--clients", "5"]
    main(["compare", "zeroshot", "--scenario", "leave-one-domain-out", *domains, *places])
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert [f"target={d}" in text for d in DOMAINS] == [True] * 6
    assert "| mean |" in text
    assert "clipart" in capsys.readouterr().out
