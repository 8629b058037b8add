"""Log-probabilities of tokens without the logits of all tokens.

The logits of a batch are its largest tensor: tokens x vocabulary, several times over in a backward pass. Yet one number
per trained token is wanted. Two things are done here instead of `model(...).logits` and a cross entropy:

- Positions that are not trained never meet the output matrix: the hidden states of the others are picked first.
- These go through the head in chunks of C rows, so that no tensor holds more than C x vocabulary logits.

A frozen head (LoRA, DPO) needs no second pass over the vocabulary in backward. With z = head(h), p = softmax(z),

    log p(y | h) = z_y - logsumexp(z)          d log p(y | h) / dh = (e_y - p)^T dz/dh          (one row of D numbers)

depends on nothing that comes later, so the forward pass keeps it, N x D in all, and backward multiplies row n by the
gradient of token n. The same idea as the fused linear cross entropies of Liger Kernel (Hsu et al. 2024) and Cut Cross
Entropy (Wijmans et al. 2024), but for one number a token rather than their sum, and in plain torch: the derivative
dz/dh is taken by autograd through whatever the head is (bias, scale, soft cap, adapter). A head that is trained, tied
embeddings included, needs the gradient of its weights too. Of the SUM of all tokens it is known in the forward pass but
for one factor, and is kept there (`sum_log_probs`, for the loss). Token by token it would be N matrices, so chunks are
checkpointed and run again in backward, one more product of three (`token_log_probs`, for DPO).

What lies between the last hidden state and the logits is a fact of the architecture (`FACTS`). `can_split` holds the
facts against the model on four tokens; where it says why not, use full logits.

Shapes: B batch, T time, N tokens asked for, D hidden, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmops.errors import LlmopsError, ModelError
from llmops.models.arch import text_config
from llmops.models.packed_rows import evaluating, pack

__all__ = ["FACTS", "Head", "can_split", "head_of", "last_hidden", "next_token_loss", "pair_log_probs",
           "sum_log_probs", "token_log_probs"]

IGNORED = -100
CHUNK_BYTES = 64 << 20  # of float32 logits in one chunk, unless the caller's `chunk` is smaller
INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
                    "max_length_k"})

Scale = Callable[[Tensor, float], Tensor]


def _times(z: Tensor, by: float) -> Tensor:
    return z * by


def _over(z: Tensor, by: float) -> Tensor:
    return z / by


def _cap(z: Tensor, cap: float) -> Tensor:
    return torch.tanh(z / cap) * cap


#: What a config key does to the logits after the output matrix, in the order in which it happens. An absent key or None
#: does nothing.
FACTS: dict[str, Scale] = {"logit_scale": _times, "lm_head_multiplier": _times, "output_multiplier": _times,
                           "logits_scaling": _over, "logits_soft_cap": _cap, "final_logit_softcapping": _cap}
#: Families that give a key another meaning: (model_type, key).
EXCEPTIONS: dict[tuple[str, str], Scale] = {("hyperclovax", "logits_scaling"): _times}


@dataclass(frozen=True)
class Head:
    """Hidden states (..., D) -> logits (..., V): the output matrix and what the architecture does to its product."""

    matrix: nn.Module
    steps: tuple[tuple[Scale, float], ...]

    def __call__(self, hidden: Tensor) -> Tensor:
        z: Tensor = self.matrix(hidden)
        for step, value in self.steps:
            z = step(z, value)
        return z

    def trained(self) -> list[Tensor]:
        """Its parameters that want a gradient: an adapter's, the matrix itself, or the embeddings it is tied to."""
        return [parameter for parameter in self.matrix.parameters() if parameter.requires_grad]


def _base(model: nn.Module) -> Any:
    """The transformers model inside: out of a wrapper for parallel training, and out of PEFT's."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head:
    """The head of a causal LM, PEFT-wrapped or not. Raises ModelError when the model has no output embeddings."""
    base = _base(model)
    matrix = base.get_output_embeddings()
    if matrix is None:
        raise ModelError(f"{type(base).__name__} has no output embeddings; expected a causal language model; load it "
                         "with AutoModelForCausalLM")
    config = text_config(base)
    steps = [(EXCEPTIONS.get((str(config.model_type), key), step), getattr(config, key, None))
             for key, step in FACTS.items()]
    return Head(matrix, tuple((step, float(value)) for step, value in steps if value is not None))


# ---- hidden states


@dataclass
class _Seen:
    """What passed out of the decoder: its last hidden state (B, T, D), and the autocast that it ran under."""

    hidden: Tensor | None = None
    autocast: torch.dtype | None = None

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        hidden: Tensor = outputs[0]
        self.hidden = hidden
        device = hidden.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def again(self) -> AbstractContextManager[Any]:
        """The same autocast for the head: a wrapper's forward may have set it, and it is over by now."""
        if self.hidden is None or self.autocast is None:
            return nullcontext()
        return torch.autocast(self.hidden.device.type, dtype=self.autocast)  # type: ignore[no-any-return]


def _run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, _Seen]:
    """Run the model as it is, wrappers and all, with one logit row in place of T; keep what leaves the decoder."""
    seen = _Seen()
    watch = _base(model).get_decoder().register_forward_hook(seen)
    try:
        model(**{name: value for name, value in batch.items() if name in INPUTS}, logits_to_keep=1, use_cache=False)
    finally:
        watch.remove()
    if seen.hidden is None:
        raise ModelError(f"the decoder of {type(_base(model)).__name__} was not called by it; expected a causal "
                         "language model; use full logits (`can_split` says so beforehand)")
    return seen.hidden, seen


def last_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """(B, T, D): what the head is applied to. batch: padded (input_ids, attention_mask) or packed.

    The whole model is called, not its decoder, so that autocast, adapters and parallel wrappers do what they do.
    """
    return _run(model, batch)[0]


@torch.no_grad()  # type: ignore[untyped-decorator]
def can_split(model: nn.Module, batch: Mapping[str, Any]) -> bool | str:
    """True when head(last_hidden) are the model's own logits on four tokens of the batch; otherwise why not.

    The difference may be 1e-4 of the largest logit. In eval mode, which is undone.
    """
    ids = batch["input_ids"][:1, :4]
    few: dict[str, Any] = {"input_ids": ids}
    if "cu_seq_lens_q" in batch:
        row = ids[0].tolist()
        few = {name: value.to(ids.device) if isinstance(value, Tensor) else value
               for name, value in pack([{"input_ids": row, "labels": row}]).items() if name != "labels"}
    try:
        with evaluating(model):
            wanted = model(**few, use_cache=False).logits.float()
            hidden, seen = _run(model, few)
            with seen.again():
                given = head_of(model)(hidden).float()
    except Exception as error:  # whatever a family's code raises is a reason to use full logits
        return f"{type(model).__name__} does not come apart at its head: {type(error).__name__}: {error}"
    if given.shape != wanted.shape:
        return (f"the head of {type(model).__name__} gives logits of shape {tuple(given.shape)}; expected "
                f"{tuple(wanted.shape)}, as the model does")
    off = float((given - wanted).abs().max() / wanted.abs().max())
    return True if off <= 1e-4 else (f"head(last hidden state) of {type(model).__name__} differs from its logits by "
                                     f"{off:.1e} of the largest; expected at most 1e-4; a scale of its logits is not "
                                     "known here")


# ---- log-probabilities


def token_log_probs(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int = 1024,
                    parameters: Sequence[Tensor] = ()) -> Tensor:
    """(N,) float32: log p of each target. hidden: (N, D); targets: (N,) ids; head: (rows, D) -> (rows, V), row by row.

    chunk: rows of logits at a time, at most; fewer where V is large, so that they stay under 64 MB in float32.
    parameters: what the head is made of; when one requires a gradient, chunks run again in backward. Raises
    LlmopsError when the head has such a parameter that is not among them, and in backward under create_graph.
    """
    if not len(targets):
        return hidden.sum(1).float()  # empty, and still a child of `hidden`
    chunk = _rows_at_once(hidden, head, chunk)
    grad = torch.is_grad_enabled()
    if grad and any(parameter.requires_grad for parameter in parameters):
        return torch.cat([checkpoint(_chunk_log_probs, h, y, head, use_reentrant=False)
                          for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)])
    if grad and hidden.requires_grad:
        return _FrozenHead.apply(hidden, targets, head, chunk)  # type: ignore[no-any-return]
    return torch.cat([_chunk_log_probs(h, y, head)
                      for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)])


def sum_log_probs(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int = 1024,
                  parameters: Sequence[Tensor] = ()) -> Tensor:
    """The sum of `token_log_probs`, a scalar, without a second run of a trained head. Arguments and errors as there."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not len(targets) or not trained or not torch.is_grad_enabled():
        return token_log_probs(hidden, targets, head, chunk=chunk, parameters=parameters).sum()
    chunk = _rows_at_once(hidden, head, chunk)
    return _SummedHead.apply(hidden, targets, head, chunk, *trained)  # type: ignore[no-any-return]


def _rows_at_once(hidden: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> int:
    vocabulary = int(head(hidden[:1].detach()).shape[-1])
    return max(1, min(chunk, CHUNK_BYTES // (4 * vocabulary)))


def _chunk_log_probs(h: Tensor, y: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.log_softmax(head(h), dim=-1, dtype=torch.float32).gather(1, y[:, None])[:, 0]


def _pull(hidden: Tensor, y: Tensor, head: Callable[[Tensor], Tensor], parameters: Sequence[Tensor] = ()
          ) -> tuple[Tensor, list[Tensor]]:
    """One chunk: log-probabilities (C,), and the derivative of MINUS their sum by `hidden` (C, D) and by parameters."""
    with torch.enable_grad():
        h = hidden.detach().requires_grad_()
        z = head(h)  # (C, V)
    _refuse_others(z, [h, *parameters])
    log_p = torch.log_softmax(z.detach(), dim=-1, dtype=torch.float32)
    taken = log_p.gather(1, y[:, None])[:, 0]
    slope = log_p.exp_()  # p, then p - e_y: the derivative of -log p(y) by z
    slope.scatter_add_(1, y[:, None], slope.new_full((1, 1), -1.0).expand(len(y), 1))
    found = torch.autograd.grad(z, [h, *parameters], slope.to(z.dtype), materialize_grads=True)
    return taken, list(found)


class _FrozenHead(torch.autograd.Function):  # type: ignore[misc]
    """Log-probabilities (N,) whose Jacobian with respect to each token's own hidden row is kept from the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        jacobian = torch.empty_like(hidden)  # (N, D)
        parts = []
        for start in range(0, len(targets), chunk):
            place = slice(start, start + chunk)
            log_p, (slope,) = _pull(hidden[place], targets[place], head)
            torch.neg(slope, out=jacobian[place])
            parts.append(log_p)
        ctx.save_for_backward(jacobian)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        jacobian, = ctx.saved_tensors
        return jacobian * grad[:, None].to(jacobian.dtype), None, None, None


class _SummedHead(torch.autograd.Function):  # type: ignore[misc]
    """The sum of the log-probabilities; all its derivatives but for one factor are known in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk: int,
                *parameters: Tensor) -> Tensor:
        slopes = [torch.empty_like(hidden), *(torch.zeros_like(parameter) for parameter in parameters)]
        parts = []
        for start in range(0, len(targets), chunk):
            place = slice(start, start + chunk)
            log_p, (slope, *others) = _pull(hidden[place], targets[place], head, parameters)
            torch.neg(slope, out=slopes[0][place])
            for kept, new in zip(slopes[1:], others, strict=True):
                kept.sub_(new)
            parts.append(log_p)
        ctx.save_for_backward(*slopes)
        return torch.cat(parts).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        by_hidden, *by_parameters = (slope * grad.to(slope.dtype) for slope in ctx.saved_tensors)
        return by_hidden, None, None, None, *by_parameters


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph: what was kept from the forward pass has no history
        raise LlmopsError("a second derivative of log-probabilities in chunks was asked for; expected one backward "
                          "without create_graph; use full logits")


def _refuse_others(z: Tensor, known: Sequence[Tensor]) -> None:
    """Raises LlmopsError when z depends on a leaf in training that is not known: its gradient would be lost."""
    seen, open_nodes = set(), [z.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is tensor for tensor in known):
            raise LlmopsError(f"the head trains a parameter of shape {tuple(leaf.shape)} that `parameters` does not "
                              "name; expected all of them; pass head.parameters()")
        open_nodes += [following for following, _ in node.next_functions]


def _before_trained(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(row, column) of the position before each trained token, (N,) each."""
    first, second = torch.nonzero(batch["labels"][:, 1:] != IGNORED, as_tuple=True)
    return first, second


def next_token_loss(model: nn.Module, batch: Mapping[str, Any], *, chunk: int = 1024) -> Tensor:
    """SUM over the trained tokens of -log p(token | those before), float32, a scalar.

    batch: padded (input_ids, attention_mask, labels (B, T)), or of `pack` with the packed attention in the model. A
    label counts where it is not -100 and not the first of its sequence.
    """
    hidden, seen = _run(model, batch)
    before, head = _before_trained(batch), head_of(model)
    with seen.again():
        return -sum_log_probs(hidden[before], batch["labels"][:, 1:][before], head, chunk=chunk,
                              parameters=head.trained())


def pair_log_probs(model: nn.Module, batch: Mapping[str, Any], rows: Tensor, *, chunk: int = 1024) -> Tensor:
    """(R,) float32: for each row the sum of its trained tokens' log-probabilities, as DPO compares them.

    rows: the row number of every position, shaped as the labels (`packed_rows.row_of` for a pack, or
    `arange(B)[:, None].expand(B, T)`); R is the largest number plus one. A row without a trained token has 0.
    """
    hidden, seen = _run(model, batch)
    before, head = _before_trained(batch), head_of(model)
    with seen.again():
        log_p = token_log_probs(hidden[before], batch["labels"][:, 1:][before], head, chunk=chunk,
                                parameters=head.trained())
    return log_p.new_zeros(int(rows.max()) + 1).index_add(0, rows[:, 1:][before], log_p)
