// A random resized crop or a view of Barlow Twins for a batch: resized crop, flip, colours, blur, solarize,
// normalisation, image by image.
//
// The arithmetic is Pillow's, so that the bytes equal its per-image chain: fixed point with 22 bits in the two passes of
// the crop and 24 in the blur, single and double precision as Pillow in blends and in the hue. An image stays in the processor's
// nearest caches from its crop to its normalised values. One thread computes a whole image, so that the result depends
// neither on the batch nor on the number of threads.
#pragma GCC optimize("fp-contract=off")  // a fused multiply-add rounds once where Pillow rounds twice
#pragma STDC FP_CONTRACT OFF             // the same for clang
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using Byte = uint8_t;

// A row of each table of ViewDraws (draws.py).
struct Whole {
  int32_t top, left, height, width, flip, jitter, order[4], hue, gray, solarize;
};

struct Real {
  float brightness, contrast, saturation, sigma;
};

struct Taps {
  int first, weight[4];  // in 1 / 2 ** 22
};

// Passes over lines use ints: with mixed bytes and ints, a vector loop takes 64 pixels at once or none.
constexpr int kLanes = 16;

int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Scratch {
  std::vector<int> crop, passed, lines, row, next;
  std::vector<Byte> image, gray;
  std::vector<std::vector<Taps>> taps;  // by the crop's size; empty until needed
  bool bilinear;                        // else bicubic
  Scratch(int channels, int side, bool bilinear)
      // Three additional columns or lines, which taps of weight 0 at the end of the crop read.
      : crop((side + 3) * padded(channels * side)), passed(side * padded(channels * side)),
        lines((channels * side + 3) * padded(side)), row(padded(side) + 4), next(padded(side) + 4),
        image(channels * side * side), gray(side * side), taps(side + 1),
        bilinear(bilinear) {}
};

// The loops over pixels. All numbers are arguments: the compiler would load references for each pixel.

// out[c, r] = in[r, c]
template <class Number>
void transpose(const Number* __restrict in, int rows, int columns, int in_stride, int* __restrict out, int out_stride) {
  constexpr int kSquare = 8;
  for (int c0 = 0; c0 < columns; c0 += kSquare)
    for (int r = 0; r < rows; r++)
      for (int c = c0; c < std::min(c0 + kSquare, columns); c++) out[c * out_stride + r] = in[r * in_stride + c];
}

void weigh(const int* in, int stride, const int* weight, int n, int* __restrict out) {
  const int *a = in, *b = in + stride, *c = b + stride, *d = c + stride;
  const int wa = weight[0], wb = weight[1], wc = weight[2], wd = weight[3];
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const int sum = ((1 << 21) + wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i]) >> 22;
    out[i] = std::min(std::max(sum, 0), 255);
  }
}

Byte blended(int degenerate, int pixel, float factor) {
  const float value = static_cast<float>(degenerate) + factor * static_cast<float>(pixel - degenerate);
  return static_cast<Byte>(static_cast<int>(std::min(std::max(value, 0.f), 255.f)));
}

void blend_with(int degenerate, Byte* __restrict image, int n, float factor) {
#pragma omp simd
  for (int i = 0; i < n; i++) image[i] = blended(degenerate, image[i], factor);
}

void blend_with(const Byte* __restrict degenerate, Byte* __restrict image, int n, float factor) {
#pragma omp simd
  for (int i = 0; i < n; i++) image[i] = blended(degenerate[i], image[i], factor);
}

void to_gray(const Byte* __restrict red, const Byte* __restrict green, const Byte* __restrict blue, int n,
             Byte* __restrict gray) {
#pragma omp simd
  for (int i = 0; i < n; i++)
    gray[i] = static_cast<Byte>((19595u * red[i] + 38470u * green[i] + 7471u * blue[i] + 0x8000u) >> 16);
}

int rounded_mean(const Byte* gray, int n) {
  uint64_t sum = 0;
  for (int i = 0; i < n; i++) sum += gray[i];
  return static_cast<int>(static_cast<double>(sum) / n + 0.5);
}

// Conversion to HSV in bytes and back, in stages with arrays between them: the compiler doesn't vectorise one loop with
// mixed bytes, floats and doubles.
constexpr int kBlock = 64;
using Ints = int[kBlock];
using Floats = float[kBlock];

// Computes the hue in turns from -1/6 on, the saturation as a portion of 1, and the value.
void to_turns(const Byte* __restrict red, const Byte* __restrict green, const Byte* __restrict blue, int n,
              Floats& turns, Floats& portion, Ints& value) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const int r = red[i], g = green[i], b = blue[i];
    const int high = std::max(r, std::max(g, b)), chroma = high - std::min(r, std::min(g, b));
    const float divisor = static_cast<float>(std::max(chroma, 1));
    const float rc = static_cast<float>(high - r) / divisor, gc = static_cast<float>(high - g) / divisor;
    const float bc = static_cast<float>(high - b) / divisor;
    const float from_green = static_cast<float>(2.0 + rc - bc), from_blue = static_cast<float>(4.0 + gc - rc);
    turns[i] = r == high ? bc - gc : g == high ? from_green : from_blue;
    portion[i] = static_cast<float>(chroma) / static_cast<float>(std::max(high, 1));
    value[i] = high;
  }
}

void to_bytes(const Floats& turns, const Floats& portion, int shift, int n, Ints& hue, Ints& saturation) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const double turn = turns[i] / 6.0 + 1.0;
    const float fraction = static_cast<float>(turn >= 1.0 ? turn - 1.0 : turn);
    hue[i] = (static_cast<int>(fraction * 255.0) + shift) & 255;
    saturation[i] = static_cast<int>(portion[i] * 255.0);
  }
}

// Computes the lowest and the middle level of a pixel's channels; the highest is the value.
void to_levels(const Ints& hue, const Ints& saturation, const Ints& value, int n, Ints& sixth, Ints& low,
               Ints& middle) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    sixth[i] = hue[i] * 6 / 255;
    const float f = static_cast<float>(hue[i] * 6 - 255 * sixth[i]) / 255.f;
    const float s = static_cast<float>(saturation[i]) / 255.f, product = s * f;
    const double high = value[i];
    const int falling = static_cast<int>(high * (1.0 - product) + 0.5);
    const int rising = static_cast<int>(high * (1.0 - s * (1.0 - f)) + 0.5);
    low[i] = static_cast<int>(high * (1.0 - s) + 0.5);
    middle[i] = sixth[i] & 1 ? falling : rising;
  }
}

// By sixth of the circle, red is value, middle, low, low, middle, value, value; the other channels are thirds later.
void to_channel(const Ints& sixth, const Ints& value, const Ints& middle, const Ints& low, int n, int from,
                Byte* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const int at = sixth[i] + from, place = at >= 6 ? at - 6 : at;  // 0..5, and the hue 255 is in sixth 6
    const int from_middle = std::abs(2 * place - 5);                // 5, 3, 1, 1, 3, 5
    out[i] = static_cast<Byte>(from_middle == 5 ? value[i] : from_middle == 3 ? middle[i] : low[i]);
  }
}

// Converts to HSV in bytes, shifts the hue modulo 256, and converts back.
void shift_hue(Byte* red, Byte* green, Byte* blue, int pixels, int shift) {
  Floats turns, portion;
  Ints value, hue, saturation, sixth, low, middle;
  for (int i = 0; i < pixels; i += kBlock) {
    const int n = std::min(kBlock, pixels - i);
    to_turns(red + i, green + i, blue + i, n, turns, portion, value);
    to_bytes(turns, portion, shift, n, hue, saturation);
    to_levels(hue, saturation, value, n, sixth, low, middle);
    to_channel(sixth, value, middle, low, n, 0, red + i);
    to_channel(sixth, value, middle, low, n, 4, green + i);
    to_channel(sixth, value, middle, low, n, 2, blue + i);
  }
}

// A box of 2 * radius + 1 pixels of weight `inner` between two pixels of weight `outer`, in 1 / 2 ** 24.
struct Box {
  int radius;
  uint32_t inner, outer;
};

// The neighbours at -2, -1, 0, 1, 2.
struct Neighbours {
  const int* at[5];
};

template <int radius>
void box_pass(const Neighbours& in, uint32_t inner, uint32_t outer, int n, int* __restrict out) {
  const int *a = in.at[0], *b = in.at[1], *c = in.at[2], *d = in.at[3], *e = in.at[4];
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const uint32_t beside = b[i] + d[i], box = radius ? c[i] + beside : c[i], ends = radius ? a[i] + e[i] : beside;
    out[i] = static_cast<int>((box * inner + ends * outer + (1u << 23)) >> 24);
  }
}

void box_pass(const Box& box, const Neighbours& in, int n, int* out) {
  (box.radius ? box_pass<1> : box_pass<0>)(in, box.inner, box.outer, n, out);
}

template <bool solarize>
void normalise(const Byte* __restrict in, int n, float mean, float std, float* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const int value = solarize && in[i] >= 128 ? 255 - in[i] : in[i];
    out[i] = (static_cast<float>(value) - mean) / std;
  }
}

void interleave(const float* __restrict planes, int n, float* __restrict out) {
  for (int i = 0; i < n; i++) {
    out[3 * i] = planes[i];
    out[3 * i + 1] = planes[n + i];
    out[3 * i + 2] = planes[2 * n + i];
  }
}

// The steps.

double bicubic(double x) {
  x = std::abs(x);
  if (x < 1) return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

// Returns the taps for `side` pixels from `size` <= side, computed once: four for bicubic interpolation, and two or, by
// rounding, three for bilinear.
const Taps* taps_of(int size, int side, Scratch& s) {
  std::vector<Taps>& taps = s.taps[size];
  if (!taps.empty()) return taps.data();
  taps.resize(side);
  const double scale = static_cast<double>(size) / side, reach = s.bilinear ? 1.0 : 2.0;
  for (int x = 0; x < side; x++) {
    const double centre = (x + 0.5) * scale;
    const int first = std::max(static_cast<int>(centre - reach + 0.5), 0);
    const int count = std::min(static_cast<int>(centre + reach + 0.5), size) - first;
    double weight[5], sum = 0;
    for (int i = 0; i < count; i++) {
      const double distance = i + first - centre + 0.5;
      sum += weight[i] = s.bilinear ? std::max(1 - std::abs(distance), 0.0) : bicubic(distance);
    }
    const int more = std::max(count - 4, 0);  // a fifth by rounding, at distance 2 with weight 0
    taps[x] = {first + more, {0, 0, 0, 0}};
    for (int i = more; i < count; i++) {
      const double fixed = weight[i] / sum * (1 << 22);
      taps[x].weight[i - more] = static_cast<int>(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    }
  }
  return taps.data();
}

void resized_crop(const Byte* pixels, const Whole& draw, int channels, int side, Scratch& s) {
  const int height = draw.height, lines = channels * height, stride = padded(lines), area = side * side;
  for (int c = 0; c < channels; c++) {
    const Byte* corner = pixels + c * area + draw.top * side + draw.left;
    transpose(corner, height, draw.width, side, s.crop.data() + c * height, stride);
  }
  const Taps* taps = taps_of(draw.width, side, s);
  for (int x = 0; x < side; x++) {
    int* column = s.passed.data() + (draw.flip ? side - 1 - x : x) * stride;
    weigh(s.crop.data() + taps[x].first * stride, stride, taps[x].weight, stride, column);
  }
  transpose(s.passed.data(), side, lines, stride, s.lines.data(), side);
  taps = taps_of(height, side, s);
  for (int c = 0; c < channels; c++)
    for (int y = 0; y < side; y++) {
      const int* first = s.lines.data() + (c * height + taps[y].first) * side;
      weigh(first, side, taps[y].weight, side, s.passed.data() + c * area + y * side);
    }
  std::copy_n(s.passed.data(), channels * area, s.image.data());
}

void jitter(const Whole& draw, const Real& factors, int channels, int area, Byte* image, Byte* gray) {
  Byte *red = image, *green = image + area, *blue = green + area;
  for (const int step : draw.order) {
    if (step == 0) blend_with(0, image, channels * area, factors.brightness);
    if (step == 1) {
      if (channels == 3) to_gray(red, green, blue, area, gray);
      blend_with(rounded_mean(channels == 3 ? gray : image, area), image, channels * area, factors.contrast);
    }
    if (channels != 3) continue;
    if (step == 2) {
      to_gray(red, green, blue, area, gray);
      for (Byte* plane : {red, green, blue}) blend_with(gray, plane, area, factors.saturation);
    }
    // Also by 0: the conversion to HSV rounds. A hue that is off has step 4.
    if (step == 3) shift_hue(red, green, blue, area, draw.hue);
  }
}

// Returns the box of which three passes are the blur with this standard deviation (Gwosdek et al., 2011), below 2.44.
Box box_for(float sigma) {
  const float variance = sigma * sigma / 3;
  const float length = static_cast<float>(std::sqrt(12.0 * variance + 1.0));
  const float whole = static_cast<float>(std::floor((length - 1.0) / 2.0)), next = (whole + 1) * (whole + 1);
  const float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - next));
  const float radius = whole + part;
  const int r = static_cast<int>(radius);
  const uint32_t inner = static_cast<uint32_t>(16777216.f / (radius * 2 + 1));
  return {r, inner, ((1u << 24) - (2 * r + 1) * inner) / 2};
}

void blur(const Box& box, int channels, int side, Scratch& s) {
  for (int line = 0; line < channels * side; line++) {
    int *in = s.row.data() + 2, *out = s.next.data() + 2;
    std::copy_n(s.image.data() + line * side, side, in);
    for (int pass = 0; pass < 3; pass++) {
      in[-2] = in[-1] = in[0];
      in[side] = in[side + 1] = in[side - 1];
      box_pass(box, {{in - 2, in - 1, in, in + 1, in + 2}}, side, pass == 2 ? s.lines.data() + line * side : out);
      std::swap(in, out);
    }
  }
  const int area = side * side;
  for (int c = 0; c < channels; c++) {
    int *in = s.lines.data() + c * area, *out = s.passed.data() + c * area;
    for (int pass = 0; pass < 3; pass++) {
      for (int y = 0; y < side; y++) {
        Neighbours rows;
        for (int i = 0; i < 5; i++) rows.at[i] = in + std::min(std::max(y + i - 2, 0), side - 1) * side;
        box_pass(box, rows, side, out + y * side);
      }
      std::swap(in, out);
    }
  }
  std::copy_n(s.passed.data(), channels * area, s.image.data());  // the third pass wrote there
}

}  // namespace

// A batch, with the fields of `_Batch` in augment_cpu.py.
struct Batch {
  const Byte* pixels;       // [images, channels, side, side]; images are `image_stride` apart
  const int64_t* indices;   // [count]; null: all images, in order
  const Whole* whole;       // [count]
  const Real* real;         // [count]
  const float *mean, *std;  // [channels], of pixels in 0..255
  float* out;               // [count, channels, side, side], or [count, side, side, channels]
  int64_t images, image_stride, count;
  int32_t channels, side, padding, threads;
  bool channels_last, bilinear;
};

// Returns false and does nothing if an index is out of range.
extern "C" bool augment(const Batch* batch) {
  const Batch& x = *batch;
  const auto exists = [&](int64_t index) { return index >= 0 && index < x.images; };
  if (x.indices && !std::all_of(x.indices, x.indices + x.count, exists)) return false;
  const int area = x.side * x.side, size = x.channels * area;
  const bool interleaved = x.channels_last && x.channels == 3;
#pragma omp parallel num_threads(x.threads)
  {
    Scratch s(x.channels, x.side, x.bilinear);
    std::vector<float> planes(interleaved ? size : 0);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < x.count; i++) {
      const Whole& draw = x.whole[i];
      resized_crop(x.pixels + (x.indices ? x.indices[i] : i) * x.image_stride, draw, x.channels, x.side, s);
      if (draw.jitter) jitter(draw, x.real[i], x.channels, area, s.image.data(), s.gray.data());
      if (draw.gray && x.channels == 3) {
        to_gray(s.image.data(), s.image.data() + area, s.image.data() + 2 * area, area, s.gray.data());
        for (int c = 0; c < 3; c++) std::copy_n(s.gray.data(), area, s.image.data() + c * area);
      }
      if (x.real[i].sigma > 0) blur(box_for(x.real[i].sigma), x.channels, x.side, s);
      float* image = x.out + i * size;
      float* out = interleaved ? planes.data() : image;
      for (int c = 0; c < x.channels; c++)
        (draw.solarize ? normalise<true> : normalise<false>)(s.image.data() + c * area, area, x.mean[c], x.std[c],
                                                             out + c * area);
      if (interleaved) interleave(planes.data(), area, image);
    }
  }
  return true;
}
