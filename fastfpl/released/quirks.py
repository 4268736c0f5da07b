"""The quirks by name: what each does, to which methods, and when it would do nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastfpl.errors import InputError, near
from fastfpl.methods import Method
from fastfpl.released.domains import NAMES, SCRAMBLED
from fastfpl.released.fedapt_unsupervised import DoubleSoftmax
from fastfpl.released.fedotp import BatchStop
from fastfpl.released.fedprox import NoGradient
from fastfpl.released.pfedmoap import InheritedGate, PoolInRound, SharedRandomExperts
from fastfpl.released.precision import HalfContext
from fastfpl.released.visits import Visits

__all__ = [
    "QUIRKS",
    "Quirk",
    "as_released",
    "changes_data",
    "choose_quirks",
    "share_quirks",
    "visits_of",
]

_Values = Mapping[str, Any]
_OP = "fastfpl.run"


def _always(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    return None


@dataclass(frozen=True)
class Quirk:
    """One thing that released code does and the clean method does not.

    Attributes
    ----------
    name : str
        On the command line.
    about : str
        One line for people.
    source : str
        Where the released code does it.
    methods : tuple of str
        Those whose released code has it.
    kinds : tuple of type
        Classes that are laid before the method's own, the foremost first.
    in_turn : bool
        Whether the clients of a round train one after another.
    on_data : bool
        Whether it changes the data set.
    idle : callable
        ``idle(settings, options, names)`` says why it would do nothing beside the other quirks
        ``names``, or returns None.
    """

    name: str
    about: str
    source: str
    methods: tuple[str, ...]
    kinds: tuple[type[Method], ...] = ()
    in_turn: bool = False
    on_data: bool = False
    idle: Callable[[_Values, _Values, Sequence[str]], str | None] = field(default=_always)


def _no_schedule(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    if settings["schedule"] == "cosine-rounds":
        return "the released scheduler knows no rounds; use schedule=cosine or constant"
    if settings["schedule"] == "constant" and not settings["momentum"] and "warmup" not in names:
        return "without momentum and schedule an optimiser has nothing to share"
    return None


def _no_trainer(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    if "shared-optimiser" in names:
        return None
    return "the run's first epoch is that of its one optimiser; add shared-optimiser"


def _no_term(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    return None if options["mu"] else "the proximal term weighs nothing (mu=0)"


def _no_choice(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    if options["selection"] != "nearest":
        return "it replaces the selection of experts; leave the option selection out"
    # None until the data set says it
    if settings["clients"] is not None and options["experts"] >= settings["clients"]:
        return (
            f"with experts={options['experts']} of {settings['clients']} clients "
            "everybody receives all prompts"
        )
    return None


def _alone(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    return None if options["experts"] > 1 else "nobody receives an expert (experts=1)"


def _balanced(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    return "it is for the capped transport; leave balanced out" if options["balanced"] else None


def _one_phase(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    if settings["rounds"] > options["pseudo_rounds"]:
        return None
    return f"the second phase never begins (pseudo_rounds={options['pseudo_rounds']})"


def _no_domains(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    if settings["dataset"] not in ("domainnet10", "office_caltech10"):
        return "it is for dataset=domainnet10 and office_caltech10"
    if settings["scenario"] != "personal":
        return "it is for scenario=personal"
    return None


def _whole_domains(settings: _Values, options: _Values, names: Sequence[str]) -> str | None:
    if settings["partition"] != "domain-dirichlet" or not settings["split_test"]:
        return "it is for partition=domain-dirichlet, which cuts the lists of a domain"
    return _no_domains(settings, options, names)


_DOMAIN_METHODS = ("zeroshot", "local", "promptfl", "fedprox", "pfedmoap", "fedotp", "fedpgp")

#: In the order in which they are printed.
QUIRKS: dict[str, Quirk] = {
    quirk.name: quirk
    for quirk in (
        Quirk(
            "shared-optimiser",
            "one SGD momentum and one learning-rate scheduler for all clients and all rounds",
            "one trainer for all clients in pFedMoAP, FedOTP and FedPGP; update_lr at "
            "pfedmoap.py:382-383, promptfl.py:304-305, GLP_OT.py:412-413, fedpgp.py:374-375",
            ("local", "promptfl", "fedprox", "pfedmoap", "fedotp", "fedpgp"),
            in_turn=True,
            idle=_no_schedule,
        ),
        Quirk(
            "warmup",
            "the first epoch of the run's first client trains prompts at rate 1e-5",
            "WARMUP_EPOCH 1 of the PromptFL and pFedMoAP configurations; dassl/optim/"
            "lr_scheduler.py:83-152",
            ("local", "promptfl", "fedprox", "pfedmoap"),
            in_turn=True,
            idle=_no_trainer,
        ),
        Quirk(
            "fp16-context",
            "contexts, gradients and momentum in half precision without a wider copy",
            "contexts are leaves of the model's dtype in promptfl.py, pfedmoap.py and GLP_OT.py",
            ("local", "promptfl", "fedprox", "pfedmoap", "fedotp"),
            (HalfContext,),
        ),
        Quirk(
            "fedprox-no-gradient",
            "the proximal term is added to the printed loss and has no gradient",
            "pFedMoAP/trainers/promptfl.py:293-296, the same in FedOTP and FedPGP",
            ("fedprox",),
            (NoGradient,),
            idle=_no_term,
        ),
        Quirk(
            "pfedmoap-shared-random-experts",
            "experts are the first others with a prompt on one fixed shuffled list of clients",
            "pFedMoAP/federated_main.py:370,402, trainers/pfedmoap.py:322-333",
            ("pfedmoap",),
            (SharedRandomExperts,),
            idle=_no_choice,
        ),
        Quirk(
            "pfedmoap-pool-in-round",
            "prompts enter the pool at once, later clients of the round receive them",
            "pFedMoAP/federated_main.py:387",
            ("pfedmoap",),
            (PoolInRound,),
            in_turn=True,
            idle=_alone,
        ),
        Quirk(
            "pfedmoap-inherited-gate",
            "a client's first gate is the one that the client before it trained",
            "pFedMoAP/federated_main.py:365,400",
            ("pfedmoap",),
            (InheritedGate,),
            in_turn=True,
            idle=_alone,
        ),
        Quirk(
            "fedotp-batch-stop",
            "the transport of a whole batch stops on the mean change of v",
            "FedOTP/trainers/GLP_OT.py:238-274",
            ("fedotp",),
            (BatchStop,),
            idle=_balanced,
        ),
        Quirk(
            "fedapt-double-softmax",
            "the second phase's first term takes the softmax of a softmax",
            "FedAPT/unsupervised/main-ours.py:289-422",
            ("fedapt-unsupervised",),
            (DoubleSoftmax,),
            idle=_one_phase,
        ),
        Quirk(
            SCRAMBLED,
            "clients see their domain's first images, with the labels of other ones",
            "pFedMoAP/utils/data_utils.py:707,718-727,758,769-778, the same in FedOTP and FedPGP",
            _DOMAIN_METHODS,
            on_data=True,
            idle=_whole_domains,
        ),
        Quirk(
            NAMES,
            "class names stand in an order that has nothing to do with the labels",
            "pFedMoAP/utils/data_utils.py:446,497,705,756, the same in FedOTP and FedPGP",
            _DOMAIN_METHODS,
            on_data=True,
            idle=_no_domains,
        ),
    )
}


def choose_quirks(
    names: Sequence[str], method: str, settings: _Values, options: _Values
) -> list[str]:
    """Return the quirks that are on, in the order of `QUIRKS`.

    Parameters
    ----------
    names : sequence of str
        Names, each once, or ``all`` alone: those that do something to the method in these settings.
    method : str
    settings : mapping
        Fields of `fastfpl.Settings`.
    options : mapping
        The method's, with defaults.

    Raises
    ------
    InputError
        If a name is unknown, or its quirk would do nothing.
    """
    if list(names) == ["all"]:
        chosen = _every(method, settings, options)
        if not chosen:
            raise InputError(
                f"{_OP}: as_released must be left out where no quirk of {method}'s released code "
                "would change something; got 'all'"
            )
        return chosen
    if len(set(names)) != len(names):
        raise InputError(f"{_OP}: as_released must name each quirk once; got {list(names)}")
    for name in names:
        if name == "all":
            raise InputError(f"{_OP}: as_released must be all or names; got {list(names)}")
        if name not in QUIRKS:
            raise InputError(
                f"{_OP}: as_released must be a known quirk; got {name!r}" + near(name, QUIRKS)
            )
        if method not in QUIRKS[name].methods:
            known = ", ".join(q.name for q in QUIRKS.values() if method in q.methods) or "none"
            raise InputError(
                f"{_OP}: as_released must be a quirk of {method}'s released code ({known}); "
                f"got {name!r}"
            )
        reason = QUIRKS[name].idle(settings, options, names)
        if reason is not None:
            raise InputError(
                f"{_OP}: as_released must change something; got {name!r}, but {reason}"
            )
    return [name for name in QUIRKS if name in names]


def share_quirks(
    names: Sequence[str],
    method: str,
    methods: Sequence[str],
    settings: _Values,
    options: _Values,
) -> list[str]:
    """Return those of the quirks of a comparison of several methods that are one method's.

    ``all`` may leave nothing for a method.

    Raises
    ------
    InputError
        As `choose_quirks`, and if a quirk belongs to none of ``methods``.
    """
    if list(names) == ["all"]:
        return _every(method, settings, options)
    homes = {name: QUIRKS[name].methods for name in names if name in QUIRKS}
    for name, home in homes.items():
        if not set(home) & set(methods):
            raise InputError(
                f"fastfpl.compare: as_released must belong to one of {', '.join(methods)}; "
                f"got {name!r}, which {', '.join(home)} may have"
            )
    # an unknown name is every method's, so that it is refused
    mine = [name for name in names if method in homes.get(name, (method,))]
    return choose_quirks(mine, method, settings, options)


def _every(method: str, settings: _Values, options: _Values) -> list[str]:
    mine = [quirk for quirk in QUIRKS.values() if method in quirk.methods]
    names = [quirk.name for quirk in mine]
    return [quirk.name for quirk in mine if quirk.idle(settings, options, names) is None]


def as_released(kind: type[Method], names: Sequence[str]) -> type[Method]:
    """Return the method's class with the quirks laid over it, the class itself without any."""
    kinds = [layer for name in names for layer in QUIRKS[name].kinds]
    if not kinds:
        return kind
    return type(f"{kind.__name__}AsReleased", (*kinds, kind), {"__doc__": kind.__doc__})


def changes_data(names: Sequence[str]) -> bool:
    """Whether the data set is another one with these quirks."""
    return any(QUIRKS[name].on_data for name in names)


def visits_of(names: Sequence[str], schedule: str, lr: float) -> Visits | None:
    """Say what passes from client to client; None if nothing does, and clients train together."""
    if not any(QUIRKS[name].in_turn for name in names):
        return None
    return Visits(
        shared="shared-optimiser" in names,
        warmup="warmup" in names,
        cosine=schedule == "cosine",
        lr=lr,
    )
