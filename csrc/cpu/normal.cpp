// Gaussian numbers from counters (normal.h), with loops that the compiler vectorises: own polynomials for the logarithm, the
// sine and the cosine, all within 4e-7 of the value, relatively. The bits are the same for every instruction set.
#include "normal.h"

#include "../precision.h"
#include "random.h"

#include <cmath>

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

// sqrt(scale * ln(n / 2^24)) with n = (word >> 8) + 1, exact in fp32, and scale < 0. n = 2^e m with m in [sqrt(1/2), sqrt(2)).
static FO_HD float radius(uint32_t word, float scale) {
  const float n = float(int32_t(word >> 8) + 1);
  int32_t bits;
  std::memcpy(&bits, &n, sizeof bits);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const int32_t mantissa = bits - exponent * (1 << 23);
  float m;
  std::memcpy(&m, &mantissa, sizeof m);
  const float e = float(exponent - 24), f = m - 1.f, square = f * f;
  float q = -0.0785962492f;
  q = q * f + 0.128816664f;
  q = q * f - 0.13128759f;
  q = q * f + 0.141811892f;
  q = q * f - 0.166245535f;
  q = q * f + 0.200022861f;
  q = q * f - 0.250008106f;
  q = q * f + 0.333333164f;
  // ln 2 in two parts, the first of 9 bits: e times it is exact
  const float log = e * 0.693359375f + (f + (square * (q * f - 0.5f) - e * 2.12194440e-4f));
  return std::sqrt(scale * log);
}

// Cosine and sine of 2 pi (word >> 8) / 2^24: those of the rest to the nearest quarter turn, exchanged and with signs.
static FO_HD void turn(uint32_t word, float& cosine, float& sine) {
  const int32_t a = int32_t(word >> 8), quarter = (a + (1 << 21)) >> 22;
  const float x = float(a - quarter * (1 << 22)) * 3.74507039e-7f, t = x * x;
  const float s = x + x * t * (-0.166666552f + t * (0.008332178f + t * -0.000195172650f));
  const float c = 1.f + t * (-0.5f + t * (0.0416666456f + t * (-0.0013887367f + t * 2.44384155e-5f)));
  const float first = quarter & 1 ? s : c, second = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -first : first;
  sine = quarter & 2 ? -second : second;
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
