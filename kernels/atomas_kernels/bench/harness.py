"""Parity, time and memory of all providers of one operator on one case."""

import gc
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atomas_kernels import registry
from atomas_kernels.bench import memory
from atomas_kernels.bench.operators import Case, Operator, Prepared, Provider

MODES = ("fwd", "bwd", "full")
"""`fwd` keeps nothing for a backward pass. `full` is a forward and a backward pass; `bwd` is the second part of
the same run."""

_TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-4)}
_HALF_TOLERANCE = (3e-2, 0.3)
"""Largest relative deviation (in norm) of result and gradient from float64. Similarities rounded to bfloat16
tie, and another token of nearly the same similarity then takes the gradient."""

_CHILD_SECONDS = 120

WRONG = "wrong"
"""First word of the reason of a provider whose numbers are not those of float64."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to measure."""

    modes: Sequence[str] = ("fwd", "full")
    repeats: int = 7
    """Timed runs of each provider."""
    seconds: float = 10.0
    """After this time a provider is not repeated again. One run that takes longer is measured cold."""
    memory_limit: int = 8 * memory.GIB
    """Bytes that a provider may allocate."""


class Unavailable(Exception):  # noqa: N818 - it is an answer, not an error
    """A provider cannot run here; the message says why."""


@dataclass(kw_only=True)
class _Job:
    """One provider and kind of run (`fwd`, or `full`, which gives `bwd` too), between warm-up and row."""

    name: str
    provider: Provider
    prepared: Prepared
    kind: str
    device: torch.device
    upstream: Tensor | None = None
    peak: int | None = None
    samples: list[list[float]] = field(default_factory=list)
    """Milliseconds of the parts of each run: [forward] or [forward, backward]."""

    def sample(self) -> list[float]:
        with _backend(self.provider.backend), _Stopwatch(self.device) as watch:
            if self.kind == "fwd":
                with torch.no_grad():
                    self.prepared.forward()
                watch.mark()
            else:
                output = self.prepared.forward()
                if self.upstream is None:
                    self.upstream = _upstream(_joined(output))
                watch.mark()
                torch.autograd.grad(output, self.prepared.leaves, self.upstream)
                watch.mark()
        return watch.milliseconds()

    def warm_up(self, seconds: float) -> None:
        """A run to load and compile, and one for its memory; where runs are long, one is both and a sample."""
        for cold in (True, False):
            with memory.peak(self.device) as found:
                times = self.sample()
            self.peak = found.bytes
            if sum(times) > 1e3 * seconds and not (cold and self.provider.compiled):
                self.samples = [times]
                return

    def times(self, mode: str) -> list[float]:
        return [sum(parts) if mode == "full" else parts[-1] for parts in self.samples]


def measure(operator: Operator, providers: Sequence[str], case: Case, plan: Plan) -> Iterator[Row]:
    """Rows of one case, as they become known: first of what cannot run, then of what was timed.

    The timed providers take turns, so that what else the machine does hits all alike.
    """
    gc.collect()  # of the case before
    if any(name in operator.providers and operator.providers[name].compiled for name in providers):
        torch.compiler.reset()  # or after some shapes it gives up and runs eagerly
    modes = modes_of(operator, plan.modes)
    oracle = _Oracle(operator, case)
    jobs: list[_Job] = []
    errors: dict[str, tuple[float, float | None]] = {}
    with memory.limited(plan.memory_limit, case.device):
        for name in providers:
            ready: list[_Job] = []
            try:
                provider = _available(operator, name, case)
                errors[name] = _tried(oracle, provider, case) if provider.crashes else oracle.errors(provider)
                oracle.judge(*errors[name])
                prepared = _build(provider, case)
                kinds = ["full" if mode == "bwd" else mode for mode in modes]
                for kind in dict.fromkeys(kinds):
                    if kind == "full" and not prepared.leaves:
                        raise Unavailable("it has no backward pass")
                    _refuse_if_too_large(provider, case, kind, plan)
                    job = _Job(name=name, provider=provider, prepared=prepared, kind=kind, device=case.device)
                    job.warm_up(plan.seconds)
                    ready.append(job)
            except Exception as failure:  # a peer may fail in any way; the others are still measured
                status, reason = _outcome(failure)
                done = {mode for job in ready for mode in modes if mode in _modes(job.kind)}
                for mode in modes:
                    if mode not in done:
                        yield _row(operator, name, case, mode) | {
                            "error": errors.get(name, (None,))[0],
                            "status": status,
                            "reason": reason,
                        }
            jobs += ready
        _take_turns(jobs, plan)
    for job in jobs:
        for mode in modes:
            if mode in _modes(job.kind):
                yield _row(operator, job.name, case, mode) | _result(
                    operator, case, job, mode, errors[job.name]
                )


def modes_of(operator: Operator, wanted: Sequence[str]) -> list[str]:
    """The modes that an operator has of those that are wanted; without a gradient that is `fwd`."""
    return [mode for mode in MODES if mode in wanted] if operator.differentiable else ["fwd"]


def _take_turns(jobs: list[_Job], plan: Plan) -> None:
    for _ in range(plan.repeats):
        for job in jobs:
            if sum(map(sum, job.samples)) < 1e3 * plan.seconds:
                job.samples.append(job.sample())


def _modes(kind: str) -> tuple[str, ...]:
    return ("bwd", "full") if kind == "full" else ("fwd",)


def _outcome(failure: Exception) -> tuple[str, str]:
    """Status and reason of a provider that gave no time."""
    if isinstance(failure, _TooLarge) or memory.ran_out(failure):
        return "oom", _first_line(failure)
    if isinstance(failure, Unavailable):
        return "unavailable", str(failure)
    return "unavailable", f"{type(failure).__name__}: {_first_line(failure)}"


def _first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return lines[0] if lines else "no message"


def _available(operator: Operator, name: str, case: Case) -> Provider:
    """The provider, or Unavailable."""
    if name not in operator.providers:
        raise Unavailable("this operator has no such provider")
    provider = operator.providers[name]
    if provider.device is not None and provider.device != case.device.type:
        raise Unavailable(f"it runs on {provider.device} only")
    if provider.backend is not None:
        with _backend(provider.backend):
            for op in operator.names:
                try:
                    found = registry.active_backend(op, case.device, case.dtype)
                except RuntimeError as error:
                    raise Unavailable(str(error)) from error
                if found != provider.backend:
                    raise Unavailable(f"{op} has no {provider.backend} implementation")
    return provider


def _build(provider: Provider, case: Case) -> Prepared:
    try:
        return provider.build(case)
    except ImportError as error:
        raise Unavailable(f"{provider.package or 'it'} cannot be imported: {_first_line(error)}") from error


def _tried(oracle: "_Oracle", provider: Provider, case: Case) -> tuple[float, float | None]:
    """Errors as a child process finds them, which then runs the whole case too; Unavailable where it dies."""
    oracle.prepare(provider)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send(oracle.errors(provider))
            _build(provider, case).forward()
        except Exception as failure:
            sender.send(failure)
        sender.close()
        os._exit(0)  # without the farewell of its libraries

    child = context.Process(target=run, daemon=True)
    child.start()
    sender.close()
    child.join(_CHILD_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise Unavailable(f"no answer after {_CHILD_SECONDS} seconds")
    if child.exitcode:
        raise Unavailable(f"it crashed: {signal.Signals(-child.exitcode).name}")
    answer: tuple[float, float | None] | Exception = receiver.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


class _TooLarge(Exception):  # noqa: N818
    """A provider would not fit into the memory."""


def _refuse_if_too_large(provider: Provider, case: Case, kind: str, plan: Plan) -> None:
    if provider.needs is None or case.device.type == "cuda":
        return
    needed = provider.needs(case, kind)
    if needed > plan.memory_limit:
        raise _TooLarge(
            f"needs about {needed / memory.GIB:.1f} GiB, the limit is {plan.memory_limit / memory.GIB:.1f} GiB"
        )


class _Oracle:
    """Results in float64 of small parts of a case, computed once for all providers."""

    def __init__(self, operator: Operator, case: Case) -> None:
        self._operator, self._limit = operator, _TOLERANCE.get(case.dtype, _HALF_TOLERANCE)
        self._cases = (
            {"ragged": case.few(), "equal": case.equal()} if "batch" in case.shape else {"ragged": case}
        )
        self._known: dict[tuple[str, str], list[Tensor]] = {}

    def errors(self, provider: Provider) -> tuple[float, float | None]:
        """Relative deviations of result and gradient from float64; None without gradient."""
        results, gradients = [], []
        for part in self._parts(provider):
            prepared = _build(provider, self._cases[part])
            with _backend(provider.backend):
                first, *others = _results(prepared)
            wanted, *wanted_gradients = self._wanted(part, provider.semantics)
            results.append(_deviation(first, wanted))
            share = 0.01 if self._operator.has_maxima else 0.0
            pairs = zip(others, wanted_gradients, strict=bool(others))
            gradients += [_deviation(*pair, left_out=share) for pair in pairs]
        return max(results), max(gradients) if gradients else None

    def judge(self, *errors: float | None) -> None:
        """Unavailable where a deviation is above its limit."""
        for kind, error, limit in zip(("result", "gradient"), errors, self._limit, strict=True):
            if error is not None and error > limit:
                raise Unavailable(f"{WRONG} {kind}: deviates from float64 by {error:.1e} (limit {limit:g})")

    def prepare(self, provider: Provider) -> None:
        """Compute what `errors` compares with."""
        for part in self._parts(provider):
            self._wanted(part, provider.semantics)

    def _parts(self, provider: Provider) -> list[str]:
        if provider.semantics == "published":
            return ["equal"]
        return list(self._cases)

    def _wanted(self, part: str, semantics: str) -> list[Tensor]:
        if (part, semantics) not in self._known:
            exact = replace(self._cases[part], exact=True)
            self._known[part, semantics] = _results(self._operator.exact(exact, semantics))
        return self._known[part, semantics]


def _results(prepared: Prepared) -> list[Tensor]:
    """Result, then gradients."""
    output = _joined(prepared.forward())
    if not prepared.leaves:
        return [output.detach()]
    return [output.detach(), *torch.autograd.grad(output, prepared.leaves, _upstream(output))]


def _deviation(got: Tensor, wanted: Tensor, left_out: float = 0.0) -> float:
    """|got - wanted| / |wanted|, but for a share of the rows; infinite for what is not a number."""
    rows = (got.double() - wanted).reshape(len(got) if got.dim() else 1, -1).norm(dim=1)
    if not rows.isfinite().all():
        return math.inf
    kept = rows.sort().values[: len(rows) - int(left_out * len(rows))]
    return (kept.norm() / wanted.norm().clamp(min=1e-300)).item()


def _joined(output: Tensor | list[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat([part.flatten() for part in output])


def _upstream(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def _row(operator: Operator, name: str, case: Case, mode: str) -> Row:
    provider = operator.providers.get(name)
    lengths = {}
    if operator.ragged:
        lengths = {
            "text": int(case.text_lengths.sum()),
            "smiles": int(case.smiles_lengths.sum()),
            "longest_text": int(case.text_lengths.max()),
            "longest_smiles": int(case.smiles_lengths.max()),
        }
    return {
        "provider": name,
        "semantics": provider.semantics if provider else None,
        "backend": provider.backend if provider else None,
        "mode": mode,
        "shape": dict(case.shape),
        "lengths": lengths,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ms": None,
        "peak_mb": None,
        "tflops": None,
        "error": None,
    }


def _result(
    operator: Operator, case: Case, job: _Job, mode: str, errors: tuple[float, float | None]
) -> dict[str, Any]:
    """What was measured of one mode."""
    times = torch.tensor(job.times(mode), dtype=torch.float64)
    quantiles = times.quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    milliseconds = dict(zip(("p20", "p50", "p80"), (round(q, 4) for q in quantiles), strict=True))
    tflops = None
    if operator.flops is not None:
        forward, backward = operator.flops(case)
        work = {"fwd": forward, "bwd": backward, "full": forward + backward}[mode]
        tflops = round(work / quantiles[1] / 1e9, 6)
    return {
        "ms": milliseconds,
        "repeats": len(job.samples),
        "peak_mb": None if job.peak is None else round(job.peak / 2**20, 2),
        "tflops": tflops,
        "error": errors[0],
        "gradient_error": errors[1],
        "status": "ok",
        "reason": None,
    }


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """Our operators run on this backend inside the block."""
    before = registry._chosen
    if name is not None:
        registry.set_backend(name)
    try:
        yield
    finally:
        registry.set_backend(before)


class _Stopwatch:
    """Times between marks, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __enter__(self) -> "_Stopwatch":
        if self._cuda:
            torch.cuda.synchronize()
        self.mark()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]
