"""What the kernels of the quantized KV cache share: how a vector of a head becomes codes, and how codes are read.

A vector x of D numbers is stored as D codes and numbers of its own (bfloat16, rounded before the codes are computed):

    int8   x ~ s c,        c in -127..127,  s = max|x| / 127
    fp8    x ~ s c,        c in E4M3,       s = max|x| / 448
    int4   x R ~ m + s c,  c in 0..15,      m = min(x R), s = (max(x R) - m) / 15;  R = diag(r) H / sqrt(D)

Two 4-bit codes share a byte, *planar*: element i in the low half of byte i, element i + D/2 in its high half. H is
Sylvester's Hadamard matrix, H_ij = (-1)^popcount(i & j), applied by log2(D) butterflies in registers; r_i =
(-1)^popcount(i & i/2) (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456, section 4.3).

A vector with NaN or infinity in it gets NaN or infinity for its scale: it shows, and is not clipped into a number.
Hardware drops NaN in a maximum, so the kernels add sum(0 x) to the scale.
"""

from __future__ import annotations

from ._interpret import INTERPRET
from ._triton import tl, triton

__all__ = ["FORMATS", "eights", "exponent", "halved", "nibbles", "power", "quantize", "turn"]

INT8, FP8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: The formats by name: what the kernels take as FORMAT.
FORMATS = {"int8": 0, "fp8": 1, "int4": 2}


@triton.jit  # type: ignore[untyped-decorator]
def _round(x):  # type: ignore[no-untyped-def]
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def _bfloat16(x):  # type: ignore[no-untyped-def]
    """x (float32) rounded to bfloat16, as float32. The interpreter cuts where hardware rounds to nearest even."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        y = tl.where(x == x, even, x)
    else:
        y = x.to(tl.bfloat16).to(tl.float32)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def halved(x):  # type: ignore[no-untyped-def]
    """x (float32) as a matmul takes it: float16, and in the interpreter float32 again."""
    y = x.to(tl.float16)
    if INTERPRET:
        y = y.to(tl.float32)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _e4m3(x):  # type: ignore[no-untyped-def]
    """x in -448..448 (float32) rounded to E4M3, ties to even. The interpreter's own conversion is not to the nearest:
    there x is first made a number that E4M3 holds."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        subnormal = _round(x * 512.0) * 0.001953125
        x = tl.where(tl.abs(x) < 0.015625, subnormal, tl.where(x == x, normal, x))
    return x.to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def turn(x, ROWS: tl.constexpr, D: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x R, or x R^T, of rows x (ROWS, D) float32; D a power of two."""
    i = tl.arange(0, D)
    parity = i & (i >> 1)
    parity = parity ^ (parity >> 8)
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    signs = 1.0 - 2.0 * (parity & 1).to(tl.float32)
    root: tl.constexpr = D ** -0.5
    if not BACK:
        x = x * signs[None, :]
    half: tl.constexpr = D // 2
    # The same butterfly log2(D) times: pairs (j, j + D/2) become neighbours (2j, 2j + 1), so that after all of them
    # every bit of the index has been combined and stands where it stood.
    stages: tl.constexpr = 4 if D == 16 else 5 if D == 32 else 6 if D == 64 else 7 if D == 128 else 8
    for _ in tl.static_range(stages):
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, half)), (0, 2, 1)))
        x = tl.reshape(tl.join(a + b, a - b), (ROWS, D))
    x = x * root
    if BACK:
        x = x * signs[None, :]
    return x


@triton.jit  # type: ignore[untyped-decorator]
def quantize(x, FORMAT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(what is stored of rows x (ROWS, D) float32, scale (ROWS,), minimum (ROWS,)); the minimum is 0 but at 4 bits."""
    wrong = tl.sum(x * 0.0, 1)
    if FORMAT == INT4:
        x = turn(x, ROWS, D, False)
        least = _bfloat16(tl.min(x, 1) + wrong)
        scale = _bfloat16(tl.div_rn(tl.maximum(tl.max(x, 1) - least, 0.0), 15.0) + wrong)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        wide = _round(tl.div_rn(x - least[:, None], tl.broadcast_to(divisor[:, None], (ROWS, D))))
        each = tl.minimum(tl.maximum(wide, 0.0), 15.0).to(tl.uint8)
        half: tl.constexpr = D // 2
        low, high = tl.split(tl.permute(tl.reshape(each, (ROWS, 2, half)), (0, 2, 1)))
        codes = low | (high << 4)
    else:
        top: tl.constexpr = 127.0 if FORMAT == INT8 else 448.0
        least = wrong
        scale = _bfloat16(tl.div_rn(tl.max(tl.abs(x), 1), top) + wrong)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        scaled = tl.div_rn(x, tl.broadcast_to(divisor[:, None], (ROWS, D)))
        if FORMAT == INT8:
            codes = tl.minimum(tl.maximum(_round(scaled), -127.0), 127.0).to(tl.int8)
        else:
            codes = _e4m3(tl.minimum(tl.maximum(scaled, -448.0), 448.0))
    return codes, scale, least


@triton.jit  # type: ignore[untyped-decorator]
def nibbles(w, ROWS: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """(1024 + low halves, 1024 + 16 (high halves)) of w (ROWS, BYTES) uint8 in float16, with the columns of every four
    in the order 0, 2, 1, 3: 0x6400 | n is the float16 1024 + n, and one `lop3` makes two of them where they lie.

    The caller takes the rest of the sum in the same order, and takes the constants out of the sums.
    """
    if INTERPRET:
        fours: tl.constexpr = BYTES // 4
        moved = tl.reshape(tl.permute(tl.reshape(w, (ROWS, fours, 2, 2)), (0, 1, 3, 2)), (ROWS, BYTES))
        low = (moved & 15).to(tl.float32) + 1024.0
        high = (moved >> 4).to(tl.float32) * 16.0 + 1024.0
    else:
        low, high = tl.inline_asm_elementwise("""{ .reg .b32 t; shr.u32 t, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xEA;  lop3.b32 $1, t, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $2, $4, 0x00f000f0, 0x64006400, 0xEA;  lop3.b32 $3, t, 0x00f000f0, 0x64006400, 0xEA; }""",
            "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def eights(w, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """1152 + codes (int8: 0x6400 | the byte with its sign flipped), or the codes (E4M3), in float16, exact.

    The second output of the assembly is not used (and costs nothing: ptxas drops it). It keeps the conversion where
    the load has its 16 bytes; with one output Triton moves it behind the change of layout, and values are then read
    from shared memory byte by byte.
    """
    if INTERPRET:
        y = w.to(tl.float32)
        if FORMAT == INT8:
            y += 1152.0
    elif FORMAT == INT8:
        y, _ = tl.inline_asm_elementwise("""{ .reg .b32 t; xor.b32 t, $4, 0x80808080;
            prmt.b32 $0, t, 0x64646464, 0x4140;  prmt.b32 $1, t, 0x64646464, 0x4342;
            mov.b32 $2, $0;  mov.b32 $3, $1; }""",
            "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
    else:
        y, _ = tl.inline_asm_elementwise("""{ .reg .b16 a, b; mov.b32 {a, b}, $4;
            cvt.rn.f16x2.e4m3x2 $0, a;  cvt.rn.f16x2.e4m3x2 $1, b;  mov.b32 $2, $0;  mov.b32 $3, $1; }""",
            "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def power(x):  # type: ignore[no-untyped-def]
    """2^x by the hardware's approximation (2 ulp), what is below the normal numbers as 0: a third of the
    instructions of `tl.exp2`."""
    if INTERPRET:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def exponent(x):  # type: ignore[no-untyped-def]
    """log2 x, approximately."""
    if INTERPRET:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y
