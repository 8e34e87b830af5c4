"""Running the programs that the cluster is made with: a failure names the command, its log and its last words."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

Argument = str | Path


class StepError(RuntimeError):
    """A step failed; the message says what, where its log is, and what can be done."""


def run(
    command: Sequence[Argument],
    *,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 600,
) -> None:
    """Runs a command to its end, with its output appended to `log`; raises StepError with the log's tail if it fails.

    `env` is added to the environment, it does not replace it. `timeout` is in seconds.
    """
    words = [str(word) for word in command]
    target = log or Path(os.devnull)
    with target.open("a+b") as output:
        output.write(f"$ {' '.join(words)}\n".encode())
        output.flush()
        try:
            result = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                timeout=timeout,
                check=False,
            )
        except FileNotFoundError as error:
            raise StepError(f"{words[0]} is not installed: {error}") from error
        except subprocess.TimeoutExpired as error:
            raise StepError(f"`{' '.join(words[:6])}` took more than {timeout:.0f} s{_told(log)}") from error
    if result.returncode != 0:
        raise StepError(f"`{' '.join(words[:6])}` ended with {result.returncode}{_told(log)}")


def capture(
    command: Sequence[Argument], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60
) -> str:
    """Runs a command and returns what it printed; raises StepError with its error output if it fails."""
    words = [str(word) for word in command]
    try:
        result = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise StepError(f"{words[0]} is not installed: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise StepError(f"`{' '.join(words[:6])}` took more than {timeout:.0f} s") from error
    if result.returncode != 0:
        raise StepError(f"`{' '.join(words[:6])}` ended with {result.returncode}: {result.stderr.strip()[-800:]}")
    return result.stdout


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented, for an error message."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return "    (no log)"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def _told(log: Path | None) -> str:
    return f"; its log is {log} and ends:\n{tail(log)}" if log else ""
