"""What is asked of a run or an engine and how: the config groups `attribute`, `layers` and `acceptance`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from rl_onoff.errors import at_least


class Rung(Enum):
    """A cause that the attribution tries, in this order; a change that explains something is kept for later rungs."""

    noise = "noise"  # the same engine scores the same tokens in other batches
    end_token = "end_token"  # the last token is there on one side only, or is treated differently
    retokenised = "retokenised"  # the target scored the text's ids, not the sampled ones
    transform = "transform"  # raw, scaled and processed logprobs taken for one another
    decode = "decode"  # what the engine reports while it samples, against its own prefill
    merge = "merge"  # LoRA adapter beside the weights, not merged into them
    switches = "switches"  # what can be turned on an engine, one at a time: the tables of switches
    lm_head = "lm_head"  # LM head in float32
    experts = "experts"  # the behaviour's experts replayed in the target's routers
    dtype = "dtype"  # all weights in float32
    tensor_parallel = "tensor_parallel"  # one device
    engine = "engine"  # one engine for both sides
    weights = "weights"  # one model for both sides


@dataclass(kw_only=True, slots=True)
class AttributeConfig:
    """How the gap between behaviour and target is taken apart."""

    target: str | None = None
    """Name of the scores whose gap is explained; null is the furthest from the behaviour."""
    rungs: list[Rung] = field(default_factory=list)
    """Causes to try; empty is all of them."""
    switches: list[str] = field(default_factory=list)
    """Switches of the engines to try, by name (in the tables below); empty is all that apply."""
    limit: int | None = 256
    """Most responses that are scored again, chosen at random but always the same; null is all."""
    truth_check: int = 4
    """Responses on which the truth, a forward pass in float32, is checked in float64; 0 checks nothing."""


@dataclass(kw_only=True, slots=True)
class LayersConfig:
    """Of which responses the hidden states of backend and target are compared. The target's are on disk meanwhile."""

    limit: int | None = 64
    """Most responses that are looked at, chosen at random but always the same; null is all. The disk holds 4 bytes ×
    (layers + 2) × hidden size a token."""
    inside: int = 8
    """In how many of them, the longest, each layer's attention and MLP are looked at too: 3 times the disk."""

    def __post_init__(self) -> None:
        at_least(1, "layers.limit", self.limit, "64, or null for all responses")
        at_least(0, "layers.inside", self.inside, 8)


class Check(Enum):
    """A line of the list that says whether a model on an engine is fit to be trained, in this order."""

    template = "template"  # prompts are sent as the tokenizer's chat template says, with one BOS
    round_trip = "round_trip"  # the tokenizer gives the ids of its own text back
    eos = "eos"  # config.json, generation_config.json, tokenizer, template and engine agree on what ends a response
    sampling = "sampling"  # tokens are drawn from the whole distribution, whatever the checkpoint's defaults
    decode = "decode"  # logprobs while sampling are those of prefill
    decode_long = "decode_long"  # the same behind a long context
    batch = "batch"  # a response alone has the scores it has in a batch of 32
    cache = "cache"  # a prompt in the engine's cache gives the tokens and logprobs it gave before
    head = "head"  # rows of the LM head that stand for no token have no probability
    greedy = "greedy"  # greedy tokens are the likeliest ones of the truth
    truth = "truth"  # scores are those of the truth, HuggingFace in float32


@dataclass(kw_only=True, slots=True)
class AcceptanceConfig:
    """What a model on an engine must pass before it is trained with; `target` is the truth it is held against."""

    prompts: int = 8
    """Prompts that are asked, the first of the data; 32 responses to them are drawn, at temperature 1."""
    tokens: int = 100
    """Tokens of the first response to each prompt, which decode compares."""
    long_tokens: int = 1000
    """Tokens of context behind which decode_long draws 32 more, twice."""
    k3: float = 0.015
    """Most mean k3 KL, nats a token, for decode, decode_long, batch, cache and truth."""
    sampling_z: float = 5.0
    """Most standard errors by which the drawn tokens' mean logprob may miss minus the mean entropy."""
    greedy: float = 0.5
    """Most nats by which the truth's likeliest token may beat a greedy token, where their ids first part."""
    head_mass: float = 1e-4
    """Most probability, at any position, on rows of the LM head that stand for no token."""
    skip: list[Check] = field(default_factory=list)
    """Lines that are not tried."""

    def __post_init__(self) -> None:
        at_least(1, "acceptance.prompts", self.prompts, 8)
        at_least(1, "acceptance.tokens", self.tokens, 100)
        at_least(1, "acceptance.long_tokens", self.long_tokens, 1000)
        for name in ("k3", "sampling_z", "greedy", "head_mass"):
            at_least(0, f"acceptance.{name}", getattr(self, name), 0.015)
