// The Python module icae_fast._C. The files in ops/ register the ops when the library is loaded; the module itself
// reports what was built and which unit runs.
#include <Python.h>
#include <torch/version.h>

#include <exception>
#include <string>
#include <vector>

#include "common/isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

PyObject* to_list(const std::vector<std::string>& names) {
  PyObject* list = PyList_New(0);
  if (list == nullptr) return nullptr;
  for (const auto& name : names) {
    PyObject* text = PyUnicode_FromString(name.c_str());
    const bool failed = text == nullptr || PyList_Append(list, text) != 0;
    Py_XDECREF(text);
    if (failed) {
      Py_DECREF(list);
      return nullptr;
    }
  }
  return list;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(icae_fast::kernels().isa); }

PyObject* cpu_features(PyObject*, PyObject*) { return to_list(icae_fast::cpu_features()); }

PyObject* runnable_isas(PyObject*, PyObject*) { return to_list(icae_fast::runnable_isas()); }

// Advise Linux to use huge pages for memory that has not been touched yet. It is only a hint: failure is not
// reported.
PyObject* prefer_huge_pages(PyObject*, PyObject* arguments) {
  unsigned long long address = 0, bytes = 0;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const unsigned long long page = sysconf(_SC_PAGESIZE), begin = (address + page - 1) / page * page,
                           end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  Py_RETURN_NONE;
}

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  PyObject* isas = to_list(icae_fast::built_isas());
  if (isas == nullptr) return nullptr;
#if defined(_OPENMP)
  const int openmp = _OPENMP;
#else
  const int openmp = 0;
#endif
#if defined(ICAE_FAST_SANITIZE)
  const char* sanitizers = ICAE_FAST_SANITIZE;
#else
  const char* sanitizers = "";
#endif
  return Py_BuildValue("{s:s, s:s, s:l, s:i, s:s, s:N}", "compiler", compiler, "torch", TORCH_VERSION, "cxx",
                       static_cast<long>(__cplusplus), "openmp", openmp, "sanitizers", sanitizers, "isas", isas);
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {"cpu_features", cpu_features, METH_NOARGS, "The CPU's features that kernels here use and the OS enables."},
    {"runnable_isas", runnable_isas, METH_NOARGS, "The instruction sets of this build that this CPU can run."},
    {"prefer_huge_pages", prefer_huge_pages, METH_VARARGS,
     "prefer_huge_pages(address, nbytes): advise huge pages for memory that has not been touched yet."},
    {"build_info", build_info, METH_NOARGS,
     "Compiler, torch version, sanitizers and instruction sets of this build."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "icae_fast._C",
                          "Compiled kernels of icae_fast.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

// Raise BackendError for a wrong ICAE_FAST_ISA. An ImportError would look like a missing build, which is tolerated.
void raise_backend_error(const char* message) {
  PyObject* errors = PyImport_ImportModule("icae_fast.errors");
  PyObject* type = errors == nullptr ? nullptr : PyObject_GetAttrString(errors, "BackendError");
  if (type == nullptr) PyErr_Clear();
  PyErr_SetString(type == nullptr ? PyExc_RuntimeError : type, message);
  Py_XDECREF(type);
  Py_XDECREF(errors);
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  try {
    icae_fast::kernels();
  } catch (const std::exception& error) {
    raise_backend_error(error.what());
    return nullptr;
  }
  return PyModule_Create(&definition);
}
