"""SGLang as it would look to us if a new version had moved what our hooks hold on to."""

from __future__ import annotations

from rl_onoff.backends.sglang.backend import SGLangBackend


class MovedSGLang(SGLangBackend):
    def _start(self, in_engine: bool) -> None:
        from sglang.srt.managers.scheduler import run_scheduler_process

        from rl_onoff.backends.sglang import hooks

        hooks.run_scheduler = run_scheduler_process  # without our hooks
        super()._start(in_engine)
