"""A request to stop: noted at once, followed when all ranks can."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP (a lost ssh) only set a flag: the ranks agree on it at the next boundary.

    A handler that saved at once would wait in a collective for ranks that have not been signalled. Python runs
    handlers between two of its own instructions, so a rank that waits inside gloo or NCCL would not even hear of the
    signal: a thread listens to what the system writes at once. A second SIGINT interrupts, for a person at a terminal.
    Under `nohup` SIGHUP stays ignored.

    Enter it before anything slow is imported: until then a signal ends the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal"""
        self._received_at = 0.0
        self._asked, self._left = threading.Event(), threading.Event()

    def __enter__(self) -> "StopSignal":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="stop-signal").start()
        heard = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        for end in (self._writer, self._reader):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def after_grace(self, seconds: float, end: Callable[[str], None]) -> None:
        """Call `end` with a message, in a thread, if the block is not left `seconds` after a signal; 0: never."""
        if seconds:
            threading.Thread(target=self._wait, args=[seconds, end], daemon=True, name="grace").start()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received:
                raise KeyboardInterrupt
            os.write(2, b"\natomas: stopping at the next step; interrupt again to stop at once\n")
        self.received = self.received or signal.Signals(number).name

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while number := self._reader.recv(1):
                if number[0] in SIGNALS and not self._asked.is_set():
                    self._received_at = time.monotonic()
                    self._asked.set()

    def _wait(self, seconds: float, end: Callable[[str], None]) -> None:
        self._asked.wait()
        if not self._left.wait(self._received_at + seconds - time.monotonic()):
            end(f"asked to stop, and the grace time of {seconds:g} s is over")
