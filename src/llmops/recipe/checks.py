"""What can be wrong with the tree of variants although every field has the right type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmops.data.options import DataSource
from llmops.errors import nearest
from llmops.methods.prune.options import MASKING
from llmops.methods.quantize.options import BITSANDBYTES
from llmops.recipe.bnb_checks import check_bitsandbytes
from llmops.recipe.healing_checks import check_healing
from llmops.recipe.model import LINEARS, LLAMA_LIKE, POST_NORMS, Dims
from llmops.recipe.names import refer
from llmops.recipe.number_checks import check_number_format
from llmops.recipe.pruning_checks import check_depth, check_masks, check_width, dims_after, layers_after
from llmops.recipe.schema import BASE, Variant
from llmops.recipe.source import Problems, Trail, shown
from llmops.recipe.students import dims_below
from llmops.recipe.tree import cycle

if TYPE_CHECKING:
    from llmops.methods.finetune.options import Dpo, Lora, Qlora
    from llmops.methods.quantize.options import Auto, Hqq, WeightOnly

__all__ = ["check_links", "check_steps", "layers_after"]

_LAST_NAMES = tuple(name.rsplit(".", 1)[-1] for name in LINEARS)


def check_links(problems: Problems, variants: Mapping[str, Variant], names: Sequence[str],
                matrices: dict[str, list[str]]) -> bool:
    """Whether every `from` and every teacher leads somewhere and nothing goes in a circle."""
    known = [BASE, *names]
    sound = True
    graph: dict[str, list[str]] = {}
    for name, variant in variants.items():
        if not refer(problems, ("variants", name, "from"), variant.parent, known, "a variant", matrices):
            sound = False
        teacher = variant.teacher
        if teacher == name:
            problems.add(("variants", name, variant.kind, "teacher"), f"given {shown(name)}, the student itself; "
                         "expected another variant, as the one it was cut from")
            sound = False
        elif teacher is not None and not refer(problems, ("variants", name, variant.kind, "teacher"), teacher, known,
                                               "a variant", matrices):
            sound = False
        graph[name] = [parent for parent in variant.parents() if parent != name or parent in (variant.parent,
                                                                                              *variant.writers)]
        sound &= all(writer in known for writer in variant.writers)
    while found := cycle(graph):
        first, second = found[0], found[1]
        key: Trail = (("from",) if variants[first].parent == second else
                      (variants[first].kind, "teacher" if variants[first].teacher == second else "data"))
        problems.add(("variants", first, *key), f"given a circle: {' -> '.join(found)}; expected every line to end at "
                                                "base: let one of them start from base")
        graph[first] = [parent for parent in graph[first] if parent != second]
        sound = False
    return sound


def check_steps(problems: Problems, variants: Mapping[str, Variant], data: Mapping[str, DataSource],
                data_names: Sequence[str] | None, dims: Dims | None) -> None:
    """Steps that their parent, their data and the model's dimensions allow."""
    whole = dims
    for name, variant in variants.items():
        trail: Trail = ("variants", name, variant.kind)
        dims = dims_after(variants, variant.parent, dims_below(variants, variant.parent, whole))
        stop = getattr(variant.options, "stop", None)
        _check_data(problems, trail, variant, data_names)
        if stop is not None and stop.data is not None:
            refer(problems, (*trail, "stop", "data"), stop.data, data_names, "data")
            if stop.data in variant.read_names():
                problems.add((*trail, "stop", "data"), f"given {shown(stop.data)}, the training rows themselves, whose "
                             "loss falls whatever is learned; expected other data, or holdout: 0.05")
        check_healing(problems, variants, variant, whole)
        options, method = variant.options, variant.method
        if variant.kind == "prune":
            _check_pruning(problems, trail, variant, dims, layers_after(variants, variant.parent, whole))
        if method == "rtn":
            check_bitsandbytes(problems, trail, options)
        if hasattr(options, "scheme") and options.scheme not in BITSANDBYTES:
            check_number_format(problems, trail, variant, _widths(dims, options.ignore))
            if options.number_format is None:
                _check_groups(problems, trail, options.group, options, dims)
            _check_rotation(problems, (*trail, "rotate"), options, _pruned_ancestor(variants, variant.parent), dims)
        if method == "auto":
            from llmops.recipe.auto_checks import check_auto  # with the arithmetic of its budget

            for group in options.sizes:
                _check_groups(problems, trail, group, options, dims)
            check_auto(problems, trail, options, dims, layers_after(variants, variant.parent, whole))
            _check_rotation(problems, (*trail, "rotate"), options, _pruned_ancestor(variants, variant.parent), dims)
        if method == "hqq":
            _check_hqq(problems, trail, options)
        if getattr(options, "kv_cache", None) is not None:
            _check_kv_cache(problems, (*trail, "dtype" if method == "kv_cache" else "kv_cache"),
                            options.kv_cache, dims)
        if getattr(options, "embeddings", False) and options.rotations:
            problems.add((*trail, "embeddings"), "given true with rotate, which changes the embedding after it was "
                         "rounded; expected one of the two: leave embeddings in 16 bit, or rotate out")
        if method in MASKING and dims is not None and dims.tied \
                and not _ignored("lm_head", options.ignore):
            problems.add((*trail, "ignore"), "given no lm_head, which shares its weight with the token embedding here "
                         "(tie_word_embeddings), so that words would lose entries, too; expected lm_head in `ignore`",
                         key=True)
        if method == "logits":
            _check_teacher(problems, trail, variant)
        if method in ("lora", "qlora"):
            _check_adapters(problems, trail, options, _pruned_ancestor(variants, variant.parent), dims)
        if method == "dpo":
            _check_pairs(problems, trail, options, _pruned_ancestor(variants, variant.parent), dims)
        if hasattr(options, "ignore"):
            _check_layer_names(problems, (*trail, "ignore"), options.ignore, dims, None)


def _check_pruning(problems: Problems, trail: Trail, variant: Variant, dims: Dims | None, layers: int | None) -> None:
    if variant.method == "depth":
        check_depth(problems, trail, variant.options, layers, dims)
    elif variant.method == "width":
        check_width(problems, trail, variant.options, dims)
    else:
        check_masks(problems, trail, variant.options, _widths(dims, variant.options.ignore))


def _check_data(problems: Problems, trail: Trail, variant: Variant, known: Sequence[str] | None) -> None:
    """Names of data that lead somewhere, each given once."""
    judge = getattr(variant.options, "judge", None)
    if judge is not None:
        refer(problems, (*trail, "judge"), judge, known, "data")
    names = [name for name in variant.read_names() if name != judge or name == variant.options.data]
    for index, name in enumerate(names):
        place: Trail = (*trail, "data") if isinstance(variant.options.data, str) else (*trail, "data", index)
        if refer(problems, place, name, known, "data") and name in names[:index]:
            problems.add(place, f"given {shown(name)} twice; expected each name once: for more of its rows than of the "
                                "others', give the others fewer `samples`")


def _pruned_ancestor(variants: Mapping[str, Variant], name: str) -> str | None:
    """The nearest variant from `name` up whose step left single zeros, which everything after it has to keep."""
    while name in variants:
        if variants[name].method in MASKING:
            return name
        name = variants[name].parent
    return None


def _check_adapters(problems: Problems, trail: Trail, options: Lora | Qlora, pruned: str | None,
                    dims: Dims | None) -> None:
    """Adapters whose parent has zeros, starts that need another base or rank, and names of layers."""
    if pruned is not None:
        masked = "expected adapters that can be masked: "
        why = f"after {shown(pruned)}, whose zeros have to stay"
        if options.method == "qlora":
            problems.add((*trail, "method"), f"given qlora {why}; {masked}method: lora, and quantize the result")
        if options.dora:
            problems.add((*trail, "dora"), f"given true {why} (DoRA rescales whole rows); {masked}leave dora out, "
                                           "rslora can stay")
        if options.method == "lora" and not options.merge:
            _refuse_apart(problems, trail, pruned)
        if options.init == "pissa":
            problems.add((*trail, "init"), f"given pissa {why} (its frozen rest is dense); {masked}init: default")
    if options.init == "loftq" and options.method != "qlora":
        problems.add((*trail, "init"), "given loftq with method: lora, whose base is not rounded; expected method: "
                                       "qlora with it, or init: pissa or default")
    if options.method == "qlora" and "loftq_iterations" in options.model_fields_set and options.init != "loftq":
        problems.add((*trail, "loftq_iterations"), f"given loftq_iterations with init: {options.init}, which makes no "
                     "turns; expected init: loftq beside it: add that, or remove loftq_iterations", key=True)
    if not isinstance(options.targets, str):
        _check_layer_names(problems, (*trail, "targets"), options.targets, dims, "every linear layer: all-linear")
    if options.init != "default" and dims is not None and dims.family in LLAMA_LIKE:
        ends = {name.rsplit(".", 1)[-1] for name in options.targets}
        fit = min((min(shape) for name, shape in dims.linear_shapes().items()
                   if options.targets == "all-linear" or name.rsplit(".", 1)[-1] in ends), default=options.rank)
        if options.rank > fit:
            problems.add((*trail, "rank"), f"given {options.rank} with init: {options.init}, which takes that many "
                                           f"singular directions of every weight; expected at most {fit}, the smaller "
                                           "side of the smallest layer", key="rank" not in options.model_fields_set)


def _check_pairs(problems: Problems, trail: Trail, options: Dpo, pruned: str | None, dims: Dims | None) -> None:
    """Adapters that are left apart on a parent with zeros, and names of layers."""
    if pruned is not None and not options.merge:
        _refuse_apart(problems, trail, pruned)
    if not isinstance(options.targets, str):
        _check_layer_names(problems, (*trail, "targets"), options.targets, dims, "every linear layer: all-linear")


def _refuse_apart(problems: Problems, trail: Trail, pruned: str) -> None:
    problems.add((*trail, "merge"), f"given false after {shown(pruned)}, whose zeros have to stay: an adapter apart is "
                                    "a plain PEFT one, which fills them; expected merge: true, which masks what is "
                                    "folded in")


def _check_groups(problems: Problems, trail: Trail, group: int, options: WeightOnly | Auto, dims: Dims | None) -> None:
    place: Trail = (*trail, "group_size")
    if group == -1:
        return
    if group < 1:
        problems.add(place, f"given {group}; expected a whole number from 1, or -1 for one scale a row")
        return
    bad = {name: width for name, width in _widths(dims, options.ignore).items() if width % group}
    if bad:
        fits = [size for size in (256, 128, 96, 64, 48, 32, 16, 8)
                if not any(width % size for width in _widths(dims, options.ignore).values())]
        listed = ", ".join(f"{name} takes {width} inputs" for name, width in bad.items())
        said = "given" if options.group_size is not None else "given no group_size, so"
        problems.add(place, f"{said} {group}, but {listed}; expected a divisor of every layer's inputs: "
                            f"{f'{fits[0]}, ' if fits else ''}or -1 for one scale a row, or the layer in `ignore`",
                     key=options.group_size is None)


def _check_rotation(problems: Problems, trail: Trail, options: WeightOnly | Auto, pruned: str | None,
                    dims: Dims | None) -> None:
    given = shown(options.rotate)
    if options.rotate is None:
        return
    if not options.rotations:
        problems.add(trail, "given an empty list; expected hadamard, or a list of r1 and r2")
    elif pruned is not None:
        problems.add(trail, f"given {given} after {shown(pruned)}, whose zeros have to stay: a rotation fills them; "
                            "expected no rotate here", key=True)
    elif "r1" in options.rotations and dims is not None and dims.family in POST_NORMS:
        problems.add(trail, f"given {given} for a model of type {dims.family}, whose layers norm what they add to the "
                            "residual stream (post-norms), so that a rotation of the stream (r1) cannot be folded; "
                            "expected [r2], the values of each head alone, or no rotate", key=True)


def _check_hqq(problems: Problems, trail: Trail, options: Hqq) -> None:
    if options.symmetric:
        problems.add((*trail, "symmetric"), "given true; expected false, or no `symmetric`: hqq fits the zero point, "
                                            "and a symmetric grid has none. Of the methods without data, rtn is "
                                            "symmetric")
    if options.group == -1 or options.group > 128:
        problems.add((*trail, "group_size"), f"given {options.group}; expected at most 128: one zero point for a "
                                             "longer stretch loses too much")


def _check_kv_cache(problems: Problems, trail: Trail, dtype: str, dims: Dims | None) -> None:
    if dims is None:
        return
    other = sorted(dims.caches - {"full_attention", "sliding_attention", "chunked_attention"})
    if other:
        problems.add(trail, f"given {dtype}, but layers of this {dims.family} model keep {', '.join(other)}; expected "
                            "layers that keep keys and values of their own: leave it out")
    if dtype == "int4" and dims.head_dim % 2:
        problems.add(trail, f"given int4, but a head has {dims.head_dim} numbers, which do not fill bytes of two; "
                            "expected an even head_dim, or int8 or fp8")


def _widths(dims: Dims | None, ignore: Sequence[str]) -> dict[str, int]:
    """Inputs of each linear layer that is not ignored; empty when the layers are not known."""
    if dims is None or dims.family not in LLAMA_LIKE:
        return {}
    widths = {name.rsplit(".", 1)[-1]: shape[1] for name, shape in dims.linear_shapes().items()
              if not all(_ignored(f"model.layers.{layer}.{name}", ignore) for layer in range(dims.layers))}
    if not _ignored("lm_head", ignore):
        widths["lm_head"] = dims.hidden
    return widths


def _ignored(full: str, ignore: Sequence[str]) -> bool:
    return any(full == ending or full.endswith("." + ending) for ending in ignore)


def _check_teacher(problems: Problems, trail: Trail, variant: Variant) -> None:
    options = variant.options
    if options.teacher == variant.parent and options.hard_weight == 0 and options.student is None:
        problems.add((*trail, "teacher"), f"given {shown(options.teacher)}, the very weights that the student starts "
                                          "with: the loss is 0 from the first step; expected another variant, or a "
                                          "hard_weight above 0")


def _check_layer_names(problems: Problems, trail: Trail, names: Any, dims: Dims | None, instead: str | None) -> None:
    """Typing errors in the names of layers, for the families whose layers are known."""
    if instead is not None and not names:
        problems.add(trail, f"given an empty list; expected names of linear layers, or {instead}")
        return
    if dims is None or dims.family not in LLAMA_LIKE:
        return
    known = (*_LAST_NAMES, "lm_head")
    for index, name in enumerate(names):
        if name.rsplit(".", 1)[-1] not in known:
            last = name.rsplit(".", 1)[-1]
            problems.add((*trail, index), f"given {shown(name)}, the end of no layer's name; expected one of "
                                          f"{', '.join(known)}{nearest(last, known)}")
