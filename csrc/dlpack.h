// Tensors as Python hands them over, read through DLPack's C exchange table. No torch header.
//
// `type(tensor).__dlpack_c_exchange_api__` is a capsule with a table of C functions (DLPack 1.3; in
// torch from 2.11 on). One of them describes a tensor without taking a reference: shape and strides
// are borrowed and hold while the caller keeps the tensor, that is, during the call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "check.h"
#include "number.h"

namespace fastfpl {

namespace dlpack {  // the layout, from DLPack's specification

struct Tensor {
  void* data;
  int32_t device_type, device_id;  // device_type 1 is the CPU
  int32_t ndim;
  uint8_t code, bits;  // code 0 is a signed integer, 2 a float
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Table {
  uint32_t major, minor;
  Table* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*describe)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace dlpack

template <class T>
struct TypeName;
template <>
struct TypeName<float> {
  static constexpr uint8_t code = 2;
  static constexpr const char* name = "float32";
};
template <>
struct TypeName<double> {
  static constexpr uint8_t code = 2;
  static constexpr const char* name = "float64";
};
template <>
struct TypeName<bf16> {
  static constexpr uint8_t code = 4;
  static constexpr const char* name = "bfloat16";
};
template <>
struct TypeName<int64_t> {
  static constexpr uint8_t code = 0;
  static constexpr const char* name = "int64";
};

// A contiguous tensor in memory, for the length of one call.
class View {
 public:
  View(const char* op, const char* name, pybind11::handle tensor) : op_(op), name_(name) {
    const dlpack::Table* table = table_of(tensor);
    if (!table) refuse_kind("be a torch.Tensor", type_of(tensor));
    if (table->describe(tensor.ptr(), &tensor_) != 0) throw pybind11::error_already_set();
    if (tensor_.device_type != 1) refuse("be on the CPU", "another device");
    for (int32_t d = 0; d < tensor_.ndim; ++d) size_ *= tensor_.shape[d];
    // A FakeTensor has a shape and no memory.
    if (!tensor_.data && size_) refuse_kind("have memory", type_of(tensor));
    // torch marks a lazily negated real tensor by a bit that DLPack does not carry.
    if (pybind11::cast<bool>(tensor.attr("is_neg")())) refuse("be resolved", "a negative view");
    int64_t stride = 1;
    for (int32_t d = tensor_.ndim - 1; size_ && d >= 0; --d) {
      if (tensor_.shape[d] != 1 && tensor_.strides && tensor_.strides[d] != stride)
        refuse("be contiguous", "strides " + tuple(tensor_.strides));
      stride *= tensor_.shape[d];
    }
  }

  int64_t size() const { return size_; }
  int32_t ndim() const { return tensor_.ndim; }
  int64_t shape(int32_t d) const { return tensor_.shape[d < 0 ? d + tensor_.ndim : d]; }

  template <class T>
  bool is() const {
    return tensor_.code == TypeName<T>::code && tensor_.bits == 8 * sizeof(T) && tensor_.lanes == 1;
  }

  template <class T>
  T* data() const {
    if (!is<T>()) refuse_kind(std::string("be ") + TypeName<T>::name, kind());
    return reinterpret_cast<T*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
  }

  void need_size(int64_t size) const {
    if (size_ != size)
      refuse("have " + std::to_string(size) + " elements", "shape " + tuple(tensor_.shape));
  }

  void need_ndim(int32_t least) const {
    if (tensor_.ndim < least)
      refuse("have at least " + std::to_string(least) + " dimensions",
             "shape " + tuple(tensor_.shape));
  }

  std::string kind() const {
    const char* codes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    return (tensor_.code < 7 ? codes[tensor_.code] : "type") + std::to_string(tensor_.bits);
  }

 private:
  // The type answers the same table every time: look it up once for the type seen last.
  static const dlpack::Table* table_of(pybind11::handle tensor) {
    static PyTypeObject* last_type = nullptr;
    static const dlpack::Table* last_table = nullptr;
    PyTypeObject* type = Py_TYPE(tensor.ptr());
    if (type == last_type) return last_table;
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    const auto* table = capsule ? static_cast<const dlpack::Table*>(
                                      PyCapsule_GetPointer(capsule, "dlpack_exchange_api"))
                                : nullptr;
    PyErr_Clear();
    Py_XDECREF(capsule);  // the table outlives it: it is the framework's own
    while (table && table->major != 1) table = table->previous;
    if (!table || !table->describe) return nullptr;
    Py_INCREF(reinterpret_cast<PyObject*>(type));  // so that no other type gets this address
    Py_XDECREF(reinterpret_cast<PyObject*>(last_type));
    last_type = type;
    last_table = table;
    return table;
  }

  static std::string type_of(pybind11::handle object) { return Py_TYPE(object.ptr())->tp_name; }

  std::string tuple(const int64_t* values) const {
    std::string text = "(";
    for (int32_t d = 0; d < tensor_.ndim; ++d) text += (d ? ", " : "") + std::to_string(values[d]);
    return text + (tensor_.ndim == 1 ? ",)" : ")");
  }

  [[noreturn]] void refuse(const std::string& rule, const std::string& got) const {
    fastfpl::refuse(op_, name_, rule, got);
  }
  [[noreturn]] void refuse_kind(const std::string& rule, const std::string& got) const {
    fastfpl::refuse_kind(op_, name_, rule, got);
  }

  const char* op_;
  const char* name_;
  dlpack::Tensor tensor_{};
  int64_t size_ = 1;
};

}  // namespace fastfpl
