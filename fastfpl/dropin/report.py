"""What was swapped in a model, what was left, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Finding", "Report"]


@dataclass(frozen=True)
class Finding:
    """One module that was recognised.

    Attributes
    ----------
    path : str
        Its name inside the model, "" for the model itself.
    module : str
        Its class.
    kind : str
        What it was recognised as.
    swapped : bool
    reason : str
        Why it was left; empty if it was swapped.
    calls : dict from str to int
        How its calls were answered so far: how the fast pass ran, or why the original did.
    """

    path: str
    module: str
    kind: str
    swapped: bool
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything that was recognised in a model; ``print`` it."""

    findings: tuple[Finding, ...]

    @property
    def swapped(self) -> tuple[Finding, ...]:
        """What runs fastfpl's pass."""
        return tuple(f for f in self.findings if f.swapped)

    @property
    def left(self) -> tuple[Finding, ...]:
        """What runs as it was."""
        return tuple(f for f in self.findings if not f.swapped)

    def __str__(self) -> str:
        lines = [f"fastfpl: {len(self.swapped)} swapped, {len(self.left)} left"]
        for finding in self.findings:
            place = finding.path or "(the model)"
            verb = "swapped" if finding.swapped else "left"
            lines.append(f"  {verb:8}{place}: {finding.module}, {finding.kind}")
            if finding.reason:
                lines.append(f"          because {finding.reason}")
            for how, count in sorted(finding.calls.items(), key=lambda item: -item[1]):
                lines.append(f"          {count} x {how}")
        return "\n".join(lines)
