"""How weights lie for the programs of triton_products.py.

A tensor core's thread takes, of every 8 columns, two that are side by side, and the three threads next to it the
others. Those two codes lie in the two halves of a word, so that one shift and one mask give both, and the words of one
thread lie side by side, up to 16 bytes of them. Nothing is exchanged between threads, and nothing restored is written
to shared memory: with that, a product of few rows would be slower than memory is.

Chunks of columns come first, 1, 2 or 4 blocks of 32, so that a group is whole chunks; then outputs; then, for each of
the threads that share an output, the words of each block. Of 3 bits, the lower two of all outputs come before the
highest. Where groups are not whole blocks, or columns are in another order, columns are gathered, and each group is
filled up.
"""

from __future__ import annotations

from itertools import product

import torch

from ..core.weight import QuantizedWeight

BLOCK = 32  # columns


def packed(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Words int32 [chunks, bits, out, blocks of a chunk], and which column is multiplied at each place.

    The shape of the words is how many there are. The order is int32, and empty where columns are in theirs.
    """
    codes, order = _blocked(weight)
    bits, blocks = weight.scheme.bits, codes.shape[1] // BLOCK
    whole = blocks // weight.scales.shape[1]  # of a group
    chunk = max(n for n in (1, 2, 4) if whole % n == 0)
    codes = codes.view(len(codes), blocks // chunk, chunk, BLOCK)
    words = torch.cat([_plane(codes & 3, 2), _plane(codes >> 2, 1)], 1) if bits == 3 else _plane(codes, bits)
    return words.view(blocks // chunk, bits, len(codes), chunk), order


def _blocked(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, whole blocks for every group], and which column each is: int32, empty if in order.

    What fills up a group stands for weights of 0; any column will do for them.
    """
    inputs = weight.shape[1]
    groups, index = weight.scales.shape[1], weight.group_index.long()
    sizes = torch.bincount(index, minlength=groups)
    width = -(-int(sizes.max()) // BLOCK) * BLOCK
    if weight.trivially_grouped and width * groups == inputs:
        return weight.codes, index.new_empty(0, dtype=torch.int32)
    columns = torch.argsort(index, stable=True)
    place = torch.arange(inputs, device=index.device) - (sizes.cumsum(0) - sizes)[index[columns]]
    place += index[columns] * width
    order = torch.zeros(groups * width, dtype=torch.int32, device=index.device)
    order[place] = columns.int()
    codes = weight.zeros.repeat_interleave(width, 1)
    codes[:, place] = weight.codes[:, columns]
    return codes, order


def _plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [chunks, out * words]: the words of codes uint8 [out, chunks, blocks, 32], of 1, 2, 4 or 8 bits.

    The columns of a block are 8 a + 2 t + b. Two that differ in b are 16 bits apart in a word; it holds as many t and a
    as there is room for, and where there is room for one t alone, its words are side by side.
    """
    wide, far = min(bits, 4), max(bits // 4, 1)  # words along t, and along a
    outputs, chunks, blocks, _ = codes.shape
    codes = codes.view(outputs, chunks, blocks, far, 4 // far, wide, 4 // wide, 2)
    words = torch.zeros(outputs, chunks, blocks, far, wide, dtype=torch.int32, device=codes.device)
    for inner, outer, half in product(range(4 // far), range(4 // wide), range(2)):
        words |= codes[:, :, :, :, inner, :, outer, half].int() << (bits * (outer * (4 // far) + inner) + 16 * half)
    return words.permute(1, 0, 4, 3, 2).reshape(chunks, -1)
