// What the projections with a given and with a random projector share.
#pragma once
#include "matrix.h"

namespace fo {

// n numbers to a tensor of a dtype, from an offset on.
void store_result(const float* x, int64_t n, int32_t dtype, void* to, int64_t offset);

// The projection of `work` with a projector [rank, K] on either side, and the sums of squares of the gradient's columns (left) or
// rows (right), or null. square_slices: a sum per slice of the ProjectPlan and column or row.
void project_components(const ProjectLaunch& work, float* squares, float* square_slices);

}  // namespace fo
