// Crop, flip, rotation and normalisation of a batch; each thread takes some of the images.
//
// The source of each pixel of a result is computed once for all channels. A channel of the image is normalised as a
// whole, into a plane that stays in the cache, and pixels are picked from the plane. Divisions are cheap in vectors, and
// a pixel costs fewer loads than a byte that is looked up in a table of 256.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t kThreaded = 1 << 15;  // pixels; below, waking the other threads takes longer than their work

// A row of `Draws.table`; the rotation in 1/65536.
struct Draw {
  int32_t top, left, flip, cos, sin, minus_sin, first_row, first_column;
};

bool rotated(const Draw& draw) {
  constexpr int32_t one = 1 << 16, half = one / 2;
  return draw.cos != one || draw.sin || draw.minus_sin || draw.first_row != half || draw.first_column != half;
}

struct Range {
  int32_t begin, end;  // empty unless begin < end
  bool contains(int32_t i) const { return (i >= begin) & (i < end); }
};

// Position of a crop in the image.
struct Crop {
  Range rows, columns;   // rows and columns of the crop that lie in the image
  int32_t origin, step;  // row r, column c of the crop is pixel `origin + r * side + c * step` of the image

  Crop(const Draw& draw, int32_t padding, int32_t side) {
    const int32_t top = draw.top - padding, left = draw.left - padding, before = draw.flip ? left : -left;
    rows = {std::max(0, -top), std::min(side, side - top)};
    columns = {std::max(0, before), std::min(side, side + before)};
    origin = top * side + left + (draw.flip ? side - 1 : 0);
    step = draw.flip ? -1 : 1;
  }
};

// Computes the source in the image of each pixel of the rotated crop; `side * side` if there is none.
void find_sources(const Draw& draw, const Crop& crop, int32_t side, int32_t* __restrict sources) {
  const auto [rows, columns, origin, step] = crop;
  const int32_t cos = draw.cos, minus_sin = draw.minus_sin, none = side * side;
  for (int32_t y = 0; y < side; y++) {
    const int32_t first_row = draw.first_row + cos * y, first_column = draw.first_column + draw.sin * y;
#pragma omp simd
    for (int32_t x = 0; x < side; x++) {
      const int32_t row = (first_row + minus_sin * x) >> 16, column = (first_column + cos * x) >> 16;
      const bool inside = rows.contains(row) & columns.contains(column);
      sources[y * side + x] = inside ? origin + row * side + column * step : none;
    }
  }
}

void normalise(const uint8_t* __restrict pixels, int32_t count, float mean, float std, float* __restrict result) {
#pragma omp simd
  for (int32_t i = 0; i < count; i++) result[i] = (static_cast<float>(pixels[i]) - mean) / std;
}

void pick(const float* __restrict plane, const int32_t* __restrict sources, int32_t count, int64_t stride,
          float* __restrict result) {
  for (int32_t i = 0; i < count; i++) result[i * stride] = plane[sources[i]];
}

// Does the same as `find_sources` and `pick` for a crop that isn't rotated: copies whole rows.
void copy_rows(const float* plane, const Crop& crop, int32_t side, float* result) {
  const float empty = plane[side * side];
  const auto [begin, end] = crop.columns;
  for (int32_t y = 0; y < side; y++, result += side) {
    if (begin >= end || !crop.rows.contains(y)) {
      std::fill_n(result, side, empty);
      continue;
    }
    std::fill(result, result + begin, empty);
    std::fill(result + end, result + side, empty);
    const float* row = plane + crop.origin + y * side;
    if (crop.step > 0)
      std::copy(row + begin, row + end, result + begin);
    else
      std::reverse_copy(row - end + 1, row - begin + 1, result + begin);
  }
}

// A batch, with the fields of `_Batch` in augment_cpu.py.
struct Batch {
  const uint8_t* pixels;    // [images, channels, side, side]; images are `image_stride` apart
  const int64_t* indices;   // [count]; null: all images, in order
  const Draw* draws;        // [count]; null: none
  const void* real;         // null: of views only
  const float *mean, *std;  // [channels], for pixels in 0..255
  float* result;            // [count, channels, side, side], or with the channels last
  int64_t images, image_stride, count;
  int32_t channels, side, padding, threads;
  bool channels_last, bilinear;
};

// Memory of one thread.
struct Scratch {
  std::vector<int32_t> sources;  // of each pixel; the pixel itself without draws
  std::vector<float> plane;      // a channel, and an empty pixel

  explicit Scratch(int32_t size) : sources(size), plane(size + 1) { std::iota(sources.begin(), sources.end(), 0); }
};

void augment_image(const Batch& x, int64_t i, Scratch& scratch) {
  const int32_t side = x.side, size = side * side;
  const uint8_t* image = x.pixels + (x.indices ? x.indices[i] : i) * x.image_stride;
  float *result = x.result + i * x.channels * size, *plane = scratch.plane.data();
  const int64_t stride = x.channels_last ? x.channels : 1, next_channel = x.channels_last ? 1 : size;

  const Draw draw = x.draws ? x.draws[i] : Draw{};
  const Crop crop(draw, x.padding, side);
  const bool unchanged = !x.draws && !x.channels_last, by_rows = x.draws && !x.channels_last && !rotated(draw);
  if (x.draws && !by_rows) find_sources(draw, crop, side, scratch.sources.data());

  for (int32_t c = 0; c < x.channels; c++, image += size, result += next_channel) {
    normalise(image, size, x.mean[c], x.std[c], unchanged ? result : plane);
    if (unchanged) continue;
    plane[size] = (0.f - x.mean[c]) / x.std[c];
    if (by_rows)
      copy_rows(plane, crop, side, result);
    else
      pick(plane, scratch.sources.data(), size, stride, result);
  }
}

}  // namespace

// Returns false and does nothing if an index is out of range.
extern "C" bool augment(const Batch* batch) {
  const Batch& x = *batch;
  const auto exists = [&](int64_t index) { return index >= 0 && index < x.images; };
  if (x.indices && !std::all_of(x.indices, x.indices + x.count, exists)) return false;
  const int32_t size = x.side * x.side;
#pragma omp parallel num_threads(x.threads) if (x.count * x.channels * size > kThreaded)
  {
    Scratch scratch(size);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < x.count; i++) augment_image(x, i, scratch);
  }
  return true;
}
