"""Bit fields of 16-bit words -> fp16 or bf16 integers, in about one instruction a weight.

A register holds two words, so every instruction works on two codes. Field at bit b, width w, of fp16:

    t = (word & mask << b) | 0x6400       the number 1024 + code * 2^b: the code sits in the mantissa
    y = t * 2^-b - (1024 * 2^-b + offset) exact, one fused multiply-add; offset undoes the unsigned storage, and holds
                                          the zero point when there is one

The mantissa of fp16 takes fields up to bit 9, that of bf16 (0x4300: 128) up to bit 6; a field further up is first
shifted down, by as few different amounts as do, since equal shifts are computed once.

8-bit codes fill an fp16 mantissa: the low byte by one mask, the high one by one byte permutation. In bf16 they don't
fit, and go to the tensor cores in two parts, since one more matrix instruction is cheaper than the addition:

    as they are     128 + low seven bits, and -128 or -256 for the top bit: two's complement
    as stored       -f and max(256 - f, 0), which add up to 256 - 2 byte, where f is the byte put below 0x43: 128 + byte
                    below 128, twice the byte above (its top bit is the exponent's). A quarter of an instruction less,
                    where what the byte is too large by is taken off with the zero points (`_group_sums.py`)

At many tokens products cost more than additions, and where the weight itself is scaled (`times`) it has to be one
number: `programs(..., parts=0)`.

The idea of the magic number is Kim et al., "Who Says Elephants Can't Run", 2022, section 4.2. `lop3` computes any
function of three bits in one instruction: 0xEA is (a & b) | c, 0x6A is (a & b) ^ c.
"""

from __future__ import annotations

import struct
from functools import cache

from ._interpret import INTERPRET
from ._triton import tl, triton
from .reference.int_linear import HIGH_BITS

__all__ = ["across", "base", "field", "in_order", "less", "points_at", "programs", "scales", "spread", "times"]


def _pair(value: float, bf16: bool) -> str:
    """The 32-bit constant that holds `value` twice."""
    half, wide = struct.pack("<e", value), struct.pack("<f", value)
    bits = struct.unpack("<H", wide[2:] if bf16 else half)[0]
    return f"0x{bits << 16 | bits:08x}"


def _down(i: int, bits: int, bf16: bool) -> tuple[int, int]:
    """(right shift of the word, bit where field i then begins)."""
    if bits == 8:
        return 8 * i, 0
    at = (2 * (i % 8)) if bits == 3 else bits * i
    room = (7 if bf16 else 10) - bits  # the last bit where a field can begin
    step = {2: 6, 3: 6, 4: 4}[bits] if bf16 else 8
    shift = at // step * step
    assert at - shift <= room
    return shift, at - shift


@cache
def base(i: int, bits: int, bf16: bool) -> float:
    """What field i's number is too large by: the program adds -(base + zero point)."""
    if bits == 8:
        return 0.0 if bf16 else 1024.0 + 128.0
    return (128.0 if bf16 else 1024.0) / (1 << _down(i, bits, bf16)[1]) + (1 << (bits - 1))


@cache
def programs(bits: int, bf16: bool, zero: bool, parts: str = "") -> tuple[str, ...]:
    """PTX for every field: $0 = two numbers; $1 = two words; $2 = two words of high bits; $3 = -(base + zero).

    parts: of 8 bits in bf16, "exact" or "stored" for two parts a code (the second ones follow the first).
    """
    if parts == "exact":
        return tuple(_block([f"shr.b32 w, $1, {8 * i};", part.format("$0")]) for part in (_LOW, _TOP) for i in (0, 1))
    if parts == "stored":
        return tuple(_block(_negative(i, "$0")) for i in (0, 1)) + tuple(_rectified(i) for i in (0, 1))
    return tuple(_program(i, bits, bf16, zero) for i in range(16 if bits == 3 else 16 // bits))


def _rectified(i: int) -> str:
    """max(256 - f, 0) of field i."""
    return _block([*_negative(i, "v"), f"mov.b32 one, {_pair(1.0, True)};", f"mov.b32 less, {_pair(256.0, True)};",
                   "fma.rn.relu.bf16x2 $0, v, one, less;"])


def _negative(i: int, out: str) -> list[str]:
    """-f of field i."""
    low = "lop3.b32 {}, $1, 0x00ff00ff, 0xc300c300, 0xEA;"
    return [low.format(out)] if i == 0 else [low.format("w"), f"prmt.b32 {out}, $1, w, 0x7351;"]


_LOW = "lop3.b32 {}, w, 0x007f007f, 0x43004300, 0xEA;"  # 128 + the low seven bits
_TOP = "lop3.b32 {}, w, 0x00800080, 0xc380c380, 0x6A;"  # -128 or -256


def _program(i: int, bits: int, bf16: bool, zero: bool) -> str:
    shift, at = _down(i, bits, bf16)
    kind, magic = ("bf16x2", 0x4300) if bf16 else ("f16x2", 0x6400)
    lines = [f"shr.b32 w, $1, {shift};" if shift else "mov.b32 w, $1;",
             f"mov.b32 one, {_pair(1.0, bf16)};",
             "mov.b32 less, $3;" if zero else f"mov.b32 less, {_pair(-base(i, bits, bf16), bf16)};"]
    if bits == 8 and bf16:
        lines += [_LOW.format("v"), _TOP.format("w"), f"fma.rn.bf16x2 {'v' if zero else '$0'}, w, one, v;"]
        return _block(lines + ["fma.rn.bf16x2 $0, v, one, less;"] * zero)
    if bits == 8:  # the high byte by one permutation, the magic byte out of the low one's number
        lines += ["lop3.b32 v, $1, 0x00ff00ff, 0x64006400, 0xEA;"] + ["prmt.b32 v, $1, v, 0x7351;"] * i
        return _block([*lines[1:], "add.f16x2 $0, v, less;"])
    width = 2 if bits == 3 else bits
    mask = ((1 << width) - 1) << at
    lines.append(f"lop3.b32 v, w, 0x{mask << 16 | mask:08x}, 0x{magic << 16 | magic:08x}, 0xEA;")
    if bits == 3:
        move = HIGH_BITS[i] - (at + 2)
        lines += [f"sh{'r' if move > 0 else 'l'}.b32 w, $2, {abs(move)};" if move else "mov.b32 w, $2;",
                  f"lop3.b32 v, w, 0x{(4 << at) << 16 | (4 << at):08x}, v, 0xEA;"]
    if at == 0 and not bf16:
        return _block([*lines, "add.f16x2 $0, v, less;"])
    return _block([*lines, f"mov.b32 one, {_pair(1 / (1 << at), bf16)};", f"fma.rn.{kind} $0, v, one, less;"])


def _block(lines: list[str]) -> str:
    return "{ .reg .b32 v, w, one, less; " + " ".join(lines) + " }"


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _pick(listing, i):  # type: ignore[no-untyped-def]
    """Program i of a listing: kernels take one string, since Triton 3.6 loses strings in tuples."""
    return listing.split("|")[i]


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _reader(dtype, count):  # type: ignore[no-untyped-def]
    """PTX: $0 ... = the 2, 4 or 8 numbers of dtype from address $COUNT on, as float32."""
    if str(dtype) == "fp32":
        few = min(count, 4)
        return "".join(f"ld.global.nc.v{few}.f32 {{{', '.join(f'${j}' for j in range(i, i + few))}}}, "
                       f"[${count} + {4 * i}]; " for i in range(0, count, few))
    read = {2: ".b32 a", 4: ".v2.b32 {a, b}", 8: ".v4.b32 {a, b, c, d}"}[count]
    lines = [f"{{ .reg .b32 a, b, c, d; .reg .b16 low, high; ld.global.nc{read}, [${count}];"]
    for i, name in enumerate("abcd"[: count // 2]):
        if str(dtype) == "bf16":
            lines += [f"shl.b32 ${2 * i}, {name}, 16;", f"and.b32 ${2 * i + 1}, {name}, 0xffff0000;"]
        else:
            lines += [f"mov.b32 {{low, high}}, {name};", f"cvt.f32.f16 ${2 * i}, low;",
                      f"cvt.f32.f16 ${2 * i + 1}, high;"]
    return " ".join([*lines, "}"])


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def scales(at, rows, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of COUNT (2, 4 or 8) groups, which lie next to each other, of rows from scalar `at` on: eight float32
    tensors like rows, fewer groups again and again. Read and widened by assembly, which the compiler runs where the
    product needs its results; a `tl.load` of as many rows as threads goes through shared memory.
    """
    dtype: tl.constexpr = at.dtype.element_ty
    place = at + COUNT * rows
    if INTERPRET:
        a = tl.load(place).to(tl.float32)
        b = tl.load(place + 1).to(tl.float32)
        c = tl.load(place + 2 % COUNT).to(tl.float32)
        d = tl.load(place + 3 % COUNT).to(tl.float32)
        e = tl.load(place + 4 % COUNT).to(tl.float32)
        f = tl.load(place + 5 % COUNT).to(tl.float32)
        g = tl.load(place + 6 % COUNT).to(tl.float32)
        h = tl.load(place + 7 % COUNT).to(tl.float32)
        return a, b, c, d, e, f, g, h
    elif COUNT == 8:
        return tl.inline_asm_elementwise(_reader(dtype, 8), "=f,=f,=f,=f,=f,=f,=f,=f,l", [place.to(tl.int64)],
                                         dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32,
                                                tl.float32, tl.float32), is_pure=True, pack=1)
    elif COUNT == 4:
        a, b, c, d = tl.inline_asm_elementwise(_reader(dtype, 4), "=f,=f,=f,=f,l", [place.to(tl.int64)],
                                               dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True,
                                               pack=1)
        return a, b, c, d, a, b, c, d
    else:
        a, b = tl.inline_asm_elementwise(_reader(dtype, 2), "=f,=f,l", [place.to(tl.int64)],
                                         dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
        return a, b, a, b, a, b, a, b


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def spread(r, rows: tl.constexpr, ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of `rows` (64 or 128) rows of a tile a program has as its row r; ONCE is 0: the same.

    Each of four warps copies ONCE rows at a time. A thread's next piece is the next row of the tile, near enough to be
    a constant beside the address of its first one; in order every other piece would take an addition of 64 bits.
    """
    if ONCE == 0:
        return r
    else:
        nth = r % 64 // (4 * ONCE) + r // 64 * (16 // ONCE)
        return r // ONCE % 4 * (rows // 4) + r % ONCE * (rows // (4 * ONCE)) + nth


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def in_order(sums, ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(M, rows) with columns as `spread` has them -> with columns in order."""
    if ONCE == 0:
        return sums
    else:
        apart = sums.reshape(sums.shape[0], sums.shape[1] // (4 * ONCE), 4, ONCE)
        return apart.permute(0, 2, 3, 1).reshape(sums.shape[0], sums.shape[1])


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def points_at(at, rows: tl.constexpr, ONCE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zero points of rows, which lie STEP numbers apart from scalar `at` on, as `spread` has them: int16 (rows,).

    One by one and 64 at a time: the pipeliner would copy wider ones 4 bytes at a time, and more through shared memory.
    """
    few = at + STEP * spread(tl.arange(0, 64), rows, ONCE)
    if rows == 128:
        more = few + STEP * (64 if ONCE == 0 else 16 // ONCE)
        return tl.join(tl.load(few), tl.load(more)).permute(1, 0).reshape(rows)
    else:
        return tl.load(few)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def across(a, b, SIDES: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of rows for a run's columns: (rows, 1), or where it has two groups (rows, RUN), a in its left half.

    Views of what was loaded and nothing computed from columns: else the product's operand goes through shared memory.
    """
    if SIDES == 1:
        return a[:, None]
    else:
        both = tl.join(a, b)[:, :, None]
        return tl.broadcast_to(both, (a.shape[0], 2, RUN // 2)).reshape(a.shape[0], RUN)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def times(w, scale):  # type: ignore[no-untyped-def]
    """w * scale, rounded to w's dtype (in the interpreter not at all); scale of the same dtype."""
    if INTERPRET:
        return w * scale.to(tl.float32)
    elif w.dtype == tl.float16:
        return w * scale
    else:
        return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [w, scale], dtype=tl.bfloat16,
                                         is_pure=True, pack=2)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def less(zero, i: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `field` adds to field i for zero points `zero`, int16: -(base + zero), exact in dtype.

    Put together bitwise: the number's exponent is known, the code's offset and its zero point are its mantissa.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    HALF: tl.constexpr = 1 << (BITS - 1)
    AT16: tl.constexpr = 0 if BITS == 8 else (WIDTH * i) % 8  # where `_down` leaves the field
    AT: tl.constexpr = 0 if BITS == 4 else (2 * (i % 8)) % 6
    if INTERPRET:
        return zero.to(tl.float32)
    elif dtype == tl.float16:
        bits = (zero << AT16) + (0xE400 - 0x10000 - (AT16 << 10) + (HALF << AT16))
        return bits.to(tl.int16).to(dtype, bitcast=True)
    elif BITS == 8:
        return (-zero).to(tl.float32).to(dtype)
    else:
        bits = (zero << AT) + (0xC300 - 0x10000 - (AT << 7) + (HALF << AT))
        return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def field(word, high, add, BITS: tl.constexpr, ZERO: tl.constexpr, PAIRED: tl.constexpr,  # type: ignore[no-untyped-def]
          STORED: tl.constexpr, PROGRAMS: tl.constexpr, dtype: tl.constexpr, i: tl.constexpr):
    """Field i of int16 words (BLOCK_N, RUN) as exact numbers of dtype: code - zero; with PAIRED a part of it.

    high: the words of the high bits for 3 bits; add: `less` of the zero points, (BLOCK_N, 1), with ZERO; anything
    otherwise. STORED: parts of 256 - 2 byte. The interpreter knows no assembly: there it is integer arithmetic and
    gives float32.
    """
    if INTERPRET:
        bare = word.to(tl.int32) & 0xFFFF
        if BITS == 8:
            code = (bare >> (8 * (i % 2))) & 255
            if not PAIRED:
                value = code.to(tl.float32) - 128
            elif STORED:
                value = -tl.where(code > 127, 2 * code, 128 + code).to(tl.float32)
                if i >= 2:
                    value = tl.maximum(value + 256, 0.0)
            elif i >= 2:
                value = tl.where(code > 127, -128, -256).to(tl.float32)
            else:
                value = (128 + (code & 127)).to(tl.float32)
        elif BITS == 3:  # AT: HIGH_BITS[i]
            AT: tl.constexpr = (2 + 2 * i if i < 4 else 2 * i - 5 if i < 8 else 2 * i - 6 if i < 11 else 0 if i == 11
                                else 2 * i - 13 if i < 15 else 1)
            top = (((high.to(tl.int32) & 0xFFFF) >> AT) & 1) << 2
            value = (((bare >> (2 * (i % 8))) & 3) | top).to(tl.float32) - 4.0
        else:
            value = ((bare >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.float32) - (1 << (BITS - 1))
        if ZERO:
            value = value - add
        return value
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(_pick(PROGRAMS, i), "=r,r,r,r", [word, high, add], dtype=tl.float16,
                                         is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(_pick(PROGRAMS, i), "=r,r,r,r", [word, high, add], dtype=tl.bfloat16,
                                         is_pure=True, pack=2)
