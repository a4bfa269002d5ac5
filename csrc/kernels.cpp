// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with SKIPVIT_ISA naming the namespace. Everything but the
// table is in an unnamed namespace and no library template is used: a weak symbol compiled for
// AVX-512 could otherwise be the one the linker keeps for a machine without it.
#include "kernels.h"

#include "merge-inl.h"
#include "rows-inl.h"
#include "scores-inl.h"
#include "sums-inl.h"
#include "topk-inl.h"

namespace skipvit {
namespace SKIPVIT_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    cls_logits,
    cls_softmax_mean,
    head_mean,
    select_topk,
    check_range,
    invert_index,
    gather_rows,
    sum_dropped,
    fuse_backward,
    scatter_rows,
    scatter_back_backward,
    match_higher,
    match_kept,
    group_rows,
    merge_rows,
    merge_rows_backward,
    restore_rows,
    restore_rows_backward,
};

}  // namespace SKIPVIT_ISA
}  // namespace skipvit
