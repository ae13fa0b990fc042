// Python's view of the flat interface: addresses in, exceptions out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "magnitude.hpp"
#include "paint.hpp"

namespace py = pybind11;
using namespace activemark;

namespace {

void raise_unless_ok(Status status) {
    switch (status) {
        case Status::ok:
            return;
        case Status::bad_size:
            throw py::value_error(
                "wanted images and image_stride >= 0, k in 1 ... values_per_image (on CUDA at most 32), "
                "threads >= 1");
        case Status::unsupported:
            throw std::runtime_error("this processor lacks the instructions asked for");
        case Status::launch_failed:
            throw std::runtime_error("CUDA refused to launch the magnitude kernel");
    }
}

void raise_unless_ok(PaintStatus status) {
    switch (status) {
        case PaintStatus::ok:
            return;
        case PaintStatus::bad_size:
            throw py::value_error(
                "wanted height and width in 1 ... 2^24, 1 ... 2^31 - 1 discs, at most 32 octaves (for clouds "
                "at "
                "least 1), shifts in 0 ... step - 1");
        case PaintStatus::out_of_memory:
            throw std::bad_alloc();
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

// Octaves come as (lattice, shift_y, shift_x), axes as (mean, spread).
using OctaveTuple = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;
using AxisTuple = std::pair<double, double>;

std::vector<Octave> octaves_of(const std::vector<OctaveTuple>& tuples) {
    std::vector<Octave> octaves;
    for (const auto& [lattice, shift_y, shift_x] : tuples)
        octaves.push_back({pointer<const double>(lattice), shift_y, shift_x});
    return octaves;
}

Axis axis_of(AxisTuple axis) { return {axis.first, axis.second}; }

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

    module.def(
        "paint_leaves",
        [](std::int64_t height, std::int64_t width, std::uintptr_t discs, std::int64_t disc_count,
           const std::vector<OctaveTuple>& octaves, std::uintptr_t image) {
            PaintStatus status;
            {
                const py::gil_scoped_release release;
                const std::vector<Octave> texture = octaves_of(octaves);
                status =
                    paint_leaves(height, width, pointer<const Disc>(discs), disc_count, texture.data(),
                                 static_cast<std::int64_t>(texture.size()), pointer<std::uint8_t>(image));
            }
            raise_unless_ok(status);
        },
        py::kw_only(), py::arg("height"), py::arg("width"), py::arg("discs"), py::arg("disc_count"),
        py::arg("octaves"), py::arg("image"));
    module.def(
        "paint_clouds",
        [](std::int64_t height, std::int64_t width, const std::vector<OctaveTuple>& octaves, double gain,
           AxisTuple lightness, AxisTuple yellow, AxisTuple red, std::uintptr_t image) {
            PaintStatus status;
            {
                const py::gil_scoped_release release;
                const std::vector<Octave> field = octaves_of(octaves);
                status = paint_clouds(height, width, field.data(), static_cast<std::int64_t>(field.size()),
                                      gain, axis_of(lightness), axis_of(yellow), axis_of(red),
                                      pointer<std::uint8_t>(image));
            }
            raise_unless_ok(status);
        },
        py::kw_only(), py::arg("height"), py::arg("width"), py::arg("octaves"), py::arg("gain"),
        py::arg("lightness"), py::arg("yellow"), py::arg("red"), py::arg("image"));

    module.attr("MAX_TOP_CUDA") = kMaxTopCuda;
#ifdef ACTIVEMARK_CUDA
    module.attr("cuda") = true;
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
