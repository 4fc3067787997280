// plop_ext._C: loads the kernel library and reports how it was built. No torch header: the kernels register
// themselves with torch when the library is opened, so this module depends on the Python version only and the kernels
// on neither.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

void load(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    const char* reason = dlerror();
    throw py::import_error(reason ? reason : "dlopen failed without a reason");
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = PLOP_VERSION;
  info["cuda"] = *PLOP_CUDA_VERSION ? py::object(py::str(PLOP_CUDA_VERSION)) : py::object(py::none());
  info["cuda_archs"] = PLOP_CUDA_ARCHS;
  info["torch_target"] = PLOP_TORCH_TARGET;
  info["built_with_torch"] = PLOP_BUILD_TORCH;
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loader of the native kernels.";
  m.def("load", &load, py::arg("path"), "Open the kernel library; its ops register with torch. Raises ImportError.");
  m.def("build_info", &build_info, "Versions, CUDA architectures and compiler of this build.");
}
