"""Statistics of logits: Triton's kernel (in its interpreter, and compiled for GPUs that are not here) and torch against
float64; and when the host waits for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rl_onoff.backends import token_stats as module
from rl_onoff.backends.huggingface.backend import HuggingFaceBackend
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.backends.token_stats import StatsBuffer, token_stats
from rl_onoff.types import Rollout, Sampling, TokenScores, Want
from tests.conftest import ROOT

TOLERANCE = 1e-5  # nats, float32 against float64
SAMPLER = Want(top_k=5, full_logits=True, sampler=Sampling(temperature=0.7, top_k=40, top_p=0.9))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Case = tuple[torch.Tensor, torch.Tensor, Want, bool]


def cases() -> dict[str, Case]:
    """Logits, ids, what is wanted, `low`."""
    random = torch.Generator().manual_seed(0)

    def logits(num_rows: int, vocab_size: int, scale: float = 4.0) -> torch.Tensor:
        return torch.randn(num_rows, vocab_size, generator=random) * scale + 20

    found: dict[str, Case] = {}
    for vocab_size in (1, 7, 128, 131, 2048, 2049, 5000, 6144):
        ids_R = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0, vocab_size - 1])
        for dtype in DTYPES:
            name = f"{vocab_size} {str(dtype).removeprefix('torch.')}"
            found[name] = logits(5, vocab_size).to(dtype), ids_R.int(), Want(top_k=18), False
    ids_R = torch.tensor([0, 4999, 7])
    found["rows apart"] = logits(3, 5060).bfloat16()[:, :5000], ids_R, Want(top_k=18), False
    found["columns apart"] = logits(3, 10000)[:, ::2], ids_R, Want(top_k=18), False
    found["equal"] = torch.full((3, 5000), -3.0), ids_R, Want(top_k=3), False
    nearly_certain = torch.zeros(3, 5000)
    nearly_certain[:, 7] = torch.tensor([20.0, 50.0, 80.0])
    found["nearly certain"] = nearly_certain, ids_R, Want(top_k=2), False
    masked = logits(3, 5000)
    masked[:, 8:4990], masked[1, 8:] = -torch.inf, -torch.inf  # fewer left than are asked for
    found["masked"] = masked, ids_R, Want(top_k=18), False
    far = logits(3, 5000)
    far[:, 8:4500] = torch.finfo(torch.float32).min  # what some models give tokens that they never say
    found["far below"] = far, ids_R, Want(top_k=18), False
    falling = torch.arange(5000.0, 0, -1)[None].repeat(3, 1) / 5  # all top tokens in one block
    found["falling"] = falling, ids_R, Want(top_k=18), False
    found["rising"] = falling.flip(-1).contiguous(), ids_R, Want(top_k=18), False  # every block has a new largest logit
    found["no rows"] = logits(0, 5000), ids_R[:0], Want(top_k=18), False
    found["nothing finite"] = torch.full((1, 5000), -torch.inf), ids_R[:1], Want(top_k=3), False
    found["infinite"] = torch.cat([logits(1, 4999), torch.full((1, 1), torch.inf)], -1), ids_R[:1], Want(top_k=3), False
    found["nan"] = torch.cat([logits(1, 4999), torch.full((1, 1), torch.nan)], -1), ids_R[:1], Want(top_k=3), False
    found["sampler"] = logits(3, 5000).bfloat16(), ids_R, SAMPLER, False
    found["low"] = logits(3, 5000).bfloat16(), ids_R, Want(), True
    return found


CASES = cases()


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    files = [tmp_path_factory.mktemp("kernel") / name for name in ("cases", "results")]
    torch.save(CASES, files[0])
    command = [sys.executable, "-m", "tests.backends.interpreted_kernel", *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return torch.load(files[1], weights_only=False)


def check(got: dict[str, np.ndarray], case: Case) -> None:
    logits_RV, token_ids_R, want, low = case
    expected = token_stats(logits_RV.double(), token_ids_R, want).arrays()
    if low:
        expected["logprobs_T"] = token_stats(logits_RV, token_ids_R, want, low=True).logprobs_T
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name].shape == values.shape and got[name].dtype == values.dtype, name
        if name == "top_ids_TK":  # which of equal logits is one of the top is free
            assert ((got[name] >= 0) & (got[name] < logits_RV.shape[-1])).all()
            assert all(len(set(row)) == len(row) for row in got[name].tolist())
            if not logits_RV.isnan().any():
                some = torch.from_numpy(got[name]).long(), torch.from_numpy(values).long()
                ours_RK, theirs_RK = (logits_RV.gather(-1, ids_RK) for ids_RK in some)
                assert torch.equal(ours_RK, theirs_RK)
        else:
            np.testing.assert_allclose(got[name], values, atol=TOLERANCE, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_numbers_of_float64(name: str, by_kernel: dict[str, dict[str, np.ndarray]]) -> None:
    check(by_kernel[name], CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_this_machine_gives_the_numbers_of_float64(name: str) -> None:
    """Torch on a CPU; where there is a GPU, the kernel itself."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits_RV, token_ids_R, want, low = CASES[name]
    logits_RV, token_ids_R = logits_RV.to(device), token_ids_R.to(device)
    assert (module._kernel(logits_RV.device, logits_RV.dtype) is not None) == (device == "cuda")
    check(token_stats(logits_RV, token_ids_R, want, low=low).arrays(), CASES[name])


def test_a_small_entropy_keeps_its_digits(by_kernel: dict[str, dict[str, np.ndarray]]) -> None:
    expected = token_stats(CASES["nearly certain"][0].double(), CASES["nearly certain"][1], Want()).entropy_T
    np.testing.assert_allclose(by_kernel["nearly certain"]["entropy_T"][1:], expected[1:], rtol=1e-4)
    assert 0 < expected[2] < 1e-28


def test_logits_that_are_no_numbers_have_no_entropy() -> None:
    for name in ("nothing finite", "infinite", "nan"):
        logits_RV, token_ids_R, want, _ = CASES[name]
        assert np.isnan(token_stats(logits_RV, token_ids_R, want).entropy_T).all(), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
def test_the_kernel_compiles(
    capability: int, dtype: str, aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For GPUs that are not here: by Triton's own assembler, afresh."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rl_onoff.backends import token_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = [f"*{dtype}", f"*{dtype}", "*fp32", "*fp32", "*i32", f"*{dtype}", "i32", "i32"]
    constants = {"SLOTS": token_kernel.SLOTS, "BLOCK": module.BLOCK}
    signature = dict(zip(token_kernel.kernel.arg_names, [*types, "constexpr", "constexpr"], strict=True))
    multiples_of_16 = {(i,): [["tt.divisibility", 16]] for i in range(8 if aligned else 6)}  # pointers; also the sizes
    source = ASTSource(token_kernel.kernel, signature, constexprs=constants, attrs=multiples_of_16)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"].startswith(b"\x7fELF") and compiled.metadata.shared < 48 * 1024


@pytest.fixture
def kernel_anywhere(monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    """The kernel is tried on this CPU, where it cannot run."""
    module._kernel.cache_clear()
    monkeypatch.setattr(module, "KERNEL_DEVICE", "cpu")
    yield
    module._kernel.cache_clear()


@pytest.mark.usefixtures("kernel_anywhere")
def test_torch_does_what_the_kernel_cannot(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        check(token_stats(*CASES["5000 bfloat16"][:3]).arrays(), CASES["5000 bfloat16"])
    (record,) = caplog.records
    assert "kernel does not work on cpu" in record.getMessage()


@pytest.mark.usefixtures("kernel_anywhere")
def test_a_kernel_with_other_numbers_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_onoff.backends import token_kernel

    def wrong(z_RV: torch.Tensor, chosen_R: torch.Tensor, block: int) -> tuple[torch.Tensor, ...]:
        logsumexp_R, *others = module._row_stats(z_RV, chosen_R, block)
        return logsumexp_R + 1e-3, *others

    monkeypatch.setattr(token_kernel, "row_stats", wrong)
    check(token_stats(*CASES["5000 float32"][:3]).arrays(), CASES["5000 float32"])
    assert "0.001" in caplog.text
    monkeypatch.setattr(token_kernel, "row_stats", module._row_stats)
    module._kernel.cache_clear()
    assert module._kernel(torch.device("cpu"), torch.float32) is module._row_stats


@pytest.mark.parametrize("sizes", [(9,), (1, 3, 5), (4, 4, 1)])
def test_chunks_give_what_the_whole_gives(sizes: tuple[int, ...]) -> None:
    logits_RV = torch.randn(9, 700, generator=torch.Generator().manual_seed(0))
    ids_R = torch.arange(9) * 70
    whole = token_stats(logits_RV, ids_R, SAMPLER)
    buffer = StatsBuffer(9, SAMPLER)
    at = 0
    for size in sizes:
        assert not buffer.complete
        logprobs_R = buffer.add(logits_RV[at : at + size], ids_R[at : at + size])
        np.testing.assert_array_equal(logprobs_R, whole.logprobs_T[at : at + size])
        at += size
    for name, values in buffer.send().scores().arrays().items():
        np.testing.assert_array_equal(values, getattr(whole, name), err_msg=name)


def scored(monkeypatch: pytest.MonkeyPatch, device: str, out_of_memory_at: int) -> list[str]:
    """What the HuggingFace backend does, in order, with responses 0 to 4 in batches of two."""
    events: list[str] = []
    backend = HuggingFaceBackend(HuggingFaceBackendConfig(model_name="none", batch_size=2))
    backend._split = SimpleNamespace(device=torch.device(device))
    backend._limits = SimpleNamespace(halve=lambda num: events.append("halve"))

    def score_batch(batch: list[Rollout], want: Want) -> Iterable[TokenScores]:
        if "halve" not in events and any(rollout.sample == out_of_memory_at for rollout in batch):
            raise torch.OutOfMemoryError
        events.append("launch " + " ".join(str(rollout.sample) for rollout in batch))

        def results() -> Iterable[TokenScores]:
            events.append("wait")
            for rollout in batch:
                yield TokenScores(token_ids_T=rollout.token_ids_T, logprobs_T=np.zeros(1)).of(rollout)

        return results()

    def batches(rollouts: list[Rollout], want: Want) -> list[list[Rollout]]:
        return [rollouts[i : i + 2] for i in range(0, len(rollouts), 2)]

    monkeypatch.setattr(backend, "_score_batch", score_batch)
    monkeypatch.setattr(backend, "_batches", batches)
    ids: Any = {"request_id": "r", "prompt_ids": np.zeros(1, np.int32), "token_ids_T": np.zeros(1, np.int32)}
    for scores in backend._score([Rollout(sample=i, **ids) for i in range(5)], Want()):
        events.append(str(scores.sample))
    return events


def test_a_gpu_is_given_the_next_batch_before_the_last_ones_results_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = ["wait", "0", "1"], ["wait", "2", "3"], ["wait", "4"]
    assert scored(monkeypatch, "cpu", -1) == ["launch 0 1", *first, "launch 2 3", *second, "launch 4", *third]
    assert scored(monkeypatch, "cuda", -1) == ["launch 0 1", "launch 2 3", *first, "launch 4", *second, *third]
    assert scored(monkeypatch, "cuda", 2) == ["launch 0 1", "halve", "launch 2 3", *first, "launch 4", *second, *third]
