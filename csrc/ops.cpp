// The schemas of all compiled ops, and the Python module that registers them.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(megalite, m) {
  m.def("causal_softmax(Tensor scores, float scale) -> Tensor");
  m.def("causal_softmax_backward(Tensor grad, Tensor probs, float scale) -> Tensor");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
}

// Importing megalite._C loads the library, which registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
