"""The machine code of every kernel for sm_90, read without a GPU: no spills, matrix units, wide copies."""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

import pytest
from benchmarks import offline
from tests.kernels.processes import oldest_triton, python, pythons

pytest.importorskip("triton")


def gate(**which: Any) -> str:
    """What the gate says at its end of the sample: of each op one set of tiles for each `offline.kind`."""
    done = python("-m", "benchmarks.offline", "--json", "--sample", interpreter=False, **which)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["op"] for line in done.stdout.splitlines()} == set(offline.ops())
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("which", pythons())
def test_machine_code_is_as_required(which: str) -> None:
    """`make kernels` compiles every one."""
    assert "kernels as required" in gate(which=which)


@pytest.mark.slow
def test_machine_code_is_as_required_on_the_oldest_triton() -> None:
    oldest = oldest_triton()
    if oldest is None:
        pytest.skip(f"no Triton in {sys.prefix}/oldest-triton: `make oldest-triton` puts it there, with a network")
    floor = re.search(r'"triton>=([\d.]+)', (offline.ROOT / "pyproject.toml").read_text())
    assert floor and f"Triton {floor[1]}.0: " in gate(before=oldest)


def test_what_make_installs_is_the_oldest_that_is_allowed() -> None:
    pinned = re.search(r"^OLDEST_TRITON := (.*)$", (offline.ROOT / "Makefile").read_text(), re.M)
    assert pinned
    for project in ("pyproject.toml", "kernels/pyproject.toml"):
        floor = re.search(r'"triton>=([\d.]+)', (offline.ROOT / project).read_text())
        assert floor and pinned[1] == f"{floor[1]}.0"


@pytest.mark.parametrize("op", offline.ops())
def test_the_sample_holds_every_kernel_matrix_instruction_and_limit(op: str) -> None:
    cases = importlib.import_module(f"benchmarks.kernels.{op}").compiled()
    kept = offline.sample(cases)
    assert {(case.kernel, case.matrix, case.limit) for case in kept} == \
        {(case.kernel, case.matrix, case.limit) for case in cases}
    for limited in (case for case in cases if case.limit):  # each type of activations and of weights under each limit
        assert any(case.kernel is limited.kernel and case.limit == limited.limit
                   and {**case.types, "y_ptr": ""} == {**limited.types, "y_ptr": ""} for case in kept), limited.name


@pytest.mark.parametrize("op", offline.ops())
def test_every_op_keeps_the_contract_and_is_in_the_table(op: str) -> None:
    module = importlib.import_module(f"benchmarks.kernels.{op}")
    names = [case.name for case in module.compiled()]
    assert names and len(set(names)) == len(names)
    assert callable(module.checks) and callable(module.cases)
    table = (offline.ROOT / "docs" / "kernels.md").read_text()
    assert not [name for name in names if f"| {name} |" not in table], "run python -m benchmarks.offline --write"


def test_the_reader_finds_loops_and_widths() -> None:
    from tests.kernels.offline import Code, Compiled, faults, instructions

    sass = """
.L_x_0:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
        /*0050*/                   BRA `(.L_x_2);
.L_x_2:
"""
    every, loop = instructions(sass)
    assert len(every) == 6 and [op.split(".")[0] for op in loop] == ["LDGSTS", "HMMA", "BRA"]
    case = Compiled("k", None, {}, {}, limit=3.0, matrix="HGMMA")
    code = Code("k", 64, 8, 2, 240_000, 6, 3, 3.5, {"HMMA": 1}, 1, 2, {})
    text = "\n".join(faults(case, code))
    for part in ("8 bytes of stack, 2 spills", "240000 bytes of shared", "no HGMMA", "1 of 2 async", "3.5 thread-inst"):
        assert part in text
