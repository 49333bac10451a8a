"""How many prompts a shard holds where `job.shard_size=auto`: about half a minute of a replica's work.

A shard is the unit of loss, so it should not be long; and each costs the driver, the store and the listing of parts
something, so it should not be short. Its time is *estimated*, from multiplications and a nominal speed, and never
measured: how prompts are cut into shards is part of a run's identity, and the same command has to find the same run,
however fast its machines are and however many. So of the settings of the cluster the estimate asks only whether a
replica has an accelerator; with fewer or more processors a run goes on as it is.

Texts stand for tokens: a run that goes on encodes a shard's prompts only when it is its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from neg_service.config import ScanConfig, device_names
from neg_service.prompts.prompt import Prompt

# Who plans has inspected a model; those who only read plans need no torch.
if TYPE_CHECKING:
    from neg_service.measures.base import Cost
    from neg_service.models.inspection import ModelInfo

SHARD_SECONDS = 30.0
# Multiplications, each with its addition, a second: two to four processor cores in float32; one data-centre GPU,
# which has less of it with a small model in float32 and more with a large one in bfloat16.
CPU_SPEED, ACCELERATOR_SPEED = 5e10, 1e13
# Models of more parameters are hardly measured without an accelerator.
CPU_PARAMETERS = 10**9
# A shard's parts are encoded in memory, two at a time.
SHARD_BYTES = 64 * 2**20
# Prompts go to a replica as a message, and the driver holds two of each replica.
MESSAGE_BYTES = 4 * 2**20
# Of a small data set several replicas should have something: so many shards at the least, but none of under three
# seconds that holds under 64 prompts, which share beginnings and batches.
FEWEST_SHARDS, LEAST_SECONDS, LEAST_PROMPTS = 32, 3.0, 64

# Bytes of UTF-8 that a token stands for; what a prompt takes in a message beside its text and tokens.
_TOKEN_BYTES, _PROMPT_BYTES = 4, 256
# So many prompts, at even steps, are looked at.
_LOOKED_AT = 256


def automatic_shard_size(prompts: Sequence[Prompt], info: ModelInfo, cost: Cost, has_accelerator: bool) -> int:
    """Prompts of a shard; `cost` is that of one prompt."""
    n_prompts, texts = len(prompts), texts_of(prompts)
    speed = ACCELERATOR_SPEED if has_accelerator else CPU_SPEED
    seconds = max(1e-9, multiplications(info, cost, texts) / speed)
    few = max(-(-n_prompts // FEWEST_SHARDS), min(LEAST_PROMPTS, int(LEAST_SECONDS / seconds)))
    stored = SHARD_BYTES // max(1, sum(cost.bytes.values()), cost.held)
    # A token takes three bytes there, and a chat lies there once more as it was before its template.
    message = MESSAGE_BYTES // int(_PROMPT_BYTES + 2 * texts.bytes + texts.beside_bytes)
    return max(1, min(int(SHARD_SECONDS / seconds), stored, message, few, n_prompts))


def plans_for_accelerator(config: ScanConfig, info: ModelInfo) -> bool:
    """Whether shards are sized for replicas with an accelerator: as the settings say, else by the model's size."""
    gpus, devices = config.cluster.gpus_per_replica, device_names(config.model.device)
    if gpus != "auto":
        return bool(gpus > 0)
    return info.n_parameters > CPU_PARAMETERS if devices == ["auto"] else devices[0] != "cpu"


@dataclass(frozen=True)
class Texts:
    """Of a data set's prompts, in the mean: bytes of a text, and of what it does not share with those beside it.

    beside_bytes: of its wordings, as texts and tokens.
    """

    bytes: float
    own_bytes: float
    beside_bytes: float = 0.0


def texts_of(prompts: Sequence[Prompt]) -> Texts:
    """Looks at some prompts, at even steps; beside each other lie those whose texts begin alike."""
    steps = min(len(prompts), _LOOKED_AT)
    looked_at = [prompts[(2 * i + 1) * len(prompts) // (2 * steps)] for i in range(steps)]
    texts = sorted(prompt.text.encode() for prompt in looked_at)
    beside = sum(_PROMPT_BYTES + 2 * len(text.encode()) for prompt in looked_at for text, _ in prompt.wordings or ())
    total = sum(map(len, texts))
    shared = sum(_n_shared(*pair) for pair in pairwise(texts))
    # The last token is each prompt's own, also where prompts are equal.
    return Texts(total / steps, max(_TOKEN_BYTES, (total - shared) / steps), beside / steps)


def _n_shared(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


def multiplications(info: ModelInfo, cost: Cost, texts: Texts) -> float:
    """About how many a prompt takes: its tokens through all layers, those that prompts share once, then its rows."""
    tokens, own_tokens = max(1.0, texts.bytes / _TOKEN_BYTES), texts.own_bytes / _TOKEN_BYTES
    if info.rows_are_prompts:
        return cost.rows * cost.passes * (tokens * info.token_weights + info.head_weights)
    return own_tokens * info.token_weights + cost.rows * cost.passes * (info.token_weights + info.head_weights)
