// int8 lanes without permutations (SSE2, other architectures): one element at a time.
#pragma once
#include "../formats.h"

namespace fo {

constexpr int kLanes = 1, kWide = 1;

template <bool Signed>
struct Decoder {
  static constexpr Int8Map map = make_int8_map(Signed);
  FO_HD void run(const uint8_t* code, float scale, float* value) const { *value = int8_decode<Signed>(*code, scale, map); }
};

template <bool Signed>
struct Encoder {
  static constexpr Int8Map map = make_int8_map(Signed);
  FO_HD void run(const float* value, float inverse, uint8_t* code) const { *code = int8_encode<Signed>(*value, inverse, map); }

  FO_HD void run_wide(const float* values, float inverse_scale, uint8_t* codes) const { run(values, inverse_scale, codes); }
};

}  // namespace fo
