"""Randomized Hadamard rotations of any size: spread what stands out in a few features over all of them.

A Hadamard matrix H_n has entries +-1 and orthogonal rows, so H_n / sqrt(n) is a rotation in which every feature takes
part in every other with the same weight. With random signs D before it (QuaRot, arXiv 2404.00456, section 3; QuIP#),

    Q = D H_n / sqrt(n),       Q Q^T = I

a vector whose energy sits in a few features leaves with nearly all of them alike, whichever those few were.

Orders are products: H_a (x) H_b has order a b. The factors are

    2^k           Sylvester:  H_2 (x) ... (x) H_2
    q + 1         Paley I,    q prime, q = 3 mod 4:   12, 20, 24, 44, 60, 68, ...
    2 (q + 1)     Paley II,   q prime, q = 1 mod 4:   28, 36, 76, ...

which covers every multiple of 4 up to 48, and the hidden sizes in use (576 = 16 x 36, 2304 = 64 x 36, 3072 = 256 x 12,
3584 = 128 x 28, 5120 = 256 x 20). Where no such product is `n`, Q is block-diagonal: n / b copies of H_b for the
largest b that divides n, each block with its own signs. It then mixes within a block alone.

A product is never formed: X Q takes n x (sum of the factors' orders) multiplications a row instead of n^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["Hadamard", "hadamard", "orders", "randomized"]

_LARGEST = 64  # of the Sylvester factors: small dense products instead of a butterfly


@dataclass(frozen=True)
class Hadamard:
    """Q = diag(signs) blockdiag(H_b, ..., H_b) / sqrt(b). signs: (n,), +-1; factors: the orders whose product is b."""

    signs: Tensor
    factors: tuple[int, ...]

    @property
    def block(self) -> int:
        """b, the order of a block; n itself where there is one."""
        size = 1
        for order in self.factors:
            size *= order
        return size

    def apply(self, X: Tensor) -> Tensor:
        """X Q along the last axis. X: (..., n), float32 or wider, n a multiple of Q's size: several are taken apart."""
        n = len(self.signs)
        if X.shape[-1] % n:
            raise LlmopsError(f"{X.shape[-1]} features cannot be rotated by {n}; expected a multiple")
        Y = X.reshape(-1, n) * self.signs.to(X)
        after = self.block
        for order in self.factors:
            after //= order
            H = hadamard(order).to(Y) / order ** 0.5
            Y = (H.t() @ Y.reshape(-1, order, after)).reshape(-1, n)
        return Y.reshape(X.shape)


def randomized(n: int, seed: int) -> Hadamard:
    """The rotation of size `n` whose signs are drawn with `seed`. Raises LlmopsError when n < 1."""
    if n < 1:
        raise LlmopsError(f"a rotation of size {n}; expected 1 or more")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
    for copies in range(1, n + 1):
        if n % copies == 0 and (found := orders(n // copies)) is not None:
            return Hadamard(signs, found)
    raise AssertionError("a block of 1 always fits")


def orders(n: int) -> tuple[int, ...] | None:
    """Orders of the factors whose product is a Hadamard matrix of order `n`; None when there is none here."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return _sylvester(n)
    size = 4 * odd
    while size <= n:  # the smallest with an odd part; what is left is a power of two
        if n % size == 0 and _paley(size) is not None:
            return (size, *_sylvester(n // size))
        size *= 2
    for size in range(12, n // 12 + 1, 4):
        if n % size == 0 and _paley(size) is not None and (rest := orders(n // size)) is not None:
            return (size, *rest)
    return None


def hadamard(n: int) -> Tensor:
    """(n, n) of +-1, float32, H H^T = n I. Raises LlmopsError where `orders` is None."""
    found = orders(n)
    if found is None:
        raise LlmopsError(f"no Hadamard matrix of order {n}; expected 1, 2, or a product of powers of two and q + 1 or "
                          "2 (q + 1) for a prime q")
    H = torch.ones(1, 1)
    for order in found:
        H = torch.kron(H, _base(order))
    return H


def _base(order: int) -> Tensor:
    """(order, order): one factor."""
    kind = _paley(order)
    if kind is None:
        H = torch.ones(1, 1)
        while len(H) < order:
            H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        return H
    q = order - 1 if kind == 1 else order // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))])
    C = torch.ones(q + 1, q + 1)
    C[0, 0] = 0
    C[1:, 1:] = character[(torch.arange(q).unsqueeze(1) - torch.arange(q)) % q]
    if kind == 1:
        C[1:, 0] = -1  # skew: C + C^T = 0
        return C + torch.eye(q + 1)
    return (torch.kron(C, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
            + torch.kron(torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])))


def _sylvester(n: int) -> tuple[int, ...]:
    """A power of two as factors of at most `_LARGEST`."""
    found = []
    while n > _LARGEST:
        found.append(_LARGEST)
        n //= _LARGEST
    return (*found, n) if n > 1 else tuple(found)


def _paley(n: int) -> int | None:
    """1 or 2: which of Paley's constructions has order n; None when neither, or Sylvester's does."""
    if n % 4 or n & (n - 1) == 0:
        return None
    if _is_prime(n - 1):
        return 1
    return 2 if _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1 else None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q ** 0.5) + 1))
