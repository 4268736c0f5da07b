"""Clients are asked for by what people call them: vendors, domains, names of those that joined."""

import numpy as np
import pytest
from PIL import Image

import fastfpl
from fastfpl.cli import main
from fastfpl.data import from_arrays
from fastfpl.errors import InputError
from fastfpl.trained import adapt

VENDORS = ("Apple", "Google", "1")  # somebody may be called by a number
RUN = {
    "partition": "given",
    "rounds": 1,
    "local_epochs": 1,
    "shots": None,
    "threads": 1,
    "n_ctx": 2,
}


def pictures(clients, *, domains=None, count=4):
    """Squares and bars, a few of each for everybody."""
    rng = np.random.default_rng(0)
    number = 2 * count * len(clients) * 2
    images = rng.integers(0, 255, (number, 16, 16, 3), dtype=np.uint8)
    who = [clients[i % len(clients)] for i in range(number)]
    return from_arrays(
        images,
        ["square" if (i // len(clients)) % 2 else "bar" for i in range(number)],
        split=["train" if i < number // 2 else "test" for i in range(number)],
        clients=who if domains is None else None,
        domains=who if domains else None,
        name="shapes",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("named")
    fastfpl.run("fedpgp", dataset=pictures(VENDORS), out=place / "run", cache=place / "c", **RUN)
    Image.new("RGB", (20, 20), "red").save(place / "x.png")
    return place


def logits(client):
    return client.predict(np.zeros((16, 16, 3), np.uint8)).logits.tolist()


def test_a_name_is_its_number(folder):
    model = fastfpl.load(folder / "run")
    assert set(model.names) == set(VENDORS)
    for number, name in enumerate(model.names):
        assert model.client(name).name == name
        assert logits(model.client(name)) == logits(model.client(number))
    # a text of digits is a name where a client has it
    assert model.client("1").name == "1"
    assert model.client("2").name == model.names[2]


def test_a_wrong_name_lists_those_that_exist(folder):
    model = fastfpl.load(folder / "run")
    with pytest.raises(InputError) as said:
        model.client("Appel")
    listed = ", ".join(f"{n} ({name})" for n, name in enumerate(model.names))
    assert f"one of the 3, from 0 to 2: {listed}; got 'Appel'; did you mean 'Apple'?" in str(
        said.value
    )
    with pytest.raises(InputError, match=r"from 0 to 2: .*; got 9"):
        model.client(9)


def test_predict_and_export_know_names(folder, capsys):
    for arguments in (
        ["predict", str(folder / "run"), str(folder / "x.png"), "--client", "Google"],
        ["export", str(folder / "run"), "--to", "classifier", "--client", "Apple"],
    ):
        out = [] if arguments[0] == "predict" else ["--out", str(folder / "head.safetensors")]
        main([*arguments, *out])
    assert (folder / "head.safetensors").is_file()
    with pytest.raises(SystemExit):
        main(["predict", str(folder / "run"), str(folder / "x.png")])
    assert "one from 0 to 2 (" in capsys.readouterr().err


def test_who_joins_may_not_be_called_like_a_client_of_the_run(folder):
    more = pictures(("Late",))
    where = {"cache": folder / "c", "participations": 1}
    with pytest.raises(InputError, match="must be new; got 'Apple', a client of the run itself"):
        adapt(folder / "run", more, name="Apple", **where)
    adapt(folder / "run", more, name="Late", **where)
    model = fastfpl.load(folder / "run")
    assert model.client("Late").name == "Late"
    with pytest.raises(
        InputError, match="and 'Late', who came later; got 'Lat'; did you mean 'Lat"
    ):
        model.client("Lat")


def test_a_client_a_domain_is_called_by_it(folder):
    settings = {**RUN, "partition": "domain"}
    dataset = pictures(("photo", "sketch"), domains=True)
    fastfpl.run("fedpgp", dataset=dataset, out=folder / "d", cache=folder / "c", **settings)
    model = fastfpl.load(folder / "d")
    assert model.names == ("photo", "sketch")
    assert logits(model.client("sketch")) == logits(model.client(1))
