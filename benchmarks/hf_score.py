"""Scoring with HuggingFace, all statistics and top-20: time against lm-evaluation-harness (sums of logprobs alone) and
against the model's body and LM head with nothing else, and peak memory against full logits.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/hf_score.py [MODEL] [--prompts 8] [--responses 8] [--rounds 3]

The work: 32 prompts of 64–512 tokens × 8 responses of 16–256 tokens of MATH-500; --prompts takes the first of them.
The numbers are compared before a time is printed. Without lm-eval (`pip install lm-eval`) its row is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from machine import ratios, versions  # beside this file

from rl_onoff.backends import create_backend
from rl_onoff.data.prompts import prompts as problems
from rl_onoff.types import Rollout, Want

WANT = Want(top_k=20)
BATCHES = (4, 8, 16)


def backend_of(model: str) -> Any:
    options = {"backend_type": "huggingface", "model_name": model, "backend_specific": {"dtype": "float32"}}
    backend = create_backend(options)
    backend.load()
    return backend


def work(backend: Any, num_prompts: int, num_responses: int) -> list[Rollout]:
    """Pieces of the problems' texts, as long as the work says."""
    rng = np.random.default_rng(0)
    text = "\n\n".join(math_500())
    tokens = np.asarray(backend.get_tokenizer().encode(text), np.int32)

    def piece(least: int, most: int) -> np.ndarray:
        size = int(rng.integers(least, most + 1))
        start = int(rng.integers(0, len(tokens) - size))
        return tokens[start : start + size]

    return [
        Rollout(request_id=str(i), sample=sample, prompt_ids=prompt_ids, token_ids_T=piece(16, 256))
        for i, prompt_ids in enumerate(piece(64, 512) for _ in range(num_prompts))
        for sample in range(num_responses)
    ]
