"""What is played in the first hour on a card, in its order: data for `bench.first_gpu_hour`.

Cheap proofs come before dear ones, and no time is taken of what is not proven.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BENCHES", "STEPS", "Step"]

#: Runs the command line of this installation, wherever its script lies.
_FASTFPL = ("-c", "from fastfpl.cli import main; main()")
_PYTEST = ("-m", "pytest", "-q", "-n0", "-x", "-p", "no:cacheprovider")
# a rehearsal imports once what all steps import, plugins of pytest among it
_PRETENDED = (*_PYTEST, "-p", "tests.pretended", "--collect-only")
_PRETENDED += ("-p", "no:anyio", "-W", "ignore:Module already imported")
_TABLES = ("-m", "bench.tables", "--out", "{made}")
_COLLECTED = r"\b[1-9]\d*(/\d+)? tests? collected"
_NO_CARD = r"got 'cuda' without a CUDA device"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes
    ----------
    name : str
    what : str
        What is proven.
    look : str
        Where to look if it is red.
    argv : tuple of str
        What Python is given; ``{out}`` is the folder of the hour, ``{card}`` the card's name in
        names of files, ``{made}`` what the step writes.
    rehearsal : tuple of str
        The same without a card.
    minutes : float
        A step that takes longer is red.
    proves, rehearses : str
        A pattern that the log must hold: a step in which everything was skipped is not green.
    rehearsal_exit : int
        With what the rehearsal ends where it ends for want of the card.
    makes : str
        The file that is there once the step is green.
    before : tuple of str
        A tool that runs Python; a step whose tool is not there is not played, and says so.
    cards : int
        So many cards are needed.
    env, rehearsal_env : dict
        Environment variables.
    """

    name: str
    what: str
    look: str
    argv: tuple[str, ...]
    rehearsal: tuple[str, ...]
    minutes: float = 10
    proves: str = ""
    rehearses: str = ""
    rehearsal_exit: int = 0
    makes: str = ""
    before: tuple[str, ...] = ()
    cards: int = 1
    env: dict[str, str] = field(default_factory=dict)
    rehearsal_env: dict[str, str] = field(default_factory=dict)


def _tests(name: str, what: str, look: str, *argv: str, minutes: float = 10) -> Step:
    return Step(
        *(name, what, look),
        argv=(*_PYTEST, *argv),
        rehearsal=(*_PRETENDED, *argv),
        minutes=minutes,
        proves=r"\b[1-9]\d* passed",
        rehearses=_COLLECTED,
    )


def _sanitized(tool: str, look: str, *interpreted: str) -> Step:
    cases = ("-m", "bench.small_cases", "--device")
    return Step(
        f"sanitizer-{tool}",
        f"compute-sanitizer's {tool} over every kernel at small odd sizes",
        look,
        argv=(*cases, "cuda"),
        rehearsal=(*cases, "cpu", *(x for op in interpreted for x in ("--op", op))),
        minutes=15,
        proves=r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards",
        rehearses=r"\b[1-9]\d* cases",
        before=("compute-sanitizer", "--tool", tool, "--error-exitcode", "1"),
        # each tensor has an allocation of its own: what is read beyond it shows
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        rehearsal_env={"TRITON_INTERPRET": "1"},
    )


def _profile(method: str, look: str) -> Step:
    argv = (*_FASTFPL, "profile", method, "--device", "cuda", "--steps", "5")
    argv += ("--out", f"{{out}}/profile-{method}", "--cache", "{out}/cache")
    return Step(
        f"profile-{method}",
        f"where a round of {method} spends its time",
        look,
        argv=argv,
        rehearsal=argv,
        minutes=5,
        proves=r"trace\.json",
        # all options are read, and then the card is missed
        rehearses=_NO_CARD,
        rehearsal_exit=2,
    )


def _bench(name: str, minutes: float) -> Step:
    argv = (*_PYTEST, "--benchmark", f"bench/bench_{name}.py")
    return Step(
        f"bench-{name}",
        f"times of bench/bench_{name}.py, each after its result was right",
        "the first row that is not timed says why; a result on another device is a bench's fault",
        argv=(*argv, "--benchmark-json={made}"),
        rehearsal=(*_PRETENDED, "--benchmark", f"bench/bench_{name}.py"),
        minutes=minutes,
        proves=r"\b[1-9]\d* passed",
        rehearses=_COLLECTED,
        makes=f"{name}-{{card}}.json",
    )


#: The benches that a card has something to say to, and the minutes that each may take.
BENCHES = {
    "attention": 5,
    "entropic": 5,
    "transport": 15,
    "gate": 20,
    "embedded": 5,
    "text": 30,
    "dropin": 10,
    "step": 10,
    "round": 20,
}

STEPS = (
    Step(
        "nvidia-smi",
        "driver, cards, and who else is on them",
        "the driver; another process on the card makes every time below worthless",
        argv=(),
        rehearsal=("-c", "print('nvidia-smi is asked where there is a card')"),
        minutes=1,
        before=("nvidia-smi",),
    ),
    Step(
        "doctor",
        "which faces run here, and why the others do not",
        "fastfpl doctor must name the card and say yes to every triton face",
        argv=(*_FASTFPL, "doctor"),
        rehearsal=(*_FASTFPL, "doctor"),
        minutes=3,
        proves=r"transport_plan +triton +yes",
        rehearses=r"transport_plan +triton +",
    ),
    _tests(
        "launches",
        "launches that are not asked of Triton again are the launches that it would make",
        "kernels/launching.py; what it takes for alike",
        *("-m", "gpu", "tests/test_launching.py"),
    ),
    _tests(
        "text-kernels",
        "kernels of the text pass, compiled",
        "kernels/text.py; div.full and ex2.approx err by an ulp or two (tests/hostile.py)",
        *("-m", "gpu", "tests/test_text_kernels.py"),
    ),
    _tests(
        "attention-kernels",
        "attention behind a shared prefix, compiled",
        "kernels/attention.py",
        *("-m", "gpu", "tests/test_attention_kernels.py"),
    ),
    _tests(
        "gate-kernels",
        "the gate, compiled",
        "kernels/gate.py; TF32 where float32 was asked for",
        *("-m", "gpu", "tests/test_gate.py"),
    ),
    _tests(
        "transport-kernels",
        "transport, compiled",
        "kernels/transport.py; a bias in 16 bits is a product that truncates",
        *("-m", "gpu", "tests/test_transport_kernels.py"),
    ),
    _tests(
        "largest-images",
        "transport_logits at P=576, D=768 in every dtype",
        "OutOfResources: depth of a tile in kernels/transport.py, and tests/aot.py for the card",
        *("-m", "gpu", "-k", "largest_images", "tests/test_transport_kernels.py"),
    ),
    _tests(
        "whole-text-pass",
        "the text pass by kernels against the literal one",
        "fastfpl/ops/text.py: how the kernels are put together",
        *("-k", "kernels_equal", "tests/test_text.py"),
    ),
    _tests(
        "steps",
        "no training step waits for the card, nor one client's answers",
        "the traceback names what read a tensor on the host",
        *("-m", "gpu", "tests/test_steps.py", "tests/test_scoring.py"),
    ),
    _tests(
        "graphs",
        "replayed steps and text passes are what they are",
        "fastfpl/training/graphs.py; what a graph reads must live as long as it does",
        *("-m", "gpu", "tests/test_graphs.py"),
    ),
    _sanitized(
        "memcheck",
        "the kernel and the thread that it names; masks of its loads",
        *("prefix_attention", "gate_experts", "transport_logits"),
    ),
    _sanitized(
        "racecheck",
        "the kernel that it names; two warps on one place of shared memory",
        "transport_plan",
    ),
    _profile("promptfl", "trace.json at ui.perfetto.dev: gaps between kernels are host time"),
    _profile("fedotp", "trace.json: copies to the card in every step are features not kept there"),
    *(_bench(name, minutes) for name, minutes in BENCHES.items()),
    Step(
        "tables",
        "the tables of all of them, losses shown",
        "bench/tables.py",
        argv=(*_TABLES, *(f"{{out}}/{name}-{{card}}.json" for name in BENCHES)),
        rehearsal=(*_TABLES, "bench/results/text-cpu-epyc-2-cores.json"),
        minutes=1,
        makes="tables-{card}.md",
    ),
    Step(
        "two-cards",
        "features of cuda:1 are those of cuda:0, byte for byte",
        "streams and events of the current device; kernels/launching.py",
        argv=("-m", "bench.two_cards", "--first", "cuda:0", "--second", "cuda:1"),
        rehearsal=("-m", "bench.two_cards", "--first", "cpu", "--second", "cpu", "--images", "8"),
        minutes=5,
        proves=r"\b[1-9]\d* rows .*the same",
        rehearses=r"\b[1-9]\d* rows .*the same",
        cards=2,
    ),
)
