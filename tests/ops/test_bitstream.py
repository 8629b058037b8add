"""The bit stream against a bit-by-bit writer in Python integers, and against compressed-tensors' own packer."""

from __future__ import annotations

import pytest
import torch

from llmops.ops.bitstream import pack_bits, unpack_bits, words


def codes_of(rows: int, count: int, bits: int, seed: int = 0) -> torch.Tensor:
    half = 1 << (bits - 1)
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, count), generator=made, dtype=torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33, 100, 128])
def test_matches_a_stream_written_bit_by_bit(bits: int, count: int) -> None:
    codes = codes_of(3, count, bits)
    packed = pack_bits(codes, bits)
    for row, line in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(row))
        expected = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(words(count, bits))]
        assert [value & 0xFFFFFFFF for value in line] == expected
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_matches_compressed_tensors(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = codes_of(16, 96, bits, seed=1)
    assert torch.equal(pack_bits(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(pack_bits(codes, bits), bits, codes.shape), codes)
    along_out = pack_bits(codes.t().contiguous(), bits).t()
    assert torch.equal(along_out, pack_to_int32(codes, bits, packed_dim=0))


def test_every_code_at_every_place_survives() -> None:
    for bits in range(2, 9):
        half = 1 << (bits - 1)
        codes = torch.stack([torch.full((40,), value, dtype=torch.int8) for value in range(-half, half)])
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 40), codes)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 bits hold -4..3"):
        pack_bits(torch.full((1, 8), 4, dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="expected 2 to 8"):
        pack_bits(codes_of(1, 8, 8), 9)
    with pytest.raises(ValueError, match="expected int32 of 3 words"):
        unpack_bits(torch.zeros(1, 4, dtype=torch.int32), 3, 32)


def test_a_single_word_a_row_is_read_whatever_its_stride() -> None:
    codes = torch.tensor([[1, -2, 3, -4], [-8, 7, 0, 5]], dtype=torch.int8)
    column = pack_bits(codes, 4).t().contiguous().t()  # (2, 1) with a stride of 1 and 2, which counts as contiguous
    assert torch.equal(unpack_bits(column.t().contiguous().t().contiguous(), 4, 4), codes)
    strided = torch.zeros(2, 2, dtype=torch.int32)[:, :1].copy_(pack_bits(codes, 4))
    assert strided.stride() == (2, 1) and torch.equal(unpack_bits(strided, 4, 4), codes)
    odd = torch.as_strided(pack_bits(codes, 4).flatten(), (2, 1), (1, 2))
    assert odd.is_contiguous() and odd.stride(-1) == 2 and torch.equal(unpack_bits(odd, 4, 4), codes)
