// Resize of a whole image to a square, with Pillow's bytes: two antialiased passes in fixed point with 22 bits.
//
#pragma GCC optimize("fp-contract=off")  // a fused multiply-add rounds once where Pillow rounds twice
#pragma STDC FP_CONTRACT OFF             // the same for clang
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Byte = uint8_t;
constexpr int kBits = 22, kHalf = 1 << (kBits - 1);

// For each pixel of the result: its first source, the number of its sources, and their weights in 1 / 2 ** 22.
struct Taps {
  int most;
  std::vector<int> first, count, weight;
};

double bilinear(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

double bicubic(double x) {
  x = std::abs(x);
  if (x < 1) return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

Taps taps_of(int size, int side, bool is_bilinear) {
  const double scale = static_cast<double>(size) / side, wider = std::max(scale, 1.0);
  const double support = (is_bilinear ? 1.0 : 2.0) * wider, inverse = 1.0 / wider;
  Taps taps;
  taps.most = static_cast<int>(std::ceil(support)) * 2 + 1;
  taps.first.resize(side), taps.count.resize(side), taps.weight.resize(side * taps.most);
  std::vector<double> weight(taps.most);
  for (int i = 0; i < side; i++) {
    const double centre = (i + 0.5) * scale;
    const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
    const int count = std::min(static_cast<int>(centre + support + 0.5), size) - first;
    double sum = 0;
    for (int j = 0; j < count; j++) {
      const double distance = (j + first - centre + 0.5) * inverse;
      sum += weight[j] = is_bilinear ? bilinear(distance) : bicubic(distance);
    }
    for (int j = 0; j < count; j++) {
      const double fixed = (sum != 0 ? weight[j] / sum : weight[j]) * (1 << kBits);
      taps.weight[i * taps.most + j] = static_cast<int>(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    }
    taps.first[i] = first, taps.count[i] = count;
  }
  return taps;
}

Byte clipped(int sum) { return static_cast<Byte>(std::min(std::max(sum >> kBits, 0), 255)); }

// [rows, n] to [side, n]
void pass(const Byte* in, int n, const Taps& taps, int side, Byte* out) {
  static thread_local std::vector<int> sums;
  sums.resize(n);
  int* __restrict sum = sums.data();
  for (int i = 0; i < side; i++, out += n) {
    std::fill_n(sum, n, kHalf);
    for (int j = 0; j < taps.count[i]; j++) {
      const Byte* source = in + static_cast<int64_t>(taps.first[i] + j) * n;
      const int weight = taps.weight[i * taps.most + j];
#pragma omp simd
      for (int k = 0; k < n; k++) sum[k] += weight * source[k];
    }
#pragma omp simd
    for (int k = 0; k < n; k++) out[k] = static_cast<Byte>(std::min(std::max(sum[k] >> kBits, 0), 255));
  }
}

// [rows, columns, channels] to [columns, rows, channels]
template <int channels>
void transpose(const Byte* in, size_t rows, size_t columns, Byte* __restrict out) {
  constexpr size_t kSquare = 16;
  for (size_t c0 = 0; c0 < columns; c0 += kSquare)
    for (size_t r = 0; r < rows; r++)
      for (size_t c = c0; c < std::min(c0 + kSquare, columns); c++)
        std::memcpy(out + (c * rows + r) * channels, in + (r * columns + c) * channels, channels);
}

// Passes run along columns, over whole rows at once; a pass along rows is between two transpositions.
template <int channels>
void resize(const Byte* in, int height, int width, const Taps& horizontal, const Taps& vertical, int side, Byte* out) {
  static thread_local std::vector<Byte> first, second;
  const size_t most = static_cast<size_t>(std::max(height, side)) * std::max(width, side) * channels;
  first.resize(std::max(first.size(), most)), second.resize(std::max(second.size(), most));
  Byte *a = first.data(), *b = second.data();
  if (height - side > 2 * std::max(width - side, 0)) {  // as Pillow 13
    pass(in, width * channels, vertical, side, a);
    transpose<channels>(a, side, width, b);
    pass(b, side * channels, horizontal, side, a);
    transpose<channels>(a, side, side, b);
  } else {
    transpose<channels>(in, height, width, a);
    pass(a, height * channels, horizontal, side, b);
    transpose<channels>(b, side, height, a);
    pass(a, side * channels, vertical, side, b);
  }
  for (int c = 0; c < channels; c++)
    for (int i = 0; i < side * side; i++) out[c * side * side + i] = b[i * channels + c];
}

}  // namespace

// Converts [height, width, channels] to planes, [channels, side, side]. Channels: 1 or 3.
extern "C" void resize(const Byte* in, int height, int width, int channels, int side, bool is_bilinear, Byte* out) {
  const Taps horizontal = taps_of(width, side, is_bilinear), vertical = taps_of(height, side, is_bilinear);
  (channels == 1 ? resize<1> : resize<3>)(in, height, width, horizontal, vertical, side, out);
}
