"""A made-up run whose every number is known, and a real headless Chromium to look at its page with."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_onoff.compare import METRICS, Pair, compare, verdict
from rl_onoff.report import ReportInput, ReportResponse
from rl_onoff.types import FinishReason, Rollout, TokenScores

QUESTION = (
    "Solve the problem, then give the answer in \\boxed{{}}.\n\n"
    "{name} has {a} apples and buys {b} more boxes of {c} apples. How many now?"
)
ANSWER = (
    "First, count what {name} buys: {b} boxes of {c} apples are {b} * {c} = {bc} apples.\n"
    "Then add the {a} apples that {name} had before.\n\nSo the total is {a} + {bc} = {total}. "
    "The answer is \\boxed{{{total}}}."
)
NAMES = ("Amira", "Jonas", "Mei", "Tomás", "Wanjiru")
TOP_K = 10


@dataclass
class SampleRun:
    """Responses as the page is given them, and what the metrics made of them."""

    responses: list[ReportResponse]
    words: list[str]
    comparisons: list[dict[str, Any]]
    verdict: str

    def report(self, **changes: Any) -> ReportInput:
        num_targets = len(self.comparisons)
        target = {
            "engine": "HuggingFace",
            "model": "smollm2",
            "dtype": "float32",
            "version": "transformers 4.57",
            "attention": "sdpa",
        }
        sampler = {
            "engine": "vLLM",
            "dtype": "bfloat16",
            "version": "vllm 0.11",
            "attention": "flash",
            "sampling": {"temperature": 1.0},
        }
        policies = [
            {**target, **sampler},
            *({**target, "dtype": dtype} for dtype in ("float32", "bfloat16", "float16")[:num_targets]),
        ]
        values = {
            "title": "smollm2 on word problems",
            "verdict": self.verdict,
            "policies": policies,
            "comparisons": self.comparisons,
            "metrics": METRICS,
            "responses": iter(self.responses),
            "token_text": self.words.__getitem__,
        }
        return ReportInput(**{**values, **changes})


def words_of(text: str) -> list[str]:
    return re.findall(r" ?[^\W\d_]+| ?\d|\n+| ?[^\w\s]|\s", text)


def view_of(logits_TV: np.ndarray, ids_T: np.ndarray, top_k: int = TOP_K) -> TokenScores:
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    chosen_T = np.take_along_axis(logprobs_TV, ids_T[:, None], 1)[:, 0]
    top_ids_TK = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :top_k]
    return TokenScores(
        token_ids_T=ids_T,
        logprobs_T=chosen_T.astype(np.float32),
        entropy_T=-(np.exp(logprobs_TV) * logprobs_TV).sum(axis=1),
        rank_T=1 + (logprobs_TV > chosen_T[:, None]).sum(axis=1),
        top_ids_TK=top_ids_TK.astype(np.int32),
        top_logprobs_TK=np.take_along_axis(logprobs_TV, top_ids_TK, 1).astype(np.float32),
    )


def make_run(num_responses: int = 45, noises: tuple[float, ...] = (0.12,), seed: int = 0) -> SampleRun:
    """Each target is the behaviour with noise on its logits, more of it the further into the response."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_responses):
        a, b, c = (int(x) for x in rng.integers(2, 40, 3))
        facts = {"name": NAMES[i % 5], "a": a, "b": b, "c": c, "bc": b * c, "total": a + b * c}
        rows.append((QUESTION.format(**facts), ANSWER.format(**facts) * (1 + (i % 7 == 3))))
    words = sorted({word for _, answer in rows for word in words_of(answer)})
    code = {word: i for i, word in enumerate(words)}
    responses = [_response(i, *row, code, noises, rng) for i, row in enumerate(rows)]
    comparisons = [compare([_pair(r, v) for r in responses], num_resamples=200) for v in range(len(noises))]
    return SampleRun(
        responses,
        words,
        [c.to_dict() for c in comparisons],
        verdict(comparisons[0]) if comparisons else "Sampled only.",
    )


def _response(
    i: int, prompt: str, text: str, code: dict[str, int], noises: tuple[float, ...], rng: np.random.Generator
) -> ReportResponse:
    tokens = words_of(text)
    assert "".join(tokens) == text
    ids_T = np.array([code[token] for token in tokens])
    logits_TV = rng.normal(size=(len(ids_T), len(code))) * 2
    logits_TV[np.arange(len(ids_T)), ids_T] += np.maximum(rng.normal(9, 3.5, len(ids_T)), 1)
    growth_T1 = np.linspace(0.5, 1.5, len(ids_T))[:, None] * np.where(rng.random((len(ids_T), 1)) < 0.02, 8, 1)
    targets = [view_of(logits_TV + rng.normal(size=logits_TV.shape) * noise * growth_T1, ids_T) for noise in noises]
    rollout = Rollout(
        request_id=f"word-{i // 2}",
        sample=i % 2,
        text=text,
        token_ids_T=ids_T,
        reward=float(i % 3 == 0),
        finish_reason=FinishReason.length if i % 7 == 3 else FinishReason.eos,
    )
    return ReportResponse(
        rollout=rollout,
        prompt=prompt,
        tokens=tokens,
        behaviour=view_of(logits_TV, ids_T),
        targets=targets,
        groups={"level": str(1 + i % 3), "reward": "right" if i % 3 == 0 else "wrong"},
    )


def _pair(response: ReportResponse, v: int) -> Pair:
    behaviour, target = (side.of(response.rollout) for side in (response.behaviour, response.targets[v]))
    return Pair(behaviour=behaviour, target=target, groups=response.groups)


@pytest.fixture(scope="session")
def sample_run() -> Callable[..., SampleRun]:
    return make_run


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, headless, with a console that is kept; it may reach nothing but files."""
    how = "install it with `apt-get install chromium chromium-driver` and `pip install selenium`"
    chromium = (
        os.environ.get("CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail(f"the tests of report.html need Chromium and chromedriver: {how}, or set CHROMIUM and CHROMEDRIVER")
    try:
        from selenium import webdriver
    except ImportError:
        pytest.fail(f"the tests of report.html need selenium: {how}")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking",
        "disable-component-update", "disable-sync", "no-first-run", "proxy-server=127.0.0.1:9",
        "window-size=1280,900", f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "OFF"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


class Page:
    """One opened report: short words for what a reader does."""

    def __init__(self, chrome: Any) -> None:
        self.chrome = chrome

    def open(self, path: Path, hash: str = "") -> Page:
        self.chrome.get("about:blank")
        self.chrome.get_log("browser")
        self.chrome.get(f"{path.as_uri()}{hash}")
        self.wait(lambda: self.js("return document.documentElement.dataset.ready !== undefined"))
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], timeout: float = 10) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.chrome, timeout, poll_frequency=0.02).until(lambda _: condition())

    def find(self, css: str) -> Any:
        return self.chrome.find_element("css selector", css)

    def all(self, css: str) -> list[Any]:
        return self.chrome.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css)

    def tab(self, name: str) -> None:
        self.find(f"#tab-{name}").click()

    def set(self, name: str, value: str) -> None:
        """Change a control of the tool bar, and wait for the list that follows."""
        script = """
            const control = document.querySelector(`#tools [name="${arguments[0]}"]`);
            control.value = arguments[1];
            control.dispatchEvent(new Event("input", { bubbles: true }));
        """
        before = self.turn()
        self.js(script, name, value)
        if name not in ("colour", "scale"):
            self.wait(lambda: self.turn() != before)

    def turn(self) -> str:
        return self.js("return document.documentElement.dataset.turn")

    def ids(self) -> list[str]:
        return self.texts(".response h3")

    def count(self) -> int:
        return int(self.texts("#pager .count")[0].split()[0].replace(",", ""))

    def choose(self, r: int, t: int) -> None:
        self.find(f'.response[data-r="{r}"] .token[data-t="{t}"]').click()

    def number(self, what: str) -> float:
        """A number of the panel, as exact as the page has it."""
        return float(self.find(f'#panel [data-is="{what}"]').get_attribute("title"))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.chrome.get_log("browser")]


@pytest.fixture
def page(browser: Any) -> Page:
    browser.set_window_size(1280, 900)
    return Page(browser)
