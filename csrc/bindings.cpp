// Python's view of the flat interface: addresses in, exceptions out.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "magnitude.hpp"

namespace py = pybind11;
using namespace activemark;

namespace {

void raise_unless_ok(Status status) {
    switch (status) {
        case Status::ok:
            return;
        case Status::bad_size:
            throw py::value_error(
                "images and image_stride must be >= 0, k in 1 ... values_per_image (on CUDA at most 32), "
                "threads >= 1");
        case Status::unsupported:
            throw std::runtime_error("this processor lacks the instructions asked for");
        case Status::launch_failed:
            throw std::runtime_error("CUDA refused to launch the magnitude kernel");
    }
}

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Magnitudes outputs(std::uintptr_t values, std::uintptr_t index, std::uintptr_t median,
                   std::uintptr_t mean_square, std::uintptr_t nonfinite) {
    return {pointer<float>(values), pointer<std::int64_t>(index), pointer<float>(median),
            pointer<float>(mean_square), pointer<std::int64_t>(nonfinite)};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled kernels of activemark_fast. Arguments are addresses and sizes; see csrc/*.hpp.";

    py::enum_<Dtype>(module, "Dtype")
        .value("float32", Dtype::float32)
        .value("float16", Dtype::float16)
        .value("bfloat16", Dtype::bfloat16);
    py::enum_<Instructions>(module, "Instructions")
        .value("portable", Instructions::portable)
        .value("avx2", Instructions::avx2)
        .value("avx512", Instructions::avx512);
    module.def("best_instructions", &best_instructions);
    module.def("scratch_size", &scratch_size, py::kw_only(), py::arg("values_per_image"), py::arg("threads"));

    module.def(
        "magnitudes_cpu",
        [](std::uintptr_t x, Dtype dtype, std::int64_t images, std::int64_t values_per_image,
           std::int64_t image_stride, std::int64_t k, std::uintptr_t values, std::uintptr_t index,
           std::uintptr_t median, std::uintptr_t mean_square, std::uintptr_t nonfinite,
           std::uintptr_t scratch, int threads, Instructions instructions) {
            Status status;
            {
                const py::gil_scoped_release release;
                status =
                    magnitudes_cpu({pointer<const void>(x), dtype, images, values_per_image, image_stride}, k,
                                   outputs(values, index, median, mean_square, nonfinite),
                                   pointer<std::int8_t>(scratch), threads, instructions);
            }
            raise_unless_ok(status);
        },
        py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("images"), py::arg("values_per_image"),
        py::arg("image_stride"), py::arg("k"), py::arg("values"), py::arg("index"), py::arg("median"),
        py::arg("mean_square"), py::arg("nonfinite"), py::arg("scratch"), py::arg("threads"),
        py::arg("instructions"));

#ifdef ACTIVEMARK_CUDA
    module.attr("cuda") = true;
    module.attr("MOST_TOP_CUDA") = kMostTopCuda;
    module.def("scratch_size_cuda", &scratch_size_cuda, py::kw_only(), py::arg("images"),
               py::arg("values_per_image"));
    module.def(
        "magnitudes_cuda",
        [](std::uintptr_t x, Dtype dtype, std::int64_t images, std::int64_t values_per_image,
           std::int64_t image_stride, std::int64_t k, std::uintptr_t values, std::uintptr_t index,
           std::uintptr_t median, std::uintptr_t mean_square, std::uintptr_t nonfinite,
           std::uintptr_t scratch, std::uintptr_t stream) {
            Status status;
            {
                const py::gil_scoped_release release;
                status =
                    magnitudes_cuda({pointer<const void>(x), dtype, images, values_per_image, image_stride},
                                    k, outputs(values, index, median, mean_square, nonfinite),
                                    pointer<void>(scratch), pointer<void>(stream));
            }
            raise_unless_ok(status);
        },
        py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("images"), py::arg("values_per_image"),
        py::arg("image_stride"), py::arg("k"), py::arg("values"), py::arg("index"), py::arg("median"),
        py::arg("mean_square"), py::arg("nonfinite"), py::arg("scratch"), py::arg("stream"));
#else
    module.attr("cuda") = false;
#endif
}
