"""Runs the stages of the training side by side: each in a process and on a processor of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from tools.nano.progress import logged_steps
from tools.nano.stages import STAGES

_SECONDS_PER_LOOK = 1.0
_ENVIRONMENT = {
    # Freed memory stays with the process: else page faults take a quarter of the time.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=17179869184"
}

Command = Callable[[str, int], Sequence[str]]
"""The command line that runs a stage on a processor."""


class StageError(RuntimeError):
    """A stage has failed; the message says which, and where its output is."""


def run_side_by_side(out: Path, processors: Sequence[int], command: Command) -> None:
    """Runs every stage once those that it builds on are finished.

    Args:
      out: directory of the run; what a stage prints goes to STAGE.txt.
      processors: their numbers; as many stages run at once.
      command: see `Command`. It ends at once for a stage that is finished, and by an interrupt.

    Raises:
      StageError: a stage has failed; the others were interrupted.
    """
    waiting, done = list(STAGES), set[str]()
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(stage.steps for stage in STAGES.values()), unit="step", disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            free = [number for number in processors if number not in {used for used, _ in running.values()}]
            ready = [name for name in waiting if done.issuperset(STAGES[name].after)]
            for name, number in zip(ready, free, strict=False):
                waiting.remove(name)
                running[name] = number, _start(command(name, number), out / f"{name}.txt")
                tqdm.write(f"{time.strftime('%H:%M:%S')} {name}: begins on processor {number}", file=sys.stderr)
            time.sleep(_SECONDS_PER_LOOK)
            for name, (_, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    if code:
                        raise StageError(f"stage {name} ended with {code}; what it printed is in {out / name}.txt")
                    done.add(name)
                    tqdm.write(f"{time.strftime('%H:%M:%S')} {name}: finished", file=sys.stderr)
            bar.update(sum(logged_steps(out / name) for name in STAGES) - bar.n)
            bar.set_postfix_str(", ".join(running))
    finally:
        bar.close()
        for _, process in running.values():
            process.send_signal(signal.SIGINT)
        for _, process in running.values():
            process.wait()


def _start(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_ENVIRONMENT | os.environ)
