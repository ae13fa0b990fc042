// Python's view of the flat interface: addresses in, exceptions out.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>

#include "magnitude.hpp"

namespace {

void raise_unless_ok(activemark::Status status) {
    switch (status) {
        case activemark::Status::ok:
            return;
        case activemark::Status::bad_size:
            throw pybind11::value_error("images and image_stride must be >= 0, k in 1 ... values_per_image");
        case activemark::Status::out_of_memory:
            throw std::bad_alloc();
    }
}

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void top_magnitudes_f32(std::uintptr_t x, std::int64_t images, std::int64_t values_per_image,
                        std::int64_t image_stride, std::int64_t k, std::uintptr_t values,
                        std::uintptr_t index, std::uintptr_t nonfinite) {
    activemark::Status status;
    {
        const pybind11::gil_scoped_release release;
        status = activemark::top_magnitudes_f32(
            pointer<const float>(x), images, values_per_image, image_stride, k, pointer<float>(values),
            pointer<std::int64_t>(index), pointer<std::int64_t>(nonfinite));
    }
    raise_unless_ok(status);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled kernels of activemark_fast. Arguments are addresses and sizes; see csrc/*.hpp.";
    module.def("top_magnitudes_f32", &top_magnitudes_f32, pybind11::arg("x"), pybind11::arg("images"),
               pybind11::arg("values_per_image"), pybind11::arg("image_stride"), pybind11::arg("k"),
               pybind11::arg("values"), pybind11::arg("index"), pybind11::arg("nonfinite"));
}
