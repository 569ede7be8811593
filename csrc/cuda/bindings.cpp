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

void launch(const py::bytes& packed, uintptr_t stream) {
  fo::Launch work;
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw py::error_already_set();
  if (size != Py_ssize_t(sizeof work)) throw std::invalid_argument("a Launch has launch_bytes() bytes");
  std::memcpy(&work, data, sizeof work);
  if (const char* error = fo::cuda_launch(work, reinterpret_cast<void*>(stream))) throw std::runtime_error(std::string("CUDA: ") + error);
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
  m.def("launch_bytes", [] { return sizeof(fo::Launch); }, "Size of a packed Launch.");
  m.def("describe", &describe, "(name, states, scalars, trust_on) of every rule, in the order of rule ids.");
  m.def("device_count", &device_count, "Number of CUDA devices; raises RuntimeError where there is no driver.");
  m.def("sm_count", &sm_count, py::arg("device"), "Streaming multiprocessors of a device.");
}
