"""The machine that executes PTX: does it notice a kernel that is wrong?

PYTHONPATH=tests pytest -p ptx.executed tests/ptx
"""

import os
import random
import re
import sys

import pytest
import torch

if "ptx.executed" not in sys.modules:
    pytest.skip("runs with -p ptx.executed, as `make test-ptx` does", allow_module_level=True)

import triton
from ptx.executed import driver, executed
from ptx.machine import Fault, Memory, Program, UnknownInstruction

from skipvit_kernels import reference
from skipvit_kernels.backends import triton as kernels
from skipvit_kernels.backends.triton import merge, rows, scores, topk

# ------------------------------------------------------------------- the machine itself

HEAD = """.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 32
{
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	shl.b32 	%r2, %r1, 2;
"""


def run(body, out, shared=128, programs=1, inputs=()):
    program = Program(HEAD + body + "\tret;\n}\n")
    program.run([out.data_ptr()], [out], Memory(inputs), programs, shared)
    return out.tolist()


def test_threads_store_what_they_load():
    out = torch.arange(32, dtype=torch.int32)
    body = """
	ld.global.b32 	%r3, [%rd3];
	st.shared.b32 	[%r2], %r3;
	bar.sync 	0;
	xor.b32 	%r4, %r2, 4;
	ld.shared.b32 	%r5, [%r4];
	st.global.b32 	[%rd3], %r5;
"""
    with pytest.raises(Fault, match="store to what this launch reads"):
        run(body, out, inputs=[out])
    body = body.replace("ld.global.b32 \t%r3, [%rd3];", "mov.b32 \t%r3, %r1;")
    assert run(body, out) == [i ^ 1 for i in range(32)]


def test_lanes_branch_apart_and_meet_again():
    body = """
	mov.u32 	%r3, 0;
	setp.lt.u32 	%p1, %r1, 5;
	@!%p1 bra 	$L2;
$L1:
	add.s32 	%r3, %r3, 1;
	setp.lt.s32 	%p2, %r3, %r1;
	@%p2 bra 	$L1;
	bra 	$L3;
$L2:
	mov.u32 	%r3, 100;
$L3:
	redux.sync.add.s32 	%r4, %r3, -1;
	add.s32 	%r5, %r4, %r3;
	st.global.b32 	[%rd3], %r5;
"""
    own = [1, 1, 2, 3, 4] + [100] * 27
    out = torch.zeros(32, dtype=torch.int32)
    assert run(body, out) == [sum(own) + value for value in own]


FAULTS = {
    "out of bounds": "st.global.b32 [%rd3+4], %r1;",
    "misaligned": "st.global.b32 [%rd3+2], %r1;",
    "misaligned shared": "st.shared.b32 [%r2+2], %r1;",
    "shared store at 128 out of bounds": "st.shared.b32 [%r2+4], %r1;",
    "global memory that nobody wrote": "ld.global.b32 %r3, [%rd3];",
    "shared memory that nobody wrote": "ld.shared.b32 %r3, [%r2];",
    "load of what this launch wrote": "st.global.b32 [%rd3], %r1; ld.global.b32 %r3, [%rd3];",
    "unequal values stored to one global address": "st.global.b32 [%rd1], %r1;",
    "unequal values stored to one shared address": "st.shared.b32 [0], %r1;",
    "read after write": "st.shared.b32 [%r2], %r1; ld.shared.b32 %r3, [4];",
    "write after read": (
        "st.shared.b32 [%r2], 7; bar.sync 0; ld.shared.b32 %r3, [0]; st.shared.b32 [%r2], 7;"
    ),
    "not all lanes reach": (
        "setp.lt.s32 %p1, %r1, 5; @%p1 bra $L1; bar.sync 0; bra $L2;"
        " $L1: bar.sync 0; $L2: mov.u32 %r3, 0;"
    ),
    "not all lanes": "setp.lt.s32 %p1, %r1, 5; @%p1 redux.sync.add.s32 %r3, %r1, -1;",
    "never ends": "$L1: bra $L1;",
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_have_a_name(what):
    with pytest.raises(Fault, match=what):
        run(FAULTS[what].replace("; ", ";\n") + "\n", torch.zeros(32, dtype=torch.int32))


def test_a_copy_is_there_after_it_is_waited_for():
    body = """
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4, 4;
	cp.async.commit_group;
	cp.async.wait_group 0;
	ld.shared.b32 	%r3, [%r2];
"""
    x = torch.arange(32, dtype=torch.int32)
    run(body, x, inputs=[x])
    with pytest.raises(Fault, match=r"before cp\.async ended"):
        run(body.replace("cp.async.wait_group 0;", ""), x, inputs=[x])
    with pytest.raises(Fault, match="read after write"):  # another thread's: a barrier is missing
        run(body.replace("[%r2];", "[4];"), x, inputs=[x])


def test_the_gap_of_a_view_is_out_of_bounds():
    buffer = torch.zeros(8, 8, dtype=torch.int32)
    with pytest.raises(Fault, match="outside the tensor's elements"):
        run("st.global.b32 [%rd3], 0;", buffer[:, :4])


@pytest.mark.parametrize(
    "unknown", ["tanh.approx.f32 %r3, %r1", "add.s32 %r3, %r1", "mov.u32 %r3, %clock"]
)
def test_an_unknown_instruction_fails_by_name(unknown):
    with pytest.raises(UnknownInstruction, match=re.escape(unknown.split()[-1])):
        run(unknown + ";\n", torch.zeros(32, dtype=torch.int32))


# ------------------------------------------------------------------- the kernels, and mutants


torch.manual_seed(0)
X = torch.randn(2, 50, 72).to(torch.bfloat16)
# Every other patch leads, and more of them than are kept: a score read from beside changes the set.
WEIGHTS = torch.rand(2, 3, 49) / 8 + torch.arange(49) % 2
RANKS = WEIGHTS.mean(1)
INDEX = reference.gather_topk(X, WEIGHTS, 22)[1]
GRAD = torch.randn(2, 24, 72).to(X)
TOKENS, AFTER, UPDATE = GRAD[:, :23].contiguous(), GRAD[:, 1:].contiguous(), GRAD[:, 0].contiguous()
OWNER, SIZES = reference.match_kept(X, INDEX), torch.rand(2, 50) + 0.5
MERGED = reference.merge_rows(X, OWNER, 23, sizes=SIZES)[1]
# Ties up to the second block of 1,024, and an odd last bit: where it is even, the last count of the
# selection by bits is the same as the one behind it.
TIED = 1 + (torch.randint(8, (1, 1100)) * 2 + 1) * 2.0**-23
Q, K = torch.randn(2, 3, 32), torch.randn(2, 3, 50, 32)

# name -> operator, arguments; together they launch every kernel
CALLS = {
    "cls_scores": ("cls_scores", Q, K),
    "cls_scores, long": ("cls_scores", Q[:1, :1], torch.randn(1, 1, 1030, 32)),
    "gather_topk": ("gather_topk", X[:1, :, :8], WEIGHTS[:1], 22),
    "gather_topk, two launches": ("gather_topk", torch.randn(1, 1101, 8), TIED, 1095),
    "gather_topk_fuse": ("gather_topk_fuse", X, WEIGHTS, 22),
    "gather_topk_fuse_backward": ("gather_topk_fuse_backward", GRAD, X, WEIGHTS, INDEX),
    "gather_rows": ("gather_rows", X, INDEX),
    "gather_rows_backward": ("gather_rows_backward", TOKENS, INDEX, 50),
    "scatter_back": ("scatter_back", X, TOKENS, INDEX, UPDATE),
    "scatter_back_backward": ("scatter_back_backward", X, INDEX, True),
    "match_higher": ("match_higher", X, RANKS),
    "match_higher, float32": ("match_higher", K, RANKS),
    "match_kept": ("match_kept", X, INDEX),
    "match_kept, float32": ("match_kept", K, INDEX),
    "merge_rows": ("merge_rows", X, OWNER, 23, SIZES),
    "merge_rows_backward": ("merge_rows_backward", TOKENS, OWNER, SIZES, MERGED),
    "restore_rows": ("restore_rows", X, TOKENS, AFTER, OWNER),
    "restore_rows_backward": ("restore_rows_backward", X, OWNER, 23),
}
OPTIONS = {"scatter_back": ("update",), "merge_rows": ("sizes",)}


def call(name):
    """The results' bytes."""
    operator, *args = CALLS[name]
    options = dict(zip(OPTIONS.get(operator, ()), args[3:], strict=False))
    args = args[: len(args) - len(options)]
    results = driver.call(getattr(kernels, operator))(*args, **options)
    results = results if isinstance(results, tuple) else (results,)
    return [r.contiguous().view(torch.uint8).clone() for r in results if r.numel()]


def test_every_kernel_is_executed():
    for name in CALLS:
        call(name)
    launched = {name for name, count in executed.items() if count["launches"]}
    assert launched == {
        name
        for module in (merge, rows, scores, topk)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel")
    }


def removed(match):
    return [""]


def shifted(match):
    """By one element, up or down: the one beside may hold the same value."""
    size = int(re.search(r"\.[bs](\d+)", match[0])[1]) // 8
    address = r"\s*(?:\+ ?(\d+))? ?\]"
    return [
        re.sub(address, lambda m: f"+{int(m[1] or 0) + by}]", match[0], count=1)  # noqa: B023
        for by in (size, -size)
    ]


GUARD = r"(?:@!?%p\d+ )?"
MUTANTS = {
    "barrier removed": (r"bar\.sync[^;]*;", removed),
    "wait removed": (r"cp\.async\.wait_group[^;]*;", removed),
    "global address shifted": (GUARD + r"(?:ld|st)\.global[^;]*;", shifted),
    "shared address shifted": (GUARD + r"(?:ld|st)\.shared[^;]*;", shifted),
    "store removed": (GUARD + r"st\.(?:global|shared)[^;]*;", removed),
}
# Of each kind and kernel, so many places; SKIPVIT_PTX_MUTANTS=1000 takes all.
PLACES = int(os.environ.get("SKIPVIT_PTX_MUTANTS", "2"))


def noticed(name, program, match, replacement, want):
    """By a fault, or by other results."""
    text = program.ptx[: match.start()] + replacement + program.ptx[match.end() :]
    driver.instead = {program: Program(text)}
    try:
        return not all(map(torch.equal, call(name), want))
    except Fault:
        return True
    finally:
        driver.instead = {}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CALLS)
def test_a_mutant_is_noticed(name):
    want = call(name)
    mutants, survivors = 0, []
    for program in dict.fromkeys(driver.launched):
        for kind, (pattern, change) in MUTANTS.items():
            places = list(re.finditer(pattern, program.ptx))
            for match in random.Random(0).sample(places, min(PLACES, len(places))):
                # The largest of 22 cosines stays it where one of 72 products is wrong, and the
                # 1,095th of 1,100 scores where one of them is another.
                ranks = name.startswith(("match_kept", "gather_topk, two launches"))
                if ranks and change is shifted and "ld." in match[0]:
                    continue
                guard = re.match(GUARD, match[0])[0]
                if not noticed(name, program, match, guard + "trap;", want):
                    continue  # nobody comes here, of any thread
                mutants += 1
                if not any(noticed(name, program, match, new, want) for new in change(match)):
                    survivors.append((program.name, kind, match[0], match.start()))
    assert mutants and not survivors
