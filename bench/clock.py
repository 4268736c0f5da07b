"""How a bench measures: a clock that waits for the device, and a check before any time.

On a card times are those between two CUDA events, each call with an L2 that holds nothing of the
call before. No card has run that part yet; tests/test_clock.py plays it with events that are made
up.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DEVICE",
    "EventClock",
    "checked",
    "copy_rate",
    "elsewhere",
    "gemm_rate",
    "peak_bytes",
    "synced",
    "timer",
]

#: Where benches put their tensors, all of them: a row without it, or of another place, is refused.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def elsewhere(face: str) -> list[str]:
    """Say why a face cannot be timed where the tensors of benches are."""
    wanted = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(face, DEVICE)
    return (
        [] if wanted == DEVICE else [f"{face} takes tensors on {wanted}; benches run on {DEVICE}"]
    )


def synced() -> float:
    """Seconds, read after the device has finished what was asked of it before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class EventClock:
    """Seconds of the current CUDA stream, by events.

    A reading waits until the stream has come to it. One after `cold` does not: the stream is still
    busy with emptying the cache, and the host may run ahead, so that what is timed is not the
    host's first launch.
    """

    #: Bytes that are written to empty the L2, at least: the largest there is has 126 MB.
    LEAST = 256 << 20

    def __init__(self) -> None:
        self._seconds, self._last, self._runs_ahead = 0.0, None, False

    @functools.cached_property
    def _emptying(self) -> Tensor:
        size = torch.cuda.get_device_properties("cuda").L2_cache_size
        return torch.empty(max(self.LEAST, 4 * size), dtype=torch.uint8, device="cuda")

    def cold(self) -> None:
        """Empty the L2, and let the next reading be one that does not wait."""
        self._emptying.zero_()
        self._runs_ahead = True

    def __call__(self) -> float:
        """Read it."""
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        ahead, self._runs_ahead = self._runs_ahead, False
        if not ahead:
            now.synchronize()
            if self._last is not None:  # milliseconds in float32: only of short spans exact
                self._seconds += 1e-3 * self._last.elapsed_time(now)
        self._last = now
        return self._seconds


_events = EventClock()


def timer() -> float:
    """Seconds: by events where benches run on a card, else those of `synced`."""
    return _events() if DEVICE == "cuda" else synced()


def _best(run: Callable[[], Any], seconds: float, device: str) -> float:
    """Seconds of one call, best of many; on a card of bursts, which hide the launches."""
    best, until = float("inf"), synced() + seconds
    burst = 1 if torch.device(device).type == "cpu" else 20
    read = synced if burst == 1 else EventClock()
    while time.perf_counter() < until:
        begin = read()
        for _ in range(burst):
            run()
        best = min(best, (read() - begin) / burst)
    return best


@functools.cache
def gemm_rate(
    rows: int,
    inner: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 0.3,
) -> float:
    """FLOP/s of one matrix product (rows, inner) @ (inner, columns) here and now, best of many."""
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    took = _best(lambda: torch.nn.functional.linear(a, b), seconds, device)
    return 2 * rows * inner * columns / took


@functools.cache
def copy_rate(device: str = "cpu", seconds: float = 0.5) -> float:
    """Bytes a second of a large copy here and now, best of many; those read and those written."""
    source = torch.randn(1 << 26, device=device)  # 256 MiB: no cache holds it
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), seconds, device)


def peak_bytes(run: Callable[[], Tensor], device: torch.device) -> int | None:
    """Bytes that one call takes at its worst beyond what was there before; its result counts.

    On a GPU by torch's own count. On the CPU by the kernel's high-water mark of the whole process,
    so that memory of compiled code counts too; None where Linux does not offer it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        # memory that was freed and kept by the allocator would hide what is taken next
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def checked(
    benchmark: Any,
    run: Callable[[], Tensor],
    exact: Tensor,
    limit: float,
    rounds: int | None = None,
    *,
    flops: float | None = None,
    moved: float | None = None,
    gemm: tuple[int, int, int] | None = None,
    result_on: str = DEVICE,
    **row: Any,
) -> Tensor:
    """Time ``run`` only if its result is right, and put the error beside the time.

    Parameters
    ----------
    benchmark
        pytest-benchmark's fixture.
    run : callable
        Returns the result that is judged, and is then timed.
    exact : Tensor
        The float64 truth.
    limit : float
        The largest relative error, by the largest value of ``exact``, with which a time is given.
    rounds : int, optional
        So many rounds of one call each instead of as many as the plugin wants: for what takes
        seconds. With one round even the memory is not measured in a call of its own. On a card
        their number follows from the time of a call.
    flops : float, optional
        Operations that the result needs at least; with it the row says its rate.
    moved : float, optional
        Bytes that are read and written at least: inputs and results, once each.
    gemm : (rows, inner, columns), optional
        The product whose rate is measured in this process, on the result's device and in the row's
        dtype; the row says its share of that rate.
    result_on : str
        Type of the device that the result is on. A round leaves it on the host, wherever it ran.
    **row
        What the row is about: sizes by letter, dtype, face, direction, device.
    """
    assert row.get("device") == DEVICE, f"not timed: the row says {row.get('device')}, not {DEVICE}"
    kept: list[Tensor] = []
    peak = peak_bytes(lambda: kept.append(run()) or kept[0], exact.device)  # the cold call
    result = kept.pop()
    assert result.shape == exact.shape, f"not timed: shape {result.shape}, not {exact.shape}"
    assert result.device.type == result_on, f"not timed: on {result.device}, not on {result_on}"
    error = _error(result, exact)
    assert error <= limit, f"not timed: relative error {error:.2e}, at most {limit:.0e}"
    if rounds != 1:  # a first call may also load, compile or fill a cache
        peak = peak_bytes(run, exact.device)
    benchmark.extra_info |= row | {"relative_error": error, "limit": limit, "peak_bytes": peak}
    benchmark.group = " ".join(f"{k}={v}" for k, v in row.items() if k != "face")
    result = _timed(benchmark, run, rounds)
    again = _error(result, exact)
    assert again <= limit, f"wrong after timing: relative error {again:.2e}, at most {limit:.0e}"
    if benchmark.stats is None:  # timing is switched off
        return result
    median = benchmark.stats.stats.median
    facts: dict[str, float] = {"iqr_seconds": benchmark.stats.stats.iqr}
    if moved is not None:
        facts |= {"moved_bytes": moved, "gb_per_s": 1e-9 * moved / median}
        facts["copy_gb_per_s"] = 1e-9 * copy_rate(str(exact.device))
    if flops is not None:
        facts |= {"gflop": 1e-9 * flops, "gflop_per_s": 1e-9 * flops / median}
        if gemm is not None:
            dtype = getattr(torch, str(row.get("dtype", "float32")))
            rate = gemm_rate(*gemm, dtype, str(exact.device))
            facts |= {"gemm_gflops": 1e-9 * rate, "share_of_gemm": flops / rate / median}
    benchmark.extra_info |= facts
    return result


def _timed(benchmark: Any, run: Callable[[], Tensor], rounds: int | None) -> Tensor:
    if DEVICE != "cuda":
        result: Tensor = benchmark.pedantic(run, rounds=rounds) if rounds else benchmark(run)
        return result
    begin = synced()
    run()
    rounds = min(100, max(3, int(1 / (synced() - begin))))
    benchmark.extra_info["clock"] = "CUDA events, cold L2"
    result = benchmark.pedantic(run, setup=_events.cold, rounds=rounds)
    return result


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max())
