"""What a stage will take, from arithmetic alone: parameters, bytes on disk, peak memory, tokens.

Estimates are for choosing a machine, not for reporting: every figure says its formula, and what cannot be known
without the network or the data is null with the reason. In the formulas below b is a batch, s a length, h the hidden
size, V the vocabulary, L the layers kept.

    parameters      embeddings + L x (linear + norms) + final norm        (model.py)
    disk            parameters x bytes of the dtype; quantized, or trained on a quantized parent: linear weights x
                    bits / 8 + 2 bytes a scale (+ a zero point of `bits` bits where asymmetric); an unmerged adapter:
                    r x (in + out) x 4 bytes
    memory          weights in fp32 for everything that trains on the CPU's terms (the worst case)
      full, logits  16 bytes a parameter (weight, gradient, two Adam moments, fp32) + activations (+ the teacher)
      lora, dpo     4 bytes a parameter + 16 bytes an adapter parameter + activations (dpo: of both answers)
      on a quantized parent, beside these: what the forward pass sees of every linear weight, 4 bytes, and for lora
                    the sum it is rounded from, 4 more; an adapter apart instead: the packed weights, 4 bytes for
                    each of the rest, and one linear layer in 4
      qlora         4.127 bits a linear weight (4.5 without double quantization) + the rest in its dtype + as lora
      prune, quantize   weights + one layer in fp32 with its new copy (+ calibration activations, 2 x n x s x h x 4)
      gptq, awq     + 3 x in^2 x 4 of the widest layer: its Hessian, a copy in the order of solving, the factor
      auto          + a byte a linear weight and candidate, and 4 for the model in fp32, + as gptq; with rotate or
                    factors 2 for a copy
      autoround     + 20 bytes a weight of a layer (offset, gradient, rounded, best) + activations of its batch
    activations     34 s b h bytes a layer (Korthikanti et al. 2022, without the attention matrix, which fused
                    attention does not keep) x 2 for fp32, + 12 s b V for the logits, their softmax and gradient,
                    of which no more than a chunk is held at once (a distillation holds all of them)
    tokens          rows x epochs, or steps x batch, x max_length (an upper bound: rows are padded to their batch's
                    longest, or cut)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.data.locate import locate, named
from llmops.data.options import DataSource
from llmops.data.splits import parse_split
from llmops.data.world_size import ROWS, SIZES
from llmops.errors import DataError
from llmops.methods.quantize.options import BITSANDBYTES
from llmops.quantity import Quantity
from llmops.recipe.healing_checks import quantized_by
from llmops.recipe.model import Dims, bytes_per_weight, read_dims
from llmops.recipe.pruning_checks import dims_after, layers_after
from llmops.recipe.schema import Recipe, Variant
from llmops.recipe.students import after_students

if TYPE_CHECKING:
    from llmops.methods.finetune.options import Dpo, Lora, Qlora
    from llmops.methods.quantize.options import WeightOnly

__all__ = ["Estimate", "estimate", "row_count", "training_memory"]

_TRAINING = ("finetune", "distill")  # kinds of step
CHUNK_BYTES = 64_000_000  # of float32 logits that a loss holds at once; the rest is computed chunk by chunk
CROPS = 128  # of a calibration whose data names no `samples`
_MOST_COUNTED = 256_000_000  # bytes of a text file whose lines are counted


@dataclass(frozen=True)
class Estimate:
    """Four figures with unit "1", "B", "B" and "tokens"; each may be null with a reason."""

    parameters: Quantity
    disk_bytes: Quantity
    peak_memory_bytes: Quantity
    tokens: Quantity

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).as_dict() for name in
                ("parameters", "disk_bytes", "peak_memory_bytes", "tokens")}


def estimate(recipe: Recipe, name: str, dims: Dims | None, reason: str) -> Estimate:
    """The figures of the variant `name` (or "base"). reason: why `dims` is None."""
    variant = recipe.variants.get(name)
    tokens = _tokens(recipe, variant, dims)
    if variant is not None:
        dims, reason = after_students(recipe, name, dims, reason)
    if dims is None:
        return Estimate(Quantity.null("1", reason), Quantity.null("B", reason), Quantity.null("B", reason), tokens)
    student = getattr(variant.options, "student", None) if variant is not None else None
    above = variant.parent if variant is not None and student is None else name
    before = layers_after(recipe.variants, above, dims) if variant is not None else dims.layers
    layers, after = layers_after(recipe.variants, name, dims), dims_after(recipe.variants, name, dims)
    below = after if variant is None else dims_after(recipe.variants, above, dims)
    if layers is None or before is None or after is None or below is None:
        why = "how small it gets is searched for when it is built"
        return Estimate(Quantity.null("1", why), Quantity.null("B", why), Quantity.null("B", why), tokens)
    count = after.parameters(layers)
    how = f"config.json: {layers} layers of {after.linear_parameters + after.other_parameters:,}"
    return Estimate(Quantity(float(count), "1", "estimated", how),
                    _estimated(_disk(recipe, variant, after, layers), "parameters x bytes of their storage"),
                    _estimated(_memory(recipe, variant, below, before), "weights, gradients, optimizer, activations"),
                    tokens)


def _estimated(value: float, how: str) -> Quantity:
    return Quantity(float(round(value)), "B", "estimated", how)


def _disk(recipe: Recipe, variant: Variant | None, dims: Dims, layers: int) -> float:
    width = bytes_per_weight(recipe.runtime.dtype, dims)
    if variant is not None and _kept_apart(variant.options):
        return 4.0 * _adapter(variant.options, dims, layers)
    dense = float(width * dims.parameters(layers))
    scheme: Any = _scheme(recipe, variant.name) if variant is not None else None
    if "r1" in getattr(scheme, "rotations", ()) and dims.tied:
        dense += width * dims.vocab * dims.hidden  # the head, untied
    dense += layers * sum(packed - width * count for count, packed in _packed(scheme, dims, layers, width))
    return dense + (_ends(scheme, dims, width) if hasattr(scheme, "scheme") else 0)


def _scheme(recipe: Recipe, name: str) -> Any:
    """The options of the step that made the numbers that a variant is stored in; None in 16 bit or more."""
    made_by = quantized_by(recipe.variants, name)
    return recipe.variants[made_by].options if made_by is not None else None


def _packed(scheme: Any, dims: Dims, layers: int, width: int) -> list[tuple[int, float]]:
    """(weights, bytes with their scales) of each linear layer of a block that is quantized so."""
    if getattr(scheme, "method", None) == "auto":
        linear = layers * dims.linear_parameters
        rest = width * (dims.parameters(layers) - linear)
        rest += width * dims.vocab * dims.hidden if "r1" in scheme.rotations and dims.tied else 0
        each = (scheme.bits or 0) / 8 if scheme.bytes is None else (scheme.bytes - rest) / linear
        return [(dims.linear_parameters, each * dims.linear_parameters)]
    found = []
    for name, (out, into) in dims.linear_shapes().items():
        if hasattr(scheme, "scheme") and not any(name.endswith(ending) for ending in scheme.ignore):
            groups = out * (1 if scheme.group == -1 else -(-into // scheme.group))
            if scheme.number_format == "fp8-block":
                groups = -(-out // scheme.group) * -(-into // scheme.group)
            scale = 1 if scheme.scheme in ("mxfp4", "nvfp4") else 2
            extra: float = groups * (scale + (0 if scheme.symmetric else scheme.bits / 8))
            if scheme.scheme in BITSANDBYTES:
                extra = _bitsandbytes_scales(scheme, out, into)
            found.append((out * into, out * into * scheme.bits / 8 + extra))
    return found


def _bitsandbytes_scales(options: WeightOnly, out: int, into: int) -> float:
    """Float32 a row or a block of 64; with double quantization a byte a block and float32 for 256 of them. And the
    tables of a layer: 16 levels, what the codes mean, 256 levels of the scales."""
    if str(options.scheme) == "llm_int8":
        return 4.0 * out
    double = getattr(options, "double_quant", False)
    return 226 + 1024 * double + out * into / 64 * (1 + 4 / 256 if double else 4)


def _ends(options: WeightOnly, dims: Dims, width: int) -> float:
    """Bytes that embedding and head take more than in 16 bit: 8 bits and a scale a token, the scheme's for a head."""
    table, change = dims.vocab * dims.hidden, 0.0
    head = not any(ending == "lm_head" for ending in options.ignore)
    if options.embeddings:
        change += table * (1 - width) + 2 * dims.vocab * (2 if dims.tied and not head else 1)
    if head:
        groups = dims.vocab * (1 if options.group == -1 else -(-dims.hidden // options.group))
        packed = table * options.bits / 8 + groups * (2 + (0 if options.symmetric else options.bits / 8))
        apart = not dims.tied or "r1" in options.rotations  # a head of its own already
        change += packed - (width * table if apart else 0)
    return change


def _adapter(options: Lora | Qlora | Dpo, dims: Dims, layers: int) -> int:
    """Parameters of the adapters: r x (in + out) for every target, in every layer."""
    assert options.rank is not None
    shapes = {name.rsplit(".", 1)[-1]: shape for name, shape in dims.linear_shapes().items()}
    chosen = list(shapes) if options.targets == "all-linear" else [name.rsplit(".", 1)[-1] for name in options.targets]
    return layers * options.rank * sum(sum(shapes[name]) for name in chosen if name in shapes)


def _memory(recipe: Recipe, variant: Variant | None, dims: Dims, layers: int) -> float:
    """Peak bytes while the step runs; `layers`: of its parent, which is what is in memory."""
    width = bytes_per_weight(recipe.runtime.dtype, dims)
    count = dims.parameters(layers)
    if variant is None:
        return float(width * count)
    options = variant.options
    if variant.kind in _TRAINING:
        length = min(options.max_length, dims.context or options.max_length)
        return training_memory(recipe, variant, dims,
                               options.batch_tokens or options.batch_size * length * _sides(options))
    layer = 8.0 * dims.linear_parameters
    return (width * count + layer + _solving(options, dims)
            + 2.0 * 4 * dims.hidden * (_calibration(recipe, options, dims) or 0))


def _solving(options: Any, dims: Dims) -> float:
    """Bytes that a quantizer needs beside the layer and the activations that wait."""
    if options.method == "autoround":
        length = min(options.length, dims.context or options.length)
        return float(20 * dims.linear_parameters + 2 * 34 * dims.hidden * options.batch_size * length)
    if options.method == "auto":
        held = len(options.grids()) + 4.0  # codes of every candidate, and the model in float32
        held += 2.0 if options.rotations or options.factors else 0.0  # the copy that costs are measured on
        return held * dims.layers * dims.linear_parameters + 12.0 * max(into for _, into in
                                                                        dims.linear_shapes().values()) ** 2
    if options.method in ("gptq", "awq", "smoothquant"):
        return 12.0 * max(into for _, into in dims.linear_shapes().values()) ** 2
    return 0.0


def training_memory(recipe: Recipe, variant: Variant, dims: Dims, tokens: int) -> float:
    """Peak bytes of a training step with `tokens` tokens in a forward pass."""
    options = variant.options
    above = variant.name if getattr(options, "student", None) is not None else variant.parent
    layers = layers_after(recipe.variants, above, dims) or dims.layers
    count = dims.parameters(layers)
    made_by = quantized_by(recipe.variants, variant.parent)
    kept = layers if not options.gradient_checkpointing else 1 + layers / 17  # a layer's inputs: 4 of its 68 bytes
    logits = min(12.0 * tokens * dims.vocab, 12.0 * CHUNK_BYTES)
    activations = tokens * 2 * 34 * dims.hidden * kept + logits
    if getattr(options, "rank", None) is not None:
        width = bytes_per_weight(recipe.runtime.dtype, dims)
        base = _four_bit(dims, layers, width, options) if options.method == "qlora" else 4.0 * count
        if made_by is not None:
            base += _on_integers(recipe.variants[made_by].options, dims, layers, width, apart=_kept_apart(options))
        return base + 16.0 * _adapter(options, dims, layers) + activations
    teacher = 0.0
    if options.method == "logits":
        teacher = _teacher(recipe, options, dims) + 12.0 * tokens * dims.vocab
    seen = 4.0 * layers * dims.linear_parameters if made_by is not None else 0.0
    return 16.0 * count + seen + activations + teacher


def _teacher(recipe: Recipe, options: Any, dims: Dims) -> float:
    """Bytes of the teacher in float32; of signals from the disk, none."""
    if options.offline is not None:
        return 0.0
    if options.student is not None:
        dims = read_dims(recipe.model, recipe.base_dir)[0] or dims
    narrow = dims_after(recipe.variants, options.teacher, dims) or dims
    return 4.0 * narrow.parameters(layers_after(recipe.variants, options.teacher, dims))


def _on_integers(scheme: Any, dims: Dims, layers: int, width: int, apart: bool) -> float:
    """Bytes that adapters on a quantized parent take beside (apart: less than) 4 for each weight."""
    if not apart:
        return 8.0 * layers * dims.linear_parameters
    saved = sum(4.0 * count - packed for count, packed in _packed(scheme, dims, layers, width))
    return 4.0 * max(out * into for out, into in dims.linear_shapes().values()) - layers * saved


def _four_bit(dims: Dims, layers: int, width: int, options: Qlora) -> float:
    """Bytes of a base in 4 bits with a scale for every 64 weights (Dettmers et al. 2023, section 3), the rest dense."""
    linear = layers * dims.linear_parameters
    bits = 4 + (8 / 64 + 32 / (64 * 256) if options.double_quant else 32 / 64)
    return linear * bits / 8 + float(width * (dims.parameters(layers) - linear))


def _sides(options: Any) -> int:
    """Answers that a row of the training holds: a pair has two."""
    return 2 if options.method == "dpo" else 1


def _kept_apart(options: Any) -> bool:
    """Whether what is stored is an adapter alone."""
    return getattr(options, "merge", True) in (False, "apart")


def _calibration(recipe: Recipe, options: Any, dims: Dims | None) -> int | None:
    """Tokens of calibration: crops x length, however many rows they are cut from; None when the step reads no data."""
    name = getattr(options, "data", None)
    if name is None or not hasattr(options, "length"):
        return None
    context = dims.context if dims is not None and dims.context else options.length
    return (recipe.data[name].samples or CROPS) * int(min(options.length, context))


def _tokens(recipe: Recipe, variant: Variant | None, dims: Dims | None) -> Quantity:
    options: Any = variant.options if variant is not None else None
    if variant is None or variant.kind not in _TRAINING:
        count = _calibration(recipe, options, dims)
        if count is not None:
            return Quantity(float(count), "tokens", "estimated", "calibration crops x length, at most")
        return Quantity.null("tokens", "the step reads no tokens")
    length = min(options.max_length, dims.context) if dims is not None and dims.context else options.max_length
    length *= _sides(options)
    counts = [row_count(name, recipe.data, recipe.base_dir) for name in options.mixed]
    known, unknown = [rows for rows, _ in counts if rows is not None], [why for rows, why in counts if rows is None]
    if options.max_steps is not None:  # whatever the epochs
        steps = options.max_steps * options.accumulate * (options.batch_tokens or options.batch_size * length)
        return Quantity(float(steps), "tokens", "estimated", "steps x batch x max_length, at most")
    if unknown:
        return Quantity.null("tokens", unknown[0])
    return Quantity(float(round(sum(known) * options.epochs * length)), "tokens", "estimated",
                    "rows x epochs x max_length, at most")


def row_count(name: str, sources: Mapping[str, DataSource], base_dir: Path) -> tuple[int | None, str]:
    """(rows of a data source at most, "") or (None, why they are not known). Reads no row, only counts lines."""
    try:
        *derived, root = named(name, sources)
        if root.synthesize is not None:
            rows, reason = row_count(root.synthesize.prompts, sources, base_dir)
            rows = rows * root.synthesize.answers if rows is not None else None
        else:
            rows, reason = _rows_of(root, base_dir)
    except (DataError, OSError) as error:
        return None, str(error)
    if rows is None:
        known = [source.samples for source in (root, *derived) if source.samples is not None]
        return (min(known), "") if known else (None, reason)
    for source in (root, *reversed(derived)):
        split = parse_split(source.split)
        if split.sliced:
            try:
                first, last = split.range(rows)
            except ValueError as error:
                return None, str(error)
            rows = last - first
        rows = rows if source.samples is None else min(rows, source.samples)
    return rows, ""


def _rows_of(source: DataSource, base_dir: Path) -> tuple[int | None, str]:
    where, split = locate(source, base_dir), parse_split(source.split)
    if where.what == "builtin":
        if where.label == "builtin:world":
            return None, "builtin:world is as long as `samples` says"
        return ROWS.get(where.label, SIZES.get(split.name or "train")), ""
    path = where.path if where.what == "file" else where.files.get(split.name or "train")
    if path is None or path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        return None, f"rows of {where.label} are not counted before they are read"
    if path.stat().st_size > _MOST_COUNTED:
        return None, f"{where.label} is too large to count its rows"
    lines = 0
    with open(path, "rb") as file:
        for line in file:
            lines += bool(line.strip())
    return max(lines - (path.suffix.lower() != ".jsonl"), 0), ""
