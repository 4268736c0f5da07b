"""Kernels compiled ahead of time for every card, without one: can they launch, what do they spill.

Three parts. `record` runs launchers without running their kernels, so the papers' full sizes cost
nothing (give tensors on the device ``meta``), and keeps what was launched. A second process, where
Triton does not interpret, compiles exactly that. `assert_fits` does both and judges:

    def launches():
        qkv = torch.empty(1000, 77, 1536, device="meta", dtype=torch.float16)
        prefix_attention_fwd(qkv, ...)

    def test_the_kernels_fit_every_card():
        assert_fits(launches)

What cannot launch fails with every Triton. Spilled registers are the compiler's choice, so they are
figures: ``compiled.json`` holds, for every version of Triton that was tried, the registers, shared
memory and spills of every kernel on every card, the largest of its launches. A version that has a
row may not spill more than its row, nor any row more than `MOST_SPILLED`; a version that has none
has its figures printed at the end of the test run, and so has a figure that left its row.

What a kernel's speed rests on is counted in its code: instructions of the matrix units, and copies
into shared memory while others compute. With every Triton there must be some of the first where
they take what is multiplied (`on_units`). A row holds the fewest and the most of its launches, for
each kind of what they multiply, and a launch that leaves them fails; rows that were written before
this was counted hold none, and are given them when their kernel changes, or with ``--all``.

What a Triton makes of one source is always the same. ``compiled_launches.json`` holds a digest of
every launch whose figures are committed (source, types, constants, options): what is in it is not
compiled again but for a sample, so that a test run spends its minutes on what has changed.

``python -m tests.aot tests.test_gate`` prints the table of what the functions named ``launches`` or
``..._launches`` of a test file launch; several files may be named, all of `SOURCES` if none is.
``--write`` puts the figures of this Triton into both files, and compiles for it the kernels of
which a launch is new, all with ``--all``; ``--triton FOLDER``, where ``pip install --no-deps
--target FOLDER triton==X`` has put another version, compiles with that one (``nox -s compiled``
does it for all).

A kernel that upcasts for the interpreter alone does so under a constant of its module,
``INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)``; it is False where kernels are
compiled. A constexpr argument of that name is recorded as False.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = [
    "CARDS",
    "COUNTED",
    "MOST_SPILLED",
    "PIPELINED",
    "SAYS",
    "TRIED",
    "Launch",
    "Report",
    "assert_fits",
    "compiled",
    "digest",
    "digests",
    "every_pair",
    "faults",
    "figures",
    "multiplied",
    "on_units",
    "record",
    "said",
    "table",
    "taken",
]

ROOT = Path(__file__).resolve().parent.parent
#: Triton's version -> kernel -> card -> registers, shared memory and spills.
FIGURES = ROOT / "tests" / "compiled.json"
#: Triton's version -> digests of the launches that its figures are of.
LAUNCHES = ROOT / "tests" / "compiled_launches.json"
#: One in so many of the launches with a digest is compiled again.
SAMPLED = 32
#: Test files whose launches are in the figures.
SOURCES = tuple(f"tests.test_{x}" for x in ("attention_kernels", "gate", "text_kernels"))
SOURCES += ("tests.test_transport_kernels",)
#: Bytes a thread that no kernel may spill with any version that has a row: a cache line, which may
#: stay in L1 beside the hundreds that a thread reads (attention's keys on sm_120 need most of it).
MOST_SPILLED = 128
#: How a line of standard output begins that the test run repeats at its end (see conftest.py).
SAYS = "compiled kernels: "

#: Of every kernel of a version: card -> registers, shared memory, spills, and what is `COUNTED`:
#: what is multiplied -> fewest and most.
Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
#: Instructions that are counted -> what they are.
COUNTED = {
    "products": "instructions of the matrix units",
    "copies": "copies into shared memory that others need not wait for",
}
#: Kernels with a loop whose loads Triton begins an iteration or more before they are needed -> what
#: they multiply then. A tile that leaves no room for it is an exception, a ``while`` never is one.
PIPELINED = {
    "_gate_fwd_kernel": ("bf16", "fp16", "ieee", "tf32"),
    "_gate_bwd_qz_kernel": ("bf16", "fp16", "ieee"),
    **dict.fromkeys(
        (
            "_prefix_attention_fwd_kernel",
            "_prefix_attention_bwd_query_kernel",
            "_prefix_attention_bwd_key_kernel",
        ),
        ("bf16", "fp16", "tf32", "bf16x6"),
    ),
    "_transport_logits_fwd_kernel": ("bf16", "fp16", "tf32x3"),
}

#: Compute capability -> bytes of shared memory one program may have (NVIDIA's documentation).
CARDS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
#: Cards that take the same code, up to ptxas' allotment of registers.
FAMILIES = ((80,), (86, 89), (90,), (120,))
#: What a test compiles for. sm_86 and sm_89 take the code of sm_80 but for the order of a few
#: instructions, and for products of float64, for which they and sm_120 have no matrix units; so
#: what is compiled for sm_80 is held to their shared memory too. `--write` compiles for all.
TRIED = (80, 90, 120)
#: Registers one thread may have, and the threads of one program together (every card here).
REGISTERS, ALL_REGISTERS = 255, 65_536
#: Programs that CUDA takes along each axis of a grid.
GRID = (2**31 - 1, 65_535, 65_535)


@dataclass(frozen=True)
class Launch:
    """One distinct launch: everything that the compiler is told about it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> "*fp32", "i32" or "constexpr"
    constants: tuple[tuple[int, Any], ...]  # position -> value, as JSON knows it
    aligned: tuple[int, ...]  # positions divisible by 16
    options: tuple[tuple[str, Any], ...]  # num_warps, num_stages

    def __str__(self) -> str:
        types = [kind for _, kind in self.signature if kind != "constexpr"]
        seen = list(dict.fromkeys(kind for kind in types if kind.startswith("*")))
        names = [name for name, _ in self.signature]
        said = [
            f"{names[at]}={value['dtype'] if isinstance(value, dict) else value}"
            for at, value in self.constants
            if value is not None
        ]
        said += [f"{name}={value}" for name, value in self.options]
        return f"{self.kernel}[{' '.join(seen)}; {', '.join(said)}]"


@dataclass(frozen=True)
class Report:
    """What the compiler made of one launch for one card."""

    launch: Launch
    card: int
    registers: int  # of one thread
    shared: int  # bytes of one program
    spilled: int  # bytes stored to memory for want of registers
    failure: str = ""  # why it did not compile, else empty
    copies: int = 0  # instructions that fetch into shared memory while others compute
    products: int = 0  # instructions of the matrix units


def record(run: Callable[[], object]) -> list[Launch]:
    """Return the distinct launches that ``run`` makes, in order; no kernel is run.

    Each must be made where its tensors are: Triton launches on the current device, whichever it is.
    """
    import torch
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches: dict[Launch, None] = {}

    places: list[Any] = []

    @contextlib.contextmanager
    def device_of(tensor: Any) -> Iterator[None]:
        places.append(tensor.device)
        yield
        places.pop()

    def keep(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        ours = self.fn.__module__.startswith("fastfpl.")
        assert not ours or given == set(places[-1:]), (
            f"{self.__name__} is launched beside its tensors' device"
        )
        launches[_launch(self, args, grid, kwargs)] = None

    with contextlib.ExitStack() as stack:
        for kind in (InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(kind, "run", keep))
        stack.enter_context(_unfilled())
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", device_of))
        run()
    assert launches, "nothing was launched"
    return list(launches)


@contextlib.contextmanager
def _unfilled() -> Iterator[None]:
    """Leave new memory untouched: what nobody reads need not be there."""
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


def _launch(kernel: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Launch:
    import inspect

    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl  # what a real launch asks

    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    parameters = inspect.signature(kernel.fn)
    bound = parameters.bind(*args, **named)
    bound.apply_defaults()
    signature, constants, aligned = [], [], []
    for at, (name, parameter) in enumerate(parameters.parameters.items()):
        value = bound.arguments[name]
        if "constexpr" in str(parameter.annotation):
            kind, note = "constexpr", False if name == "INTERPRETED" else value
        else:
            kind, note = native_specialize_impl(CUDABackend, value, False, True, True)
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((at, _plain(note)))
        elif CUDABackend.parse_attr(note or ""):
            aligned.append(at)
    _check_grid(kernel.__name__, grid(bound.arguments) if callable(grid) else grid)
    return Launch(
        module=kernel.fn.__module__,
        kernel=kernel.__name__,
        signature=tuple(signature),
        constants=tuple(constants),
        aligned=tuple(aligned),
        options=tuple(sorted(options.items())),
    )


def every_pair(
    where: Callable[[dict[str, Any]], bool] = lambda _: True, **axes: Iterable[Any]
) -> list[dict[str, Any]]:
    """Return rows of a table in which any two values of different axes stand in one row.

    Only of rows ``where`` they are admitted. The whole product has ten times as many, and a kernel
    depends on few things of which three must come together.
    """
    values = [list(found) for found in axes.values()]
    rows = [dict(zip(axes, row, strict=True)) for row in itertools.product(*values)]
    rows = [row for row in rows if where(row)]
    pairs = [frozenset(itertools.combinations(row.items(), 2)) for row in rows]
    wanted = frozenset().union(*pairs)

    def chosen(seed: int) -> list[int]:
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        left, found = set(wanted), []
        while left:
            found.append(max(order, key=lambda at: len(pairs[at] & left)))
            left -= pairs[found[-1]]
        return found

    # what is taken first decides how many there are in the end
    return [rows[at] for at in sorted(min(map(chosen, range(32)), key=len))]


def taken(op: str, *arguments: Any) -> bool:
    """Say whether the Triton face of an op takes arguments, wherever their tensors are."""
    from fastfpl.ops import all_faces, launch

    (face,) = [face for face in all_faces()[op] if face.name == "triton"]
    with mock.patch.object(launch, "against", return_value=[]):
        return not face.against(*arguments)


def _check_grid(kernel: str, grid: tuple[int, ...]) -> None:
    for axis, (programs, most) in enumerate(zip(grid, GRID, strict=False)):
        assert 0 <= programs <= most, (
            f"{kernel}: {programs} programs along axis {axis} of its grid, at most {most}"
        )


def _plain(value: Any) -> Any:
    import triton.language as tl

    value = value.value if isinstance(value, tl.constexpr) else value
    return _Dtype(dtype=str(value)) if isinstance(value, tl.dtype) else value


class _Dtype(dict[str, str]):
    """A Triton dtype among the constants; hashable, and JSON."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self["dtype"])


def compiled(
    launches: Iterable[Launch],
    cards: Iterable[int] = tuple(CARDS),
    triton: Path | None = None,
    processes: int = 1,
) -> list[Report]:
    """Compile every launch for every card in processes of their own, and report.

    ``triton`` is the folder of another version than the one that is installed.
    """
    wanted, targets = list(launches), list(cards)
    if processes > 1:
        shares = [wanted[at::processes] for at in range(min(processes, len(wanted)))]
        with ThreadPoolExecutor(processes) as pool:
            found = list(pool.map(lambda share: compiled(share, targets, triton), shares))
        by_place = {(r.launch, r.card): r for reports in found for r in reports}
        return [by_place[launch, card] for launch in wanted for card in targets]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(triton or ""), str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with tempfile.TemporaryDirectory() as folder:
        order, answer = Path(folder, "order.json"), Path(folder, "answer.json")
        environment["TRITON_CACHE_DIR"] = folder  # what is kept comes without ptxas' words
        order.write_text(json.dumps({"launches": [asdict(x) for x in wanted], "cards": targets}))
        done = subprocess.run(
            [sys.executable, "-m", "tests.aot", "--compile", str(order), str(answer)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"the compiling process failed:\n{done.stderr[-4000:]}"
        figures = json.loads(answer.read_text())
    pairs = [(launch, card) for launch in wanted for card in targets]
    return [Report(launch, card, **f) for (launch, card), f in zip(pairs, figures, strict=True)]


def figures() -> dict[str, Rows]:
    """Return what was committed: the rows of every version of Triton that was tried."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}


def summary(reports: Iterable[Report]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the largest figures of each kernel on each card, as a version's rows hold them."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for report in reports:
        row = {name: getattr(report, name) for name in ("registers", "shared", "spilled")}
        if kind := multiplied(report.launch):
            row |= {name: {kind: [getattr(report, name)] * 2} for name in COUNTED}
        cards = rows.setdefault(report.launch.kernel, {})
        card = f"sm_{report.card}"
        cards[card] = _together(cards[card], row) if card in cards else row
    return rows


def _together(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row for the launches of two; counts only if both have them."""
    row: dict[str, Any] = {
        name: max(first[name], second[name]) for name in second if name not in COUNTED
    }
    for name in first.keys() & second.keys() & COUNTED.keys():
        ranges = dict(first[name])
        for kind, (least, most) in second[name].items():
            was = ranges.get(kind, (least, most))
            ranges[kind] = [min(was[0], least), max(was[1], most)]
        row[name] = {kind: ranges[kind] for kind in sorted(ranges)}
    return {name: row[name] for name in second if name in row}


def multiplied(launch: Launch) -> str:
    """Say what a launch multiplies matrices of: a dtype or, of float32, the precision asked for.

    Empty if it multiplies none. Of several dtypes it is the narrowest: sums are in wider ones.
    """
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    if not any("tl.dot(" in text for text in _sources(kernel, {})):
        return ""
    names = [name for name, _ in launch.signature]
    constants = {names[at]: value for at, value in launch.constants}
    found = {kind.removeprefix("*") for _, kind in launch.signature}
    dtype = next((x for x in ("fp16", "bf16", "fp32", "fp64") if x in found), "")
    if "DOT" in constants:
        dtype = constants["DOT"]["dtype"]
    return constants.get("PRECISION", dtype) if dtype == "fp32" else dtype


def on_units(kind: str, card: int) -> bool:
    """Say whether products of a kind (see `multiplied`) belong on the matrix units of a card."""
    if kind == "fp64":
        return card in (80, 90)
    return kind in ("fp16", "bf16", "tf32", "tf32x3", "bf16x6")


def faults(reports: Iterable[Report], rows: Rows | None = None) -> list[str]:
    """Return a sentence for everything that a card cannot launch or that breaks its bound.

    ``rows`` are the figures committed for the Triton that compiled, whose spills are the bounds (0
    for a kernel that has none); None if that version has no figures, and nothing to be judged by.
    """
    found = []
    for report in reports:
        where = f"{report.launch} on sm_{report.card}"
        if report.failure:
            found.append(f"{where}: does not compile: {report.failure}")
            continue
        row = (rows or {}).get(report.launch.kernel, {}).get(f"sm_{report.card}", {})
        bound = row.get("spilled", 0)
        if rows is not None and report.spilled > bound:
            found.append(
                f"{where}: spills {report.spilled} bytes of registers to memory, "
                f"its row in {FIGURES.name} has {bound}"
            )
        kind = multiplied(report.launch)
        if on_units(kind, report.card) and not report.products:
            found.append(f"{where}: multiplies {kind} without the matrix units")
        for name, what in COUNTED.items():
            now = getattr(report, name)
            least, most = row.get(name, {}).get(kind, (now, now))
            if not least <= now <= most:
                found.append(
                    f"{where}: has {now} {what} where it multiplies {kind}, "
                    f"its row in {FIGURES.name} has {least} to {most}"
                )
        # ptxas allots registers by eights, and a warp has 32 threads
        threads = 32 * dict(report.launch.options).get("num_warps", 4)
        if report.registers > REGISTERS or -(-report.registers // 8) * 8 * threads > ALL_REGISTERS:
            found.append(
                f"{where}: needs {report.registers} registers for each of {threads} threads, a "
                f"thread has {REGISTERS}, a program {ALL_REGISTERS}"
            )
        kin = (80, 86, 89) if report.card == 80 else (report.card,)
        card = min(kin, key=lambda card: CARDS[card])
        if report.shared > CARDS[card]:
            found.append(
                f"{where}: needs {report.shared} bytes of shared memory, "
                f"sm_{card} has {CARDS[card]}"
            )
    return found


def said(reports: Iterable[Report], version: str, rows: Rows | None) -> list[str]:
    """Return a line for every figure that no row holds: all of a new version, else what moved."""
    lines = []
    for kernel, cards in summary(reports).items():
        for card, found in cards.items():
            was = (rows or {}).get(kernel, {}).get(card, {})
            names = ("registers", "shared", "spilled")
            # fewer launches than the table's may be smaller, which says nothing
            if rows is None or any(found[x] > was.get(x, 0) for x in names):
                now, then = (", ".join(f"{x} {r.get(x, '-')}" for x in names) for r in (found, was))
                row = f"; its row: {then}" if was else "; it has no row"
                lines.append(f"{SAYS}Triton {version}, {kernel} on {card}: {now}{row}")
    return lines


def assert_fits(run: Callable[[], object], cards: Iterable[int] = TRIED) -> list[Report]:
    """Record what ``run`` launches, compile it for `TRIED`, and refuse what does not fit a card."""
    import triton

    known = digests().get(triton.__version__, frozenset())
    launches = [x for x in record(run) if not _proven(x, known)]
    reports = compiled(launches, cards) if launches else []
    rows = figures().get(triton.__version__)
    found = faults(reports, rows)
    assert not found, "\n".join(found)
    sys.stdout.writelines(line + "\n" for line in said(reports, triton.__version__, rows))
    return reports


def digests() -> dict[str, frozenset[str]]:
    """Return what was committed: the launches that the figures of every version are of."""
    return {
        version: frozenset(x for found in kernels.values() for x in found)
        for version, kernels in _by_kernel().items()
    }


def _by_kernel() -> dict[str, dict[str, list[str]]]:
    """Return the digests as they are committed: version -> kernel -> launches."""
    return json.loads(LAUNCHES.read_text(encoding="utf-8")) if LAUNCHES.exists() else {}


def digest(launch: Launch) -> str:
    """Return the digest of everything that decides what the compiler makes of a launch.

    The kernel's source and that of all it calls, and the constants of their modules; not the place
    where they stand.
    """
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    facts = asdict(launch)
    del facts["module"]
    text = json.dumps([facts, *_sources(kernel, {})])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sources(kernel: Any, seen: dict[str, str]) -> list[str]:
    """Return a kernel's source, and of everything it names that is no library's, in order."""
    import inspect

    import triton.language as tl

    seen[kernel.fn.__qualname__] = inspect.getsource(kernel.fn)
    for name in sorted(set(kernel.fn.__code__.co_names)):
        value = kernel.fn.__globals__.get(name)
        if hasattr(value, "fn"):
            if not value.fn.__module__.startswith("triton.") and value.fn.__qualname__ not in seen:
                _sources(value, seen)
        elif name != "INTERPRETED" and isinstance(value, (int, float, str, bool, tl.constexpr)):
            seen[f"{name} = {_plain(value)}"] = ""
    return [f"{name}: {text}" for name, text in sorted(seen.items())]


def _proven(launch: Launch, known: frozenset[str]) -> bool:
    """Say whether the committed figures are of this launch, and it is not in the sample."""
    found = digest(launch)
    return found in known and int(found, 16) % SAMPLED != 0


def table(reports: Iterable[Report]) -> str:
    """Lay the reports out in columns, the launch last."""
    lines = ["card     registers  shared  spills  copies  products  launch"]
    lines += [
        f"sm_{r.card:<6}{r.registers:>9}{r.shared:>8}{r.spilled:>8}{r.copies:>8}{r.products:>10}  "
        f"{r.launch}" + (f"  FAILS: {r.failure}" if r.failure else "")
        for r in reports
    ]
    return "\n".join(lines)


def _compile(launch: dict[str, Any], cards: Iterable[int]) -> list[dict[str, Any]]:
    """Compile one launch; only in the process that does not interpret.

    Of cards that take the same code the first is compiled for, the others have it assembled.
    """
    found: dict[int, dict[str, Any]] = {}
    for family in FAMILIES:
        kin = [card for card in cards if card in family]
        if kin:
            found |= _compile_family(launch, kin)
    return [found[card] for card in cards]


def _compile_family(launch: dict[str, Any], cards: list[int]) -> dict[int, dict[str, Any]]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    def value(x: Any) -> Any:
        return getattr(tl, _DTYPES.get(x["dtype"], x["dtype"])) if isinstance(x, dict) else x

    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    source = ASTSource(
        kernel,
        dict(launch["signature"]),
        {(at,): value(x) for at, x in launch["constants"]},
        {(at,): [["tt.divisibility", 16]] for at in launch["aligned"]},
    )
    options = dict(launch["options"]) | {"enable_fp_fusion": True}
    triton.knobs.nvidia.dump_ptxas_log = True
    first, *others = cards
    found = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            result = triton.compile(source, target=GPUTarget("cuda", first, 32), options=options)
        ptx = result.asm["ptx"]
        known = {"shared": result.metadata.shared, "failure": "", **_units(ptx)}
        found[first] = known | _allotted(log.getvalue())
        for card in others:
            backend = make_backend(GPUTarget("cuda", card, 32))
            for_card = re.sub(r"(?m)^\.target sm_\d+", f".target sm_{card}", ptx)
            with contextlib.redirect_stdout(io.StringIO()) as log:
                backend.make_cubin(for_card, {}, backend.parse_options(options), card)
            found[card] = known | _allotted(log.getvalue())
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
        nothing = {"registers": 0, "shared": 0, "spilled": 0, "failure": failure}
        return {card: found.get(card, nothing) for card in cards}
    return found


def _allotted(log: str) -> dict[str, int]:
    """Read from what ptxas says the registers of a thread, and the bytes that it stores of them."""
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(x) for x in re.findall(r"(\d+) bytes spill stores", log)]
    return {"registers": max(registers), "spilled": max(spilled)}


def _units(ptx: str) -> dict[str, int]:
    """Count in the code of a launch what its speed on a card rests on."""
    return {
        "copies": len(re.findall(r"\bcp\.async\.c[ag]\.|\bcp\.async\.bulk\.tensor", ptx)),
        "products": len(re.findall(r"\b(?:mma|wgmma|tcgen05)\.(?:sync|mma_async|mma)\b", ptx)),
    }


_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def _serve(order: Path, answer: Path) -> None:
    wanted = json.loads(order.read_text())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # whole PTX files
        figures = [x for launch in wanted["launches"] for x in _compile(launch, wanted["cards"])]
    answer.write_text(json.dumps(figures))


def _forget(launches: Iterable[Launch], version: str) -> None:
    """Drop from a version's tables kernels that are no more, or of which a launch is no more.

    What that one needed may have been the largest figures of its row.
    """
    now = _digests_of(launches)
    old = _by_kernel().get(version, {})
    kept = {name: found for name, found in old.items() if set(found) <= now.get(name, set())}
    rows = {name: row for name, row in figures().get(version, {}).items() if name in kept}
    _put(version, rows, kept)


def _write(reports: Iterable[Report], version: str) -> None:
    """Put the figures of one version into the committed tables, beside those of others.

    A row is of all launches whose digests are known, so that a run that is broken off keeps what it
    has, and the next compiles the rest.
    """
    reports = list(reports)
    rows = dict(figures().get(version, {}))
    for kernel, cards in summary(reports).items():
        old = rows.get(kernel, {})
        rows[kernel] = {c: _together(old[c], row) if c in old else row for c, row in cards.items()}
    kept = {name: set(found) for name, found in _by_kernel().get(version, {}).items()}
    for name, found in _digests_of(report.launch for report in reports).items():
        kept[name] = kept.get(name, set()) | found
    _put(version, rows, kept)


def _digests_of(launches: Iterable[Launch]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, set()).add(digest(launch))
    return found


def _put(version: str, rows: Rows, launches: Mapping[str, Iterable[str]]) -> None:
    known = {name: sorted(launches[name]) for name in sorted(launches)}
    kept = _by_kernel() | {version: known}
    text = json.dumps({name: kept[name] for name in sorted(kept)}, indent=0)
    LAUNCHES.write_text(text + "\n", encoding="utf-8")
    merged = {**figures(), version: rows}
    key = lambda name: [int(x) for x in re.findall(r"\d+", name)]  # noqa: E731
    lines = []
    for name in sorted(merged, key=key):
        kernels = ",\n".join(
            f"    {json.dumps(kernel)}: {{\n"
            + ",\n".join(
                f"      {json.dumps(card)}: {json.dumps(row)}"
                for card, row in sorted(cards.items(), key=lambda x: key(x[0]))
            )
            + "\n    }"
            for kernel, cards in sorted(merged[name].items())
        )
        lines.append(f"  {json.dumps(name)}: {{\n{kernels}\n  }}")
    FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _launched(name: str) -> list[Launch]:
    """Return what all functions of a test file launch that say so by their name."""
    module = importlib.import_module(name)
    runs = [run for made, run in vars(module).items() if made.split("_")[-1] == "launches"]
    return [launch for run in runs for launch in record(run)]


def _version(triton: Path | None) -> str:
    path = [str(triton)] if triton else None
    distributions = [
        x
        for x in importlib.metadata.distributions(**({"path": path} if path else {}))
        if x.name == "triton"
    ]
    assert distributions, f"no Triton in {triton}"
    return distributions[0].version


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["--compile"]:
        _serve(Path(arguments[1]), Path(arguments[2]))
        return
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    parser = argparse.ArgumentParser(prog="python -m tests.aot")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {FIGURES.name}")
    parser.add_argument("--all", action="store_true", help="compile what has not changed, too")
    parser.add_argument("--triton", type=Path, help="folder of another version of Triton")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("files", nargs="*", default=SOURCES, help="test files, as modules")
    asked = parser.parse_args(arguments)
    launches = list(dict.fromkeys(launch for name in asked.files for launch in _launched(name)))
    version = _version(asked.triton)
    if asked.write:
        assert tuple(asked.files) == SOURCES, "figures are of all files together"
        _forget([] if asked.all else launches, version)
        known, rows = digests()[version], figures()[version]
        launches = [launch for launch in launches if digest(launch) not in known]
        launches.sort(key=lambda launch: launch.kernel in rows)  # first what has no row
    step = 4 * asked.jobs if asked.write else max(1, len(launches))
    found = []
    for at in range(0, len(launches), step):
        some = launches[at : at + step]
        reports = compiled(some, triton=asked.triton, processes=asked.jobs)
        sys.stdout.write(table(reports) + "\n")
        sys.stdout.flush()
        found += faults(reports)
        if asked.write and not found:
            _write(reports, version)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    _main(sys.argv[1:])
