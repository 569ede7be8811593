// Python module fusedopt._native_cpu: runs a Launch with the driver of the instruction set it names. Integers and bytes only.
#include "cpu/history.h"
#include "cpu/isa.h"
#include "cpu/matrix.h"
#include "formats.h"
#include "rule_headers.inc"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

#define FO_LIST(Type) {fo::Type::name, fo::Type::states, fo::Type::scalars, int(fo::Type::trust_on)},
const fo::RuleInfo kRules[] = {
#include "rules.inc"
};
#undef FO_LIST
constexpr int kRuleCount = int(sizeof(kRules) / sizeof(kRules[0]));

bool usable(int32_t isa) {
  if (isa == kIsaBaseline) return true;
#if defined(FO_X86)
  __builtin_cpu_init();
  if (isa == kIsaAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == kIsaAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx2");
  }
#endif
  return false;
}

FoDriver driver(int32_t isa) {
  if (!usable(isa)) throw std::invalid_argument("instruction set " + std::to_string(isa) + " is not usable here: see isa()");
#if defined(FO_X86)
  if (isa == kIsaAvx512) return fo_avx512::driver();
  if (isa == kIsaAvx2) return fo_avx2::driver();
#endif
  return fo_baseline::driver();
}

void launch(const py::bytes& packed) {
  fo::Launch work;
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw py::error_already_set();
  if (size != Py_ssize_t(sizeof work)) throw std::invalid_argument("a Launch has launch_bytes() bytes");
  std::memcpy(&work, data, sizeof work);
  if (work.bytes != int32_t(sizeof work)) throw std::invalid_argument("the layout of this Launch is another version's");
  if (work.rule < 0 || work.rule >= kRuleCount) throw std::invalid_argument("no such rule: see describe()");
  if (work.phase < fo::kFused || work.phase > fo::kDirection) throw std::invalid_argument("no such phase");
  const FoDriver chosen = driver(work.isa);
  py::gil_scoped_release released;
  if (work.phase == fo::kNorm) chosen.norm(&work);
  else chosen.steps[work.rule](&work);
}

std::vector<std::tuple<std::string, std::string, std::string, int>> describe() {
  std::vector<std::tuple<std::string, std::string, std::string, int>> rules;
  for (const fo::RuleInfo& r : kRules) rules.emplace_back(r.name, r.states, r.scalars, r.trust_on);
  return rules;
}

std::vector<std::pair<std::string, int>> isa() {
  std::vector<std::pair<std::string, int>> found;
  const char* names[kIsaCount] = {"baseline", "avx2", "avx512"};
  for (int i = 0; i < kIsaCount; ++i) {
    if (usable(i)) found.emplace_back(names[i], i);
  }
  return found;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What the tensor drivers take on trust.
FoDriver checked_driver(int32_t isa, int32_t format, int32_t dtype, int64_t numel, int32_t threads) {
  if (!fo::is_blockwise(format)) throw std::invalid_argument("no such blockwise format");
  if (dtype < fo::kF32 || dtype > fo::kF16) throw std::invalid_argument("no such dtype");
  if (numel < 0 || threads < 1) throw std::invalid_argument("a tensor has no negative size, a call at least one thread");
  return driver(isa);
}

// Runs a packed struct of cpu/matrix.h.
template <class Work>
void matrix_work(const py::bytes& packed, void (*FoDriver::*run)(const void*)) {
  Work work;
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw py::error_already_set();
  if (size != Py_ssize_t(sizeof work)) throw std::invalid_argument("this work has matrix_bytes() bytes");
  std::memcpy(&work, data, sizeof work);
  if (work.bytes != int32_t(sizeof work)) throw std::invalid_argument("the layout of this work is another version's");
  if (work.threads < 1 || work.rows < 0 || work.cols < 0) throw std::invalid_argument("no negative sizes, and at least one thread");
  if (work.rows == 0 || work.cols == 0) return;
  const FoDriver chosen = driver(work.isa);
  py::gil_scoped_release released;
  (chosen.*run)(&work);
}

// A window of gradients, after checks of what its drivers take on trust.
fo::History history(uintptr_t rows, uintptr_t scales, int32_t format, int64_t window, int64_t width, int64_t row_bytes,
                    int64_t row_scales, int32_t threads) {
  const int32_t id = format & fo::kFormatMask;
  if (!fo::is_blockwise(format) && id != fo::kFormatF32 && id != fo::kFormatBF16) throw std::invalid_argument("no such format");
  if (window < 1 || width < 0 || threads < 1) throw std::invalid_argument("no negative sizes, and at least one row and thread");
  if (fo::is_blockwise(format) && width % fo::kBlock) throw std::invalid_argument("rows of codes have whole blocks");
  return {at<void>(rows), at<float>(scales), format, window, width, row_bytes, row_scales, threads};
}

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

PYBIND11_MODULE(_native_cpu, m) {
  m.doc() = "Multi-tensor optimizer steps on the CPU. All arguments are addresses, numbers and packed Launch structs.";
  m.def("launch", &launch, py::arg("packed"), "Runs one packed Launch.");
  m.def("launch_bytes", [] { return sizeof(fo::Launch); }, "Size of a packed Launch.");
  m.def("describe", &describe, "(name, states, scalars, trust_on) of every rule, in the order of rule ids.");
  m.def("isa", &isa, "(name, code) of the instruction sets this machine can run, the widest last.");
  m.def("max_threads", &max_threads, "Threads OpenMP would use; 1 where it was not available to the build.");
  m.def(
      "encode",
      [](uintptr_t values, int32_t dtype, int64_t numel, int32_t format, uintptr_t codes, uintptr_t scales, int32_t isa,
         int32_t threads) {
        const FoDriver chosen = checked_driver(isa, format, dtype, numel, threads);
        py::gil_scoped_release released;
        chosen.encode(at<void>(values), dtype, numel, format, at<uint8_t>(codes), at<float>(scales), threads);
      },
      py::arg("values"), py::arg("dtype"), py::arg("numel"), py::arg("format"), py::arg("codes"), py::arg("scales"), py::arg("isa"),
      py::arg("threads"), "Encodes values of a dtype in a blockwise format: codes and one fp32 scale per block.");
  m.def(
      "decode",
      [](uintptr_t codes, uintptr_t scales, int64_t numel, int32_t format, uintptr_t values, int32_t dtype, int32_t isa,
         int32_t threads) {
        const FoDriver chosen = checked_driver(isa, format, dtype, numel, threads);
        py::gil_scoped_release released;
        chosen.decode(at<uint8_t>(codes), at<float>(scales), numel, format, at<void>(values), dtype, threads);
      },
      py::arg("codes"), py::arg("scales"), py::arg("numel"), py::arg("format"), py::arg("values"), py::arg("dtype"), py::arg("isa"),
      py::arg("threads"), "Decodes the codes of a blockwise format into values of a dtype, rounded to nearest even.");
  m.def("apply_matrix", [](const py::bytes& packed) { matrix_work<fo::MatrixLaunch>(packed, &FoDriver::apply_matrix); },
        py::arg("packed"), "Updates one projected parameter: a packed MatrixLaunch.");
  m.def("project", [](const py::bytes& packed) { matrix_work<fo::ProjectLaunch>(packed, &FoDriver::project); }, py::arg("packed"),
        "Projects one gradient: a packed ProjectLaunch.");
  m.def("project_seeded", [](const py::bytes& packed) { matrix_work<fo::SeededLaunch>(packed, &FoDriver::project_seeded); },
        py::arg("packed"), "Projects one gradient with random numbers from a seed: a packed SeededLaunch.");
  m.def("square_sums", [](const py::bytes& packed) { matrix_work<fo::SumsLaunch>(packed, &FoDriver::square_sums); },
        py::arg("packed"), "Sums of squares by row and column: a packed SumsLaunch.");
  m.attr("history_span") = fo::kHistorySpan;
  m.def(
      "history_products",
      [](uintptr_t rows, uintptr_t scales, int32_t format, int64_t window, int64_t width, int64_t row_bytes, int64_t row_scales,
         int64_t place, uintptr_t part, int32_t isa, int32_t threads) {
        const fo::History work = history(rows, scales, format, window, width, row_bytes, row_scales, threads);
        if (place < 0 || place >= window) throw std::invalid_argument("no such row");
        const FoDriver chosen = driver(isa);
        py::gil_scoped_release released;
        chosen.history_products(&work, place, at<double>(part));
      },
      "Products of a row with all rows of a window of gradients, part fp64 [spans, window].");
  m.def(
      "history_combine",
      [](uintptr_t rows, uintptr_t scales, int32_t format, int64_t window, int64_t width, int64_t row_bytes, int64_t row_scales,
         uintptr_t y, uintptr_t out, int32_t isa, int32_t threads) {
        const fo::History work = history(rows, scales, format, window, width, row_bytes, row_scales, threads);
        const FoDriver chosen = driver(isa);
        py::gil_scoped_release released;
        chosen.history_combine(&work, at<double>(y), at<float>(out));
      },
      "A combination of the rows of a window of gradients by y fp64 [window], out fp32 [width].");
  m.def(
      "matrix_bytes",
      [] {
        return std::make_tuple(sizeof(fo::MatrixLaunch), sizeof(fo::ProjectLaunch), sizeof(fo::SumsLaunch), sizeof(fo::SeededLaunch));
      },
      "Sizes of a packed MatrixLaunch, ProjectLaunch, SumsLaunch and SeededLaunch.");
  m.def("apply_scratch", &fo::apply_scratch, py::arg("residual"), py::arg("threads"), "Floats of scratch of apply_matrix.");
  m.def("project_scratch", &fo::project_scratch, py::arg("right"), py::arg("rows"), py::arg("cols"), py::arg("rank"),
        py::arg("threads"), "Floats of scratch of project.");
  m.def("seeded_scratch", &fo::seeded_scratch, py::arg("right"), py::arg("rows"), py::arg("cols"), py::arg("rank"),
        py::arg("threads"), "Floats of scratch of project_seeded.");
  m.def("sums_scratch", &fo::sums_scratch, py::arg("rows"), py::arg("cols"), py::arg("columns"), "Floats of scratch of square_sums.");
}
