// Random problems, small and awkward: odd lengths, groups, every kind of band, lengths and offsets of
// each sequence, and NaN and infinities in all that nobody sees.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/problem.h"

namespace emulated {

using namespace jax_flash2;

// A random stream with whole numbers and tensors.
struct Draw {
  std::mt19937 engine;
  std::normal_distribution<float> normal;

  int from(int low, int high) { return low + int(engine() % unsigned(high - low + 1)); }
  bool one_in(int n) { return from(1, n) == 1; }
  template <typename Element>
  std::vector<Element> tensor(int64_t size, float amplitude = 1.f) {
    std::vector<Element> x(size);
    for (Element& value : x) value = Element(amplitude * normal(engine));
    return x;
  }
};

// A band as the definition reads it: the distances j - i, then offset and lengths of each sequence.
struct Mask {
  bool left, right;  // is there a lower, an upper bound?
  int lower, upper;
  std::vector<Bounds> bounds;  // empty: none

  bool sees(int64_t b, int i, int j) const {
    const Bounds r = bounds.empty() ? Bounds{0, i + 1, j + 1} : bounds[b];
    const int distance = j - i - r.query_offset;
    return i < r.query_length && j < r.kv_length && !(left && distance < lower) &&
           !(right && distance > upper);
  }
  BandSpec spec() const {
    return {left ? lower : -kUnbounded, right ? upper : kUnbounded,
            bounds.empty() ? nullptr : bounds.data()};
  }
};

template <typename Element>
struct Problem {
  static constexpr bool kIsHalf = std::is_same_v<Element, __half>;

  int seed;
  Draw draw{std::mt19937(unsigned(seed)), {}};
  Shape shape;
  Mask mask;
  double scale;
  float amplitude = 1.f;  // of q
  bool ramp = false;      // the later keys are the larger ones
  std::vector<Element> q, k, v;

  Problem(int seed, int longest, bool large_values) : seed(seed) {
    draw_shape(longest);
    draw_mask();
    scale = draw.one_in(6) ? 0.3 : 1 / std::sqrt(double(shape.head_dim));
    if (large_values) {
      if (draw.one_in(4)) amplitude = draw.one_in(2) ? 40.f : 150.f;
      ramp = draw.one_in(4);
    }
    q = draw.tensor<Element>(queries() * shape.query_heads * shape.head_dim, amplitude);
    k = draw.tensor<Element>(keys() * shape.kv_heads * shape.head_dim);
    v = draw.tensor<Element>(keys() * shape.kv_heads * shape.value_dim);
    if (ramp) {
      for (size_t i = 0; i < k.size(); ++i) {
        const int key = int(i / (shape.kv_heads * shape.head_dim) % shape.kv_len);
        if (key < shape.kv_len / 2) k[i] = Element(12.f * k[i]);
      }
    }
    poison_rows(q, shape.query_heads * shape.head_dim, hidden_queries());
    poison_rows(k, shape.kv_heads * shape.head_dim, hidden_keys());
    poison_rows(v, shape.kv_heads * shape.value_dim, hidden_keys());
  }

  int64_t queries() const { return shape.batch * shape.query_len; }
  int64_t keys() const { return shape.batch * shape.kv_len; }
  DType dtype() const { return kIsHalf ? DType::kFloat16 : DType::kBFloat16; }
  // Half the distance of 1 to the next element.
  static constexpr double epsilon() { return kIsHalf ? 0x1p-11 : 0x1p-8; }

  // Tokens [B, T] that see nothing, and [B, S] that nobody sees.
  std::vector<bool> hidden_queries() const {
    std::vector<bool> hidden(queries(), true);
    for_each_pair([&](int64_t query, int64_t) { hidden[query] = false; });
    return hidden;
  }
  std::vector<bool> hidden_keys() const {
    std::vector<bool> hidden(keys(), true);
    for_each_pair([&](int64_t, int64_t key) { hidden[key] = false; });
    return hidden;
  }
  static void poison_rows(std::vector<Element>& x, int width, const std::vector<bool>& rows) {
    for (size_t i = 0; i < x.size(); ++i)
      if (rows[i / width]) x[i] = Element(i % 2 == 0 ? NAN : INFINITY);
  }

  std::string describe() const {
    const Shape& s = shape;
    const auto text = [](int x) { return std::to_string(x); };
    std::string line = std::string(kIsHalf ? "float16" : "bfloat16") + " seed " + text(seed);
    line += " B " + text(int(s.batch)) + " T " + text(s.query_len) + " S " + text(s.kv_len);
    line += " N " + text(s.query_heads) + " K " + text(s.kv_heads) + " H " + text(s.head_dim);
    line += " Hv " + text(s.value_dim);
    if (mask.left) line += " lower " + text(mask.lower);
    if (mask.right) line += " upper " + text(mask.upper);
    for (const Bounds& r : mask.bounds)
      line += " (" + text(r.query_offset) + ", " + text(r.query_length) + ", " + text(r.kv_length) +
              ")";
    return line + " amplitude " + text(int(amplitude)) + (ramp ? " ramp" : "");
  }

 private:
  template <typename F>
  void for_each_pair(const F& f) const {
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int i = 0; i < shape.query_len; ++i)
        for (int j = 0; j < shape.kv_len; ++j)
          if (mask.sees(b, i, j)) f(b * shape.query_len + i, b * shape.kv_len + j);
  }
  void draw_shape(int longest) {
    Shape& s = shape;
    s.batch = draw.from(1, 2);
    s.query_len = draw.one_in(4) ? 64 * draw.from(1, longest / 64) : draw.from(1, longest);
    s.kv_len = draw.one_in(3) ? s.query_len : draw.from(1, longest + longest / 2);
    s.kv_heads = draw.from(1, 2);
    s.query_heads = s.kv_heads * (draw.one_in(3) ? 4 * draw.from(1, 4) : draw.from(1, 3));
    const int smallest = HEAD_DIM > 192 ? 200 : HEAD_DIM / 2 + 8;
    s.head_dim = draw.one_in(2) ? HEAD_DIM : 8 * draw.from(smallest / 8, HEAD_DIM / 8);
    s.value_dim = draw.one_in(2) ? s.head_dim : 8 * draw.from(1, HEAD_DIM / 8);
    if (draw.one_in(6)) std::swap(s.head_dim, s.value_dim);
  }
  void draw_mask() {
    const int aligned = shape.kv_len - shape.query_len;  // at the last tokens
    const int offset = draw.one_in(3) ? aligned : (draw.one_in(2) ? 0 : draw.from(-50, 200));
    mask.left = draw.one_in(2);
    mask.right = draw.one_in(2);
    mask.lower = offset - draw.from(0, 200);
    mask.upper = offset + (draw.one_in(2) ? 0 : draw.from(0, 200));
    if (!draw.one_in(3)) return;
    for (int64_t b = 0; b < shape.batch; ++b)
      mask.bounds.push_back({draw.one_in(2) ? 0 : draw.from(-60, 60),
                             draw.one_in(5) ? shape.query_len : draw.from(0, shape.query_len),
                             draw.one_in(5) ? shape.kv_len : draw.from(0, shape.kv_len)});
  }
};

}  // namespace emulated
