"""What benchmarks/hlo.py counts of a compiled program, held to sums by hand."""

import pytest

from benchmarks.hlo import Program, read_shapes

PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused (p0: bf16[8,256]) -> bf16[8,256] {
  %p0 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %add = bf16[8,256]{1,0:T(8,128)(2,1)} add(%p0, %p0)
}

%body (carry: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {
  %carry = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %held = bf16[8,256]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  ROOT %sum = bf16[8,256]{1,0:T(8,128)(2,1)} fusion(%held), kind=kLoop, calls=%fused
}

%condition (carry: (s32[], bf16[8,256])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%carry.1, %bound), direction=LT
}

ENTRY %main (image: bf16[8,256], narrow: f32[16,8]) -> bf16[8,256] {
  %image = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %narrow = f32[16,8]{1,0:T(8,128)} parameter(1)
  ENTRY_LINES
}
"""


def cost_of(*lines: str):
    program = Program(PROGRAM.replace("ENTRY_LINES", "\n  ".join(lines)))
    return program.cost(program.entry)


def test_tiles_pad_the_last_axes_of_a_layout() -> None:
    shape, = read_shapes("bf16[30,256,256,16]{0,3,2,1:T(8,128)(2,1)}")
    assert (shape.bytes, shape.padded) == (2 * 30 * 256 * 256 * 16, 2 * 128 * 256 * 256 * 16)


def test_a_product_reads_its_operands_and_writes_its_result() -> None:
    cost = cost_of("ROOT %result = f32[16,16]{1,0:T(8,128)} dot(%narrow, %narrow), lhs_contracting_dims={1}, "
                   "rhs_contracting_dims={1}")
    assert (cost.flops, cost.traffic, cost.unpadded) == (2 * 16 * 16 * 8, 3 * 4 * 16 * 128, 4 * (16 * 16 + 2 * 16 * 8))


def test_loops_count_as_often_as_they_run() -> None:
    """A fusion reads an image and writes one, three times."""
    cost = cost_of("ROOT %result = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)}) while(%image), "
                   "condition=%condition, body=%body")
    assert cost.traffic == 3 * 2 * 2 * 8 * 256


@pytest.mark.parametrize("lines, moved", [
    # To scratch memory: the source is read, whole or in part. What lies there is free to read.
    (("%start = (bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[8,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%image)",
      "%done = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)",
      "ROOT %result = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} negate(%done)"), 2 * 8 * 256),
    (("%start = ((bf16[8,256]{1,0:T(8,128)(2,1)}), bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) "
      "slice-start(%image), slice={[0:8], [0:128]}",
      "%done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%start)",
      "ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} negate(%done)"), 2 * 8 * 128),
    # Between places of main memory: read and written.
    (("ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} slice(%image), slice={[0:8], [0:128]}",), 2 * 2 * 8 * 128),
])
def test_copies_count_as_what_is_moved(lines: tuple[str, ...], moved: int) -> None:
    assert cost_of(*lines).traffic == moved


def test_collectives_are_added_up() -> None:
    cost = cost_of("ROOT %result = f32[16,8]{1,0:T(8,128)} all-reduce(%narrow), to_apply=%fused")
    assert dict(cost.collectives) == {"all-reduce": 1} and cost.reduced == 4 * 16 * 8
