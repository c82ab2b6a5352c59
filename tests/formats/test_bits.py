"""Words are worked out by hand, and by a twin that moves one bit at a time."""

import pytest
import torch

from wellrounded.core.scheme import BITS
from wellrounded.formats.bits import pack, unpack


def line(*codes: int) -> torch.Tensor:
    return torch.tensor([codes], dtype=torch.uint8)


def hexes(words: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()]


def bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """Unsigned words of one line of codes."""
    stream = [code >> i & 1 for code in codes for i in range(bits)]
    return [sum(bit << i for i, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def test_two_bit_codes_fill_a_byte_lowest_first():
    # 3 2 1 0 -> 11 10 01 00 = e4
    assert hexes(pack(line(*[0, 1, 2, 3] * 4), 2, dim=1)) == ["e4e4e4e4"]


def test_four_bit_codes_read_backwards_as_hex_digits():
    assert hexes(pack(line(0, 1, 2, 3, 4, 5, 6, 7, 15, 0, 0, 0, 0, 0, 0, 8), 4, dim=1)) == ["76543210", "8000000f"]


def test_eight_bit_codes_are_the_bytes_of_the_word():
    assert hexes(pack(line(0x01, 0x02, 0x80, 0xFF), 8, dim=1)) == ["ff800201"]


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        (0, 0b111, ["00000007", "00000000", "00000000"]),
        (9, 0b111, ["38000000", "00000000", "00000000"]),  # bits 27 to 29
        (10, 0b101, ["40000000", "00000001", "00000000"]),  # bits 30 and 31 hold 01, the next word begins with 1
        (10, 0b010, ["80000000", "00000000", "00000000"]),
        (11, 0b111, ["00000000", "0000000e", "00000000"]),  # bits 1 to 3 of word 1
        (21, 0b101, ["00000000", "80000000", "00000002"]),  # bit 31 of word 1 holds 1, the next word begins with 10
        (21, 0b110, ["00000000", "00000000", "00000003"]),
        (31, 0b111, ["00000000", "00000000", "e0000000"]),  # the last three bits
    ],
)
def test_three_bit_codes_cross_words(place, code, words):
    codes = line(*[0] * 32)
    codes[0, place] = code
    assert hexes(pack(codes, 3, dim=1)) == words


def test_three_bit_constants_shift_by_a_bit_from_word_to_word():
    # 011 011 ... : every third bit is clear, starting with bits 2, 0 and 1 of the three words
    assert hexes(pack(line(*[3] * 32), 3, dim=1)) == ["db6db6db", "b6db6db6", "6db6db6d"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1])
def test_packing_agrees_with_the_bit_by_bit_twin(bits, dim):
    codes = random_codes(bits, 64, 96)
    words = pack(codes, bits, dim).movedim(dim, -1)
    lines = codes.movedim(dim, -1).tolist()
    assert [[word & 0xFFFFFFFF for word in row] for row in words.tolist()] == [bit_by_bit(row, bits) for row in lines]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1])
def test_unpacking_undoes_packing(bits, dim):
    codes = random_codes(bits, 160, 32)
    words = pack(codes, bits, dim)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape[dim] == codes.shape[dim] * bits // 32 and words.shape[1 - dim] == codes.shape[1 - dim]
    back = unpack(words, bits, dim, codes.shape[dim])
    assert back.dtype == torch.uint8 and torch.equal(back, codes)
    assert back.movedim(dim, -1).is_contiguous()


@pytest.mark.parametrize("bits", BITS)
def test_any_word_is_a_legal_line_of_codes(bits):
    words = torch.randint(-(2**31), 2**31, (6, 5), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    assert torch.equal(pack(unpack(words, bits, 0, 6 * 32 // bits), bits, 0), words)


def test_strided_views_pack_like_their_copies():
    codes = random_codes(4, 64, 64)
    view = codes[::2, 8:40].T
    assert torch.equal(pack(view, 4, dim=0), pack(view.contiguous(), 4, dim=0))
    words = pack(codes, 4, dim=0)
    assert torch.equal(unpack(words[:, ::3], 4, 0, 64), codes[:, ::3])


@pytest.mark.parametrize(("bits", "unit"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_codes_must_fill_whole_words(bits, unit):
    pack(line(*[0] * unit), bits, dim=1)
    with pytest.raises(ValueError, match=f"multiple of {unit}"):
        pack(line(*[0] * (unit + unit // 2)), bits, dim=1)
    with pytest.raises(ValueError, match=f"multiple of {unit}"):
        unpack(torch.zeros(1, 3, dtype=torch.int32), bits, 1, unit - 1)


def test_the_count_must_fit_the_words():
    with pytest.raises(ValueError, match="fill 2 words, not 3"):
        unpack(torch.zeros(3, 1, dtype=torch.int32), 4, 0, 16)


def test_a_code_beyond_its_bits_is_refused_instead_of_spilling_over():
    with pytest.raises(ValueError, match="largest code is 16; 4 bits hold 0 to 15"):
        pack(line(0, 16, 0, 0, 0, 0, 0, 0), 4, dim=1)


def test_other_widths_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="bits=5"):
        pack(line(*[0] * 32), 5, dim=1)
    with pytest.raises(ValueError, match=r"uint8.*int64"):
        pack(line(*[0] * 8).long(), 4, dim=1)
    with pytest.raises(ValueError, match=r"int32.*int64"):
        unpack(torch.zeros(1, 1, dtype=torch.int64), 4, 1, 8)
