// The part of ONNX Runtime's stable C ABI that the operators use, in our own declarations: slots of its function table,
// the record of a custom operator, and the numbers of its enums. Slots are never reordered, so one build serves 1.17 on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mptqc::ort {

// Objects of ONNX Runtime, only ever seen by pointer.
struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct ShapeInfo;
struct SessionOptions;
struct Domain;

// Versions of the ABI: the oldest that the operators run with, and the first that reads which outputs may be in place.
constexpr uint32_t kLeastVersion = 17, kInPlaceVersion = 18;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10 };
enum Characteristic { kRequired = 0, kOptional = 1 };
constexpr int kDefaultMemory = 0;

using FunctionTable = void* const*;

struct ApiBase {
  FunctionTable (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// Typed access to the function table. A returned status is null on success, else owned by the caller.
class Api {
 public:
  explicit Api(FunctionTable table) : table_(table) {}

  Status* create_status(ErrorCode code, const char* message) const {
    return call<Status*, int, const char*>(0, code, message);
  }
  const char* message(const Status* status) const { return call<const char*>(2, status); }
  void release(Status* status) const { call<void>(93, status); }

  Status* create_domain(const char* name, Domain** domain) const { return call<Status*>(26, name, domain); }
  Status* add_operator(Domain* domain, const struct CustomOp* op) const { return call<Status*>(27, domain, op); }
  Status* add_domain(SessionOptions* options, Domain* domain) const { return call<Status*>(28, options, domain); }

  Status* attribute(const KernelInfo* info, const char* name, float* value) const {
    return call<Status*>(85, info, name, value);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* value) const {
    return call<Status*>(86, info, name, value);
  }
  // `size` is the buffer's on the way in, the string's with its end on the way out.
  Status* attribute(const KernelInfo* info, const char* name, char* value, size_t* size) const {
    return call<Status*>(87, info, name, value, size);
  }
  // `count` is the buffer's on the way in, the list's on the way out; of an attribute of another type it is 0.
  Status* integers(const KernelInfo* info, const char* name, int64_t* values, size_t* count) const {
    return call<Status*>(163, info, name, values, count);
  }
  Status* input_count(const KernelInfo* info, size_t* count) const { return call<Status*>(230, info, count); }
  // The sizes of names are with their ends; an absent input's name is empty.
  Status* input_name(const KernelInfo* info, size_t index, char* name, size_t* size) const {
    return call<Status*>(232, info, index, name, size);
  }
  Status* node_name(const KernelInfo* info, char* name, size_t* size) const {
    return call<Status*>(244, info, name, size);
  }
  // `value` is untouched where the input is not constant.
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** value) const {
    return call<Status*>(249, info, index, is_constant, value);
  }

  // Null where the input is absent.
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return call<Status*>(90, context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** value) const {
    return call<Status*>(91, context, index, shape, rank, value);
  }
  // Null on the CPU.
  Status* stream(const KernelContext* context, void** stream) const { return call<Status*>(193, context, stream); }
  // Runs task(user, i) for each i below `total`, on the session's threads.
  Status* parallel_for(const KernelContext* context, void (*task)(void*, size_t), size_t total, void* user) const {
    constexpr size_t one_by_one = 0;
    return call<Status*>(274, context, task, total, one_by_one, user);
  }

  Status* data(Value* value, void** data) const { return call<Status*>(51, value, data); }
  Status* shape_info(const Value* value, ShapeInfo** info) const { return call<Status*>(65, value, info); }
  Status* element_type(const ShapeInfo* info, int* type) const { return call<Status*>(60, info, type); }
  Status* rank(const ShapeInfo* info, size_t* rank) const { return call<Status*>(61, info, rank); }
  Status* shape(const ShapeInfo* info, int64_t* shape, size_t rank) const {
    return call<Status*>(62, info, shape, rank);
  }
  void release(ShapeInfo* info) const { call<void>(99, info); }

 private:
  template <class Result, class... Arguments>
  Result call(int slot, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_[slot])(arguments...);
  }

  FunctionTable table_;
};

// A custom operator as ONNX Runtime reads it. Fields that are left null are optional or unused at our versions.
struct CustomOp {
  uint32_t version;
  void* create_kernel_1;
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t index);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t index);
  size_t (*output_count)(const CustomOp*);
  void* compute_1;
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t index);
  int (*output_characteristic)(const CustomOp*, size_t index);
  int (*input_memory)(const CustomOp*, size_t index);
  void* variadic[4];
  Status* (*create_kernel)(const CustomOp*, FunctionTable, const KernelInfo*, void** kernel);
  Status* (*compute)(void* kernel, KernelContext*);
  void* infer_shape;
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  // How many pairs of an input and an output that may have its memory; they are given back to the second.
  size_t (*may_be_in_place)(int** inputs, int** outputs);
  void (*release_in_place)(int* inputs, int* outputs);
  void* alias[2];
};
static_assert(sizeof(void*) != 8 || sizeof(CustomOp) == 208, "26 fields of 8 bytes");

}  // namespace mptqc::ort
