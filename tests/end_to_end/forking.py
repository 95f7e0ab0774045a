"""Commands in processes of their own that need not import everything first: a server that has imported it forks one for
each.

Starting Python with torch and pandas takes two seconds, and the command itself a tenth of one. The forked process gets
the arguments, working folder and environment of the command, its files as stdout and stderr, and ends as any other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

SERVER = """
import json, os, runpy, signal, sys, threading
import torch, pandas, pyarrow.parquet, hydra, rl_onoff.cli.main, rl_onoff.run

assert threading.active_count() == 1, "a fork would lack the other threads"
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid:
        print(json.dumps(pid), flush=True)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)
        continue
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environ"])
    streams = ((os.devnull, 0, os.O_RDONLY), (order["out"], 1, os.O_WRONLY), (order["err"], 2, os.O_WRONLY))
    for name, number, mode in streams:
        opened = os.open(name, mode)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)
    sys.path[0], sys.argv = order["cwd"], ["rl_onoff", *order["arguments"]]
    runpy.run_module("rl_onoff", run_name="__main__", alter_sys=True)
    sys.exit()
"""


class Server:
    """One at a time, from the first command on until the tests end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: tuple[str, ...], cwd: Path, environ: dict[str, str], timeout: float) -> Any:
        """What `subprocess.run` of `rl_onoff` with these arguments returns, its output as text."""
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            command = [sys.executable, "-c", SERVER]
            self._process = subprocess.Popen(command, env=environ, text=True, start_new_session=True, **pipes)
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            order = {"arguments": arguments, "cwd": str(cwd), "environ": environ, "out": out.name, "err": err.name}
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            pid = json.loads(self._process.stdout.readline())
            timer = threading.Timer(timeout, os.kill, (pid, 9))
            timer.start()
            code = json.loads(self._process.stdout.readline())
            timer.cancel()
            return subprocess.CompletedProcess(["rl_onoff", *arguments], code, out.read(), err.read())

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.communicate()
