"""Run by test_int_matmul.py in a process of its own, without TRITON_INTERPRET: compile for sm_90, no GPU needed.

Prints one JSON line per variant with what ptxas made of it: registers, stack bytes, spill loads and stores, tensor-
core ops.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # newer tritons warn when it is unset

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmops_kernels.int_matmul import int_matmul_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], capture_output=True, text=True, check=True).stdout


def variant(dtype: str, bits: int, group: int, zero: bool, block_m: int, block_n: int, warps: int) -> dict[str, object]:
    types = {"x_ptr": f"*{dtype}", "q_ptr": "*u8" if bits <= 4 else "*i8", "scale_ptr": f"*{dtype}",
             "zero_ptr": "*i8" if zero else f"*{dtype}", "y_ptr": f"*{dtype}"}
    constants = {"GROUP": group, "NIBBLES": bits <= 4, "HAS_ZERO": zero, "BLOCK_M": block_m, "BLOCK_N": block_n,
                 "BLOCK_K": 128}
    names = int_matmul_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name in types or name in ("N", "K", "stride_xm", "stride_qn")]
    source = ASTSource(fn=int_matmul_kernel, signature=signature, constexprs=constants,
                       attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {"case": [dtype, bits, group, zero, block_m], "registers": int(found[1]), "stack": int(found[2]),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)), "tensor_core": len(re.findall(r"\bHG?MMA\b", sass)),
            "async_copies": len(re.findall(r"\bLDGSTS\b", sass)), "shared": made.metadata.shared}


if __name__ == "__main__":
    for line in json.loads(sys.argv[1]):
        print(json.dumps(variant(*line)), flush=True)
