// SPDX-License-Identifier: Apache-2.0
// The kernels' launch functions. CANN's ascendc_library generates one for each kernel and a header
// that declares it; with CANN those headers are included too, so that a difference does not
// compile.
#pragma once

#include <cstdint>

#ifdef SKIPVIT_WITH_CANN
#include "aclrtlaunch_skipvit_cls_scores.h"
#include "aclrtlaunch_skipvit_fuse_backward.h"
#include "aclrtlaunch_skipvit_gather_rows.h"
#include "aclrtlaunch_skipvit_gather_topk.h"
#include "aclrtlaunch_skipvit_place_rows.h"
#include "aclrtlaunch_skipvit_sum_rows.h"
#endif

// cores, stream, then the kernel's own parameters in its order
extern "C" {
uint32_t aclrtlaunch_skipvit_gather_topk(uint32_t, void*, void*, void*, void*, void*, uint64_t,
                                         uint64_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                                         uint32_t, uint32_t, uint32_t);
uint32_t aclrtlaunch_skipvit_gather_rows(uint32_t, void*, void*, void*, void*, uint64_t, uint64_t,
                                         uint32_t, uint32_t, uint32_t, uint32_t);
uint32_t aclrtlaunch_skipvit_place_rows(uint32_t, void*, void*, void*, void*, void*, void*, void*,
                                        uint64_t, uint64_t, uint32_t, uint32_t, uint32_t, uint32_t,
                                        uint32_t);
uint32_t aclrtlaunch_skipvit_sum_rows(uint32_t, void*, void*, void*, void*, void*, uint64_t,
                                      uint64_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                                      uint32_t, uint32_t, uint32_t, uint32_t);
uint32_t aclrtlaunch_skipvit_fuse_backward(uint32_t, void*, void*, void*, void*, void*, void*,
                                           void*, uint64_t, uint64_t, uint32_t, uint32_t, uint32_t,
                                           uint32_t, uint32_t, uint32_t, uint32_t, uint32_t);
uint32_t aclrtlaunch_skipvit_cls_scores(uint32_t, void*, void*, void*, void*, uint64_t, uint64_t,
                                        uint64_t, uint64_t, uint32_t, uint32_t, uint32_t, uint32_t,
                                        uint32_t, uint32_t, uint32_t, float);
}
