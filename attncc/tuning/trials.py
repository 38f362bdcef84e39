"""Trials of schedules in a process of their own, for a kernel that hangs cannot be stopped.

The parent sends the call's text and tensors once, as `torch.save` writes them and `torch.load`
reads them with `weights_only`; then requests and replies are lines of JSON. A child that dies, or
does not answer in time, is killed, and the next request starts another.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import astuple
from functools import cached_property
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attncc.backends.triton.configs import Config
from attncc.errors import UnsupportedError
from attncc.settings import Debug, settings

if TYPE_CHECKING:
    from attncc.tiles import BoundPlan
    from attncc.tuning.bench import Bench, Launch
    from attncc.tuning.sample import Sample

START = 180.0
"""Seconds for a child to import torch, reach its GPU and read the call's tensors."""

REP_MS = 40
"""Milliseconds of one careful measurement."""

AGREE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Relative difference by norms, from the default schedule's results, that a right one may have."""


class Failed(Exception):
    """A trial ended without a result: an error, a process that died, or no answer in time."""


# -- the parent's side


def job(bound: BoundPlan, q: Tensor, k: Tensor, v: Tensor) -> bytes:
    """A call, as a child reads it; strides, offsets and shared memory stay as they are."""
    program, binding = bound.plan.program, bound.binding
    scalars = {param.name: binding.scalars[param.name] for param in program.scalars}
    tensors = {name: x.detach() for name, x in binding.tensors.items()}
    text = io.BytesIO()
    given = {"text": str(program), "device": str(q.device), "scalars": scalars, "tensors": tensors}
    torch.save({**given, "inputs": [x.detach() for x in (q, k, v)]}, text)
    return text.getvalue()


class Worker:
    """A child that tries one schedule after another, and is replaced when one breaks it."""

    module = "attncc.tuning.trials"
    """What the child runs, with the number of its socket as the argument."""

    def __init__(self, job: bytes) -> None:
        self.job = job
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, what: str, kernel: str, *configs: Config, seconds: float) -> Any:
        """The child's answer; Failed if there is none within so many seconds."""
        (answer,) = self.answers(what, kernel, configs, seconds)
        return answer

    def answers(
        self,
        what: str,
        kernel: str,
        configs: Sequence[Config],
        seconds: float,
        grace: float = 0.0,
    ) -> Iterator[Any]:
        """Answers as they come; Failed where they end in an error, or late.

        grace: how much later than it was told the child may end.
        """
        connection = self.start()
        end = time.monotonic() + seconds + grace
        numbers = [astuple(config) for config in configs]
        request = {"do": what, "kernel": kernel, "configs": numbers, "seconds": seconds}
        try:
            _send(connection, request)
            while "end" not in (reply := self._reply(connection, end)):
                yield reply["answer"]
        except (OSError, EOFError):
            raise Failed(self._epitaph()) from None
        if reply["lost"]:
            self.stop()
        if reply["end"]:
            raise Failed(reply["end"])

    def _reply(self, connection: Connection, end: float) -> Any:
        begun = time.monotonic()
        if not connection.poll(max(0.0, end - begun)):
            self.stop()
            raise Failed(f"no answer within {end - begun:.0f} s")
        return json.loads(connection.recv_bytes())

    def start(self) -> Connection:
        """The socket of the child that there is, or of a new one.

        Raises UnsupportedError where none can be had.
        """
        if self._child is not None and self._child[0].poll() is None:
            return self._child[1]
        self.stop()
        connection = self._spawned()
        end = time.monotonic() + START
        try:
            self._reply(connection, end)  # it is there, and reads
            connection.send_bytes(self.job)
            problem = self._reply(connection, end)
        except (OSError, EOFError):
            problem = self._epitaph()
        except Failed as error:
            problem = str(error)
        if problem:
            self.stop()
            raise UnsupportedError(
                f"the process that tries schedules does not start: {problem}",
                hint="ATTNCC_DEBUG=1 shows what it prints",
            )
        return connection

    def _spawned(self) -> Connection:
        mine, its = socket.socketpair()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with its:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", self.module, str(its.fileno())],
                stdin=subprocess.PIPE,  # which ends when this process does, however it ends
                stdout=subprocess.DEVNULL,
                stderr=None if settings().debug >= Debug.CHOICES else subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # so that Ctrl-C is this process's to handle
            )
        connection = Connection(mine.detach())
        self._child = process, connection
        return connection

    def _epitaph(self) -> str:
        """How the child ended."""
        assert self._child is not None
        process, _ = self._child
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)  # its end of the socket closes a little before it is gone
        code = process.returncode
        self.stop()
        if code is None or code >= 0:
            return f"its process ended with {code}"
        return f"its process was ended by {signal.Signals(-code).name}"

    def stop(self) -> None:
        """Ends the child, whatever it does."""
        if self._child is None:
            return
        process, connection = self._child
        self._child = None
        connection.close()
        process.kill()
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)  # the driver ends what runs on the GPU


# -- the child's side


def main() -> None:
    """Serves a parent on the socket whose number is the argument."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    _send(connection, "here")
    try:
        trials = Trials(connection.recv_bytes())
    except Exception as error:
        _send(connection, _words(error))
        return
    _send(connection, "")
    with contextlib.suppress(EOFError, OSError):
        while True:
            _serve(connection, trials)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _serve(connection: Connection, trials: Trials) -> None:
    request = json.loads(connection.recv_bytes())
    configs = [Config(*numbers) for numbers in request["configs"]]
    problem, lost = "", False
    trials.seconds = request["seconds"]
    try:
        for answer in getattr(trials, request["do"])(request["kernel"], *configs):
            _send(connection, {"answer": answer})
    except Exception as error:
        problem = _words(error)
        lost = trials.lost()
    _send(connection, {"end": problem, "lost": lost})


def _send(connection: Connection, message: object) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _words(error: BaseException | None) -> str:
    if error is None:
        return ""
    lines = str(error).strip().split("\n")
    return f"{type(error).__name__}: {lines[0][:200]}"


class Trials:
    """What a child does with one call; each method gives its answers one by one."""

    def __init__(self, job: bytes) -> None:
        import attncc
        from attncc.tuning.bench import Bench

        given = torch.load(io.BytesIO(job), weights_only=True)
        self.device = torch.device(given["device"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        q, k, v = given["inputs"]
        arguments: Mapping[str, Any] = {**given["scalars"], **given["tensors"]}
        self.bench: Bench = Bench(attncc.compile(given["text"]).plan(q, k, v, **arguments), q, k, v)
        self.seconds = 0.0
        self._expected: dict[tuple[str, Config], dict[str, Tensor]] = {}

    @cached_property
    def sample(self) -> Sample:
        from attncc.tuning.sample import Sample

        bench = self.bench
        return Sample(bench.bound, bench.q, bench.k, bench.v)

    def lost(self) -> bool:
        """Whether the GPU's context is lost, so that nothing else can be tried."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def compile(self, kernel: str, *configs: Config) -> Iterator[tuple[int, str]]:
        """Numbers of schedules, and what failed, as each is compiled into Triton's caches.

        None is begun after the seconds that there are; those that have begun are waited for.
        """
        end = time.monotonic() + self.seconds
        pool = ThreadPoolExecutor(_workers(), initializer=self._use_device)
        futures: dict[Future[None], int] = {}
        for at, config in enumerate(configs):
            try:
                futures[pool.submit(self._launch(kernel, config).compile)] = at
            except Exception as error:  # a compiler's own errors are of many classes
                yield at, _words(error)
        told = set()
        with contextlib.suppress(TimeoutError):
            for future in as_completed(futures, timeout=max(0.0, end - time.monotonic())):
                told.add(future)
                yield futures[future], _words(future.exception())
        pool.shutdown(cancel_futures=True)  # nothing compiles while others are timed
        late = [future for future in futures if future not in told and not future.cancelled()]
        yield from ((futures[future], _words(future.exception())) for future in late)

    def _use_device(self) -> None:
        """The current device is a thread's own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def glance(self, kernel: str, config: Config) -> Iterator[float]:
        """Milliseconds of one run after the first."""
        launch = self._launch(kernel, config)
        launch.start()
        yield milliseconds(launch, self.device)

    def measure(self, kernel: str, config: Config) -> Iterator[float]:
        """Milliseconds of one run, with care."""
        yield median(self._launch(kernel, config), self.device)

    def check(self, kernel: str, config: Config, default: Config) -> Iterator[str]:
        """What is wrong with a schedule's results; empty where nothing is."""
        found = self.bench.computed(kernel, config, self.sample.dout)
        problem = self.sample.problem(found)
        if not problem and config != default:
            problem = self._difference(kernel, config, default)
        yield problem

    def _difference(self, kernel: str, config: Config, default: Config) -> str:
        """Between a schedule's results and the default's."""
        if (kernel, default) not in self._expected:
            self._expected = {(kernel, default): self._launch(kernel, default).computed()}
        expected = self._expected[kernel, default]
        found = self._launch(kernel, config).computed()
        allowed = AGREE[self.bench.q.dtype]
        differing = [name for name in expected if not close(found[name], expected[name], allowed)]
        return f"it differs from the default in {', '.join(differing)}" if differing else ""

    def _launch(self, kernel: str, config: Config) -> Launch:
        launch = self.bench.launch(kernel, config)
        assert launch is not None, "there is nothing to do"
        return launch


def close(found: Tensor, expected: Tensor, allowed: float) -> bool:
    """Whether results are equal up to rounding; NaN and inf in equal places."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, found.float() - expected.float())
    size = torch.where(expected.isfinite(), expected.float(), 0.0)
    return bool(gap.norm() <= allowed * size.norm())


def milliseconds(launch: Launch, device: torch.device, runs: int = 3) -> float:
    """Those of one run, by the mean of a few: a glance."""
    if device.type != "cuda":
        return _clocked(launch)
    event: Any = torch.cuda.Event
    events = [event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(runs):
        launch.start()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / runs


def median(launch: Launch, device: torch.device, rep: int = REP_MS) -> float:
    """Milliseconds of the median of the runs that take `rep` milliseconds."""
    from triton.testing import do_bench

    if device.type != "cuda":
        return _clocked(launch)
    return float(do_bench(launch.start, warmup=rep // 4, rep=rep, return_mode="median"))


def _clocked(launch: Launch) -> float:
    begun = time.perf_counter()
    launch.start()
    return 1e3 * (time.perf_counter() - begun)


def _workers() -> int:
    """Two cores are left to the rest; the interpreter's lock is free while LLVM and ptxas run."""
    return max(1, (os.cpu_count() or 1) - 2)


if __name__ == "__main__":
    main()
