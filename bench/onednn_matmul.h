// oneDNN's matmul primitive, to measure against: weights in the layout it likes best, reordered
// (and rounded, for bf16) before the clock starts.
#pragma once

#include <cstdint>
#include <dnnl.hpp>
#include <unordered_map>

namespace winnow {

class OneDnnMatMul {
 public:
  // y [rows, n] = x [rows, k] w [n, k]^T, given in f32 and multiplied in `type`. Throws dnnl::error
  // where the library refuses the type (bf16 without AVX-512).
  OneDnnMatMul(dnnl::memory::data_type type, float* x, float* w, float* y, int64_t rows, int64_t n,
               int64_t k)
      : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    using dnnl::memory;
    const auto f32 = memory::data_type::f32;
    const memory::desc x_desc({rows, k}, type, memory::format_tag::ab);
    const memory::desc w_any({k, n}, type, memory::format_tag::any);
    const memory::desc y_desc({rows, n}, f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(x_desc, w_any, y_desc), engine_);
    matmul_ = dnnl::matmul(desc);
    arguments_ = {{DNNL_ARG_SRC, Reordered({{rows, k}, f32, memory::format_tag::ab}, x, x_desc)},
                  {DNNL_ARG_WEIGHTS,
                   Reordered({{k, n}, f32, memory::format_tag::ba}, w, desc.weights_desc())},
                  {DNNL_ARG_DST, memory(y_desc, engine_, y)}};
  }
  void Run() {
    matmul_.execute(stream_, arguments_);
    stream_.wait();
  }

 private:
  dnnl::memory Reordered(const dnnl::memory::desc& from, float* data,
                         const dnnl::memory::desc& to) {
    dnnl::memory source(from, engine_, data), target(to, engine_);
    dnnl::reorder(source, target).execute(stream_, source, target);
    stream_.wait();
    return target;
  }
  dnnl::engine engine_;
  dnnl::stream stream_;
  dnnl::matmul matmul_;
  std::unordered_map<int, dnnl::memory> arguments_;
};

}  // namespace winnow
