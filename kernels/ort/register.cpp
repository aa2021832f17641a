// RegisterCustomOps, the entry point that ONNX Runtime calls, and the table of each operator.
#include <exception>
#include <mutex>
#include <string>

#include "operators.h"

namespace mptqc::ort {
namespace {

constexpr char kDomain[] = "ai.mptqc";

// What ONNX Runtime is told of an operator: `required` of its `count` inputs must be there.
struct Signature {
  const char* name;
  ElementType output;
  size_t count, required;
  ElementType inputs[8];
  bool has_codes = false;  // a second output, of uint8
  int residual = -1;  // the input that is added to the first output, element by element: it may take over its memory
};

// An operator on float16 in place of float32; X and, in a Linear, residual and output are what changes.
template <class Operator>
struct Half : Operator {
  using Operator::Operator;
};

template <class Operator>
constexpr ElementType kFloatType = kFloat;
template <class Operator>
constexpr ElementType kFloatType<Half<Operator>> = kFloat16;

template <class Operator>
constexpr Signature kSignature = {};
template <>
constexpr Signature kSignature<LayerNormQuantize> = {"LayerNormQuantize", kUint8, 4, 3, {kFloat, kFloat, kFloat, kInt64}};
template <>
constexpr Signature kSignature<LayerNormAdd> = {
    "LayerNormAdd", kFloat, 5, 4, {kFloat, kFloat, kFloat, kFloat, kInt64}, false, 3};
template <>
constexpr Signature kSignature<LayerNormAddQuantize> = {
    "LayerNormAddQuantize", kFloat, 6, 3, {kFloat, kFloat, kFloat, kFloat, kInt64, kInt64}, true, 3};
template <>
constexpr Signature kSignature<Linear> = {
    "Linear", kFloat, 7, 4, {kUint8, kInt8, kFloat, kFloat, kFloat, kInt64, kFloat}, false, 4};
template <>
[[maybe_unused]] constexpr Signature kSignature<Half<LayerNormQuantize>> = {
    "LayerNormQuantize", kUint8, 4, 3, {kFloat16, kFloat, kFloat, kInt64}};
template <>
[[maybe_unused]] constexpr Signature kSignature<Half<Linear>> = {
    "Linear", kFloat16, 7, 4, {kUint8, kInt8, kFloat, kFloat, kFloat16, kInt64, kFloat}};
template <>
constexpr Signature kSignature<LinearQuantize> = {
    "LinearQuantize", kUint8, 8, 4, {kUint8, kInt8, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat}};
template <>
constexpr Signature kSignature<Attention> = {"Attention", kFloat, 5, 3, {kUint8, kUint8, kUint8, kFloat, kFloat}};
template <>
constexpr Signature kSignature<AttentionQuantize> = {
    "AttentionQuantize", kUint8, 5, 3, {kUint8, kUint8, kUint8, kFloat, kFloat}};
template <>
constexpr Signature kSignature<QuantizePatches> = {"QuantizePatches", kUint8, 1, 1, {kFloat}};

// Runs `work`; what it throws becomes a status that begins with `where`.
template <class Work>
Status* guarded(Api api, const std::string& where, const Work& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return api.create_status(kInvalidArgument, (where + error.what()).c_str());
  } catch (const std::exception& error) {
    return api.create_status(kFail, (where + error.what()).c_str());
  }
}

template <class Operator>
struct Kernel {
  Api api;
  Operator op;

  static Status* create(const CustomOp*, FunctionTable table, const KernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, "", [&] {
      const Node node(api, info);
      try {
        *kernel = new Kernel{api, Operator(node, Backend::choose(kFloatType<Operator>))};
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument("ai.mptqc " + std::string(kSignature<Operator>.name) + " " + node.name() + ": " +
                                    error.what());
      }
    });
  }

  static Status* compute(void* kernel, KernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.api, "ai.mptqc: ", [&] { self.op.run(Context(self.api, context)); });
  }

  static void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

  // For ONNX Runtime of this version.
  static const CustomOp* record(uint32_t version) {
    static const CustomOp op = [&] {
      CustomOp fields = {};
      fields.version = version;
      fields.name = [](const CustomOp*) { return kSignature<Operator>.name; };
      fields.provider = [](const CustomOp*) { return Backend::kProvider; };
      fields.input_count = [](const CustomOp*) { return kSignature<Operator>.count; };
      fields.input_type = [](const CustomOp*, size_t index) { return int{kSignature<Operator>.inputs[index]}; };
      fields.input_characteristic = [](const CustomOp*, size_t index) {
        return int{index < kSignature<Operator>.required ? kRequired : kOptional};
      };
      fields.input_memory = [](const CustomOp*, size_t) { return kDefaultMemory; };
      fields.output_count = [](const CustomOp*) { return size_t{kSignature<Operator>.has_codes ? 2u : 1u}; };
      fields.output_type = [](const CustomOp*, size_t index) {
        return int{index == 0 ? kSignature<Operator>.output : kUint8};
      };
      fields.output_characteristic = [](const CustomOp*, size_t) { return int{kRequired}; };
      fields.create_kernel = create;
      fields.compute = compute;
      fields.destroy = destroy;
      fields.start_version = [](const CustomOp*) { return 1; };
      fields.end_version = [](const CustomOp*) { return 1; };
      if constexpr (Backend::kAddsInPlace && kSignature<Operator>.residual >= 0) {
        fields.may_be_in_place = [](int** inputs, int** outputs) {
          static int residual = kSignature<Operator>.residual, first = 0;
          *inputs = &residual;
          *outputs = &first;
          return size_t{1};
        };
        fields.release_in_place = [](int*, int*) {};
      }
      return fields;
    }();
    return &op;
  }
};

// The domain is made once and belongs to the process: ONNX Runtime keeps pointers to it and to the operators.
Domain* domain(Api api, uint32_t version) {
  static std::mutex mutex;
  static Domain* made = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (made == nullptr) {
    Domain* fresh = nullptr;
    check(api, api.create_domain(kDomain, &fresh));
    for (const auto record : {Kernel<LayerNormQuantize>::record, Kernel<LayerNormAdd>::record,
                              Kernel<LayerNormAddQuantize>::record, Kernel<Linear>::record,
                              Kernel<LinearQuantize>::record, Kernel<Attention>::record,
                              Kernel<AttentionQuantize>::record, Kernel<QuantizePatches>::record}) {
      check(api, api.add_operator(fresh, record(version)));
    }
    if constexpr (Backend::kHasFloat16) {
      check(api, api.add_operator(fresh, Kernel<Half<LayerNormQuantize>>::record(version)));
      check(api, api.add_operator(fresh, Kernel<Half<Linear>>::record(version)));
    }
    made = fresh;
  }
  return made;
}

}  // namespace
}  // namespace mptqc::ort

extern "C" MPTQC_EXPORT mptqc::ort::Status* RegisterCustomOps(
    mptqc::ort::SessionOptions* options, const mptqc::ort::ApiBase* base) {
  using namespace mptqc::ort;
  const FunctionTable table = base->get_api(kLeastVersion);
  if (table == nullptr) {
    return Api(base->get_api(1)).create_status(kFail, "the kernel library needs ONNX Runtime 1.17 or newer");
  }
  const Api api(table);
  const uint32_t version = base->get_api(kInPlaceVersion) != nullptr ? kInPlaceVersion : kLeastVersion;
  return guarded(api, "ai.mptqc: ", [&] {
    Backend::choose(kFloat);
    check(api, api.add_domain(options, domain(api, version)));
  });
}
