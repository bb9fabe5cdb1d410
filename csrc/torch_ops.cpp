// The module itself, and the operations that have no tensor argument. The others are in torch_*.cpp.
#include <Python.h>

#include "isa.h"
#include "torch_args.h"

namespace {

std::string isa() { return sgsc::isa_name(); }

std::string isas() { return sgsc::isa_names(); }

std::string set_isa(std::string name) {
  sgsc::set_isa(name);
  return name;
}

}  // namespace

// Without a tensor argument the dispatcher finds no CPU key: these serve every key.
STABLE_TORCH_LIBRARY_IMPL(sgsc, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_isas", TORCH_BOX(&isas));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
}

// PyMODINIT_FUNC keeps the symbol visible under -fvisibility=hidden.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
