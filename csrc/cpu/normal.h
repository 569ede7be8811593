// APOLLO's random projector from its seed (arXiv 2412.05270, algorithm 1): N(0, 1) / sqrt(rank) by Box and Muller (1958).
//
// Four neighbours along the projected side, d = 4 q to 4 q + 3 of component j, share one Philox call: counter (q, 0xFE << 24 | j,
// tensor id, step). Words 0 and 1 make the first two, words 2 and 3 the others: r cos(t) and r sin(t) with
// r^2 = -2 / rank * ln(((w >> 8) + 1) / 2^24) of the one word and t = 2 pi (w' >> 8) / 2^24 of the other.
#pragma once
#include "../fusedopt.h"

namespace fo {

constexpr int kProjectorStream = 0xFE;  // of the counter (philox.h): no parameter or state draws from it
constexpr int kNormals = 256;           // numbers that are drawn at a time

struct ProjectorSeed {
  uint64_t seed;
  uint32_t tensor, step;
  int64_t rank;
};

// Numbers [start, start + kNormals) of a component as fp32, rounded to `dtype`. start: a multiple of kNormals.
void draw_normals(const ProjectorSeed& key, int64_t component, int64_t start, int32_t dtype, float* out);

}  // namespace fo
