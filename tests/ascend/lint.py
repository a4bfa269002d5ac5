"""L1: the kernels under ascend_ops/ use only what CANN documents for the Ascend910A.

    python tests/ascend/lint.py [file ...]      # prints findings, exits 1 if there are any

A text check of every call, type and enumerator against the tables below, which were read from the
API pages of CANN's AscendC documentation (asc-devkit, July 2026; each page lists the products it
supports, the 910A as "Atlas training series"). The pages' dtype lists are enforced where types are
known: as static_asserts of the stand-in kernel_operator.h, against which the kernels must compile.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(os.environ.get("SKIPVIT_ASCEND_SOURCES", Path(__file__).parents[2]))

# The page of each API that the kernels may call, and what it says of the 910A.
SUPPORTED = {
    "Add": "arithmetic/Add: half, int32, float",
    "Sub": "arithmetic/Sub: half, int32, float",
    "Mul": "arithmetic/Mul: half, int32, float",
    "Div": "arithmetic/Div: half, float",
    "Max": "arithmetic/Max: half, int32, float",
    "Min": "arithmetic/Min: half, int32, float",
    "Adds": "arithmetic/Adds: half, float",
    "Muls": "arithmetic/Muls: half, float",
    "Exp": "arithmetic/Exp: half, float",
    "And": "logic/And: int16, uint16",
    "Compare": "comparison/Compare, result in memory: half, float; mask has no effect",
    "WholeReduceSum": "reduction/WholeReduceSum: half; float under SKIPVIT_REDUCE_FLOAT (fold.h)",
    "Cast": "conversion/Cast: half to float, int32 to float, float to half",
    "Duplicate": "fill/Duplicate: 16- and 32-bit types",
    "DataCopy": "data moves/DataCopy: GM-UB contiguous and strided, UB-UB; no bfloat16",
    "AllocTensor": "TQue: at most 4 tensors at a time of one position",
    "EnQue": "TQue",
    "DeQue": "TQue",
    "FreeTensor": "TQue",
    "InitBuffer": "TPipe: at most 64 buffers",
    "FetchEventID": "TPipe",
    "Get": "TBuf",
    "GetValue": "LocalTensor",
    "SetValue": "LocalTensor only: results written through the scalar cache of GM are not flushed",
    "ReinterpretCast": "LocalTensor",
    "SetGlobalBuffer": "GlobalTensor",
    "SetFlag": "synchronisation: event ids 0 to 3",
    "WaitFlag": "synchronisation: event ids 0 to 3",
    "PipeBarrier": "synchronisation: any pipe but the scalar one",
    "GetBlockIdx": "system variables",
}
TYPES = {"TPipe", "TQue", "TQueBind", "TBuf", "LocalTensor", "GlobalTensor", "DataCopyParams"}

# Named so that the message can say more than "unknown". 370 pages in all say "not supported".
UNSUPPORTED = {
    "DataCopyPad", "Copy", "Gather", "Gatherb", "GatherMask", "Scatter", "CreateVecIndex", "Brcb",
    "VectorPadding", "Sort32", "Sort", "Concat", "Extract", "MrgSort", "GetMrgSortResult", "Maxs",
    "Mins", "Neg", "LeakyRelu", "ShiftLeft", "ShiftRight", "Compares", "FusedMulAdd", "AddRelu",
    "MulAddDst", "SubRelu", "Ands", "Ors", "SetMaskCount", "SetMaskNorm", "ResetMask",
    "DataCacheCleanAndInvalid", "CrossCoreSetFlag", "CrossCoreWaitFlag", "GetCmpMask",
    "ScalarCast", "GetBitCount", "CountLeadingZero", "GetSFFValue", "SetAtomicMax", "SetAtomicMin",
    "ReadGmByPassDCache", "WriteGmByPassDCache", "TopK", "Pad", "UnPad", "Broadcast", "Arange",
}  # fmt: skip
BANNED_WORDS = {
    "bfloat16_t": "the 910A has no bfloat16",
    "double": "the 910A computes nothing in float64",
    "PIPE_S": "the scalar pipe has no barrier",
    "std": "the compiler has no standard library on the core",
    "new": "no heap on the core",
    "malloc": "no heap on the core",
    "throw": "no exceptions on the core",
    "try": "no exceptions on the core",
    "virtual": "no virtual functions on the core",
    "static": "no static storage on the core",
    "thread_local": "no thread storage on the core",
    "EVENT_ID4": "event ids are 0 to 3",
    "EVENT_ID5": "event ids are 0 to 3",
    "EVENT_ID6": "event ids are 0 to 3",
    "EVENT_ID7": "event ids are 0 to 3",
    "INFINITY": "the 910A has no infinity",
    "NAN": "the 910A has no NaN",
    "SetAtomicAdd": "documented for float, but not deterministic: the kernels do without",
}
ENUMERATORS = {
    "RoundMode": {"CAST_NONE"},  # the one mode of every pair that the kernels use
    "CMPMODE": {"LT", "GT", "EQ", "LE", "GE", "NE"},
    "SELMODE": {"VSEL_CMPMASK_SPR"},
    "TPosition": {"VECIN", "VECOUT", "VECCALC"},
    "HardEvent": {
        "MTE2_V", "V_MTE2", "MTE3_V", "V_MTE3", "MTE2_MTE3", "MTE3_MTE2", "V_S", "S_V", "MTE2_S",
        "S_MTE2", "MTE3_S", "S_MTE3",
    },
}  # fmt: skip
PIPES = {"PIPE_V", "PIPE_MTE2", "PIPE_MTE3", "PIPE_ALL"}
KEYWORDS = {
    "if", "for", "while", "switch", "return", "sizeof", "static_cast", "reinterpret_cast",
    "alignas", "constexpr", "const", "decltype",
}  # fmt: skip


def strip(text: str) -> str:
    """Comments and strings blanked out, line numbers kept."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    return re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", blank, text, flags=re.S)


def own_names(sources: list[str]) -> set[str]:
    """Functions, classes and buffers that the kernels define themselves."""
    names: set[str] = set()
    for text in sources:
        names |= set(re.findall(r"__aicore__\s+inline\s+[\w:<>&*\s]*?\b(\w+)\s*\(", text))
        names |= set(re.findall(r"__global__\s+__aicore__\s+void\s+(\w+)\s*\(", text))
        names |= set(re.findall(r"\b(?:class|struct|enum)\s+(\w+)", text))
    return names


def lint_file(name: str, original: str, own: set[str]) -> list[str]:
    text = strip(original)
    found: list[str] = []

    def report(position: int, message: str) -> None:
        found.append(f"{name}:{text.count(chr(10), 0, position) + 1}: {message}")

    for match in re.finditer(r'#include\s*(<[^>]*>|"[^"]*")', original):
        header = match[1].strip('<>"')
        foreign = match[1][0] == "<" or "/" in header
        if foreign and header not in ("cstdint", "../chip.h"):
            report(match.start(), f"includes {header}: not for code on the core")
    for match in re.finditer(r"\b\w+\b", text):
        if match[0] in BANNED_WORDS:
            report(match.start(), f"{match[0]}: {BANNED_WORDS[match[0]]}")
        if match[0].startswith("PIPE_") and match[0] not in PIPES:
            report(match.start(), f"{match[0]}: no such pipe for these kernels")
    for match in re.finditer(r"\b(\w+)::(\w+)\b", text):
        if match[1] in ENUMERATORS and match[2] not in ENUMERATORS[match[1]]:
            report(match.start(), f"{match[0]}: not documented for the 910A")
    call = r"\b([A-Za-z_]\w*)\s*(?:<[\w\s:,]*>)?\s*\("
    for match in re.finditer(call, text):
        if match[1] in UNSUPPORTED:
            report(match.start(), f"{match[1]}: CANN documents it as not supported on the 910A")
        elif match[1] not in SUPPORTED and match[1] not in own | KEYWORDS | TYPES:
            report(match.start(), f"{match[1]}: no API that CANN documents for the 910A")
    # Device code reaches functions by name only: no pointers to them, no lambdas.
    for match in re.finditer(r"\[[&=]?\]\s*\(|\bauto\s+\w+\s*=\s*[^;]*\?[^;]*(?:<[^;]*>)", text):
        report(match.start(), "a lambda or a pointer to a function")
    # GM_ADDR is a macro for a pointer: a second declarator would not be one.
    for match in re.finditer(r"\bGM_ADDR\s+\w+\s*,\s*\w+\s*[,;]", text):
        report(match.start(), "one GM_ADDR a declaration: it is a macro for a pointer type")
    return found


def lint(paths: list[Path]) -> list[str]:
    texts = {path: path.read_text() for path in paths}
    own = own_names([strip(text) for text in texts.values()])
    found = [finding for path, text in texts.items() for finding in lint_file(path.name, text, own)]
    for path, text in texts.items():
        kernels = re.findall(r"__global__\s+__aicore__\s+void\s+\w+", strip(text))
        if path.suffix == ".cpp" and len(kernels) != 1:
            found.append(f"{path.name}:1: {len(kernels)} kernels, CANN's build wants one a file")
    return found


def kernel_files() -> list[Path]:
    return sorted((ROOT / "ascend_ops" / "kernels").glob("*"))


if __name__ == "__main__":
    findings = lint([Path(argument) for argument in sys.argv[1:]] or kernel_files())
    print("\n".join(findings) or "only APIs that CANN documents for the Atlas training series")
    sys.exit(bool(findings))
