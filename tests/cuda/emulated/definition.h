// Attention and its gradients in float64, written down from their definition, and what results are held
// against.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "problem.h"

namespace emulated {

using Reals = std::vector<double>;

template <typename Element>
Reals reals(const std::vector<Element>& x) {
  return Reals(x.begin(), x.end());
}

struct Results {
  Reals out, lse, dq, dk, dv;
  double largest_score = 0;
};

// `dout` and `dlse` may be empty: no gradients then.
template <typename Element>
Results define(const Problem<Element>& problem, const std::vector<Element>& dout_,
               const std::vector<float>& dlse) {
  const Shape& s = problem.shape;
  const int H = s.head_dim, Hv = s.value_dim;
  const Reals q = reals(problem.q), k = reals(problem.k), v = reals(problem.v), dout = reals(dout_);
  Results r;
  r.out.assign(problem.queries() * s.query_heads * Hv, 0);
  r.lse.assign(problem.queries() * s.query_heads, -INFINITY);
  r.dq.assign(q.size(), 0);
  r.dk.assign(k.size(), 0);
  r.dv.assign(v.size(), 0);
  const auto dot = [](const double* x, const double* y, int size) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += x[i] * y[i];
    return sum;
  };
  const auto add = [](double* to, double factor, const double* x, int size) {
    for (int i = 0; i < size; ++i) to[i] += factor * x[i];
  };
  for (int64_t b = 0; b < s.batch; ++b)
    for (int n = 0; n < s.query_heads; ++n)
      for (int i = 0; i < s.query_len; ++i) {
        const int64_t query = (b * s.query_len + i) * s.query_heads + n;
        const int64_t row = (b * s.query_heads + n) * s.query_len + i;
        const auto key = [&](int j) { return (b * s.kv_len + j) * s.kv_heads + n / s.group(); };
        std::vector<int> seen;
        Reals p;
        double top = -INFINITY, sum = 0;
        for (int j = 0; j < s.kv_len; ++j) {
          if (!problem.mask.sees(b, i, j)) continue;
          seen.push_back(j);
          p.push_back(problem.scale * dot(&q[query * H], &k[key(j) * H], H));
          top = std::max(top, p.back());
          r.largest_score = std::max(r.largest_score, std::fabs(p.back()));
        }
        if (seen.empty()) continue;
        for (double& x : p) sum += x = std::exp(x - top);
        r.lse[row] = top + std::log(sum);
        for (size_t m = 0; m < seen.size(); ++m) {
          p[m] /= sum;
          add(&r.out[query * Hv], p[m], &v[key(seen[m]) * Hv], Hv);
        }
        if (dout.empty()) continue;
        const double* const g = &dout[query * Hv];
        const double delta = dot(&r.out[query * Hv], g, Hv) - dlse[row];
        for (size_t m = 0; m < seen.size(); ++m) {
          const int64_t at = key(seen[m]);
          const double ds = problem.scale * p[m] * (dot(g, &v[at * Hv], Hv) - delta);
          add(&r.dq[query * H], ds, &k[at * H], H);
          add(&r.dk[at * H], ds, &q[query * H], H);
          add(&r.dv[at * Hv], p[m], g, Hv);
        }
      }
  return r;
}

// Fails unless `got` is as near to `want` as `tolerance`, relative: all of it in the root mean square, and
// each element within sixteen times that. Where `want` is 0, so must it be.
template <typename Element>
void expect_near(const char* name, const std::vector<Element>& got, const Reals& want,
                 double tolerance) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = got[i] - want[i];
    if (!std::isfinite(difference) || (want[i] == 0 && got[i] != 0))
      fail("%s[%zu] is %g, not %g", name, i, double(got[i]), want[i]);
    error += difference * difference;
    size += want[i] * want[i];
  }
  if (!(error <= tolerance * tolerance * size))
    fail("%s has a relative error of %.2g", name, std::sqrt(error / size));
  const double typical = std::sqrt(size / double(std::max<size_t>(want.size(), 1)));
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = std::fabs(got[i] - want[i]);
    if (difference > 16 * tolerance * (typical + std::fabs(want[i])))
      fail("%s[%zu] is %g, not %g", name, i, double(got[i]), want[i]);
  }
}

}  // namespace emulated
