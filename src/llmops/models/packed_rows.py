"""Rows of different lengths in one sequence, without padding and without seeing each other.

`pack` lays rows end to end, (1, T). Everything in a decoder but the attention works token by token, so it needs to know
nothing, and no work is spent on padding. Attention is what would mix rows. transformers' own answer is a T x T mask
from position ids that restart; it costs T^2 where the rows cost sum L^2, and it is silently left out when a cache is
on. Here the attention takes the pack apart instead (the idea of FlashAttention's variable-length calls, Dao 2023, with
nothing but what torch has):

    q, k, v (T, heads, D)  --gather-->  blocks (rows, longest, heads, D), padded on the right
    causal attention in each block     padding comes after the tokens, so causality hides it and no mask is needed
    blocks  --gather-->  (T, heads, D)

Rows are sorted by length and cut into blocks such that the padded work stays below 1.5 times the real work, and on a
CPU, where one call more costs next to nothing, below 1.1 times. Sliding windows get a banded mask where a row is longer
than the window. Soft-capping and attention sinks, which torch's attention does not have, go through the model's own
eager function on the same blocks, and any argument that is not known here through that function on the whole pack under
a full mask: slow and right.

Row lengths travel in the names of transformers' FlashAttentionKwargs, so `model(**pack(rows))` also runs under
flash_attention_2. They reach the attention function in every family that supports flash attention, and only such a
family tells its window in arguments rather than in a mask; others are refused. What carries state from token to token
by other means (Mamba layers) would still leak: `can_pack` tries it. Left out: caches, bidirectional attention,
attention weights as an output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llmops.errors import DataError, ModelError

__all__ = ["PACKED", "attention_implementation", "can_pack", "evaluating", "pack", "packed_attention", "row_of",
           "use_packed_attention", "with_attention"]

PACKED = "llmops_packed"
IGNORED = -100
WASTE, WASTE_ON_CPU = 1.5, 1.1  # padded work over real work that a block may have
#: Arguments of an attention call that change nothing for a pack, or are used by name.
HARMLESS = frozenset({"position_ids", "position_embeddings", "cu_seq_lens_k", "max_length_q", "max_length_k",
                      "use_cache", "past_key_values", "cache_position", "output_attentions", "output_hidden_states",
                      "seq_idx", "output_router_logits", "num_items_in_batch", "return_dict", "logits_to_keep"})
#: Arguments that the model's own eager function understands per head, whatever the number of rows.
PER_HEAD = frozenset({"softcap", "s_aux"})


def pack(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """Rows end to end: input_ids, labels, position_ids (1, T) int64, and their lengths as flash attention wants them.

    cu_seq_lens_q, cu_seq_lens_k: (rows + 1,) int32, where each row begins, and T; max_length_q, max_length_k: int.
    Positions restart at 0 in every row, and a row's first label is dropped, since nothing predicts it. Raises DataError
    when there is no row, or one is empty or has as many labels as it has not tokens.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    for number, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        if length == 0 or len(example["labels"]) != length:
            raise DataError(f"row {number + 1} of the pack has {length} tokens and {len(example['labels'])} labels; "
                            "expected at least one token and a label for each; leave empty rows out")
    if not lengths:
        raise DataError("a pack of no rows was asked for; expected at least one row")
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = [token for example in examples for token in example["input_ids"]]
    labels = [label for example in examples for label in (IGNORED, *example["labels"][1:])]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": torch.tensor(ids)[None], "labels": torch.tensor(labels)[None], "position_ids": positions[None],
            "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(lengths),
            "max_length_k": max(lengths)}


def row_of(batch: Mapping[str, Any]) -> Tensor:
    """(1, T): the number of the row that each position of a pack belongs to."""
    starts = batch["cu_seq_lens_q"]
    lengths = (starts[1:] - starts[:-1]).long()
    return torch.arange(len(lengths), device=starts.device).repeat_interleave(lengths)[None]


# ---- the plan of a pack: made once per batch, kept on the tensor of row lengths


@dataclass(frozen=True)
class _Plan:
    """Where each token goes. P: the tokens of all blocks, padding included.

    places: (P,) position in the pack that each entry of the blocks is taken from; holes: the entries that are padding;
    back: (T,) entry of the blocks that each token comes back from; blocks: (rows, longest) of each block, in order.
    """

    tokens: int
    places: Tensor
    holes: Tensor
    back: Tensor
    blocks: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    bands: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def band(self, length: int, window: int) -> Tensor:
        """(length, length) bool, true where a query sees a key: not after it, and less than `window` before."""
        if (length, window) not in self.bands:
            self.bands[length, window] = _band(torch.arange(length, device=self.places.device), window)
        return self.bands[length, window]


def _band(places: Tensor, window: int | None) -> Tensor:
    distance = places[:, None] - places[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _blocks(lengths: Sequence[int], waste: float) -> list[list[int]]:
    """Rows cut into blocks, longest first, each with at most `waste` times the work of its rows without padding."""
    groups: list[list[int]] = []
    real = 0
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        work = lengths[row] ** 2
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] ** 2 <= waste * (real + work):
            groups[-1].append(row)
            real += work
        else:
            groups.append([row])
            real = work
    return groups


def _make_plan(starts: Sequence[int], device: torch.device) -> _Plan:
    lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    groups = _blocks(lengths, WASTE_ON_CPU if device.type == "cpu" else WASTE)
    places, real, blocks = [], [], []
    for group in groups:
        longest = lengths[group[0]]
        offsets = torch.arange(longest)
        first, size = torch.tensor([[starts[r], lengths[r]] for r in group])[:, :, None].unbind(1)
        places.append((first + offsets.minimum(size - 1)).flatten())
        real.append((offsets < size).flatten())
        blocks.append((len(group), longest))
    where, tokens = torch.cat(places), torch.cat(real)
    back = torch.empty(starts[-1], dtype=torch.long)
    back[where[tokens]] = tokens.nonzero()[:, 0]
    return _Plan(starts[-1], where.to(device), (~tokens).nonzero()[:, 0].to(device), back.to(device), tuple(blocks),
                 tuple(starts))


def _plan(starts: Tensor, tokens: int, device: torch.device) -> _Plan:
    """The plan of these row lengths, read from the device once and then kept on the tensor itself."""
    version = 0 if starts.is_inference() else starts._version
    kept: tuple[int, _Plan] | None = getattr(starts, "_llmops_plan", None)
    if kept is None or kept[0] != version or kept[1].places.device != device:
        kept = (version, _make_plan(starts.tolist(), device))
        starts._llmops_plan = kept  # type: ignore[attr-defined]
    if kept[1].tokens != tokens:
        raise ModelError(f"a pack of {tokens} tokens came with lengths of {kept[1].tokens}; expected cu_seq_lens_q as "
                         "`pack` makes it; pack the rows again instead of cutting the batch")
    return kept[1]


class _Move(torch.autograd.Function):  # type: ignore[misc]
    """y = x[places] with zeros in the holes of y. Its adjoint is the same kind of move, so no sum is needed.

    That holds because every entry of x goes to exactly one entry of y that is no hole (`back`), or to none when it is
    itself a hole (`empty`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, holes: Tensor, back: Tensor, empty: Tensor) -> Tensor:
        ctx.save_for_backward(back, empty)
        return x.index_select(0, places).index_fill_(0, holes, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back, empty = ctx.saved_tensors
        return grads[0].contiguous().index_select(0, back).index_fill_(0, empty, 0), None, None, None, None


def _into_blocks(x: Tensor, plan: _Plan) -> list[Tensor]:
    """(1, heads, T, D) -> one (rows, heads, longest, D) for each block."""
    heads, depth = x.shape[1], x.shape[3]
    flat = x[0].transpose(0, 1).reshape(plan.tokens, heads * depth)
    moved = _Move.apply(flat, plan.places, plan.holes, plan.back, plan.back[:0])
    parts = moved.split([rows * longest for rows, longest in plan.blocks])
    return [part.view(rows, longest, heads, depth).transpose(1, 2)
            for part, (rows, longest) in zip(parts, plan.blocks, strict=True)]


def _out_of_blocks(blocks: Sequence[Tensor], plan: _Plan) -> Tensor:
    """One (rows, longest, heads, D) for each block -> (1, T, heads, D)."""
    heads, depth = blocks[0].shape[2:]
    flat = torch.cat([block.reshape(-1, heads * depth) for block in blocks])
    moved = _Move.apply(flat, plan.back, plan.back[:0], plan.places, plan.holes)
    return moved.view(1, plan.tokens, heads, depth)  # type: ignore[no-any-return]


# ---- the attention function


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
                     is_causal: bool | None = None, cu_seq_lens_q: Tensor | None = None, **extra: Any
                     ) -> tuple[Tensor, None]:
    """transformers' attention interface on a pack. query (1, heads, T, D), key, value (1, kv heads, T, D) -> (1, T,
    heads, D).

    Raises ModelError for what is no pack of causal rows: no row lengths, a mask, a cache with tokens in it.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ModelError(f"a batch of {query.shape[0]} without row lengths reached the packed attention; expected one "
                         "of `pack`, with cu_seq_lens_q; leave `use_packed_attention` for other batches")
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ModelError(f"{query.shape[2]} queries met {key.shape[2]} keys and "
                         f"{'a' if attention_mask is not None else 'no'} mask in the packed attention; expected a pack "
                         "alone: no attention_mask, no cache from an earlier call")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__} looks at later tokens; expected causal attention; train this model "
                         "on padded batches")
    plan = _plan(cu_seq_lens_q, query.shape[2], query.device)
    special = {name for name, given in extra.items() if given is not None and name not in HARMLESS}
    if special - PER_HEAD:
        return _eager_on_all(module, query, key, value, plan, dropout, scaling, sliding_window, extra), None
    triples = zip(_into_blocks(query, plan), _into_blocks(key, plan), _into_blocks(value, plan), strict=True)
    outputs = []
    for q, k, v in triples:
        window = sliding_window if sliding_window and q.shape[2] > sliding_window else None
        if special:
            outputs.append(_eager(module, q, k, v, plan.band(q.shape[2], window or q.shape[2]), dropout, scaling,
                                  window, extra))
        else:
            outputs.append(_attend(q, k, v, None if window is None else plan.band(q.shape[2], window), dropout,
                                   scaling))
    return _out_of_blocks(outputs, plan), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    """torch's attention, causal when there is no mask; (rows, heads, longest, D) -> (rows, longest, heads, D)."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None:  # with a mask, grouped heads would leave the fast kernels on a GPU
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                        scale=scaling, enable_gqa=grouped and mask is None).transpose(1, 2)


def _eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, sees: Tensor, dropout: float, scaling: float | None,
           window: int | None, extra: Mapping[str, Any]) -> Tensor:
    """The model's own plain attention, under a mask. Raises ModelError when its source has none."""
    home = inspect.getmodule(type(module))
    function: Callable[..., tuple[Tensor, Any]] | None = getattr(home, "eager_attention_forward", None)
    if function is None:
        raise ModelError(f"{type(module).__name__} was called with {sorted(extra)}, not all of which are known here, "
                         "and its source has no eager_attention_forward to fall back on; train this model on padded "
                         "batches")
    mask = torch.zeros(sees.shape, dtype=q.dtype, device=q.device).masked_fill_(~sees, torch.finfo(q.dtype).min)
    return function(module, q, k, v, mask[None, None], dropout=dropout, scaling=scaling, sliding_window=window,
                    **extra)[0]


def _eager_on_all(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, dropout: float,
                  scaling: float | None, window: int | None, extra: Mapping[str, Any]) -> Tensor:
    """The same on the whole pack, rows kept apart by the mask: T^2 of memory, and right for every argument."""
    starts = torch.tensor(plan.starts, device=q.device)
    places = torch.arange(plan.tokens, device=q.device)
    row = torch.bucketize(places, starts, right=True)
    sees = _band(places, window) & (row[:, None] == row[None, :])
    return _eager(module, q, k, v, sees, dropout, scaling, window, extra)


# ---- putting it into a model


def _no_mask(batch_size: int, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """What a model gets for a mask under the packed attention: none. Raises ModelError where one would matter."""
    if use_vmap or batch_size != 1 or (attention_mask is not None and not bool(attention_mask.all())):
        raise ModelError(f"a batch of {batch_size} rows with a mask of its own met the packed attention; expected one "
                         "of `pack`, without attention_mask; leave `use_packed_attention` for other batches")


def _decoder(model: nn.Module) -> Any:
    """The decoder inside a causal LM, PEFT-wrapped or not. Raises ModelError when it cannot be packed."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder: Any = base.get_decoder()
    if not (getattr(decoder, "_supports_flash_attn", False) and decoder._can_set_attn_implementation()):
        raise ModelError(f"{type(decoder).__name__} has attention that cannot be replaced by another that knows row "
                         "lengths; expected a family that supports flash attention; train it on padded batches")
    return decoder


@contextmanager
def use_packed_attention(model: nn.Module) -> Iterator[None]:
    """Inside, `model` takes packs and nothing else; after it, the attention is what it was. Works through PEFT.

    Raises ModelError when the family's attention cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)
    with _attention(_decoder(model), PACKED):
        yield


def attention_implementation(model: nn.Module) -> str:
    """The name of the attention that a model uses now. Raises ModelError when the family's cannot be replaced."""
    return str(_decoder(model).config._attn_implementation)


@contextmanager
def with_attention(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the model uses the attention of that name: to generate with a cache in the middle of a packed training,
    for one. Raises as `attention_implementation`."""
    with _attention(_decoder(model), name):
        yield


@contextmanager
def _attention(decoder: Any, name: str) -> Iterator[None]:
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; after it, every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()  # type: ignore[untyped-decorator]
def can_pack(model: nn.Module, lengths: Sequence[int] = (7, 3, 12)) -> bool | str:
    """True when a small pack gives the logits of its rows run alone with eager attention; otherwise why not.

    Costs a forward pass over sum(lengths) random tokens and one for each row. The tolerance is 1e-4 of the largest
    logit in float32, and eight units in the last place in half precision.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=drawn).tolist() for length in lengths]
    batch = {name: value.to(device) if isinstance(value, Tensor) else value
             for name, value in pack([{"input_ids": row, "labels": row} for row in rows]).items() if name != "labels"}
    try:
        with evaluating(model), use_packed_attention(model):
            packed = model(**batch, use_cache=False).logits[0].float()
        with evaluating(model), _attention(_decoder(model), "eager"):
            alone = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows]
    except Exception as error:  # whatever a family's code raises is a reason not to pack
        return f"{type(model).__name__} cannot take a pack: {type(error).__name__}: {error}"
    wanted = torch.cat(alone)
    allowed = max(1e-4, 8 * torch.finfo(wanted.dtype).eps if wanted.dtype != torch.float32 else 0.0)
    off = float((packed - wanted.float()).abs().max() / wanted.float().abs().max())
    return True if off <= allowed else (f"the logits of {type(model).__name__} on a pack differ from those of its rows "
                                        f"alone by {off:.1e} of the largest; expected at most {allowed:.1e}")
