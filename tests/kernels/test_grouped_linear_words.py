"""Numbers in words: how they are packed, and the assembly that takes them out, run by Python."""

from __future__ import annotations

import re

import pytest
import torch
import triton.language as tl

from pagoda_kernels.grouped_linear import GroupedShape
from pagoda_kernels.grouped_linear.packing import PLANES, choose_packing, pack
from pagoda_kernels.grouped_linear.widen import find_field, make_ptx

DTYPES = {"bf16": (tl.bfloat16, torch.bfloat16), "fp16": (tl.float16, torch.float16)}


def run_ptx(ptx, args, dtype):
    """$0, as two numbers of a dtype, for each of the registers in args: int64, of 32 bits."""
    registers = {f"${index}": arg for index, arg in enumerate(args, 1)}

    def value(name):
        return torch.tensor(int(name, 0)) if name[0].isdigit() else registers[name]

    def halves(register):
        both = torch.stack([register & 0xFFFF, register >> 16], -1)
        return both.to(torch.int32).to(torch.int16).view(dtype).double()

    def fma(a, b, c):
        rounded = (halves(a) * halves(b) + halves(c)).to(dtype)
        low, high = (rounded.view(torch.int16).long() & 0xFFFF).unbind(-1)
        return low | high << 16

    def lop3(a, b, c, table):
        # Bit by bit: what the table has at the place that the three bits are.
        found = torch.zeros_like(a)
        for place in range(8):
            if int(table, 0) >> place & 1:
                terms = [
                    part if place >> bit & 1 else ~part for part, bit in ((a, 2), (b, 1), (c, 0))
                ]
                found = found | terms[0] & terms[1] & terms[2]
        return found & 0xFFFFFFFF

    for line in ptx.strip("{}").split("\n"):
        if line.startswith("."):
            continue
        name, to, *sources = re.findall(r"[^\s,;]+", line)
        values = [value(source) for source in sources[:3]]
        match name.split(".")[0]:
            case "mov":
                found = values[0]
            case "shr":
                found = values[0] >> values[1]
            case "shl":
                found = values[0] << values[1] & 0xFFFFFFFF
            case "and":
                found = values[0] & values[1]
            case "lop3":
                found = lop3(*torch.broadcast_tensors(*values), sources[3])
            case "fma":
                found = fma(*torch.broadcast_tensors(*values))
        registers[to] = found
    return halves(registers["$0"])


def some_words(num_planes):
    torch.manual_seed(0)
    return [torch.randint(0, 2**32, (5000,)) for _ in range(num_planes)]


def find_numbers(words, bits, run):
    """[…, 2]: of both halves of registers."""
    numbers = 0
    for plane, word in enumerate(words):
        _, first, mask, place = find_field(bits, plane, run)
        numbers = numbers | (torch.stack([word & 0xFFFF, word >> 16], -1) >> first & mask) << place
    return numbers.double()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("has_zeros", [False, True])
def test_assembly_takes_the_exact_numbers_out_of_words(name, bits, has_zeros):
    triton_dtype, dtype = DTYPES[name]
    words = some_words(len(PLANES[bits]))
    zeros = torch.randint(0, 2**bits + 1, (5000, 2)).to(dtype)
    low, high = (zeros.view(torch.int16).long() & 0xFFFF).unbind(-1)
    args = [*words, low | high << 16] if has_zeros else words
    middle = zeros.double() if has_zeros else 2 ** (bits - 1)
    for run in range(16 // min(PLANES[bits])):
        found = run_ptx(make_ptx(bits, False, run, triton_dtype, has_zeros), args, dtype)
        assert torch.equal(found, find_numbers(words, bits, run) - middle)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("run", [0, 1])
def test_assembly_takes_e4m3_out_of_words(name, run):
    triton_dtype, dtype = DTYPES[name]
    # Every code, none of them a NaN, in both halves.
    codes = torch.arange(256)[torch.arange(256) % 128 != 127]
    word = codes | codes.flip(0) << 16
    word = word << 8 * run | 0x00110011 << 8 * (1 - run)
    (first, second) = run_ptx(make_ptx(8, True, run, triton_dtype, False), [word], dtype).unbind(-1)
    expected = codes.to(torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected.flip(0))


@pytest.mark.parametrize("bits", PLANES)
def test_a_word_has_a_field_for_each_of_its_runs(bits):
    torch.manual_seed(0)
    shape = GroupedShape(3, 700, bits, 700)
    packing = choose_packing(shape)
    integers = torch.randint(0, 2**bits, (3, 700), dtype=torch.uint8)
    words = pack(integers, packing).long() & 0xFFFF
    assert words.shape == (3, packing.num_steps(700), packing.words, packing.lanes)
    for column in (0, 15, 16, 33, 127, 500, 699):
        step, rest = divmod(column, packing.columns)
        run, lane = divmod(rest, packing.lanes)
        number = 0
        for plane in range(len(PLANES[bits])):
            word, first, mask, place = find_field(bits, plane, run)
            number = number | (words[:, step, word, lane] >> first & mask) << place
        assert torch.equal(number, integers[:, column].long())


@pytest.mark.parametrize(
    ("inputs", "group_size", "lanes"),
    [(256, 128, 32), (256, 32, 32), (256, 16, 16), (100, 100, 32), (96, 24, None)],
)
def test_runs_do_not_reach_from_one_group_into_the_next(inputs, group_size, lanes):
    packing = choose_packing(GroupedShape(8, inputs, 4, group_size))
    assert (packing and packing.lanes) == lanes


def test_whole_columns_of_words_take_no_more_room_than_their_bits():
    for bits in PLANES:
        packing = choose_packing(GroupedShape(8, 256, bits, 128))
        assert packing.words * packing.lanes * 16 == packing.columns * bits
