// One step of LARS or LAMB over all tensors of a group, fp32, in one pass for the norms and one for the update.
//
// A layer's update needs its norms, so every element is visited twice. The loop takes a block of layers at a time: the
// second pass then finds weights and gradients of all but the largest layers still in the cache. Tensors are cut into
// chunks, the unit of work of a thread. The chunks' sums are added in the order of the chunks, so that the result doesn't
// depend on the number of threads. Squares are summed in double: the loop is bound by memory, so double costs no time,
// and norms of 1e-30 or 1e30 are as exact as others.
//
// The same equations stand in unfused.py and fused_cuda_kernels.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kChunk = 1 << 12;  // elements; 16 KiB a tensor: chunks of 3 or 4 tensors fit the first-level cache
constexpr int64_t kBlock = 1 << 18;  // elements; weights and gradients of a block are 2 MiB
constexpr int64_t kThreaded = 1 << 15;  // elements; below, waking the other threads takes longer than their work

struct Chunk {
  int tensor;
  int64_t offset, length;
};

struct Cut {
  std::vector<Chunk> chunks;
  std::vector<int> first;   // chunk of each tensor, and the end
  std::vector<int> blocks;  // first tensor of each block, and the end
  int64_t elements = 0;
};

Cut cut(int tensors, const int64_t* numel) {
  Cut cut;
  int64_t block = 0;  // elements
  for (int t = 0; t < tensors; t++) {
    if (t == 0 || block + numel[t] > kBlock) {
      cut.blocks.push_back(t);
      block = 0;
    }
    cut.first.push_back(static_cast<int>(cut.chunks.size()));
    for (int64_t o = 0; o < numel[t]; o += kChunk)
      cut.chunks.push_back({t, o, std::min(kChunk, numel[t] - o)});
    block += numel[t];
    cut.elements += numel[t];
  }
  cut.first.push_back(static_cast<int>(cut.chunks.size()));
  cut.blocks.push_back(tensors);
  return cut;
}

struct Sums {
  double weight = 0, gradient = 0, direction = 0;  // of squares
};

// Unlike std::min, NaN stays NaN.
double at_most(double value, double limit) { return value > limit ? limit : value; }

// Calls measure(chunk) -> Sums, then conclude(tensor, its Sums), then update(chunk), block by block.
template <class Measure, class Conclude, class Update>
void over_blocks(const Cut& cut, int threads, Measure measure, Conclude conclude, Update update) {
  std::vector<Sums> sums(cut.chunks.size());
#pragma omp parallel num_threads(threads) if (cut.elements > kThreaded)
  for (size_t b = 0; b + 1 < cut.blocks.size(); b++) {
    const int begin = cut.blocks[b], end = cut.blocks[b + 1];
#pragma omp for schedule(static)
    for (int c = cut.first[begin]; c < cut.first[end]; c++) sums[c] = measure(cut.chunks[c]);
#pragma omp for schedule(static)
    for (int t = begin; t < end; t++) {
      Sums total;
      for (int c = cut.first[t]; c < cut.first[t + 1]; c++) {
        total.weight += sums[c].weight;
        total.gradient += sums[c].gradient;
        total.direction += sums[c].direction;
      }
      conclude(t, total);
    }
#pragma omp for schedule(static)
    for (int c = cut.first[begin]; c < cut.first[end]; c++) update(cut.chunks[c]);
  }
}

// The loops over a chunk. All numbers are arguments: the compiler would load captures of a lambda for each element.

// LARS: g' = g + weight_decay * w
Sums lars_sums(const float* __restrict w, const float* __restrict g, int64_t n, double sign, double decay) {
  double weight = 0, gradient = 0, direction = 0;
#pragma omp simd reduction(+ : weight, gradient, direction)
  for (int64_t i = 0; i < n; i++) {
    const double wi = w[i], gi = g[i], di = sign * gi + decay * wi;
    weight += wi * wi;
    gradient += gi * gi;
    direction += di * di;
  }
  return {weight, gradient, direction};
}

// LARS: v = momentum * v + q * g', w -= lr * v
void sgd_update(float* __restrict w, const float* __restrict g, int64_t n, float sign, float decay, float q, float lr) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) w[i] -= lr * (q * (sign * g[i] + decay * w[i]));
}

template <bool nesterov>
void momentum_update(float* __restrict w, const float* __restrict g, float* __restrict v, int64_t n, float sign,
                     float decay, float q, float lr, float momentum) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float kept = momentum * v[i], scaled = q * (sign * g[i] + decay * w[i]);
    v[i] = kept + scaled;
    w[i] -= lr * (nesterov ? scaled + momentum * v[i] : v[i]);
  }
}

struct LambNumbers {
  double lr, beta1, beta2, eps, weight_decay, correction1, correction2, norm_clip, max_ratio;
  bool maximize;
};

// LAMB: u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w
inline float adam_direction(float m, float v, float w, float correct1, float correct2, float eps, float decay) {
  return m * correct1 / (std::sqrt(v * correct2) + eps) + decay * w;
}

// LAMB: m = beta1 * m + (1 - beta1) * g, v = beta2 * v + (1 - beta2) * g^2
Sums lamb_sums(const float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
               const LambNumbers& numbers, float decay) {
  const float sign = numbers.maximize ? -1 : 1, beta1 = numbers.beta1, rest1 = 1 - numbers.beta1;
  const float beta2 = numbers.beta2, rest2 = 1 - numbers.beta2, eps = numbers.eps;
  const float correct1 = 1 / numbers.correction1, correct2 = 1 / numbers.correction2;
  double weight = 0, gradient = 0, direction = 0;
#pragma omp simd reduction(+ : weight, gradient, direction)
  for (int64_t i = 0; i < n; i++) {
    const float gi = sign * g[i], mi = beta1 * m[i] + rest1 * gi, vi = beta2 * v[i] + rest2 * gi * gi;
    m[i] = mi;
    v[i] = vi;
    const double wi = w[i], di = adam_direction(mi, vi, w[i], correct1, correct2, eps, decay);
    weight += wi * wi;
    gradient += static_cast<double>(gi) * gi;
    direction += di * di;
  }
  return {weight, gradient, direction};
}

// LAMB: w -= lr * q * u; `scale` is lr * q
void lamb_update(float* __restrict w, const float* __restrict m, const float* __restrict v, int64_t n,
                 const LambNumbers& numbers, float decay, float scale) {
  const float correct1 = 1 / numbers.correction1, correct2 = 1 / numbers.correction2, eps = numbers.eps;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) w[i] -= scale * adam_direction(m[i], v[i], w[i], correct1, correct2, eps, decay);
}

}  // namespace

extern "C" {

// A list of tensors. `row` is a tensor's place among the adapted tensors, -1 if it isn't adapted.
struct Tensors {
  int32_t count, threads, rows;
  float** weights;
  const float** gradients;
  float** first;   // momentum buffers (null without momentum), or first moments
  float** second;  // second moments
  const int64_t* numel;
  const int32_t* row;
  const bool* decayed;
  const double* given_norms;  // by row; null: use the measured gradient norms
  float* statistics;          // [3, rows]: weight norm, gradient norm, trust ratio

  void record(int row, double weight, double gradient, double ratio) const {
    statistics[row] = static_cast<float>(weight);
    statistics[rows + row] = static_cast<float>(gradient);
    statistics[2 * rows + row] = static_cast<float>(ratio);
  }
};

struct LarsNumbers {
  double lr, coefficient, momentum, weight_decay, eps, norm_clip, max_ratio;
  bool larc, sum_of_norms, lr_in_momentum, nesterov, maximize;
};

void lars(const Tensors* tensors, const LarsNumbers* numbers) {
  const Tensors& x = *tensors;
  const LarsNumbers& n = *numbers;
  const float sign = n.maximize ? -1.f : 1.f, momentum = static_cast<float>(n.momentum);
  const float lr = n.lr_in_momentum ? 1.f : static_cast<float>(n.lr);
  const auto decay = [&](int t) { return x.decayed[t] ? static_cast<float>(n.weight_decay) : 0.f; };
  std::vector<float> scale(x.count);

  const auto measure = [&](const Chunk& c) {
    if (x.row[c.tensor] < 0) return Sums{};
    const float *w = x.weights[c.tensor] + c.offset, *g = x.gradients[c.tensor] + c.offset;
    return lars_sums(w, g, c.length, sign, decay(c.tensor));
  };

  const auto conclude = [&](int t, const Sums& sums) {
    double ratio = 1;  // q = coefficient * ||w|| / (denominator + eps)
    if (const int row = x.row[t]; row >= 0) {
      const double weight = std::sqrt(sums.weight), gradient = std::sqrt(sums.gradient);
      double denominator = x.given_norms ? x.given_norms[row] : gradient;
      if (n.sum_of_norms)
        denominator += decay(t) * weight;
      else if (!x.given_norms)
        denominator = std::sqrt(sums.direction);
      if (weight != 0 && denominator != 0)
        ratio = n.coefficient * at_most(weight, n.norm_clip) / (at_most(denominator, n.norm_clip) + n.eps);
      if (n.larc) ratio /= n.lr;
      ratio = at_most(ratio, n.max_ratio);
      x.record(row, weight, gradient, ratio);
    }
    scale[t] = static_cast<float>(n.lr_in_momentum ? ratio * n.lr : ratio);
  };

  const auto update = [&](const Chunk& c) {
    float* w = x.weights[c.tensor] + c.offset;
    const float *g = x.gradients[c.tensor] + c.offset, wd = decay(c.tensor), q = scale[c.tensor];
    if (!x.first) {
      sgd_update(w, g, c.length, sign, wd, q, lr);
    } else {
      float* v = x.first[c.tensor] + c.offset;
      (n.nesterov ? momentum_update<true> : momentum_update<false>)(w, g, v, c.length, sign, wd, q, lr, momentum);
    }
  };

  over_blocks(cut(x.count, x.numel), x.threads, measure, conclude, update);
}

void lamb(const Tensors* tensors, const LambNumbers* numbers) {
  const Tensors& x = *tensors;
  const LambNumbers& n = *numbers;
  const auto decay = [&](int t) { return x.decayed[t] ? static_cast<float>(n.weight_decay) : 0.f; };
  std::vector<float> scale(x.count);

  const auto measure = [&](const Chunk& c) {
    const float *w = x.weights[c.tensor] + c.offset, *g = x.gradients[c.tensor] + c.offset;
    float *m = x.first[c.tensor] + c.offset, *v = x.second[c.tensor] + c.offset;
    return lamb_sums(w, g, m, v, c.length, n, decay(c.tensor));
  };

  const auto conclude = [&](int t, const Sums& sums) {
    double ratio = 1;  // q = min(||w||, norm_clip) / ||u||
    if (const int row = x.row[t]; row >= 0) {
      const double weight = std::sqrt(sums.weight), direction = std::sqrt(sums.direction);
      if (weight != 0 && direction != 0) ratio = at_most(weight, n.norm_clip) / direction;
      ratio = at_most(ratio, n.max_ratio);
      x.record(row, weight, std::sqrt(sums.gradient), ratio);
    }
    scale[t] = static_cast<float>(n.lr * ratio);
  };

  const auto update = [&](const Chunk& c) {
    const float *m = x.first[c.tensor] + c.offset, *v = x.second[c.tensor] + c.offset;
    lamb_update(x.weights[c.tensor] + c.offset, m, v, c.length, n, decay(c.tensor), scale[c.tensor]);
  };

  over_blocks(cut(x.count, x.numel), x.threads, measure, conclude, update);
}

}  // extern "C"
