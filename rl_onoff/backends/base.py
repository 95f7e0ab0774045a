"""The interface of every backend: text in and out, written once on top of the core (core.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from rl_onoff import sampling as sampler
from rl_onoff.backends.core import CoreBackend
from rl_onoff.errors import UsageError, plural
from rl_onoff.types import Rollout, Sampling, Want, sample_requests

NAMES = {"max_new_tokens": "max_length", "stop": "stop_strings"}  # fields of Sampling as arguments of `generate`


class BaseBackend(CoreBackend):
    """One language model behind one inference engine.

    >>> with create_backend({"backend_type": "huggingface", "model_name": "smollm2"}) as backend:
    ...     backend.generate("The capital of France is", max_length=5)
    """

    def generate(
        self,
        prompts: str | Sequence[Any],
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = True,
        stop_strings: Sequence[str] | None = None,
        return_logits: bool = False,
        return_probs: bool = False,
        compute_gradients: bool = False,
        *,
        seed: int = 0,
    ) -> Any:
        """Generate one response per prompt.

        Args:
            prompts: one prompt or a list of them, each text or a list of token ids; text is encoded as the tokenizer
                does.
            max_length: most new tokens.
            temperature, top_k, top_p: the sampler; `top_k=None` and `top_p=None` keep every token.
            do_sample: False decodes greedily.
            stop_strings: end a response and are cut from its text.
            return_logits, return_probs: also give `logits` and `probs`, float32 (num_tokens, vocab_size); the
                probabilities are after `temperature`, those of greedy decoding after 1.
            compute_gradients: give `logits` as a torch tensor that `.backward()` can be called on (HuggingFace alone).
            seed: the same seed gives the same responses.

        Returns:
            The text; or, when any of the last three is asked for, a dict with `text`, `token_ids`, `logprobs`,
            `finish_reason` and what was asked for. A list of them for a list of prompts.
        """
        values: dict[str, Any] = {
            "max_new_tokens": max_length, "temperature": temperature if do_sample else 0.0, "n": 1, "min_p": 0.0,
            "top_k": 0 if top_k is None else top_k, "top_p": 1.0 if top_p is None else top_p,
            "stop": [] if stop_strings is None else stop_strings, "seed": seed,
        }  # fmt: skip
        sampler.check(values, NAMES)
        values["stop"] = list(values["stop"])
        sampling = Sampling(**values)
        self.check_sampling(sampling)
        if compute_gradients:
            self._check_gradients()
        batch, single = as_batch(prompts, "prompts")
        numbered = [(str(i), self._ids(prompt)) for i, prompt in enumerate(batch)]
        requests = [sample_requests(id=id, prompt_ids=ids, sampling=sampling) for id, ids in numbered]
        done = {rollout.request_id: rollout for rollout in self.complete(requests)}
        rollouts = [done[id] for id, _ in numbered]
        if not (return_logits or return_probs or compute_gradients):
            return rollouts[0].text if single else [rollout.text for rollout in rollouts]
        logits = self._logits(rollouts, compute_gradients)
        results: list[dict[str, Any]] = []
        for rollout, logits_TV in zip(rollouts, logits, strict=True):
            reason = rollout.finish_reason and rollout.finish_reason.value
            ids, logprobs = rollout.token_ids_T.tolist(), rollout.logprobs_T
            result = {"text": rollout.text, "token_ids": ids, "logprobs": logprobs, "finish_reason": reason}
            if return_logits or compute_gradients:
                result["logits"] = logits_TV
            if return_probs:
                result["probs"] = _softmax(logits_TV, sampling.temperature or 1.0)
            results.append(result)
        return results[0] if single else results

    def get_logits(
        self, prompts: str | Sequence[Any], responses: str | Sequence[Any], compute_gradients: bool = False
    ) -> Any:
        """Raw logits of every response token given its prompt: float32 (num_response_tokens, vocab_size).

        Lists give a list. Prompts and responses are text or lists of token ids; a text response is encoded without
        special tokens. With `compute_gradients` a torch tensor comes back whose `.backward()` reaches the weights
        (HuggingFace alone).
        """
        if compute_gradients:
            self._check_gradients()
        prompt_batch, single = as_batch(prompts, "prompts")
        response_batch, single_response = as_batch(responses, "responses")
        if single != single_response or len(prompt_batch) != len(response_batch):
            there = f"there are {plural(len(prompt_batch), 'prompt')} but {plural(len(response_batch), 'response')}"
            raise UsageError(f"{there}: give one response per prompt")
        rollouts = [
            Rollout(request_id=str(i), sample=0, prompt_ids=self._ids(p), token_ids_T=self._ids(r, special=False))
            for i, (p, r) in enumerate(zip(prompt_batch, response_batch, strict=True))
        ]
        logits = self._logits(rollouts, compute_gradients)
        return logits[0] if single else logits

    def get_probabilities(
        self, prompts: str | Sequence[Any], responses: str | Sequence[Any], temperature: float = 1.0
    ) -> Any:
        """softmax(logits / temperature) of every response token: float32 (num_response_tokens, vocab_size)."""
        if not isinstance(temperature, Real) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
            raise UsageError(f"temperature is {temperature!r} but must be a number above 0: pass temperature=1.0")
        logits = self.get_logits(prompts, responses)
        if isinstance(logits, list):
            return [_softmax(row, temperature) for row in logits]
        return _softmax(logits, temperature)

    def encode(self, text: str | Sequence[str]) -> Any:
        """Token ids of a text, with the special tokens that the tokenizer adds; a list of them for a list of texts."""
        batch, single = as_batch(text, "text")
        ids = [self.get_tokenizer().encode(item) for item in batch]
        return ids[0] if single else ids

    def decode(self, token_ids: Sequence[Any]) -> Any:
        """Text of token ids, special tokens removed; a list of texts for a list of lists."""
        batch, single = as_batch(token_ids, "token_ids")
        texts = [self.get_tokenizer().decode(ids, skip_special_tokens=True) for ids in batch]
        return texts[0] if single else texts

    def _ids(self, text: str | Sequence[int], special: bool = True) -> np.ndarray:
        """Token ids as the engines take them, of a text or of a list of token ids."""
        ids = self.get_tokenizer().encode(text, add_special_tokens=special) if isinstance(text, str) else text
        array = np.asarray(ids)
        if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
            raise UsageError(f"{ids!r} is neither a text nor a list of token ids: pass those that backend.encode gives")
        return array.astype(np.int32)

    def _check_gradients(self) -> None:
        if not self.supports_gradients:
            raise UsageError(f"{self.name} gives no gradients: use the huggingface backend for compute_gradients")

    def _logits(self, rollouts: Sequence[Rollout], compute_gradients: bool) -> list[Any]:
        """Full logits of every response, in their order."""
        if compute_gradients:
            return self._logits_with_gradients(rollouts)
        scores = {s.request_id: s.logits_TV for s in self.score(rollouts, Want(full_logits=True))}
        return [scores[rollout.request_id] for rollout in rollouts]

    def _logits_with_gradients(self, rollouts: Sequence[Rollout]) -> list[Any]:
        raise NotImplementedError


def as_batch(value: Any, name: str) -> tuple[list[Any], bool]:
    """(list of items, whether a single one was given); an item is a text or a list of token ids."""
    if isinstance(value, str):
        return [value], True
    if hasattr(value, "tolist"):
        value = value.tolist()
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    items = list(value) if is_list else [value]
    if is_list and items and all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        return [items], True
    for item in items:
        if not (isinstance(item, Sequence) or hasattr(item, "tolist")) or isinstance(item, bytes | Mapping):
            raise UsageError(f"{name} holds {item!r}: pass a text, a list of token ids, or a list of these")
    return items, False


def _softmax(logits_TV: Any, temperature: float) -> Any:
    """softmax(logits / temperature) by row, of an array or a tensor."""
    if not isinstance(logits_TV, np.ndarray):
        return (logits_TV / temperature).softmax(-1)
    scaled = logits_TV / np.float32(temperature)
    scaled -= scaled.max(-1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(-1, keepdims=True)
    return scaled
