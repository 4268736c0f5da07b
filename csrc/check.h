// Refusals in the house sentence: fastfpl._C.<op>: <argument> must <rule>; got <value>.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fastfpl {

inline std::string sentence(const char* op, const char* name, const std::string& rule,
                            const std::string& got) {
  return std::string("fastfpl._C.") + op + ": " + name + " must " + rule + "; got " + got;
}

// A value, shape or layout: ValueError.
[[noreturn]] inline void refuse(const char* op, const char* name, const std::string& rule,
                                const std::string& got) {
  throw pybind11::value_error(sentence(op, name, rule, got));
}

// A dtype or kind of object: TypeError.
[[noreturn]] inline void refuse_kind(const char* op, const char* name, const std::string& rule,
                                     const std::string& got) {
  throw pybind11::type_error(sentence(op, name, rule, got));
}

}  // namespace fastfpl
