// Gaussian numbers from counters (normal.h), with loops that the compiler vectorises. The bits are the same for every instruction set.
#include "normal.h"

#include "../gauss.h"
#include "../precision.h"
#include "random.h"


namespace fo {

constexpr int kGroups = kNormals / 4;

typedef uint32_t WordVector __attribute__((vector_size(4 * kOctetLanes)));

// The four words of kGroups counters from group `first` of a component on.
static void draw_words(const ProjectorSeed& key, int64_t component, int64_t first, uint32_t (*words)[kGroups]) {
  constexpr int lanes = kOctetLanes, step = lanes * kTogether;
  static_assert(kGroups % step == 0, "whole vectors");
  OctetVector order;
  for (int lane = 0; lane < lanes; ++lane) order[lane] = uint64_t(lane);
  const uint64_t high = stream_octet(uint64_t(component) << 32, kProjectorStream) >> 32;
  for (int i = 0; i < kGroups; i += step) {
    OctetVectors c[4];
    for (int j = 0; j < kTogether; ++j) {
      c[0].v[j] = order + uint64_t(first + i + j * lanes);
      c[1].v[j] = OctetVector{} + high;
      c[2].v[j] = OctetVector{} + key.tensor;
      c[3].v[j] = OctetVector{} + key.step;
    }
    philox_rounds<OctetRounds>(c, uint32_t(key.seed), uint32_t(key.seed >> 32));
    for (int w = 0; w < 4; ++w) {
      for (int j = 0; j < kTogether; ++j) {
        const WordVector word = __builtin_convertvector(c[w].v[j], WordVector);
        std::memcpy(words[w] + i + j * lanes, &word, sizeof word);
      }
    }
  }
}

static void to_normals(const uint32_t* __restrict one, const uint32_t* __restrict other, float scale, float* __restrict even,
                       float* __restrict odd) {
  for (int i = 0; i < kGroups; ++i) {
    const float r = radius(one[i], scale);
    float cosine, sine;
    turn(other[i], cosine, sine);
    even[i] = r * cosine;
    odd[i] = r * sine;
  }
}

static void round_bf16(float* x) {
  for (int i = 0; i < kNormals; ++i) x[i] = bf16_to_float(float_to_bf16(x[i]));
}

static void round_f16(float* x) {
  for (int i = 0; i < kNormals; ++i) x[i] = f16_to_float(float_to_f16(x[i]));
}

void draw_normals(const ProjectorSeed& key, int64_t component, int64_t start, int32_t dtype, float* out) {
  alignas(64) uint32_t words[4][kGroups];
  alignas(64) float normals[4][kGroups];
  draw_words(key, component, start / 4, words);
  const float scale = -2.f / float(key.rank);
  to_normals(words[0], words[1], scale, normals[0], normals[1]);
  to_normals(words[2], words[3], scale, normals[2], normals[3]);
  for (int i = 0; i < kGroups; ++i)
    for (int k = 0; k < 4; ++k) out[4 * i + k] = normals[k][i];
  if (dtype == kBF16) round_bf16(out);
  else if (dtype == kF16) round_f16(out);
}

}  // namespace fo
