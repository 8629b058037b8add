"""A teacher's top-k distribution as a few bytes a token, to be written once and read by every student.

    row of a token:  k ids, b = ceil(log2 V) bits each, least significant bit first, filled up to whole bytes
                     k + 1 log-probabilities in float16, those of the k tokens and of the rest (`top_k.py`)

At k = 32 that is 110 bytes a token for 1,536 words and 138 for 152,064; whole logits of the latter are 304,128. Rows
have one length, so the file is an array that can be mapped into memory and read at any row. Half precision is off by at
most 2^-11 of a log-probability; what is read is normalized over the k + 1 again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmops.methods.distill.top_k import FLOOR

__all__ = ["bytes_per_token", "decode", "encode"]

Bytes = npt.NDArray[np.uint8]


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Bytes of a row. Raises ValueError for k outside 1..V."""
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k {k} of a vocabulary of {vocabulary}; expected 1 to that many")
    return _id_bytes(k, vocabulary) + 2 * (k + 1)


def encode(ids: Tensor, log_p: Tensor, vocabulary: int) -> Bytes:
    """(N, bytes_per_token) of ids (N, k) below `vocabulary` and log-probabilities (N, k + 1).

    Raises ValueError for ids that are none of the vocabulary's.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"ids {int(ids.min())} to {int(ids.max())}; expected 0 to {vocabulary - 1}")
    bits = _bits(vocabulary)
    whole = ids.cpu().numpy().astype(np.uint32)
    streams = ((whole[:, :, None] >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8)  # (N, k, b)
    packed = np.packbits(streams.reshape(len(whole), -1), axis=1, bitorder="little")
    halves = log_p.detach().float().clamp_min(FLOOR).cpu().numpy().astype("<f2")
    return np.concatenate([packed, halves.view(np.uint8).reshape(len(whole), -1)], axis=1)


def decode(rows: Bytes, k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(ids (N, k) int64, log-probabilities (N, k + 1) float32, normalized): the inverse of `encode`."""
    bits, split = _bits(vocabulary), _id_bytes(k, vocabulary)
    streams = np.unpackbits(np.ascontiguousarray(rows[:, :split]), axis=1, count=k * bits, bitorder="little")
    ids = streams.reshape(len(rows), k, bits).astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
    halves = np.ascontiguousarray(rows[:, split:]).view("<f2").astype(np.float32)
    return torch.from_numpy(ids), torch.from_numpy(halves).log_softmax(-1)


def _bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


def _id_bytes(k: int, vocabulary: int) -> int:
    return -(-k * _bits(vocabulary) // 8)
