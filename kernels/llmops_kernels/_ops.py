"""The namespace of the ops. Hugging Face's kernel-builder writes a file of this name, with a namespace of its own."""

import torch

ops = torch.ops.llmops


def add_op_namespace_prefix(op_name: str) -> str:
    return f"llmops::{op_name}"
