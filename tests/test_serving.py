"""The local page and its JSON endpoint, over a real socket and in a real browser."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from PIL import Image

import fastfpl
from fastfpl.cli import main
from fastfpl.data import from_arrays
from fastfpl.errors import InputError, Missing
from fastfpl.serving import Answerer, server
from fastfpl.trained import images as reading
from tests.warm import warm_python

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install fastfpl[serve]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install fastfpl[serve]")

VENDORS = ("Google", "Äpple & <b>Söhne</b>")
LIMIT = 200_000


def drawing(seed=0, mode="RGB", size=(24, 24), kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode == "I;16":  # by way of "I": Pillow 10 knows no shorter one
        image = image.convert("I")
    image.convert(mode).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    dataset = from_arrays(
        rng.integers(0, 255, (32, 16, 16, 3), dtype=np.uint8),
        ["sea horse" if (i % 4 < 2) != (i % 8 < 3) else "bar" for i in range(32)],
        split=["train" if i < 16 else "test" for i in range(32)],
        clients=[VENDORS[i % 2] for i in range(32)],
    )
    fastfpl.run(
        "fedpgp", dataset=dataset, partition="given", rounds=1, local_epochs=4, shots=None,
        threads=1, n_ctx=2, lr=0.5, out=place / "run", cache=place / "features",
    )  # fmt: skip
    return place


@contextlib.contextmanager
def begun(folder, temporary):
    """The command line's own server in a process of its own: where it answers, and the process."""
    command = [*warm_python(), "-m", "fastfpl.cli", "serve", str(folder / "run")]
    command += ["--port", "0", "--max-upload", str(LIMIT), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("http://127.0.0.1:"), said + process.stderr.read()
        yield said.split()[0].rstrip("/"), process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def served(folder):
    (folder / "tmp").mkdir()
    with begun(folder, folder / "tmp") as server:
        yield server


def ask(url, body=None, **headers):
    """Status, headers and content."""
    request = urllib.request.Request(url, body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def refused(url, body=None, **headers):
    status, _, content = ask(url, body, **headers)
    return status, json.loads(content)["error"]


def test_it_answers_what_the_model_answers(served, folder):
    url, _ = served
    image = drawing()
    model = fastfpl.load(folder / "run")
    for name in VENDORS:
        query = urllib.parse.urlencode({"client": name, "top": 2})
        status, _, content = ask(f"{url}/predict?{query}", image)
        said = json.loads(content)
        assert status == 200
        assert (said["client"], said["method"]) == (name, "fedpgp")
        for key, client in (("classes", model.client(name)), ("zero_shot", model.zero_shot())):
            (want,) = client.predict(image).top(2)
            assert [one["name"] for one in said[key]] == [name for name, _ in want]
            assert [one["probability"] for one in said[key]] == pytest.approx(
                [share for _, share in want], abs=1e-6
            )
    assert said["classes"] != said["zero_shot"]


def test_zero_shot_is_the_zero_shot_method(folder):
    dataset = from_arrays(
        [np.asarray(Image.open(io.BytesIO(drawing(n)))) for n in range(8)],
        ["sea horse", "bar"] * 4,
        split=["train"] * 4 + ["test"] * 4,
    )
    fastfpl.run("zeroshot", dataset=dataset, clients=1, partition="iid", out=folder / "z")
    own = fastfpl.load(folder / "z").global_model().predict(drawing(5))
    beside = fastfpl.load(folder / "run").zero_shot().on(own.classnames).predict(drawing(5))
    assert beside.logits.tolist() == own.logits.tolist()


def test_the_schema_says_what_is_taken_and_given(served):
    url, _ = served
    schema = json.loads(ask(f"{url}/openapi.json")[2])
    post = schema["paths"]["/predict"]["post"]
    assert post["requestBody"]["content"]["image/*"]["schema"]["format"] == "binary"
    assert {one["name"] for one in post["parameters"]} == {"client", "top"}
    assert set(post["responses"]) >= {"200", "400", "413", "422"}
    about = json.loads(ask(f"{url}/about")[2])
    assert [one["id"] for one in about["clients"]] == list(VENDORS)
    assert (about["method"], about["max_upload"]) == ("fedpgp", LIMIT)


def test_bad_questions_are_sentences(served):
    url, _ = served
    image = drawing()
    for query, body, status, sentence in (
        (
            "client=0",
            b"no image",
            400,
            "got UnidentifiedImageError: no image of a kind",
        ),
        ("client=0", b"", 400, "must be an image"),
        ("client=0", image[:300], 400, "must be an image"),
        ("client=Gogle", image, 400, "got 'Gogle'; did you mean 'Google'?"),
        ("", image, 400, "client must be named"),
        ("client=0&top=0", image, 422, "top must be"),
        ("client=0&top=x", image, 422, "top must be"),
    ):
        found = refused(f"{url}/predict?{query}", body)
        assert found[0] == status
        assert sentence in found[1]
        assert "Traceback" not in found[1]
    assert refused(f"{url}/nothing")[0] == 404
    assert refused(f"{url}/predict")[0] == 405


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_images_of_all_modes(served, mode):
    url, _ = served
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert ask(f"{url}/predict?client=0", drawing(mode=mode, kind=kind))[0] == 200


def test_an_upload_is_refused_before_it_is_read_whole(served):
    url, _ = served
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /predict?client=0 HTTP/1.1\r\nHost: {host}:{port}\r\n"
    # one that says its length is not waited for
    with socket.create_connection((host, int(port)), 30) as one:
        one.sendall((head + f"Content-Length: {LIMIT + 1}\r\n\r\n").encode())
        assert b"413" in one.recv(4096).split(b"\r\n")[0]
    # one that does not say it is cut off
    with socket.create_connection((host, int(port)), 30) as one:
        one.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        for _ in range(1 + LIMIT // 50_000):
            one.sendall(b"c350\r\n" + b"x" * 50_000 + b"\r\n")
        answer = one.recv(65536)
        assert b"413" in answer.split(b"\r\n")[0]
    assert ask(f"{url}/predict?client=0", b"x" * LIMIT)[0] == 400


def bomb(side=14_000):
    """A small PNG of more pixels than Pillow decodes."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes(1 + side) * 64, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused(served):
    url, _ = served
    assert len(bomb()) < LIMIT
    status, sentence = refused(f"{url}/predict?client=0", bomb())
    assert status == 400
    assert "too large, 196000000 pixels where at most" in sentence


def test_headers_and_assets_of_nowhere_else(served):
    url, _ = served
    for path in ("/", "/page.css", "/page.js", "/icon.svg", "/about", "/nothing"):
        _, headers, content = ask(url + path)
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
        if path != "/icon.svg":  # whose name space is written as an address
            assert b"http://" not in content
            assert b"https://" not in content
    for path in ("/docs", "/redoc"):  # whose pages load scripts from elsewhere
        assert ask(url + path)[0] == 404


def test_pages_of_other_sites_may_not_ask(served):
    url, _ = served
    image = drawing()
    assert refused(f"{url}/predict?client=0", image, Origin="http://evil.example")[0] == 403
    assert ask(f"{url}/predict?client=0", image, Host="evil.example")[0] == 400
    assert ask(f"{url}/predict?client=0", image, Origin=url)[0] == 200


def test_nothing_is_stored(served, folder):
    url, _ = served
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*")}
    assert ask(f"{url}/predict?client=1", drawing(9, size=(200, 200)))[0] == 200
    assert {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*")} == before
    assert not any(p.is_file() for p in (folder / "tmp").rglob("*"))


@pytest.mark.parametrize("method", ["promptfl", "fedotp", "fedapt"])
def test_one_model_for_all_patches_and_raw_features(method, tmp_path):
    settings = {"rounds": 1, "local_epochs": 1, "shots": 1, "clients": 2, "threads": 1, "n_ctx": 2}
    fastfpl.run(method, dataset="digits", out=tmp_path / "r", cache=tmp_path / "c", **settings)
    model = fastfpl.load(tmp_path / "r")
    answerer = Answerer(model)
    personal = model.method.personal
    ids = [key for key, _ in answerer.clients]
    assert ids == (["0", "1"] if personal else ["global"])
    image = drawing()
    said = answerer.ask(image, ids[0], 10)
    want = (model.client(0) if personal else model.global_model()).predict(image).top(10)[0]
    assert said.classes == want
    assert said.zero_shot == model.zero_shot().predict(image).top(10)[0]
    assert abs(sum(share for _, share in said.zero_shot) - 1) < 1e-5
    if personal:
        with pytest.raises(InputError, match="client must be named"):
            answerer.ask(image)
    else:
        assert answerer.ask(image, None, 10) == said


def test_bytes_are_an_image_file():
    (one,) = reading.pictures(drawing())
    assert one.read().shape == (24, 24, 3)


# -- how it begins and ends ------------------------------------------------------------------------


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_begin_is_a_sentence(folder, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails(capsys, folder / "run", "--port", port)
        assert f"got 127.0.0.1:{port}: Address already in use; name another --port" in said
    assert "must hold a run" in fails(capsys, tmp_path, "--port", 0)
    assert "host and port must be" in fails(capsys, folder / "run", "--host", "no.such.invalid")
    assert "max_upload must be" in fails(capsys, folder / "run", "--max-upload", "much")
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    said = fails(capsys, folder / "run")
    assert (
        'fastapi and uvicorn must be installed; got none; run: pip install "fastfpl[serve]"' in said
    )
    with pytest.raises(Missing):
        server.check_library()


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("example.org", False),
    ],
)
def test_what_only_this_machine_reaches(host, own):
    assert server.is_loopback(host) is own
    assert (server.hosts_of(host) == ["*"]) is not own


def test_another_host_is_warned_about(folder, capsys, monkeypatch):
    heard = {}

    def serve(model, at, *, ready, **more):
        heard.update(more, address=at.getsockname())
        ready()

    monkeypatch.setattr("fastfpl.serving.serve", serve)
    main(["serve", str(folder / "run"), "--host", "0.0.0.0", "--port", "0"])
    out, err = capsys.readouterr()
    assert "0.0.0.0 lets everybody who reaches this machine ask, without password" in err
    assert out.startswith(f"http://0.0.0.0:{heard['address'][1]}/ answers")
    assert heard["max_upload"] == 20_000_000
    main(["serve", str(folder / "run"), "--port", "0"])
    assert capsys.readouterr().err == ""


def test_a_taken_port_is_refused_before_the_model_is_loaded(folder):
    with server.listen("127.0.0.1", 0) as one, pytest.raises(InputError, match="must be free"):
        server.listen("127.0.0.1", one.getsockname()[1])


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with playwright.sync_playwright() as started:
        try:
            one = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Exception as error:
            pytest.skip(f"no browser could be started: {str(error).splitlines()[0]}")
        yield one
        one.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_person_drops_an_image_and_chooses_a_client(browser, served, folder, width):
    url, _ = served
    page = browser.new_page(viewport={"width": width, "height": 800})
    complaints, asked = [], []
    page.on("console", lambda line: complaints.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: asked.append(one.url))
    page.goto(url)
    page.wait_for_selector("#client option", state="attached")
    assert page.locator("#client option").all_inner_texts() == list(VENDORS)
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": drawing()})
    page.wait_for_selector("#classes li")
    first = page.locator("#classes li .share").all_inner_texts()
    assert page.locator("#mine").inner_text() == f"{VENDORS[0]}, fedpgp"
    assert page.locator("#zero_shot li").count() == 2
    page.select_option("#client", VENDORS[1])
    page.locator("#mine", has_text=VENDORS[1]).wait_for()
    want = fastfpl.load(folder / "run").client(VENDORS[1]).predict(drawing()).top(2)[0]
    shares = [f"{100 * share:.1f} %" for _, share in want]
    assert page.locator("#classes li .share").all_inner_texts() == shares
    assert first != shares
    # nothing is wider than the screen
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder_of := os.environ.get("FASTFPL_SCREENSHOTS"):
        page.screenshot(path=f"{folder_of}/serve-{width}.png", full_page=True)
    assert complaints == []
    bad = {"name": "x.txt", "mimeType": "text/plain", "buffer": b"no image"}
    page.set_input_files("#file", bad)
    page.wait_for_selector("#problem:not([hidden])")
    assert "must be an image" in page.locator("#problem").inner_text()
    assert page.locator("#answers").is_hidden()
    assert all(one.startswith((url, "blob:")) for one in asked)
    page.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -15)])
def test_it_is_stopped_as_soon_as_it_says_that_it_answers(number, code, folder, tmp_path):
    with begun(folder, tmp_path) as (_, process):
        process.send_signal(number)
        assert process.wait(60) == code  # a busy machine takes its time
        assert process.stderr.read() == ""
