// Blockwise encoding and decoding of one flat tensor: fusedopt.quantize_blockwise and dequantize_blockwise.
// Grid: one CTA of 8 warps per 8192 elements, 4 blocks of 256 per warp, which pays for the copy of the tables; the warp that owns the
// last block owns the tail.
#include "codec.cuh"
#include "dispatch.h"

namespace fo {

constexpr int kBlocksPerWarp = 4;
constexpr int kSpan = kBlocksPerWarp * kWarps * kBlock;

struct Flat {
  int64_t values, codes, scales, numel;  // addresses and elements
  int32_t dtype, format, aligned;
};

template <bool Encode>
__global__ void __launch_bounds__(kThreads, 3) codec_kernel(const __grid_constant__ Flat flat) {
  __shared__ CodeTables shared_tables;
  copy_code_tables(shared_tables);
  __syncthreads();
  const CodeView tables(shared_tables);
  const int64_t first = int64_t(blockIdx.x) * kSpan, left = flat.numel - first;
  const int count = int(left < kSpan ? left : kSpan), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Stream values = make_stream(flat.values, dtype_shift(flat.dtype), first);
  const Stream codes = make_stream(flat.codes, format_shift(flat.format), first);
  float* scales = reinterpret_cast<float*>(flat.scales) + (first >> block_shift(flat.format));
#pragma unroll 1
  for (int block = warp * kBlock; block < count; block += kWarps * kBlock) {
    const int at = block + lane * kOctet, live = count - at;
    const bool full = flat.aligned && block + kBlock <= count;
    const Stream &in = Encode ? values : codes, &to = Encode ? codes : values;
    Octet o;
    if (full) o = load_octet(in, at);
    else o = load_octet_masked(in, at, live);
    float v[kOctet];
    if (Encode) {
      float scale;
      widen(v, o, flat.dtype);
      o = encode(v, flat.format, scale, tables);
      if (owns_scale(flat.format, live)) __stcs(scales + (at >> block_shift(flat.format)), scale);
    } else {
      decode(v, o, flat.format, live > 0 ? __ldcs(scales + (at >> block_shift(flat.format))) : 0.f, tables);
      o = narrow(v, flat.dtype);
    }
    if (full) store_octet(to, at, o);
    else store_octet_masked(to, at, live, o);
  }
}

template <bool Encode>
const char* launch_codec(int64_t values, int dtype, int64_t numel, int format, int64_t codes, int64_t scales, void* stream) {
  if (!is_blockwise(format)) return "only blockwise formats have codes";
  if (dtype < kF32 || dtype > kF16) return "values are fp32, bf16 or fp16";
  const int64_t grid = (numel + kSpan - 1) / kSpan;
  if (grid > 0x7FFFFFFF) return "more chunks than a grid has blocks";
  if (grid <= 0) return nullptr;
  const Flat flat = {values, codes, scales, numel, dtype, format, (values | codes) % 16 == 0};
  FO_LAUNCH(codec_kernel<Encode>, grid, kThreads, stream, flat);
  return launch_error();
}

}  // namespace fo

const char* fo_cuda_encode(int64_t values, int dtype, int64_t numel, int format, int64_t codes, int64_t scales, void* stream) {
  return fo::launch_codec<true>(values, dtype, numel, format, codes, scales, stream);
}

const char* fo_cuda_decode(int64_t codes, int64_t scales, int64_t numel, int format, int64_t values, int dtype, void* stream) {
  return fo::launch_codec<false>(values, dtype, numel, format, codes, scales, stream);
}
