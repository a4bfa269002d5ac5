"""Mutation check of the Ascend kernels: does the suite notice when one of them is wrong?

    python tests/ascend/mutants.py                      # all; writes docs/results/ascend_mutants.txt
    python tests/ascend/mutants.py "name" ...           # some, by name

Each mutant is one fault in a copy of the sources: a barrier left out, a length off by a block, a flag
swapped, a tie rule turned round. The copy is built and the tests of the kernels run on it until one
fails. `why` marks a mutant that changes nothing that anybody could see, and says why.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "results" / "ascend_mutants.txt"
TIMEOUT = 300  # a mutant that never ends is caught


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # under ascend_ops
    edits: tuple[tuple[str, str], ...]  # each text must occur once
    why: str = ""  # equivalent, because


def mutant(name: str, file: str, old: str, new: str, *more: tuple[str, str], why: str = "") -> Mutant:
    return Mutant(name, file, ((old, new), *more), why)


K = "kernels/"
BARRIER = "PipeBarrier<PIPE_V>();\n"

MUTANTS = (
    # ---------------------------------------------------------------- barriers left out
    mutant("no barrier after the zeroed mean", K + "scores.h",
           "Duplicate(mean_.Get<float>(), 0.0f, static_cast<int32_t>(padded_));\n    " + BARRIER,
           "Duplicate(mean_.Get<float>(), 0.0f, static_cast<int32_t>(padded_));\n"),
    mutant("no barrier after the cast of half scores", K + "scores.h",
           "row, RoundMode::CAST_NONE, count);\n    " + BARRIER,
           "row, RoundMode::CAST_NONE, count);\n"),
    mutant("no barrier between mask and cast", K + "select.h",
           "{1, 1, 1, 8, 8, 0});\n    " + BARRIER, "{1, 1, 1, 8, 8, 0});\n"),
    mutant("no barrier before the comparison", K + "select.h",
           "static_cast<float>(value), static_cast<int32_t>(padded_));\n    " + BARRIER,
           "static_cast<float>(value), static_cast<int32_t>(padded_));\n"),
    mutant("no barrier between folds", K + "fold.h",
           "static_cast<int32_t>((blocks - half_up) * kBlockFloats));\n    " + BARRIER,
           "static_cast<int32_t>((blocks - half_up) * kBlockFloats));\n"),
    mutant("no barrier after a weighted row", K + "sum_rows.cpp",
           "Muls(scratch, scratch, weight, count);\n    " + BARRIER,
           "Muls(scratch, scratch, weight, count);\n"),
    mutant("no barrier after the sum is stored", K + "sum_rows.cpp",
           "    " + BARRIER + "    done_.EnQue(out);", "    done_.EnQue(out);",
           why="EnQue sets a flag behind everything the vector pipe was given"),
    # ------------------------------------------------------------------- flags left out
    mutant("index read before it arrives", K + "common.h",
           "    Sync<HardEvent::MTE2_S>(*pipe_);\n", ""),
    mutant("index overwritten while it is read", K + "common.h",
           "    Sync<HardEvent::S_MTE2>(*pipe_);  // the scalar unit has read the row before\n", ""),
    mutant("results leave before they are written", K + "common.h",
           "    Sync<HardEvent::S_MTE3>(*pipe_);\n", ""),
    mutant("results overwritten while they leave", K + "common.h",
           "    Sync<HardEvent::MTE3_S>(*pipe_);\n", ""),
    mutant("bits read before they are compared", K + "select.h",
           "    Sync<HardEvent::V_S>(*pipe_);\n", ""),
    mutant("bits overwritten while they are read", K + "select.h",
           "    Sync<HardEvent::S_V>(*pipe_);  // the scalar unit has read the bits before\n", ""),
    mutant("update used before it arrives", K + "place_rows.cpp",
           "        Sync<HardEvent::MTE2_V>(*pipe_);\n", ""),
    mutant("update overwritten while it is added", K + "place_rows.cpp",
           "        Sync<HardEvent::V_MTE2>(*pipe_);  // the additions of the image before are done\n",
           ""),
    mutant("weights read before they are there", K + "sum_rows.cpp",
           "      Sync<HardEvent::V_S>(*pipe_);\n", ""),
    mutant("weights overwritten while they are read", K + "sum_rows.cpp",
           "      Sync<HardEvent::S_V>(*pipe_);  // the weights of the block before have been read\n",
           ""),
    mutant("dots read before they are there", K + "fuse_backward.cpp",
           "    done_.FreeTensor(out);\n\n    Sync<HardEvent::V_S>(*pipe_);\n",
           "    done_.FreeTensor(out);\n\n"),
    mutant("dots overwritten while they are read", K + "fuse_backward.cpp",
           "    Sync<HardEvent::S_V>(*pipe_);  // the sums of the tile before have been read\n", ""),
    mutant("gradient of the fused row overwritten while it is used", K + "fuse_backward.cpp",
           "    Sync<HardEvent::V_MTE2>(*pipe_);\n", ""),
    mutant("logits used before they are written", K + "cls_softmax.cpp",
           "// lanes past the last key\n    Sync<HardEvent::S_V>(*pipe_);\n",
           "// lanes past the last key\n"),
    mutant("logits overwritten while they are used", K + "cls_softmax.cpp",
           "    Sync<HardEvent::V_S>(*pipe_);  // the next logits may be written\n", ""),
    mutant("result read before the division", K + "mean_heads.cpp",
           "      Mean(image, first, length);\n      Sync<HardEvent::V_S>(*pipe_);\n",
           "      Mean(image, first, length);\n"),
    # ------------------------------------------------------------ events and queues
    mutant("a flag for the wrong pipe", K + "common.h", "Sync<HardEvent::S_MTE3>(*pipe_);",
           "Sync<HardEvent::S_V>(*pipe_);"),
    mutant("a flag set twice", K + "common.h", "  SetFlag<event>(id);\n",
           "  SetFlag<event>(id);\n  SetFlag<event>(id);\n"),
    mutant("an event id the chip has not", K + "common.h", "  SetFlag<event>(id);\n  WaitFlag<event>(id);",
           "  SetFlag<event>(id + 4);\n  WaitFlag<event>(id + 4);"),
    mutant("waits for another event", K + "common.h", "  WaitFlag<event>(id);",
           "  WaitFlag<event>((id + 1) % 4);"),
    mutant("a fifth event at a time", K + "fuse_backward.cpp", "HeadMean<TS, 1>", "HeadMean<TS, 2>"),
    mutant("a tensor of a queue not freed", K + "gather.h", "      queue_.FreeTensor(tile);\n", ""),
    mutant("one buffer more than the budget knows", K + "gather.h",
           "pipe->InitBuffer(queue_, 2,", "pipe->InitBuffer(queue_, 3,"),
    mutant("a tile freed before it is used", K + "sum_rows.cpp",
           "      in = in_.template DeQue<T>();\n", "      in = in_.template DeQue<T>();\n      in_.FreeTensor(in);\n",
           ("      in_.FreeTensor(in);\n    }\n", "    }\n")),
    # ------------------------------------------------------------ lengths and buffers
    mutant("index length not rounded to blocks", K + "common.h",
           "RoundUp(count * 8, kBlockBytes) / 4);", "count * 8 / 4);"),
    mutant("index length one block short", K + "common.h",
           "RoundUp(count * 8, kBlockBytes) / 4);", "RoundUp(count * 8 - 24, kBlockBytes) / 4);"),
    mutant("scores' length not rounded to blocks", K + "scores.h",
           "RoundUp(patches_, kBlockBytes / sizeof(T));", "patches_;"),
    mutant("comparison of a partial repeat", K + "select.h",
           "Compare(bits.Get<uint8_t>(), key, threshold, mode, padded_);",
           "Compare(bits.Get<uint8_t>(), key, threshold, mode, patches_);"),
    mutant("table half as large", K + "gather_topk.cpp", "rows * sizeof(int32_t)", "rows * sizeof(int16_t)"),
    mutant("buffer size not rounded to blocks", K + "gather_rows.cpp",
           "RoundUp(moved * sizeof(int32_t), kBlockBytes)", "moved * sizeof(int32_t)"),
    mutant("a tile stored one row short", K + "gather.h", "tile, rows * width_);",
           "tile, (rows > 1 ? rows - 1 : rows) * width_);"),
    mutant("a run loaded one row long", K + "gather.h", "* width_], run * width_);",
           "* width_], (run + 1) * width_);"),
    mutant("a run joined across a gap", K + "gather.h", "first + static_cast<int32_t>(run)) {",
           "first + static_cast<int32_t>(run) + 1) {"),
    mutant("a zero row half cleared", K + "place_rows.cpp",
           "static_cast<int32_t>(channels_ * sizeof(T) / sizeof(int16_t)));",
           "static_cast<int32_t>(channels_));"),
    mutant("results past the last block not written", K + "common.h",
           "    if (count_ > 0) {\n      Flush();\n    }\n", ""),
    mutant("last block of results not filled", K + "common.h",
           "      stage_.SetValue(count_++, static_cast<T>(0));\n", "      ++count_;\n"),
    mutant("lanes past the last key not zeroed", K + "cls_softmax.cpp",
           "    Duplicate(weights, 0.0f, static_cast<int32_t>(padded_));  // lanes past the last key\n",
           "    // lanes past the last key\n"),
    # --------------------------------------------------------------- strides and offsets
    mutant("no room for the fused row", K + "gather_topk.cpp", "image * a.out_stride + first",
           "image * rows + first"),
    mutant("rows of the image before", K + "gather_rows.cpp", "image * num_tokens, row);",
           "(image > 0 ? image - 1 : 0) * num_tokens, row);"),
    mutant("columns' gap wrong", K + "sum_rows.cpp", "(channels_ - count) * sizeof(T)",
           "channels_ * sizeof(T)"),
    mutant("first column forgotten", K + "sum_rows.cpp", "* channels_ + first],", "* channels_],"),
    mutant("gradient's stride without the fused row", K + "fuse_backward.cpp",
           "grad_[(image * (num_moved_ + 1) + j) * channels_]", "grad_[(image * num_moved_ + j) * channels_]"),
    mutant("keys taken as dense", K + "cls_softmax.cpp", "(row_stride_ - width_) * sizeof(T) / kBlockBytes",
           "0 * sizeof(T) / kBlockBytes"),
    mutant("prefix not skipped in the mean", K + "mean_heads.cpp", "* in_stride_ + offset_ + first]",
           "* in_stride_ + first]"),
    mutant("fold's second stride", K + "fold.h", "{1, 1, 1, stride, stride, stride});",
           "{1, 1, 1, stride, stride, 0});"),
    mutant("query moves with the keys", K + "cls_softmax.cpp", "{1, 1, 1, stride, stride, 0});",
           "{1, 1, 1, stride, stride, stride});"),
    mutant("mask of three taken from the wrong place", K + "select.h", "[i * 2 * kLanes]", "[i * kLanes]"),
    # --------------------------------------------------------------------- shares
    mutant("two cores in a block of the index", "host/tiling.h", "split(batch * (prefix + keep), 4, cores)",
           "split(batch * (prefix + keep), 1, cores)"),
    mutant("two cores in a block of the dots", "host/tiling.h", "split(batch * round_up(tokens, 8), 8, cores)",
           "split(batch * round_up(tokens, 8), 4, cores)"),
    mutant("two cores in a block of the mean", "host/tiling.h",
           "split(total, kBlockBytes / element_size, cores)", "split(total, 1, cores)"),
    mutant("shares overlap by one", K + "common.h", "Smaller(begin + per_core, total)",
           "Smaller(begin + per_core + 1, total)"),
    mutant("the last share left out", "host/tiling.h",
           "static_cast<uint32_t>((total + per_core - 1) / per_core)",
           "static_cast<uint32_t>(std::max<uint64_t>(1, total / per_core))"),
    mutant("8 KB more than the framework leaves", "limits.h", "kUbBytes = 248 * 1024", "kUbBytes = 256 * 1024"),
    mutant("a buffer missing in the budget", "host/tiling.h", "(depth * score_size + 4 + 4)",
           "(depth * score_size + 4)"),
    mutant("columns cut inside a block", "host/tiling.h",
           "round_up((channels + wanted - 1) / wanted, 16)", "(channels + wanted - 1) / wanted"),
    # ------------------------------------------------------------------ selection
    mutant("tie rule turned round", K + "select.h",
           "uint32_t ties = left - CountLanes(low_above_, true);",
           "uint32_t ties = left - CountLanes(low_above_, true);\n"
           "    uint32_t skip = CountLanes(low_equal_, true) - ties;",
           ("(is_tie && ties == 0)", "(is_tie && skip > 0 && skip-- > 0)")),
    mutant("every tie kept", K + "select.h", "|| (is_tie && ties == 0)", ""),
    mutant("threshold search: reach becomes exceed", K + "select.h", "CMPMODE::GE", "CMPMODE::GT"),
    mutant("threshold search: one more wanted", K + "select.h", ">= wanted", "> wanted"),
    mutant("threshold search stops early", K + "select.h", "while (lowest < highest) {",
           "while (lowest + 1 < highest) {"),
    mutant("low keys of other high keys counted", K + "select.h", "    if (of_equal) {",
           "    if (false && of_equal) {"),
    mutant("ties among other high keys", K + "select.h", "equal & low_equal.GetValue(word)",
           "low_equal.GetValue(word)"),
    mutant("lanes past the last patch count", K + "select.h", ": (1u << lanes) - 1;", ": 0xFFFFFFFFu;"),
    mutant("low half of the score ignored", K + "select.h", "0x0000FFFFu", "0x0000FFFEu"),
    mutant("sign ignored", K + "select.h", "Muls(sign, sign, 0x1p-30f, n);", "Muls(sign, sign, 0.0f, n);"),
    mutant("NaN ranked as its payload", K + "select.h", "Adds(nan, nan, -32640.0f, n);",
           "Adds(nan, nan, -32768.0f, n);"),
    mutant("infinity taken for NaN", K + "select.h", "Adds(nan, nan, -32640.0f, n);",
           "Adds(nan, nan, -32639.0f, n);"),
    mutant("least NaNs taken for numbers", K + "select.h", "Adds(nan, nan, -32640.0f, n);",
           "Adds(nan, nan, -32641.0f, n);"),
    mutant("prefix left out of the rows", K + "select.h", "prefix + word * 32 + bit", "word * 32 + bit"),
    mutant("bit count wrong for full words", K + "select.h", "0x0F0F0F0Fu) * 0x01010101u",
           "0x07070707u) * 0x01010101u"),
    mutant("two heads summed, not averaged", K + "scores.h", "if (heads_ > 1) {", "if (heads_ > 2) {"),
    mutant("mean before the sum", K + "scores.h", "    if (head > 0) {", "    if (head > 1) {"),
    # ------------------------------------------------------------------ semantics, guards
    mutant("row out of range not caught", K + "gather_rows.cpp", "from < 0 ? 0 : from", "from"),
    mutant("high word of the index ignored", K + "common.h", "row_.GetValue(2 * i + 1) == 0 && ", ""),
    mutant("one row more than the share", K + "place_rows.cpp",
           "if (i >= 0 && i < static_cast<int32_t>(count)) {", "if (i >= 0 && i <= static_cast<int32_t>(count)) {"),
    mutant("update added to placed rows", K + "place_rows.cpp", "else if (kind == kBaseRow && has_update_)",
           "else if (has_update_)"),
    mutant("update of the first image for all", K + "place_rows.cpp", "update_[image * channels_]", "update_[0]"),
    mutant("prefix rows summed too", K + "sum_rows.cpp", "uint32_t next = prefix_;", "uint32_t next = 0;"),
    mutant("kept rows summed too", K + "sum_rows.cpp", "        named.SetValue(row, 1);\n",
           "        named.SetValue(row, 0);\n"),
    mutant("weight of the neighbour", K + "sum_rows.cpp", "weights.GetValue(row - prefix_)",
           "weights.GetValue(row - prefix_ > 0 ? row - prefix_ - 1 : 0)"),
    mutant("prefix rows take a gradient", K + "fuse_backward.cpp", "return row >= prefix_ && ", "return "),
    mutant("dots of kept rows not zero", K + "fuse_backward.cpp",
           "IsDropped(first + r) ? SumOfBlock(partial[r * kBlockFloats]) : 0.0f", "SumOfBlock(partial[r * kBlockFloats])"),
    mutant("seven of eight lanes added", K + "fold.h", "i < kBlockFloats; ++i", "i + 1 < kBlockFloats; ++i"),
    mutant("largest logit starts at zero", K + "cls_softmax.cpp", "largest = first + r == 0 || logit > largest",
           "largest = logit > largest"),
    mutant("scale forgotten", K + "cls_softmax.cpp", "Muls(query, query, scale, static_cast<int32_t>(width_));",
           "Muls(query, query, 1.0f, static_cast<int32_t>(width_));"),
    mutant("softmax not divided", K + "cls_softmax.cpp", "Div(weights, weights, scratch, count);",
           "Mul(weights, weights, scratch, count);"),
    mutant("heads not divided", K + "mean_heads.cpp", "Duplicate(scratch, divisor_,", "Duplicate(scratch, 1.0f,"),
    # ------------------------------------------------------------------ what the 910A lacks
    mutant("an API of later chips", K + "gather.h", "DataCopy(out_[(out_row + done) * width_], tile, rows * width_);",
           "DataCopyPad(out_[(out_row + done) * width_], tile, rows * width_);"),
    mutant("a cast of later chips", K + "sum_rows.cpp", "Cast(out, sum, RoundMode::CAST_NONE, count);",
           "Cast(out, sum, RoundMode::CAST_RINT, count);"),
)  # fmt: skip


def mutated_tree(mutant: Mutant, folder: Path) -> None:
    """The sources with the fault, as ascend_ops and tests/ascend under `folder`."""
    shutil.copytree(ROOT / "ascend_ops", folder / "ascend_ops")
    shutil.copytree(ROOT / "tests" / "ascend", folder / "tests" / "ascend")
    path = folder / "ascend_ops" / mutant.file
    text = path.read_text()
    for old, new in mutant.edits:
        if text.count(old) != 1:
            raise SystemExit(f"{mutant.name}: {text.count(old)} times in {mutant.file}: {old!r}")
        text = text.replace(old, new)
    path.write_text(text)


def caught_by(mutant: Mutant) -> str:
    """The first test that fails on the mutant, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        mutated_tree(mutant, Path(folder))
        environment = {
            **os.environ,
            "SKIPVIT_ASCEND_SOURCES": folder,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        # The tests of the model itself say nothing about a kernel.
        select = "(npu-model or ascend_model) and not model_objects and not does_not_compile"
        tests = [str(ROOT / "tests" / f) for f in ("test_ascend_model.py", "test_operators.py")]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
                   "--tb=no", "-rfE", "-k", select, *tests]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return "time limit"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not lines:
        raise SystemExit(f"{mutant.name}: the tests did not run\n{done.stdout}{done.stderr}")
    return lines[0].split(" ")[1].rpartition("/")[2].split(" - ")[0]


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or m.name in names]
    lines, survivors, equivalent = [], 0, 0
    for mutant in chosen:
        start = time.time()
        test = caught_by(mutant)
        verdict = f"caught      {test}" if test else "SURVIVED"
        if mutant.why:
            verdict = f"equivalent  {mutant.why}" if not test else f"caught, though marked: {test}"
        equivalent += bool(mutant.why) and not test
        survivors += not test and not mutant.why
        line = f"{mutant.file.removeprefix(K):18} {mutant.name:52} {verdict}"
        print(f"{line}   ({time.time() - start:.0f} s)", flush=True)
        lines.append(line)
    real = len(chosen) - equivalent
    summary = (
        f"{len(chosen)} mutants, {equivalent} equivalent, {real - survivors} of the other {real} "
        f"caught ({100 * (real - survivors) / max(1, real):.1f} %)"
    )
    print(summary)
    if not names:
        date = datetime.date.today().isoformat()
        head = [f"tests/ascend/mutants.py, {date}", summary, ""]
        RESULT.write_text("\n".join([*head, *lines, ""]))
    return int(100 * (real - survivors) < 95 * real)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
