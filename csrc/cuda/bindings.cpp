// Python module fusedopt._native_cuda: enqueues a Launch on a stream. Integers and bytes only.
#define FO_DISPATCH
#include "dispatch.h"

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

void accepted(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

void launch(const py::bytes& packed, uintptr_t stream) {
  fo::Launch work;
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw py::error_already_set();
  if (size != Py_ssize_t(sizeof work)) throw std::invalid_argument("a Launch has launch_bytes() bytes");
  std::memcpy(&work, data, sizeof work);
  accepted(fo::cuda_launch(work, reinterpret_cast<void*>(stream)));
}

void encode(int64_t values, int dtype, int64_t numel, int format, int64_t codes, int64_t scales, uintptr_t stream) {
  accepted(fo_cuda_encode(values, dtype, numel, format, codes, scales, reinterpret_cast<void*>(stream)));
}

void decode(int64_t codes, int64_t scales, int64_t numel, int format, int64_t values, int dtype, uintptr_t stream) {
  accepted(fo_cuda_decode(codes, scales, numel, format, values, dtype, reinterpret_cast<void*>(stream)));
}

void row_col_sums(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t mul, int64_t row_out, int64_t col_out, int64_t scratch,
                  uintptr_t stream) {
  accepted(fo_cuda_row_col_sums(grad, dtype, rows, cols, mul, row_out, col_out, scratch, reinterpret_cast<void*>(stream)));
}

void weighted_square_sum(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t row_weight, int64_t col_weight, int64_t out,
                         int64_t scratch, uintptr_t stream) {
  accepted(fo_cuda_weighted_square_sum(grad, dtype, rows, cols, row_weight, col_weight, out, scratch, reinterpret_cast<void*>(stream)));
}

std::vector<std::tuple<std::string, std::string, std::string, int>> describe() {
  std::vector<std::tuple<std::string, std::string, std::string, int>> rules;
  for (const fo::RuleInfo& r : fo::kRules) rules.emplace_back(r.name, r.states, r.scalars, r.trust_on);
  return rules;
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  return count;
}

int sm_count(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "Multi-tensor optimizer steps on NVIDIA GPUs. All arguments are addresses, numbers and packed Launch structs.";
  m.def("launch", &launch, py::arg("packed"), py::arg("stream"), "Enqueues one packed Launch on a stream of the current device.");
  m.def("encode", &encode, py::arg("values"), py::arg("dtype"), py::arg("numel"), py::arg("format"), py::arg("codes"), py::arg("scales"),
        py::arg("stream"), "Enqueues the encoding of a flat tensor in a blockwise format (FormatId | 0x100 for signed).");
  m.def("decode", &decode, py::arg("codes"), py::arg("scales"), py::arg("numel"), py::arg("format"), py::arg("values"), py::arg("dtype"),
        py::arg("stream"), "Enqueues the decoding of a flat tensor, rounded to nearest even.");
  m.def("sums_scratch", &fo_cuda_sums_scratch, py::arg("rows"), py::arg("cols"), "Floats of scratch of the two sums of squares.");
  m.def("row_col_sums", &row_col_sums, py::arg("grad"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("mul"),
        py::arg("row_out"), py::arg("col_out"), py::arg("scratch"), py::arg("stream"),
        "Enqueues the sums of (mul * grad)^2 by row and by column; an address 0 does not apply.");
  m.def("weighted_square_sum", &weighted_square_sum, py::arg("grad"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
        py::arg("row_weight"), py::arg("col_weight"), py::arg("out"), py::arg("scratch"), py::arg("stream"),
        "Enqueues the sum of grad^2 with a weight for each row and each column.");
  m.def("launch_bytes", [] { return sizeof(fo::Launch); }, "Size of a packed Launch.");
  m.def("describe", &describe, "(name, states, scalars, trust_on) of every rule, in the order of rule ids.");
  m.def("device_count", &device_count, "Number of CUDA devices; raises RuntimeError where there is no driver.");
  m.def("sm_count", &sm_count, py::arg("device"), "Streaming multiprocessors of a device.");
}
