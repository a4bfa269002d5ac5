// SPDX-License-Identifier: Apache-2.0
// Which build of the kernels runs: decided once, by what the CPU has, not by what built it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace skipvit {

namespace baseline {
extern const Kernels kernels;
}
#ifdef SKIPVIT_X86_64
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Candidate {
  const char* isa;
  const Kernels* table;
  bool supported;
};

CpuKernels choose() {
#ifdef SKIPVIT_X86_64
  // Best first. The built-in checks include the operating system's support for the registers.
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {
      {"avx512bf16", &avx512bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
      {"avx512", &avx512::kernels, avx512},
      {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") != 0},
      {"baseline", &baseline::kernels, true},
  };
  const char* compiled = "baseline,avx2,avx512,avx512bf16";
#else
  const Candidate candidates[] = {{"baseline", &baseline::kernels, true}};
  const char* compiled = "baseline";
#endif
  const char* wanted = std::getenv("SKIPVIT_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    if (wanted == nullptr || *wanted == '\0') {
      if (candidate.supported) {
        return {candidate.table, candidate.isa, compiled};
      }
    } else if (std::string(wanted) == candidate.isa) {
      if (!candidate.supported) {
        throw std::runtime_error("SKIPVIT_CPU_ISA=" + std::string(wanted) +
                                 ": this CPU does not have it");
      }
      return {candidate.table, candidate.isa, compiled};
    }
  }
  throw std::runtime_error("SKIPVIT_CPU_ISA must be one of " + std::string(compiled) + ", got " +
                           wanted);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels chosen = choose();
  return chosen;
}

}  // namespace skipvit
