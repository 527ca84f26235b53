"""An environment for worker processes, which import this file: it imports nothing that is slow."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import time


def look(what: str) -> str:
    """
    Look at a number.

    Args:
        what: The number.
    """
    return f"{what} is it"


class Looking:
    """Rewards looks that were even in number."""

    def reset(self, seed: int) -> str:
        self.looks = 0
        return " look"

    def look(self, what: str) -> str:
        """
        Look at a number.

        Args:
            what: The number.
        """
        self.looks += 1
        return f"{what} is it, {self.looks}"

    def get_reward(self) -> float:
        return float(self.looks % 2 == 0)


class Unruly:
    """Counts, and does what it is told; rewards a count of two."""

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def reset(self, answer: str, seed: int) -> str | None:
        if answer == "gone":
            raise OSError("the server is down")
        self.count, self.answer = 0, answer
        return f" in {os.getpid()}"

    def add(self) -> str:
        """Add to the count."""
        self.count += self.step
        return f"{self.count} of {self.answer} in {os.getpid()}"

    def misbehave(self, how: str) -> str:
        """
        Do something that tools should not.

        Args:
            how: What.
        """
        if how == "hang":
            time.sleep(60)
        if how in ("exit", "kill", "child", "hold"):
            os.posix_spawn("/bin/sleep", ["sleep", f"61.{os.getppid()}"], dict(os.environ))
        if how == "daemon":
            subprocess.run(["/bin/sh", "-c", f"setsid sleep 61.{os.getppid()} & exit"], check=True)
        if how == "exit":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "child":
            time.sleep(60)
        if how == "hold":  # the interpreter's lock
            ctypes.PyDLL(None).sleep(60)
        if how == "flood":
            return self.answer * 10_000_000
        if how == "kind":
            return type(self.answer).__name__
        if how == "read":
            return str(os.read(0, 1))
        if how == "killed":
            mark = os.environ["ONCE"]
            if not os.path.exists(mark):  # noqa: PTH110
                open(mark, "w").close()  # noqa: PTH123
                os.kill(os.getpid(), signal.SIGKILL)
        return "still here"

    def sleep(self, s: float) -> str:
        """
        Sleep.

        Args:
            s: Seconds.
        """
        time.sleep(s)
        return "slept"

    async def block(self, s: float) -> str:
        """
        Hold up the loop.

        Args:
            s: Seconds.
        """
        return self.sleep(s)

    async def wait(self, s: float) -> str:
        """
        Wait.

        Args:
            s: Seconds.
        """
        await asyncio.sleep(s)
        return "waited"

    def get_reward(self) -> float:
        return float(self.count == 2)
