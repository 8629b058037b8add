"""GPTQ: against Optimal Brain Quantization by explicit inverses in float64, in its own norm, and where it breaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmops.errors import LlmopsError, StepError
from llmops.methods.quantize import QuantizedWeight, gptq, packing, rtn
from llmops.methods.quantize.gptq import factorize, gptq_alike, inverse_factor, usual
from llmops.methods.quantize.grid import fit


def made(rows: int = 24, columns: int = 96, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 0.5, columns)
    X = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator) * 0.1, 2 / tokens * X.t() @ X


def rise(made: QuantizedWeight, W: Tensor, H: Tensor) -> float:
    """tr(D H D^T): what the layer's output loses."""
    D = made.dequantize().double() - W.double()
    return float((D @ H.double() * D).sum())


def brute_force(W: Tensor, H: Tensor, bits: int, size: int, symmetric: bool, order: str, damping: float
                ) -> tuple[Tensor, Tensor]:
    """(codes, scales): OBQ in float64, one column at a time, the inverse updated by its own formula (OBQ, eq. 2-3)."""
    W, H = W.double().clone(), H.double().clone()
    half = 1 << (bits - 1)
    H += damping * H.diagonal().mean() * torch.eye(len(H))
    inverse = torch.linalg.inv(H)
    perm = torch.argsort(H.diagonal(), descending=True, stable=True) if order == "activation" else torch.arange(len(H))
    if order == "groups":
        means = [float(H.diagonal()[g:g + size].mean()) for g in range(0, len(H), size)]
        perm = torch.tensor([g * size + j for g in sorted(range(len(means)), key=lambda g: -means[g])
                             for j in sorted(range(size), key=lambda j, g=g: -float(H[g * size + j, g * size + j]))])
    fixed = fit(W.float().view(len(W), -1, size), bits, symmetric, torch.float32)
    codes, scales = torch.zeros_like(W), torch.zeros(len(W), W.shape[1] // size)
    zeros = torch.zeros_like(scales)
    begun: set[int] = set()
    for j in perm.tolist():
        g = j // size
        if order != "activation" and g not in begun:
            begun.add(g)
            now = fit(W[:, g * size:(g + 1) * size].float().unsqueeze(1), bits, symmetric, torch.float32)
        else:
            now = None
        if order == "activation":
            scales[:, g] = fixed.scale[:, g]
            zeros[:, g] = 0 if fixed.zero is None else fixed.zero[:, g].float()
        elif now is not None:
            scales[:, g] = now.scale[:, 0]
            zeros[:, g] = 0 if now.zero is None else now.zero[:, 0].float()
        s, z = scales[:, g].double(), zeros[:, g].double()
        codes[:, j] = (torch.round(W[:, j] / s) + z).clamp(-half, half - 1)
        error = (W[:, j] - (codes[:, j] - z) * s) / inverse[j, j]
        W -= error.unsqueeze(1) * inverse[j].unsqueeze(0)
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # the column is done; whatever is here is not used any more
        inverse[j, :j] = inverse[j, j + 1:] = inverse[:j, j] = inverse[j + 1:, j] = 0
    return codes, scales


@pytest.mark.parametrize("order", ["groups", "activation", "none"])
@pytest.mark.parametrize(("bits", "size", "symmetric"), [(4, 96, True), (3, 32, True), (2, 16, False), (4, 24, False),
                                                         (8, 48, True)])
def test_matches_optimal_brain_quantization_in_float64(bits: int, size: int, symmetric: bool, order: str) -> None:
    W, H = made()
    codes, scales = brute_force(W, H, bits, size, symmetric, order, 0.01)
    for block in (16, 128):  # smaller than, and larger than, the groups
        ours, _ = gptq(W, H, bits=bits, group_size=size, symmetric=symmetric, order=order, block=block,
                       damping=0.01)
        torch.testing.assert_close(ours.scale, scales, rtol=2e-3, atol=1e-6)
        assert (ours.codes != codes).float().mean() < 0.01  # float32 may turn a tie, and what follows it in that row


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("order", ["groups", "activation", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_loses_less_than_rounding_to_nearest_at_every_width(bits: int, order: str, symmetric: bool) -> None:
    W, H = made(seed=bits)
    ours, solved = gptq(W, H, bits=bits, group_size=32, symmetric=symmetric, order=order)
    plain = rtn(W, bits=bits, group_size=32, symmetric=symmetric)
    most = 0.9 if order != "none" else 1.0  # here the largest inputs come last, where nothing is left to give
    assert rise(ours, W, H) < most * rise(plain, W, H)
    damped = H + solved.damping * H.diagonal().mean() * torch.eye(len(H))
    assert 2 * solved.loss == pytest.approx(rise(ours, W, damped), rel=0.02)  # the loss that is told is the true one
    assert solved.failed == () and solved.dead == 0


def test_the_searched_clip_loses_less_at_two_bits() -> None:
    W, H = made(rows=64)
    loss = {clip: rise(gptq(W, H, bits=2, group_size=32, clip=clip)[0], W, H) for clip in ("absmax", "mse")}
    assert loss["mse"] < 0.9 * loss["absmax"]


@pytest.mark.parametrize("bits", [6, 8])
def test_above_four_bits_the_usual_order_and_damping_lose_less_on_other_tokens(bits: int) -> None:
    """Other tokens of the same inputs: what damping is for. Below, the order by groups is what is usual."""
    W, H = made(rows=64, seed=1)
    _, other = made(rows=64, tokens=4000, seed=1)  # the same mix, drawn first
    (order, damping), (before, more) = usual(bits), usual(4)
    assert (order, before) == ("activation", "groups") and damping < more
    lost = [rise(gptq(W, H, bits=bits, group_size=32, order=each, damping=by, clip="mse")[0], W, other)
            for each, by in ((order, damping), (before, more))]
    assert lost[0] < 0.9 * lost[1]


def test_the_factor_is_that_of_the_inverse() -> None:
    _, H = made()
    U, damping, failed = inverse_factor(H, 0.01)
    inverse = torch.linalg.inv(H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(len(H)))
    assert damping == 0.01 and failed == ()
    assert torch.equal(U, U.triu())
    assert (U.double().t() @ U.double() - inverse).norm() < 1e-3 * inverse.norm()


@pytest.mark.parametrize("size", [129, 301, 640])
def test_the_factor_made_by_halves_is_as_exact_as_lapack(size: int) -> None:
    """Against float64, on inputs whose sizes span four orders of magnitude, and after dampings that failed."""
    draw = torch.Generator().manual_seed(size)
    X = torch.randn(size // 2, size, generator=draw) * torch.logspace(-2, 2, size)[torch.randperm(size, generator=draw)]
    H = X.t() @ X * (2 / len(X))
    before = H.clone()
    U, damping, failed = inverse_factor(H, 1e-9)
    assert failed and failed[0] == 1e-9 and damping > failed[-1] and torch.equal(H, before)
    U, damping, _ = inverse_factor(H, 0.01)
    exact = H.double() + damping * H.double().diagonal().mean() * torch.eye(size)
    apart = (U.double() @ exact @ U.double().t() - torch.eye(size)).norm()
    R = torch.linalg.cholesky(exact.float().flip(0, 1)).flip(0, 1)
    peer = torch.linalg.solve_triangular(R, torch.eye(size), upper=True).double()
    assert apart < 2 * (peer @ exact @ peer.t() - torch.eye(size)).norm() + 1e-6


@pytest.mark.parametrize("order", ["groups", "activation", "none"])
def test_a_factor_made_once_serves_every_layer_that_shares_the_input(order: str) -> None:
    W, H = made(columns=288)  # large enough to be inverted in halves
    factor = factorize(H.clone(), group_size=32, order=order)
    for rows in (W[:8], W[8:]):
        shared, told = gptq(rows, factor, bits=3, group_size=32, clip="mse")
        alone, also = gptq(rows, H, bits=3, group_size=32, clip="mse", order=order)
        assert torch.equal(shared.codes, alone.codes) and torch.equal(shared.scale, alone.scale) and told == also
    kept = H.clone()
    factorize(H, group_size=32)
    assert torch.equal(kept, H)
    with pytest.raises(LlmopsError, match="factorised for groups of 32; expected groups of 96"):
        gptq(W, factor, bits=3, group_size=96)
    with pytest.raises(LlmopsError, match="group_size 40 does not divide"):
        factorize(H, group_size=40)


@pytest.mark.parametrize("order", ["groups", "activation"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_solved_together_are_what_they_are_alone(order: str, symmetric: bool) -> None:
    W, H = made(rows=40)
    W[3, :10] = 0  # zeros stay, and are in the way of nobody else
    factor = factorize(H, group_size=32, order=order)
    parts = list(W.split([8, 20, 12]))
    together = gptq_alike(parts, factor, bits=3, group_size=32, symmetric=symmetric, clip="mse")
    assert len(together) == 3
    for part, (weight, told) in zip(parts, together, strict=True):
        alone, also = gptq(part, factor, bits=3, group_size=32, symmetric=symmetric, clip="mse")
        torch.testing.assert_close(weight.scale, alone.scale, rtol=1e-5, atol=0)  # products of other shapes, summed so
        assert (weight.codes != alone.codes).float().mean() < 2e-3  # what was a tie may turn
        assert symmetric or torch.equal(weight.zero_point, alone.zero_point)  # type: ignore[arg-type]
        assert told.loss == pytest.approx(also.loss, rel=1e-4)
        assert (told.damping, told.failed, told.dead) == (also.damping, also.failed, also.dead)
        assert weight.codes.untyped_storage().nbytes() == part.numel()  # a view would keep all of them alive
    with pytest.raises(LlmopsError, match="weight holds NaN"):
        gptq_alike([W, W * float("nan")], factor, bits=3, group_size=32)


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_change_nothing_else() -> None:
    W, H = made()
    dead = torch.tensor([3, 40, 95])
    H[dead] = 0
    H[:, dead] = 0
    for order in ("groups", "activation", "none"):
        ours, solved = gptq(W, H, bits=4, group_size=-1, order=order)
        assert solved.dead == 3
        assert torch.equal(ours.codes[:, dead], rtn(W, bits=4, group_size=-1).codes[:, dead])
        assert rise(ours, W, H) < rise(rtn(W, bits=4, group_size=-1), W, H)
    nothing, solved = gptq(W, torch.zeros_like(H), bits=4, group_size=32)
    assert solved.dead == 96 and torch.equal(nothing.codes, rtn(W, bits=4, group_size=32).codes)


def test_damping_is_raised_until_it_holds_and_told() -> None:
    W, H = made()
    low = torch.linalg.eigvalsh(H.double()).min()
    broken = H - (low + 0.05 * H.diagonal().mean()).float() * torch.eye(len(H))  # least eigenvalue: -5 % of the mean
    ours, solved = gptq(W, broken, bits=4, group_size=32, damping=0.01)
    assert solved.failed == pytest.approx((0.01,)) and solved.damping == pytest.approx(0.1)
    assert rise(ours, W, H) < rise(rtn(W, bits=4, group_size=32), W, H)
    with pytest.raises(StepError, match=r"damping 0\.01, 0\.1, 1; expected a positive definite"):
        gptq(W, hopeless(H), bits=4, damping=0.01)


def hopeless(H: Tensor) -> Tensor:
    """A matrix with a positive diagonal that no damping up to 1 makes positive definite."""
    size = H.diagonal().sqrt()
    return torch.outer(size, size) * -1 + 2 * torch.diag(size.square())


def test_fewer_tokens_than_inputs_still_beat_rounding() -> None:
    W, H = made(tokens=12)  # rank 12 of 96
    ours, solved = gptq(W, H, bits=3, group_size=32)
    assert torch.isfinite(ours.dequantize()).all()
    assert rise(ours, W, H) < 0.5 * rise(rtn(W, bits=3, group_size=32), W, H)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["groups", "activation", "none"])
def test_zeros_of_a_pruned_weight_stay_and_the_others_make_up_for_them(symmetric: bool, order: str) -> None:
    W, H = made()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    W = W * mask
    ours, _ = gptq(W, H, bits=3, group_size=32, symmetric=symmetric, order=order, clip="mse")
    assert torch.all(ours.dequantize()[~mask] == 0)
    assert rise(ours, W, H) < rise(rtn(W, bits=3, group_size=32, symmetric=symmetric, clip="mse"), W, H)


def test_deterministic_and_back_from_the_stored_form() -> None:
    W, H = made()
    first, second = (gptq(W.bfloat16(), H.clone(), bits=3, group_size=32, symmetric=False)[0] for _ in range(2))
    assert first.scale.dtype == torch.bfloat16
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
    back = packing.unpack(packing.pack(first), bits=3, group_size=32)
    assert torch.equal(back.dequantize(), first.dequantize())
    wide, _ = gptq(W.bfloat16().float(), H, bits=3, group_size=32, symmetric=False, dtype=torch.bfloat16)
    assert torch.equal(wide.codes, first.codes) and torch.equal(wide.scale, first.scale)


def test_refuses_with_what_was_given_and_expected() -> None:
    W, H = made()
    with pytest.raises(LlmopsError, match=r"H is \(95, 95\); expected \(96, 96\)"):
        gptq(W, H[1:, 1:], bits=4)
    with pytest.raises(LlmopsError, match="Hessian holds NaN"):
        gptq(W, H * float("nan"), bits=4)
    with pytest.raises(LlmopsError, match='unknown order "act"; expected one of activation, groups, none'):
        gptq(W, H, bits=4, order="act")
    with pytest.raises(LlmopsError, match="weight holds NaN"):
        gptq(W * float("inf"), H, bits=4)
    with pytest.raises(LlmopsError, match="group_size 36 does not divide the 96"):
        gptq(W, H, bits=4, group_size=36)
