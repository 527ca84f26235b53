"""`tools: [python]`: a program in the sandbox, a fresh one each call."""

from __future__ import annotations

from typing import Literal

from polyphony.rewards.sandbox.client import Level, Limits, Program, SandboxError, require_isolation

SHOWN_BYTES = 4096
"""Of what a program prints, the last: a policy reads no more, and an error stands at the end."""


class Python:
    """A tool that runs Python programs.

    Example: `Python().python("print(6 * 7)") == "42"`
    """

    def __init__(self, sandbox: Literal["limits"] | None = None) -> None:
        """`sandbox` as of the reward `code`: `limits` does where a host offers no more. Raises ValueError without one."""
        try:
            self._level: Level = require_isolation(may_be_limits=sandbox == "limits").level
        except SandboxError as error:
            raise ValueError(str(error)) from error

    def python(self, code: str) -> str:
        """
        Run a Python program and return what it prints.

        Args:
            code: The program. It has no network and no files, and what it printed is all that comes back.
        """
        try:
            with Program(code, limits=Limits(), level=self._level) as program:
                done = program.run("")
        except (SandboxError, OSError) as error:
            raise RuntimeError(f"the sandbox failed: {error}") from error
        said = done.stdout[-SHOWN_BYTES:].decode(errors="replace").strip()
        ended = {"exit": "", "error": "the program ended with an error", "output": "the program printed too much"}
        return "\n".join(filter(None, (said, ended.get(done.ended, "the program took too long"))))
