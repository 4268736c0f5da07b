"""A run within a number of bytes: what it chooses, what it takes, what it refuses."""

import json
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import fastfpl
from fastfpl.data import load_dataset
from fastfpl.errors import InputError, NotSupported
from fastfpl.federation import exams, preparation
from fastfpl.federation.states import StateFiles
from fastfpl.methods import METHODS
from fastfpl.training import budget, trainer
from fastfpl.training.budget import Budget, Living
from fastfpl.training.gathering import Share
from fastfpl.training.graphs import StepGraphs
from tests.test_memory import OPTIONS
from tests.worlds import TINY_RUN, World, figures, small_clip

RUN = {**TINY_RUN, "clients": 8, "rounds": 3, "threads": 1}
#: Played within two limits: prompts alone, with experts and a gate, on patches, on pairs of views.
BOTH = ("promptfl", "pfedmoap", "fedotp", "fedapt-unsupervised")


@pytest.fixture(scope="module", autouse=True)
def one_thread_one_digits():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = load_dataset("digits")
    patch = pytest.MonkeyPatch()
    patch.setattr(preparation, "load_dataset", lambda name, root, **more: digits)
    yield
    patch.undo()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def play(clip, cache):
    def run(method, **more):
        paired = {"augment": "views:1"} if METHODS[method].paired else {}
        settings = {**RUN, "options": OPTIONS.get(method, {}), **paired, **more}
        return fastfpl.run(method, model=clip, cache=cache, **settings)

    return run


@pytest.fixture
def nothing_taken(monkeypatch):
    monkeypatch.setattr(budget, "_taken", lambda device: 0)


@pytest.fixture
def watched(monkeypatch):
    """Count what every training and evaluation has at a time, and its clients; trials apart."""
    seen = defaultdict(list)

    def around(name, plain):
        def pass_(method, members, *arguments, trial=False, **more):
            if trial:
                return plain(method, members, *arguments, trial=True, **more)
            with Living() as living:
                result = plain(method, members, *arguments, **more)
            part = "tuning" if more.get("stream") == "tune" else name
            seen[part].append((len(members), living.most))
            return result

        return pass_

    monkeypatch.setattr(trainer, "train", around("training", trainer.train))
    monkeypatch.setattr(exams, "score", around("evaluation", exams.score))
    return seen


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].trains])
def test_a_run_stays_within_its_limit(method, play, nothing_taken, watched):
    free = play(method, rounds=2)
    most = max(size for passes in watched.values() for _, size in passes)
    sizes = {name: max(n for n, _ in passes) for name, passes in watched.items()}
    assert sizes["training"] >= 7  # who has more images than others trains apart, where it counts
    # that it just binds is another choice only where passes differ in what they hold
    limits = (int(0.9 * most), most // 2) if method in BOTH else (most // 2,)
    for limit in limits:
        watched.clear()
        result = play(method, rounds=2, max_memory=limit)
        # the states of a cohort stand beside its passes
        for passes in watched.values():
            assert max(size for _, size in passes) <= 0.95 * limit
        images, *chosen = result.memory["passes"]
        assert images["what"] == "encoding"
        assert {one["what"] for one in chosen} == {"training", "evaluation"}
        for one in chosen:
            assert 0 < one["tried_bytes"] <= 0.85 * limit
        top = max(one["clients"] for one in chosen if one["what"] == "training")
        assert max(n for n, _ in watched["training"]) == min(top, sizes["training"])
        for row, other in zip(figures(result)[:-1], figures(free)[:-1], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert row["clients"] == pytest.approx(other["clients"], abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_binds_nothing_changes_no_bit(method, play):
    """Trials leave no trace: no draw, no state, no cached feature."""
    free = figures(play(method, rounds=2))
    assert figures(play(method, rounds=2, max_memory="1 TiB")) == free


@pytest.mark.slow
def test_experts_of_many_clients_stay_within_the_limit(play, nothing_taken, watched):
    """One client stands for many in a trial, but its experts are only its own."""
    options = {"experts": 12, "heads": 2, "gate_width": 16}
    more = {"clients": 24, "shots": 3, "partition": "iid", "batch_size": 2, "options": options}
    play("pfedmoap", **more)
    most = max(size for passes in watched.values() for _, size in passes)
    for limit in (int(0.95 * most), int(0.7 * most)):
        watched.clear()
        play("pfedmoap", max_memory=limit, **more)
        assert max(size for passes in watched.values() for _, size in passes) <= 0.9 * limit


def test_a_cohort_is_an_upper_bound(play, nothing_taken, watched):
    result = play("promptfl", max_memory="1 GiB", cohort=3)
    assert [one["clients"] for one in result.memory["passes"][1:]] == [3, 1]
    assert [n for n, _ in watched["training"]] == [3, 3, 2] * 3


def test_what_does_not_fit_is_refused_before_a_round(play, nothing_taken, tmp_path):
    sentence = r"^fastfpl\.run: max_memory must hold the training of one client; got .* lower batch"
    with pytest.raises(InputError, match=sentence):
        play("pfedmoap", max_memory="100 KiB", out=tmp_path / "run")
    assert not list(tmp_path.rglob("checkpoint*"))


def test_less_than_is_taken_is_refused(play):
    with pytest.raises(InputError, match=r"max_memory must be more than the .* that are taken"):
        play("promptfl", max_memory="10 MiB")


def test_the_result_says_what_was_chosen(play, tmp_path):
    result = play("pfedmoap", max_memory="64 GiB", out=tmp_path / "run")
    written = json.loads((tmp_path / "run" / "result.json").read_text())["memory"]
    assert written == result.memory
    assert written["limit_bytes"] == 64 << 30
    assert written["text_cache_bytes"] == 256 << 20
    assert 100 << 20 < written["taken_bytes"] < 4 << 30
    # the first round without experts, the second with a new gate, the third with a kept one
    assert [one["what"] for one in written["passes"]] == [
        *("encoding", "training", "evaluation"),
        *("training", "evaluation", "training"),
    ]
    assert all(one.get("clients", 64) == 64 for one in written["passes"])
    assert play("promptfl", max_memory="64 GiB").memory["passes"][2]["clients"] == 1  # one model
    assert written["passes"][0]["images"] == 256


# --- the choice -----------------------------------------------------------------------------------


def needs(base, each, text):
    """Make a trial that takes so many bytes, its text pass as many as it may."""

    def trial(members, down, own):
        limit = budget_text()
        kept = [torch.empty(base, dtype=torch.uint8)]
        kept += [torch.empty(each, dtype=torch.uint8) for _ in members]
        kept.append(torch.empty(min(text * len(members), limit), dtype=torch.uint8))

    return trial


def budget_text():
    from fastfpl.ops.memory import current_limit

    return current_limit()


def whole(down, number):
    return down


def share(limit, trial, most=None):
    chosen = Budget(limit, torch.device("cpu"))
    state = {"a": torch.zeros(1)}
    return chosen.share("training", (state, {}), whole, trial, 7, 4, most, lambda: None), chosen


def test_clients_are_doubled_while_they_fit(nothing_taken):
    # 850 000 may be planned; 100 000 and 50 000 a client, of which 10 000 are text, and its state
    found, chosen = share(1_000_000, needs(100_000, 40_000, 10_000))
    eight = 100_000 + 8 * (50_000 + 2 * 4)
    assert chosen.passes[0]["tried_clients"] == 8
    assert chosen.passes[0]["tried_bytes"] == eight
    assert found.clients == 8 * 850_000 // eight == 13
    assert 100_000 + 13 * 50_000 <= 850_000
    assert found.text == 425_000
    assert share(1 << 40, needs(100_000, 40_000, 10_000))[0].clients == 64
    assert share(1 << 40, needs(1000, 400, 100), 100)[0].clients == 100


@pytest.mark.parametrize("slope", [0, 3000, 20_000, 60_000])
def test_what_only_many_clients_show_is_seen(slope, nothing_taken):
    """The peak is another moment's from some number of clients on."""
    most = []

    def trial(members, down, own):
        most.append(max(100_000 + 1000 * len(members), slope * len(members)))
        torch.empty(most[-1], dtype=torch.uint8)

    found, _ = share(1_000_000, trial)
    assert max(most) <= 850_000
    count = found.clients
    trial([0] * count, {}, {})
    assert most[-1] <= 850_000


def test_the_text_pass_gets_less_where_a_client_would_not_fit(nothing_taken):
    found, _ = share(10_000_000, needs(100_000, 7_000_000, 10**9))
    assert found.clients == 1
    assert found.text == 8_500_000 // 8

    def refusing(members, down, own):
        if budget_text() < 100_000:
            raise InputError("max_memory must be at least 100000 bytes for one class")
        needs(100_000, 8_390_000, 10**9)(members, down, own)

    with pytest.raises(InputError, match="must hold the training of one client"):
        share(10_000_000, refusing)


def test_a_pass_without_a_text_pass_is_refused_too(nothing_taken):
    with pytest.raises(InputError, match=r"training of one client; .*, but one needs 900008 bytes"):
        share(1_000_000, needs(900_000, 0, 0))


def test_a_kind_is_tried_once(nothing_taken):
    tried = []
    chosen = Budget(10**6, torch.device("cpu"))

    def trial(members, down, own):
        tried.append((tuple(members), down["a"].shape))

    one, other = {"a": torch.zeros(2)}, {"a": torch.zeros(3)}
    for state in (one, one, other, one):
        chosen.share("training", (state, {}), whole, trial, 5, 2, 4, lambda: None)
    chosen.share("evaluation", (one, {}), whole, trial, 5, None, 4, lambda: None)
    chosen.share("training", (one, {}), whole, trial, 5, 3, 4, lambda: None)
    assert [shape[1] for _, shape in tried] == [2, 2, 2, 3, 3, 3, 2, 2, 2, 2, 2, 2]
    assert [members for members, _ in tried] == [(5,), (5, 5), (5,) * 4] * 4


def test_captured_steps_have_their_memory_twice(nothing_taken):
    chosen = Budget(1_000_000, torch.device("cpu"))
    trial = needs(100_000, 40_000, 10_000)

    def share(what, name, replayed=False):
        state = {name: torch.zeros(1)}
        more = (whole, trial, 7, 4, None, lambda: None, replayed)
        return chosen.share(what, (state, {}), *more)

    # half of the 850 000 that may be planned: the other half is the pool's
    found = share("training", "a", replayed=True)
    four = 100_000 + 4 * (50_000 + 2 * 4)
    assert chosen.passes[-1]["tried_bytes"] == four
    assert found.clients == 4 * 425_000 // four == 5
    assert found.text == 425_000 // 2
    assert chosen.pooled == chosen.to_json()["graph_pool_bytes"] == -(-5 * four // 4)
    # no other pass has what the pool has
    assert chosen.room == 850_000 - chosen.pooled
    beside = share("evaluation", "a").clients
    assert beside == 4 * chosen.room // four == share("evaluation", "b").clients
    # another kind of steps shares the pool, and leaves room for what was granted beside it
    assert share("training", "b", replayed=True).clients <= found.clients
    assert chosen.pooled + -(-beside * four // 4) <= 850_000
    assert share("training", "a").clients < 13, "a pool is there, whoever asks"


class Pool:
    """Captures steps as a card does: what one of them needs is held for good, once for all."""

    def __init__(self):
        self.pieces = []

    @property
    def bytes(self):
        return sum(piece.nbytes for piece in self.pieces)

    def aside(self, work):
        work()

    def capture(self, work):
        with _disable_current_modes(), Living() as seen:
            work()
        self.pieces.append(torch.empty(max(0, seen.most - self.bytes), dtype=torch.uint8))

        def replay():
            with _disable_current_modes():  # in the pool's memory
                work()

        return replay


@pytest.mark.parametrize("method", ["promptfl"])
def test_the_pool_of_graphs_counts(method, play, nothing_taken, monkeypatch):
    pool, seen = Pool(), []

    def around(plain):
        def pass_(*arguments, trial=False, **more):
            if trial:
                return plain(*arguments, trial=True, **more)
            before = pool.bytes
            with Living() as living:
                result = plain(*arguments, **more)
            seen.append((before + living.most, pool.bytes))
            return result

        return pass_

    monkeypatch.setattr(trainer, "train", around(trainer.train))
    monkeypatch.setattr(exams, "score", around(exams.score))
    made = []

    def graphs(*_):
        pool.pieces.clear()
        made.append(StepGraphs(pool))
        return made[-1]

    monkeypatch.setattr(preparation, "step_graphs", graphs)
    play(method)
    free = max(size for size, _ in seen)
    for limit in (2 * free, free):
        seen.clear()
        result = play(method, max_memory=limit)
        assert made[-1].reasons == []
        assert 0 < max(held for _, held in seen) <= result.memory["graph_pool_bytes"]
        assert max(size for size, _ in seen) <= 0.95 * limit


@pytest.mark.parametrize("required", [False, True])
def test_steps_that_do_not_fit_twice_are_not_captured(required, nothing_taken):
    mine = World("promptfl").federation().trainer
    mine.budget = Budget(500_000, torch.device("cpu"))
    mine.graphs = StepGraphs(Pool(), required=required)
    mine.trial = lambda members, *_: torch.empty(300_000 * len(members), dtype=torch.uint8)

    def ask():
        return mine.share(0, {"a": torch.zeros(1)}, {}, 0, lambda: None)

    if required:
        with pytest.raises(NotSupported, match="got 'on', but max_memory leaves no room for the"):
            ask()
        return
    assert ask().clients == 1
    assert mine.graphs.reasons == ["max_memory leaves no room for the memory of captured steps"]
    assert mine.budget.pooled == 0


def test_images_are_encoded_as_many_as_fit(nothing_taken):
    def encode(pixels):
        seen.append(len(pixels))
        return torch.empty(len(pixels), 100_000, dtype=torch.uint8)

    for limit, wanted in ((10_000_000, 8 * 8_500_000 // (8 * 100_147)), (1 << 40, 50)):
        seen = []
        chosen = Budget(limit, torch.device("cpu"))
        assert chosen.images(encode, 7, 50) == min(wanted, 50)
        assert max(seen) * 100_147 <= chosen.room
    with pytest.raises(InputError, match="max_memory must hold the encoding of one image"):
        Budget(100_000, torch.device("cpu")).images(encode, 7, 50)


def test_cached_texts_are_kept_room_for(nothing_taken):
    chosen = Budget(1 << 30, torch.device("cpu"))
    room = chosen.room
    assert chosen.text_features().max_bytes == room // 8
    assert chosen.room == room - room // 8
    assert Budget(1 << 40, torch.device("cpu")).text_features().max_bytes == 256 << 20


def test_the_lesser_of_two_shares():
    assert Share(3, None).both(Share(None, 5)) == Share(3, 5)
    assert Share(3, 7).both(Share(4, 5)) == Share(3, 5)
    assert Share().both(Share()) == Share(None, None)


# --- states on disk -------------------------------------------------------------------------------


def private(method):
    """The private tensors of one client at the papers' sizes: T = 16, W = 512, a gate of 128."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randn(16, 512, generator=draw)
    if method == "fedotp":
        return {"local": prompt}
    gate = {f"gate.w_{n}": torch.randn(128, 128, generator=draw) for n in "qkvo"}
    return {"ctx": prompt, **gate, **{f"gate.b_{n}": torch.randn(128) for n in "qkvo"}}


@pytest.mark.parametrize(("method", "size"), [("pfedmoap", 296_960), ("fedotp", 32_768)])
def test_a_client_takes_little_more_than_its_tensors(method, size, tmp_path):
    state = private(method)
    assert sum(t.nbytes for t in state.values()) == size
    files = StateFiles(tmp_path)
    with Living() as living:
        for client in range(40):
            files.put(client, state)
    assert files.nbytes <= 1.2 * 40 * size
    assert living.now == 0  # nothing of it is in memory
    assert living.most <= size


def test_states_come_back_as_they_were_put(tmp_path):
    draw = torch.Generator().manual_seed(1)
    whole = torch.randn(6, 8, generator=draw)
    states = {
        3: {"a": whole[::2, 1:5], "b": torch.tensor(7)},
        0: {"c": whole.half(), "d": torch.zeros(0, 4), "e": whole.to(torch.bfloat16).T},
    }
    for files in (StateFiles(), StateFiles(tmp_path / "new" / "folder")):
        for client, state in states.items():
            files.put(client, state)
        files.put(5, {})
        assert sorted(files) == [0, 3]
        for client, state in states.items():
            assert set(files[client]) == set(state)
            for name, tensor in files[client].items():
                assert tensor.dtype == state[name].dtype
                assert torch.equal(tensor, state[name])
        first, again = files[3]["a"], files[3]["a"]
        first.zero_()
        assert torch.equal(again, whole[::2, 1:5])
        assert torch.equal(files[3]["a"], again)
        with pytest.raises(KeyError):
            files[5]
        with pytest.raises(KeyError):
            files[3]["c"]
        files.put(3, {"a": torch.ones(2)})
        assert set(files[3]) == {"a"}


def test_former_states_stay_until_they_are_swept(tmp_path):
    files = StateFiles(tmp_path)
    files.put(1, {"a": torch.zeros(1)})
    written = files.settle()
    files.put(1, {"a": torch.ones(1)})
    old = StateFiles(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    files.sweep()
    assert [p.name for p in tmp_path.iterdir()] == ["00001-00001.safetensors"]
    with pytest.raises(fastfpl.errors.Damaged, match=r"00001-00000\.safetensors must be the state"):
        old.restore(written)
    again = StateFiles(tmp_path)
    again.restore(files.settle())
    assert torch.equal(again[1]["a"], torch.ones(1))
    # what stands in the way is somebody else's, and stays
    (tmp_path / "00001-00002.safetensors").write_bytes(b"mine")
    again.restore(again.settle())
    again.put(1, {"a": torch.full((1,), 2.0)})
    again.sweep()
    assert sorted(p.name[6:11] for p in tmp_path.iterdir()) == ["00002", "00003"]
    assert (tmp_path / "00001-00002.safetensors").read_bytes() == b"mine"


def test_a_full_disk_gets_a_sentence(tmp_path, monkeypatch):
    files = StateFiles(tmp_path)
    files.put(1, {"a": torch.zeros(1)})

    def full(number, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(InputError, match="must be writable and have room; got OSError"):
        files.put(1, {"a": torch.ones(1)})
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(files[1]["a"], torch.zeros(1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pfedmoap", "fedotp", "fedpgp", "promptfl-ft"])
def test_the_memory_of_a_round_does_not_grow_with_its_clients(method, clip, cache, monkeypatch):
    """Cohorts of two, of 8 clients or of 24: what lives at a time is the same but for the pool."""
    # a volume is as small beside these clients as it is beside the papers'
    monkeypatch.setattr("fastfpl.federation.shared._VOLUME", 1 << 11)
    most = {}
    for clients in (8, 24):
        settings = {**RUN, "clients": clients, "cohort": 2, "shots": 10, "partition": "iid"}
        options = OPTIONS.get(method, {})
        federation = preparation.prepare(
            fastfpl.Settings(method=method, options=options, **settings), model=clip, cache=cache
        )
        server = 0
        with Living() as living:
            for _ in range(2):
                federation.round()
                server = sum(t.nbytes for t in federation.server.values())
        most[clients] = living.most - 3 * server  # the old one, the new one, and a copy
    assert most[24] <= 1.02 * most[8]
