"""Starting beside the kernel before: programmatic dependent launch, on NVIDIA GPUs from 9.0 on.

A kernel so launched starts once every program of the one before it has called `gdc_launch_dependents`, or has ended;
`gdc_wait` returns when the one before has ended and all that it wrote is there. Whoever starts early keeps three rules:

    before the wait   no load, no store, no atomic; addresses alone are handed to the L2 cache, which all see alike. So
                      nothing has to be constant: words, plan and grid may be what the kernel before is writing (a layer
                      laid out on this stream just now), and memory that it still reads (the allocator gives it to us
                      again as y or as sums in parts) stays as it is
    every program     waits, whatever it does then. So this kernel ends after the one before, which ended after the one
                      before that: whoever waits for us has waited for all of them
    after the wait    the next may start: it is never more than one ahead, and its loads take the bandwidth that our
                      last programs leave. It waits for our end, so our stores need not come before that call
"""

# Triton compiles these functions and gives names another meaning than Python's types do.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_unpack import WORDS

FROM = 90  # 10 times the capability
MOST: tl.constexpr = tl.constexpr(128)  # planes a program fetches: of all that run at once less than half an H100's L2

# One thread of each program; of 16-byte pieces, at an address rounded down to one.
_FETCH: tl.constexpr = tl.constexpr(
    "{ .reg .pred p; .reg .b32 t; .reg .b64 a; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; setp.gt.and.s32 p, $2, 0, p; "
    "and.b64 a, $1, -16; @p cp.async.bulk.prefetch.L2.global [a], $2; mov.b32 $0, 0; }"
)
_FETCH_LINE: tl.constexpr = tl.constexpr("{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }")


@triton.jit
def _fetch(at, size):
    tl.inline_asm_elementwise(_FETCH, "=r,l,r", [at.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _fetch_line(at):
    tl.inline_asm_elementwise(_FETCH_LINE, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def share_of(planes):
    """The first plane of a program's share, and how many there are to fetch; none or fewer where there is no more."""
    programs = tl.num_programs(0)
    share = (planes + programs - 1) // programs
    first = (programs - 1 - tl.program_id(0)) * share
    count = tl.minimum(tl.minimum(share, planes - first), MOST)
    return first, tl.where(tl.program_id(1) == 0, count, 0)


@triton.jit
def start_early(words, plan, planes, tiles, tile):
    """Fetch what the launch reads first into the L2 cache, then wait for the kernel before.

    Which words are a program's own only the plan says, which must not be read yet: each fetches an equal share of all
    `planes`, whose use it may be or another's. The last tiles are the first programs'.
    """
    _fetch_line(plan + tile)
    _fetch_line(plan + tiles + tile)
    first, count = share_of(planes)
    _fetch(words + first.to(tl.int64) * WORDS, count * (4 * WORDS))
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
