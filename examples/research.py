"""Every method is a function on tensors: how much of a layer's output do 4, 3 and 2 bits keep, and half the weights?

    python examples/research.py

Loads the built-in model, takes one linear layer and the inputs it sees, and compares round-to-nearest at several bits
and two ways to prune half the weights by the relative error of the layer's output. Then one step on the whole model,
with `llmops.apply`, and a generation on the packed weights.
"""

from __future__ import annotations

import copy

import torch

import llmops
from llmops.data.world import documents
from llmops.methods.prune import magnitude_mask, wanda_mask
from llmops.methods.quantize import rtn


def relative_error(x: torch.Tensor, W: torch.Tensor, W_hat: torch.Tensor) -> float:
    """||x W^T - x W_hat^T|| / ||x W^T||. x: (tokens, in); W, W_hat: (out, in)."""
    y = x @ W.T
    return float((x @ W_hat.T - y).norm() / y.norm())


def inputs_of(model: torch.nn.Module, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, in): what `layer` is given while the model reads ids (1, tokens)."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        model(input_ids=ids)
    handle.remove()
    return seen[0].float()


def main() -> dict[str, float]:
    model, tokenizer = llmops.load("builtin:tiny")
    text = "\n".join(documents("test", 20))
    ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
    layer = model.model.layers[1].mlp.down_proj
    W, x = layer.weight.detach().float(), inputs_of(model, layer, ids)

    errors = {f"rtn, {bits} bits": relative_error(x, W, rtn(W, bits=bits, group_size=128).dequantize().float())
              for bits in (8, 4, 3, 2)}
    errors["magnitude, 50%"] = relative_error(x, W, W * magnitude_mask(W, 0.5))
    errors["wanda, 50%"] = relative_error(x, W, W * wanda_mask(W, x.norm(dim=0), 0.5))
    for name, error in errors.items():
        print(f"{name:16} {error:.4f}")

    small = llmops.apply(copy.deepcopy(model), tokenizer, {"quantize": {"method": "rtn", "scheme": "w4a16"}})
    prompt = tokenizer(next(documents("test", 1))[:40], return_tensors="pt")
    written = small.generate(input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"],
                             max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(written[0]))
    return errors


if __name__ == "__main__":
    main()
