"""Every kind of backbone that open_clip builds is taken exactly, or refused with its reason."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from click.testing import CliRunner
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import fastfpl
from fastfpl.cli.entry import group
from fastfpl.clip import FrozenCLIP, load_clip
from fastfpl.clip.survey import survey, table
from fastfpl.clip.tokenizer import adapt_tokenizer
from fastfpl.dropin import accelerate, explain
from fastfpl.errors import InputError, Missing, NotSupported
from fastfpl.ops.embedded import encode_embedded
from fastfpl.ops.faces import face, recorded_faces
from fastfpl.ops.memory import memory_limit
from fastfpl.ops.text import encode_text
from fastfpl.prompts import ClassPrompts, encode_prompts
from fastfpl.reference.text import TextTower
from fastfpl.training import budget
from tests.families import scramble
from tests.test_text import NAMES, WordsClip, agree, both, living, random_tower, relative

CLASSES = ("cat", "Siamese sea horse", "very old oak tree")
POSITIONS = ("end", "middle", "front")
ROOT = Path(__file__).resolve().parent.parent

# --- tokenizers of the hub's kinds, without the hub -----------------------------------------------

WORDS = ("a", "photo", "of", "cat", "sea", "horse", "old", "tree", "very", "siamese")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


@functools.cache
def hub_tokenizer(kind: str) -> Any:
    """Build what transformers loads for SigLIP (T5), SigLIP 2 (Gemma) or CLIPA (BERT)."""
    special = {"t5": ["</s>"], "gemma": ["<pad>", "<eos>", "<bos>"], "bert": ["[PAD]"]}[kind]
    if kind == "t5":  # ids as in SigLIP: the end is 1, and so is the pad
        special = ["<unused>", "</s>"]
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        vocabulary = [*special, *WORDS, *LETTERS[1:], *(f"##{x}" for x in LETTERS)]
        ids = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
        inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        frame = ("[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        pieces = [*special, "<unk>", "▁", *LETTERS]
        pieces += [f"▁{word}" for word in WORDS] + list(WORDS[1:])
        scores = [(piece, -float(len(special) + 9 - min(len(piece), 8))) for piece in pieces]
        inner = Tokenizer(models.Unigram(scores, unk_id=len(special), byte_fallback=False))
        scheme = "always" if kind == "t5" else "never"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
        end = special[1]
        frame = (f"$A {end}", [(end, 1)])
        names = {"pad_token": "</s>" if kind == "t5" else "<pad>", "eos_token": end}
        if kind == "gemma":
            names["bos_token"] = "<bos>"  # it has one, and SigLIP 2 does not use it
    inner.add_special_tokens([AddedToken(x, special=True) for x in special])
    inner.post_processor = processors.TemplateProcessing(single=frame[0], special_tokens=frame[1])
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="right", **names)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Wrap them as open_clip does, from files in a folder."""

    @functools.cache
    def make(kind: str, length: int, clean: str = "canonicalize") -> Any:
        folder = tmp_path_factory.mktemp(kind)
        hub_tokenizer(kind).save_pretrained(folder)
        more = {"strip_sep_token": True} if kind == "bert" else {"clean": clean}
        return HFTokenizer(str(folder), context_length=length, **more)

    return make


@pytest.mark.parametrize(
    ("kind", "sos", "eot", "pad"), [("t5", None, 1, 1), ("gemma", None, 1, 0), ("bert", 2, 0, 0)]
)
def test_what_surrounds_a_text_is_read_from_the_tokenizer(
    wrapped: Any, kind: str, sos: int | None, eot: int, pad: int
) -> None:
    tokenizer = wrapped(kind, 20)
    found = adapt_tokenizer(tokenizer, 1000)
    assert (found.sos, found.eot, found.pad) == (sos, eot, pad)
    bare = adapt_tokenizer(lambda texts: tokenizer(texts), 1000)  # the function alone
    assert (bare.sos, bare.eot, bare.pad) == (sos, eot, pad)
    for text in ("a", "A photo of a cat", "Sea-horse 42."):
        row = [i for i in (found.sos,) if i is not None] + found.encode(text) + [found.eot]
        assert tokenizer([text])[0].tolist() == row + [pad] * (20 - len(row))
        assert bare.encode(text) == found.encode(text)
    sent = pickle.loads(pickle.dumps(found))
    assert sent.encode("Sea-horse 42.") == found.encode("Sea-horse 42.")
    plain = adapt_tokenizer(hub_tokenizer(kind), 1000)
    assert plain.sos == sos
    assert plain.eot == (3 if kind == "bert" else eot)  # open_clip replaces BERT's [SEP] by 0
    assert plain.encode("a photo") == found.encode("a photo")


def test_a_name_behind_a_context_is_tokenised_as_behind_a_word(wrapped: Any) -> None:
    for kind, differs in (("t5", False), ("gemma", True), ("bert", False)):
        found = adapt_tokenizer(wrapped(kind, 20), 1000)
        assert (found.encode("cat") != found.encode(" cat")) == differs
        assert found.encode("a photo") + found.encode(" cat") == found.encode("a photo cat")


def test_tokenizers_of_another_kind_are_refused(wrapped: Any) -> None:
    odd = hub_tokenizer("t5").__class__(tokenizer_object=hub_tokenizer("bert").backend_tokenizer)
    odd.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] [CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with pytest.raises(InputError, match="at most one id before a text and one behind it; got"):
        adapt_tokenizer(odd, 1000)
    hub_tokenizer.cache_clear()
    with pytest.raises(InputError, match="at most one id before a text and one behind it; got"):
        adapt_tokenizer(lambda texts: [[9, 8, *map(ord, t), 7, 0, 0] for t in texts], 1000)
    left = copy.copy(wrapped("gemma", 20))
    left.clean_fn = str.upper
    left.__class__ = type(
        "Other", (HFTokenizer,), {"__call__": lambda self, texts: wrapped("gemma", 20)(texts)}
    )
    with pytest.raises(InputError, match="the ids that its own inner tokenizer gives; got"):
        adapt_tokenizer(left, 1000)


def test_a_tokenizer_out_of_reach_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise OSError("We couldn't connect to the hub\nand a long story")

    monkeypatch.setattr(open_clip, "get_tokenizer", fail)
    with pytest.raises(
        Missing,
        match=r"^fastfpl\.load_clip: tokenizer 'timm/ViT-B-16-SigLIP' of 'ViT-B-16-SigLIP' must be "
        r"at hand or in reach; got OSError: We couldn't connect to the hub; with its files in a "
        r"folder: load_clip\('ViT-B-16-SigLIP', tokenizer=open_clip\.tokenizer\.HFTokenizer\("
        r'"/path/to/folder", context_length=64, clean=\'canonicalize\'\)\)$',
    ):
        load_clip("ViT-B-16-SigLIP", "random")


# --- the matrix: open_clip's own builders, few layers ---------------------------------------------

BACKBONES = ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14", "EVA02-B-16", "ViT-B-16-SigLIP")
SIDE = {"ViT-L-14": 28, "RN50": 64}


def small_config(name: str) -> dict[str, Any]:
    """Take a model's config with two narrow text layers, one image layer and small images."""
    config: dict[str, Any] = open_clip.get_model_config(name)
    config["text_cfg"] |= {"layers": 2, "width": 256, "heads": 4}
    config["vision_cfg"]["image_size"] = SIDE.get(name, 32)
    if "layers" in config["vision_cfg"]:
        layers = config["vision_cfg"]["layers"]
        config["vision_cfg"]["layers"] = 1 if isinstance(layers, int) else [1, 1, 1, 1]
        if name == "RN50":
            config["vision_cfg"]["width"] = 8
    return config


def build(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    config = small_config(name)
    custom = config.pop("custom_text", False)
    small = functools.partial(timm.create_model, depth=1, img_size=SIDE.get(name, 32))
    monkeypatch.setattr("open_clip.timm_model.timm.create_model", small)
    torch.manual_seed(0)
    model = (CustomTextCLIP if custom else CLIP)(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # biases and norms that are all zero or one hide mistakes
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


class Case:
    """One backbone, loaded in two precisions."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model = name, model
        self.tokenizer = tokenizer
        self.rows = tokenizer or open_clip.SimpleTokenizer(context_length=77)
        self.clip = load_clip(model, tokenizer=tokenizer)

    @functools.cached_property
    def exact(self) -> FrozenCLIP:
        return load_clip(self.model, tokenizer=self.tokenizer, dtype=torch.float64)

    @property
    def whole(self) -> bool:
        return "SigLIP" in self.name


@pytest.fixture(scope="module", params=BACKBONES)
def case(request: pytest.FixtureRequest, wrapped: Any) -> Case:
    with pytest.MonkeyPatch.context() as patch:
        model = build(request.param, patch)
    siglip = "SigLIP" in request.param
    return Case(request.param, model, wrapped("t5", 64) if siglip else None)


def test_texts_are_open_clips_own(case: Case) -> None:
    clip = case.clip
    assert clip.text.whole == case.whole
    classes = ClassPrompts(clip, CLASSES)
    rows = case.rows([f"a photo of a {name}." for name in CLASSES])
    with torch.no_grad():
        want = F.normalize(case.model.encode_text(rows), dim=-1)
    with recorded_faces() as seen:
        words = encode_prompts(classes, classes.words("a photo of a"))
    assert seen == {"encode_text": {"torch" if case.whole else "cpu"}}
    torch.testing.assert_close(words, want, rtol=0, atol=1e-5)
    assert (want[0] - want[1]).abs().max() > 1e-3, "the texts must differ to mean much"
    # the sentence as names, with no context at all
    whole = ClassPrompts(clip, [f"a photo of a {name}" for name in CLASSES])
    plain = encode_prompts(whole, torch.zeros(0, clip.text_width))
    torch.testing.assert_close(plain, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
def test_gradients_are_the_literal_passs(case: Case, class_specific: bool) -> None:
    clip = case.exact
    position = POSITIONS[BACKBONES.index(case.name) % 3]
    classes = ClassPrompts(clip, CLASSES[:2], position)  # type: ignore[arg-type]  # one of three
    inner = (2, 3) if class_specific else (3,)
    draw = torch.Generator().manual_seed(0)
    ctx = 0.1 * torch.randn(2, *inner, clip.text_width, generator=draw, dtype=torch.float64)
    faces = ["torch"] if case.whole else ["cpu", "torch"]
    found = both(clip.text, classes, ctx, class_specific, faces)
    assert found["reference"][1].abs().max() > 1e-6
    agree(found, 1e-12, 1e-10)


def test_images_are_open_clips_own(case: Case) -> None:
    side = case.clip.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = case.model.encode_image(pixels)
    got = case.clip.encode_image(pixels, normalize=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if case.whole:
        with pytest.raises(NotSupported, match="pools by attention with a learned query"):
            case.clip.encode_image_tokens(pixels)
        return
    patches = 1 if case.name == "ViT-B-32" else 4
    assert case.clip.patches == patches
    tokens = case.clip._image.tokens(pixels)
    assert tokens.shape == (2, 1 + patches, case.clip.dim)
    torch.testing.assert_close(tokens[:, 0], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        case.clip.encode_image_tokens(pixels, normalize=False), tokens[:, 1:]
    )


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_a_run_goes_through(
    case: Case, method: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # all that other tests hold
    monkeypatch.setattr(budget, "_taken", lambda device: 0)
    options = {"experts": 1, "heads": 2, "gate_width": 16} if method == "pfedmoap" else {}
    # two steps; pfedmoap has experts from the second round on
    rounds = 2 if method == "pfedmoap" else 1
    settings = {"clients": 2, "shots": 2, "rounds": rounds, "local_epochs": 1, "batch_size": 5}
    # a budget's trials, which two methods would repeat, and whole passes take long over
    limit = "512 MiB" if method == "promptfl" and not case.whole else None
    folder = tmp_path_factory.getbasetemp() / f"features-{case.name}"
    result = fastfpl.run(
        method,
        dataset="digits",
        model=case.clip,
        cache=folder,
        n_ctx=4,
        max_memory=limit,
        options=options,
        **settings,
    )
    assert set(result.faces["encode_text"]) == {"torch" if case.whole else "cpu"}
    assert len(result.rounds) == rounds
    assert all(0 <= row["accuracy"] <= 1 for row in result.rounds)


def test_eva_tokens_are_projected_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("EVA02-B-16", monkeypatch)
    trunk, seen = model.visual.trunk, []
    handle = trunk.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.encode_image(pixels)
        handle.remove()
        want = torch.stack([trunk.head(seen[0][:, i]) for i in range(1, 5)], dim=1)
    got = load_clip(model).encode_image_tokens(pixels, normalize=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_bias_of_the_logits_cancels(case: Case) -> None:
    if not case.whole:
        assert getattr(case.model, "logit_bias", None) is None
        return
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    rows = case.rows([f"a photo of a {name}." for name in CLASSES])
    with torch.no_grad():
        theirs, _ = case.model.get_logits(image, rows)
    classes = ClassPrompts(case.clip, CLASSES)
    text = encode_prompts(classes, classes.words("a photo of a"))
    ours = case.clip.logit_scale * case.clip.encode_image(image) @ text.T
    torch.testing.assert_close(ours - theirs, (ours - theirs).mean().expand(4, 3))
    assert (ours - theirs).mean() == pytest.approx(-case.model.logit_bias.item(), abs=1e-4)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


# --- other text towers of open_clip's configs, narrow ---------------------------------------------

TEXTS = {
    # name: tokenizer, causal, pooling
    "ViT-B-16-SigLIP2": ("gemma", False, "last"),
    "ViT-SO400M-14-SigLIP": ("t5", False, "last"),
    "ViT-SO400M-16-SigLIP-i18n-256": ("t5", False, "last"),
    "ViT-H-14-CLIPA": ("bert", False, "last"),
    "MobileCLIP-S1": (None, False, "eot"),
    "ViT-L-14-worldwide": ("gemma", True, "eot"),
    "ViT-B-16-quickgelu": (None, True, "eot"),
}


def narrow(name: str) -> Any:
    config: dict[str, Any] = open_clip.get_model_config(name)
    text = config["text_cfg"] | {"layers": 2, "width": 48, "heads": 3}
    if TEXTS[name][0] is not None:
        text["vocab_size"] = 200
    custom, quick = config.get("custom_text", False), config.get("quick_gelu", False)
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    torch.manual_seed(0)
    dim = 48 if text.get("proj_type") == "none" else 40
    return scramble((CustomTextCLIP if custom else CLIP)(dim, vision, text, quick_gelu=quick))


@pytest.mark.parametrize("name", TEXTS)
def test_other_texts_are_open_clips_own(name: str, wrapped: Any) -> None:
    kind, causal, pooling = TEXTS[name]
    model = narrow(name)
    length = int(model.context_length)
    tokenizer = None if kind is None else wrapped(kind, length)
    clip = load_clip(model, tokenizer=tokenizer)
    assert (clip.text.causal, clip.text.pooling) == (causal, pooling)
    assert clip.text.activation == {
        "B-16-SigLIP2": "gelu_tanh",
        "B-16-quickgelu": "quick_gelu",
    }.get(name.removeprefix("ViT-"), "gelu")
    rows = tokenizer or open_clip.SimpleTokenizer(context_length=length)
    names = ("cat", "sea horse", "tree") if length > 16 else ("cat", "sea", "tree")
    with torch.no_grad():
        want = F.normalize(model.encode_text(rows([f"a photo of a {n}." for n in names])), dim=-1)
    classes = ClassPrompts(clip, names)
    got = encode_prompts(classes, classes.words("a photo of a"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (want[0] - want[1]).abs().max() > 1e-3
    exact = load_clip(model, tokenizer=tokenizer, dtype=torch.float64)
    for class_specific in (False, True):
        classes = ClassPrompts(exact, names, "middle")
        inner = (3, 4) if class_specific else (4,)
        ctx = torch.randn(2, *inner, 48, dtype=torch.float64)
        agree(both(exact.text, classes, ctx, class_specific, ["torch"]), 1e-12, 1e-11)


# --- laws of a tower that is run whole ------------------------------------------------------------

WHOLE = {
    "bidirectional": {"causal": False, "pad": 7},
    "bidirectional, last": {"causal": False, "pooling": "last", "pad": 7},
    "causal, last": {"pooling": "last", "pad": 7},
    "bidirectional, last, no SOS": {"causal": False, "pooling": "last", "pad": 7, "sos": None},
}


def whole_tower(kind: str, **more: Any) -> TextTower:
    return replace(random_tower(**more), **WHOLE[kind])


@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", WHOLE)
def test_the_full_pass_is_the_literal_one(kind: str, position: Any, class_specific: bool) -> None:
    tower = whole_tower(kind, activation="gelu_tanh" if position == "middle" else "quick_gelu")
    classes = ClassPrompts(WordsClip(tower), NAMES, position)  # type: ignore[arg-type]  # text side
    for slots, lead in ((3, (2,)), (0, ()), (1, (2, 1))):
        inner = (len(NAMES), slots) if class_specific else (slots,)
        ctx = torch.randn(*lead, *inner, tower.width, dtype=torch.float64)
        if slots:
            agree(both(tower, classes, ctx, class_specific, ["torch"]), 1e-12, 1e-11)
        else:
            values = []
            for name in ("torch", "reference"):
                with face(name):
                    values.append(
                        encode_text(tower, classes.layout(0), ctx, class_specific=class_specific)
                    )
            torch.testing.assert_close(*values, rtol=0, atol=1e-12)
    with face("torch"):
        none = encode_text(tower, classes.layout(3), torch.zeros(0, 3, tower.width).double())
    assert none.shape == (0, len(NAMES), tower.dim)


@pytest.mark.parametrize("kind", WHOLE)
def test_pads_and_later_tokens_reach_the_features(kind: str) -> None:
    """The reason why nothing can be cut: another pad is another feature."""
    tower = whole_tower(kind)
    other = replace(tower, pad=8)
    ctx = torch.randn(3, tower.width, dtype=torch.float64)
    a, b = (
        encode_prompts(ClassPrompts(WordsClip(t), NAMES), ctx)  # type: ignore[arg-type]  # text
        for t in (tower, other)
    )
    assert (a - b).abs().max() > 1e-3
    plain = replace(tower, causal=True, pooling="eot")
    a, b = (
        encode_prompts(ClassPrompts(WordsClip(t), NAMES), ctx)  # type: ignore[arg-type]  # text
        for t in (plain, replace(plain, pad=8))
    )
    assert torch.equal(a, b)


def test_prompts_begin_and_end_as_the_tower_has_them() -> None:
    tower = whole_tower("bidirectional, last, no SOS", length=16)
    clip = WordsClip(tower)
    cat, dot = [ord(c) % 40 for c in "cat"], ord(".") % 40
    rows = {}
    for position in POSITIONS:
        layout = ClassPrompts(clip, ["cat"], position).layout(5)  # type: ignore[arg-type]  # text
        rows[position] = layout.tokens[0].tolist(), layout.slots[0].tolist()
        assert (layout.eot.item(), layout.begin) == (9, 0)
        assert layout.shared == {"end": 5, "middle": 2, "front": 0}[position]
    pads = [7] * 6
    assert rows["end"] == ([0, 0, 0, 0, 0, *cat, dot, 41, *pads], [0, 1, 2, 3, 4])
    assert rows["middle"] == ([0, 0, *cat, 0, 0, 0, dot, 41, *pads], [0, 1, 5, 6, 7])
    assert rows["front"] == ([*cat, 0, 0, 0, 0, 0, dot, 41, *pads], [3, 4, 5, 6, 7])
    classes = ClassPrompts(clip, ["cat"])  # type: ignore[arg-type]  # its text side
    assert classes.eot_spare == 16 - 4 - 1
    with pytest.raises(InputError, match=r"1 of the ending \+ EOT; use at most 11 vectors"):
        classes.layout(12)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
def test_a_causal_tower_without_sos_shares_its_context(position: Any, class_specific: bool) -> None:
    tower = replace(random_tower(), sos=None)
    classes = ClassPrompts(WordsClip(tower), NAMES, position)  # type: ignore[arg-type]  # text side
    inner = (len(NAMES), 4) if class_specific else (4,)
    ctx = torch.randn(2, *inner, tower.width, dtype=torch.float64)
    agree(both(tower, classes, ctx, class_specific, ["torch"]), 1e-12, 1e-11)
    plain = encode_prompts(classes, ctx, class_specific=class_specific)
    cut = encode_prompts(classes, ctx, class_specific=class_specific, max_memory=200_000)
    torch.testing.assert_close(cut, plain, rtol=0, atol=1e-13)
    with (
        pytest.raises(NotSupported, match="cpu: the tower's prompts begin without SOS"),
        face("cpu"),
    ):
        encode_text(tower, classes.layout(4), ctx, class_specific=class_specific)


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_faces_that_cut_say_why_not(name: str) -> None:
    for changes, said in (
        ({"causal": False}, "the tower is not causal: every token sees the whole prompt"),
        ({"pooling": "last"}, "the tower pools at the last token, which sees the pads"),
        ({"activation": "gelu_tanh"}, "the tower's activation is tanh GELU"),
    ):
        tower = replace(random_tower(), **changes)  # type: ignore[arg-type]  # by field name
        classes = ClassPrompts(WordsClip(tower), NAMES)  # type: ignore[arg-type]  # its text side
        ctx = torch.zeros(3, tower.width, dtype=torch.float64)
        with pytest.raises(NotSupported, match=f"{name}: {said}"), face(name):
            encode_prompts(classes, ctx)
        with recorded_faces() as seen:
            encode_prompts(classes, ctx)
        assert seen == {"encode_text": {"torch"}}


def test_embedded_prompts_need_a_causal_tower() -> None:
    tower = whole_tower("bidirectional")
    prompts = torch.zeros(2, 9, tower.width, dtype=torch.float64)
    with pytest.raises(NotSupported, match="the tower is not causal"):
        encode_embedded(tower, prompts, torch.tensor([4, 8]))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_limit_bounds_the_full_pass_and_changes_nothing(
    dtype: torch.dtype, activation: str
) -> None:
    tower = whole_tower(
        "bidirectional, last", width=64, heads=2, dim=8, depth=2, activation=activation
    ).to("cpu", dtype)
    names = [f"{'x' * (i % 8)}{i}" for i in range(12)]
    layout = ClassPrompts(WordsClip(tower), names).layout(4)  # type: ignore[arg-type]  # text side
    ctx = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    features, gradient, whole = living(tower, layout, ctx, None)
    off = 1e-12 if dtype == torch.float64 else 0.05
    seen = []
    for limit in (whole, whole // 5):
        less, d_less, most = living(tower, layout, ctx, limit)
        assert most <= limit, (limit, most)
        torch.testing.assert_close(less, features, rtol=0, atol=off)
        assert relative(d_less.double(), gradient.double()) < off
        seen.append(most)
    assert seen[0] > 2 * seen[-1]
    with memory_limit(1000), pytest.raises(InputError, match="max_memory must be at least"):
        encode_text(tower, layout, ctx)


def test_many_classes_without_gradient_are_cut_by_themselves() -> None:
    tower = whole_tower("bidirectional, last", width=8, heads=2, depth=1, dim=4)
    names = [f"{'x' * (i % 8)}{i}" for i in range(500)]
    layout = ClassPrompts(WordsClip(tower), names).layout(4)  # type: ignore[arg-type]  # text side
    ctx = torch.randn(4, 8, dtype=torch.float64)
    assert 500 * 40 > 1 << 14
    with torch.no_grad():
        cut = encode_text(tower, layout, ctx)
    uncut = encode_text(tower, layout, ctx.requires_grad_())
    torch.testing.assert_close(cut, uncut.detach(), rtol=0, atol=1e-13)


def test_gradcheck_of_the_full_pass() -> None:
    tower = whole_tower("bidirectional, last, no SOS", width=8, heads=2, depth=2, dim=4, length=16)
    classes = ClassPrompts(WordsClip(tower), NAMES[:2], "middle")  # type: ignore[arg-type]  # text
    for own in (False, True):
        inner = (2, 2) if own else (2,)
        ctx = torch.randn(2, *inner, 8, dtype=torch.float64, requires_grad=True)
        encode = functools.partial(encode_prompts, classes, class_specific=own)
        assert torch.autograd.gradcheck(encode, (ctx,), fast_mode=own)


def test_the_digest_knows_what_decides_a_feature(wrapped: Any) -> None:
    model = narrow("ViT-B-16-SigLIP2")
    tokenizer = adapt_tokenizer(wrapped("gemma", 64), 200)
    digests = {load_clip(model, tokenizer=tokenizer).weights_digest}
    digests.add(load_clip(model, tokenizer=replace(tokenizer, pad=5)).weights_digest)
    model.text.pool_type = "argmax"
    digests.add(load_clip(model, tokenizer=tokenizer).weights_digest)
    assert len(digests) == 3
    with pytest.raises(InputError, match="must have a padding token for a text tower that sees"):
        load_clip(model, tokenizer=replace(tokenizer, pad=None))
    # of the embedded model, unchanged since docs/tiny.md was written
    assert load_clip("tiny").weights_digest in (ROOT / "docs/tiny.md").read_text(encoding="utf-8")


# --- drop-in, survey, pages -----------------------------------------------------------------------

SMALL = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
NARROW = {"context_length": 24, "width": 32, "heads": 4, "layers": 2}


def test_accelerate_takes_eva_and_leaves_siglip_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, wrapped: Any
) -> None:
    eva = build("EVA02-B-16", monkeypatch)
    rows = open_clip.SimpleTokenizer(context_length=77)(["a photo of a cat.", "sea horse"])
    with torch.no_grad():
        want = eva.encode_text(rows)
        accelerate(eva)
        torch.testing.assert_close(eva.encode_text(rows), want, rtol=0, atol=1e-5)
    assert all(f.swapped for f in explain(eva).findings)
    siglip = narrow("ViT-B-16-SigLIP2")
    rows = wrapped("gemma", 64)(["a photo of a cat.", "sea horse"])
    with torch.no_grad():
        want = siglip.encode_text(rows)
        accelerate(siglip)
        assert torch.equal(siglip.encode_text(rows), want)
    (finding,) = explain(siglip).findings
    assert not finding.swapped
    assert "its text tower is bidirectional" in finding.reason
    tanh = {**NARROW, "act_kwargs": {"approximate": "tanh"}}
    causal = scramble(CLIP(40, {**SMALL}, tanh)).requires_grad_(False)
    rows = open_clip.SimpleTokenizer(context_length=24)(["a photo of a cat.", "sea horse"])
    want = causal.encode_text(rows)
    torch.testing.assert_close(accelerate(causal).encode_text(rows), want, rtol=0, atol=1e-5)
    (finding,) = explain(causal).findings
    assert finding.swapped
    assert sum(finding.calls.values()) == 1


def test_the_survey_agrees_with_what_loads(case: Case) -> None:
    seen = survey(case.name)
    assert seen.text is not None
    assert seen.image is not None
    assert (seen.text.whole, seen.text.causal) == (case.whole, not case.whole)
    assert seen.text.dim == case.clip.dim
    assert seen.text.context_length == case.clip.context_length
    assert (seen.image.patches is None) == (case.clip.patches is None)
    assert type(seen.image) is type(case.clip._image)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("coca_ViT-B-32", "a captioning model"),
        ("roberta-ViT-B-32", "the text tower 'roberta-base' of transformers"),
    ],
)
def test_the_survey_says_why_not(name: str, said: str) -> None:
    assert said in survey(name).refusal


def test_the_page_is_the_survey() -> None:
    page = (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    said = re.search(r"every model of open_clip (\S+) without", page)
    assert said is not None
    if open_clip.__version__ != said[1]:
        pytest.skip(f"the page is of open_clip {said[1]}, this is {open_clip.__version__}")
    listed = [line for line in page.splitlines() if line.startswith("| ")]
    named = {name for line in listed[1:] for name in line.split("|")[1].strip().split(", ")}
    assert named == set(open_clip.list_models())
    few = ["ViT-B-16-SigLIP2", "MobileCLIP-B", "coca_ViT-B-32", "RN50", "EVA02-B-16"]
    for line in table(few).splitlines()[2:]:
        names, *rest = line.strip("| ").split(" | ")
        for name in names.split(", "):
            (own,) = [x for x in listed if name in x.split("|")[1].strip().split(", ")]
            assert own.strip("| ").split(" | ")[1:] == rest, name


def test_doctor_says_which_face_takes_a_model() -> None:
    done = CliRunner().invoke(group, ["doctor", "--clip", "ViT-B-16-SigLIP"], terminal_width=500)
    assert done.exit_code == 0, done.output
    flat = " ".join(done.output.split())
    assert "text pass of ViT-B-16-SigLIP" in flat
    assert "cpu the tower is not causal: every token sees the whole prompt" in flat
    assert "torch yes" in flat


def test_the_features_of_a_context_are_a_leaf_of_the_graph() -> None:
    """A context that needs no gradient keeps none, one that needs it gets it in its own dtype."""
    tower = whole_tower("bidirectional, last").to("cpu", torch.float32)
    classes = ClassPrompts(WordsClip(tower), NAMES)  # type: ignore[arg-type]  # its text side
    ctx: Tensor = torch.randn(3, tower.width, dtype=torch.float64)
    assert not encode_prompts(classes, ctx).requires_grad
    leaf = ctx.requires_grad_()
    encode_prompts(classes, leaf)[0, 0].backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float64
