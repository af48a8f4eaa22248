// Training kernels over channels-last tensors: what lies between the matrix products of a convolutional network.
//
// A tensor [N, C, H, W] in channels-last memory is a table of rows (one per position) by C channels. Activations are
// bfloat16, or float32 (SCALAR); everything is computed in float32, and sums over rows are collected in float64 in
// a fixed order, so that the same number of threads gives the same bits. kernels.py compiles and calls this.
//
// Vectors are those of GCC and Clang (16 floats), which become whatever the machine has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace kernels {
namespace {

using Index = std::int64_t;
constexpr int LANES = 16;
using vf = float __attribute__((vector_size(64)));
using vu = std::uint32_t __attribute__((vector_size(64)));
using vh = std::uint16_t __attribute__((vector_size(32)));

struct bf16 {
  std::uint16_t bits;
};

inline vf vector_of(float value) { return value - vf{}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vf load(const bf16* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  vu bits = __builtin_convertvector(half, vu) << 16;
  return (vf)bits;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// To the nearest, ties to even; what is not a number stays so.
inline void store(bf16* p, vf v) {
#ifdef __AVX512BF16__
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu wrong = (vu)(v != v);
  vh half = __builtin_convertvector((wrong & 0x7fc0) | (~wrong & rounded), vh);
  std::memcpy(p, &half, sizeof half);
#endif
}

// Fewer than LANES channels, the others zero.
template <class T>
inline vf load_some(const T* p, int n) {
  T whole[LANES] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}

template <class T>
inline void store_some(T* p, vf v, int n) {
  T whole[LANES];
  store(whole, v);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

#ifdef __AVX512BF16__
inline vf load_some(const bf16* p, int n) {
  vh half = (vh)_mm256_maskz_loadu_epi16((1u << n) - 1, p);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline void store_some(bf16* p, vf v, int n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

inline vf smaller(vf a, vf b) { return a < b ? a : b; }
inline vf larger(vf a, vf b) { return a > b ? a : b; }

// Calls each(channel, lanes) so that [0, channels) is covered once.
template <class Each>
inline void blocks(Index channels, Each each) {
  Index c = 0;
  for (; c + LANES <= channels; c += LANES) each(c, LANES);
  if (c < channels) each(c, int(channels - c));
}

template <class T>
inline vf take(const T* p, int lanes) {
  return lanes == LANES ? load(p) : load_some(p, lanes);
}

template <class T>
inline void put(T* p, vf v, int lanes) {
  if (lanes == LANES)
    store(p, v);
  else
    store_some(p, v, lanes);
}

// ---------------------------------------------------------------------------------------------- activations

enum Act { NONE, RELU, RELU6, HARDSWISH };

// A NaN passes: the loss must show that training diverged.
template <Act act>
inline vf activate(vf u) {
  vf zero{}, six = vector_of(6);
  if (act == RELU) return u < zero ? zero : u;
  if (act == RELU6) return u < zero ? zero : (u > six ? six : u);
  if (act == HARDSWISH) {
    vf gate = u + 3;
    gate = gate < zero ? zero : (gate > six ? six : gate);
    return u * gate * (1.0f / 6);
  }
  return u;
}

// The gradient before the activation, at `u` before it.
template <Act act>
inline vf passed(vf g, vf u) {
  vf zero{}, six = vector_of(6), three = vector_of(3);
  if (act == RELU) return u > zero ? g : zero;
  if (act == RELU6) return u > zero ? (u < six ? g : zero) : zero;
  if (act == HARDSWISH) {
    vf slope = g * (u * (1.0f / 3) + 0.5f);
    return u > -three ? (u < three ? slope : g) : zero;
  }
  return g;
}

template <class Body>
inline void with_act(int act, Body body) {
  switch (act) {
    case RELU:
      return body(std::integral_constant<Act, RELU>{});
    case RELU6:
      return body(std::integral_constant<Act, RELU6>{});
    case HARDSWISH:
      return body(std::integral_constant<Act, HARDSWISH>{});
    default:
      return body(std::integral_constant<Act, NONE>{});
  }
}

// ---------------------------------------------------------------------------------------------- batch norm

// Few channels make short rows: several rows are then treated as one, the channels' parameters repeated.
struct Table {
  Index rows, channels, width;  // width = channels · repeats

  Table(Index r, Index c) : rows(r), channels(c), width(c) {
    while (width < 256 && rows % 2 == 0) width *= 2, rows /= 2;
  }
  Index repeats() const { return width / channels; }

  std::vector<float> repeated(const float* values) const {
    std::vector<float> out(width);
    for (Index i = 0; i < width; ++i) out[i] = values[i % channels];
    return out;
  }
};

constexpr Index ROWS_AT_ONCE = 64;  // of float32 sums before they go to float64

// Sums over rows, per thread in float32 for a few rows, then float64, then over threads in order.
struct Sums {
  Index width;
  int threads;
  std::vector<double> totals;

  Sums(Index w, int t) : width(w), threads(t), totals(2 * w * t, 0.0) {}

  void add(int thread, const float* first, const float* second) {
    double* own = &totals[2 * width * thread];
    for (Index i = 0; i < width; ++i) own[i] += first[i];
    for (Index i = 0; i < width; ++i) own[width + i] += second[i];
  }

  double total(int which, Index channel, Index channels) const {
    double sum = 0;
    for (int t = 0; t < threads; ++t)
      for (Index i = channel; i < width; i += channels) sum += totals[2 * width * t + which * width + i];
    return sum;
  }
};

inline Index share(Index rows, int thread, int threads) { return rows * thread / threads; }

// Asks for the `part`-th of `parts` of what lies behind p, to be there when it is needed.
template <bool to_write = false, class T>
inline void ahead(const T* p, Index count, Index part, Index parts) {
  constexpr Index LINE = 64;
  const char* bytes = reinterpret_cast<const char*>(p);
  Index lines = count * Index(sizeof(T)) / LINE;
  Index end = lines * (part + 1) / parts;
  for (Index i = lines * part / parts; i < end; ++i) __builtin_prefetch(bytes + i * LINE, to_write);
}

// The same for one address, some rows before it is its turn: processors foresee few streams by themselves.
constexpr Index AHEAD = 4096;

template <bool to_write = false, class T>
inline void soon(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD, to_write);
}

// Calls work(thread, first row, end) for each thread, over blocks of few rows.
template <class Work>
inline void by_rows(Index rows, Index at_once, int threads, Work work) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    Index end = share(rows, t + 1, threads);
    for (Index from = share(rows, t, threads); from < end; from += at_once)
      work(t, from, std::min(end, from + at_once));
  }
}

// Calls each(row, number of rows) for four rows at a time: what belongs to channels is then read a quarter as often.
template <class Each>
inline void by_fours(Index from, Index end, Each each) {
  for (; from + 4 <= end; from += 4) each(from, std::integral_constant<int, 4>{});
  for (; from < end; ++from) each(from, std::integral_constant<int, 1>{});
}

template <class T>
void statistics(const T* y, Index rows, Index channels, int threads, double* mean, double* variance) {
  Table table(rows, channels);
  Index width = table.width;
  std::vector<float> first(channels);
  for (Index c = 0; c < channels; ++c) {
    T one[LANES] = {};
    one[0] = y[c];
    first[c] = load(one)[0];
    if (!std::isfinite(first[c])) first[c] = 0;
  }
  std::vector<float> pivot = table.repeated(first.data());
  Sums sums(width, threads);
  by_rows(table.rows, ROWS_AT_ONCE, threads, [&](int t, Index from, Index end) {
    std::vector<float> sum(width), square(width);
    by_fours(from, end, [&](Index r, auto rows) {
      blocks(width, [&](Index c, int lanes) {
        vf s = take(&sum[c], lanes), q = take(&square[c], lanes), p = take(&pivot[c], lanes);
        for (int i = 0; i < rows.value; ++i) {
          soon(y + (r + i) * width + c);
          vf d = take(y + (r + i) * width + c, lanes) - p;
          s += d, q += d * d;
        }
        put(&sum[c], s, lanes), put(&square[c], q, lanes);
      });
    });
    sums.add(t, sum.data(), square.data());
  });
  for (Index c = 0; c < channels; ++c) {
    double shift = sums.total(0, c, channels) / rows, square = sums.total(1, c, channels) / rows;
    mean[c] = first[c] + shift;
    variance[c] = square - shift * shift;
    if (variance[c] < 0) variance[c] = 0;  // a NaN stays
  }
}

// z = act(y · scale + shift + side) for rows of `width` channels, whose parameters a and b are.
template <class T, Act act, bool has_side>
inline void affine_rows(const T* y, const T* side, T* z, Index from, Index end, Index width, const float* a,
                        const float* b) {
  by_fours(from, end, [&](Index row, auto rows) {
    blocks(width, [&](Index c, int lanes) {
      vf scale = take(a + c, lanes), shift = take(b + c, lanes);
      for (int i = 0; i < rows.value; ++i) {
        Index at = (row + i) * width + c;
        soon(y + at), soon<true>(z + at);
        if (has_side) soon(side + at);
        vf u = take(y + at, lanes) * scale + shift;
        if (has_side) u += take(side + at, lanes);
        put(z + at, activate<act>(u), lanes);
      }
    });
  });
}

template <class T, Act act, bool has_side>
void affine(const T* y, const T* side, T* z, Index rows, Index channels, const float* scale, const float* shift,
            int threads) {
  Table table(rows, channels);
  std::vector<float> a = table.repeated(scale), b = table.repeated(shift);
  by_rows(table.rows, ROWS_AT_ONCE, threads, [&](int, Index from, Index end) {
    affine_rows<T, act, has_side>(y, side, z, from, end, table.width, a.data(), b.data());
  });
}

// A BatchNorm's parameters and buffers. `kept` is for the backward pass: mean, 1 / deviation, scale, shift by channel.
struct Norm {
  const float *gamma, *beta;
  float *running_mean, *running_var, *kept;
  double eps, momentum;
  int training;
};

// Fills `kept`, in training from the values y, whose statistics then enter the running ones.
template <class T>
void prepare(const T* y, Index rows, Index channels, const Norm& norm, int threads) {
  float *mean = norm.kept, *rstd = mean + channels, *scale = rstd + channels, *shift = scale + channels;
  if (norm.training) {
    std::vector<double> m(channels), v(channels);
    statistics(y, rows, channels, threads, m.data(), v.data());
    double unbiased = rows > 1 ? double(rows) / (rows - 1) : NAN;
    for (Index c = 0; c < channels; ++c) {
      mean[c] = float(m[c]), rstd[c] = float(1 / std::sqrt(v[c] + norm.eps));
      norm.running_mean[c] = float((1 - norm.momentum) * norm.running_mean[c] + norm.momentum * m[c]);
      norm.running_var[c] = float((1 - norm.momentum) * norm.running_var[c] + norm.momentum * v[c] * unbiased);
    }
  } else {
    for (Index c = 0; c < channels; ++c)
      mean[c] = norm.running_mean[c], rstd[c] = float(1 / std::sqrt(double(norm.running_var[c]) + norm.eps));
  }
  for (Index c = 0; c < channels; ++c)
    scale[c] = norm.gamma[c] * rstd[c], shift[c] = norm.beta[c] - mean[c] * scale[c];
}

template <class T>
void norm_forward(const T* y, const T* side, T* z, Index rows, Index channels, const Norm& norm, int act, int threads) {
  prepare(y, rows, channels, norm, threads);
  const float *scale = norm.kept + 2 * channels, *shift = scale + channels;
  with_act(act, [&](auto a) {
    if (side)
      affine<T, a.value, true>(y, side, z, rows, channels, scale, shift, threads);
    else
      affine<T, a.value, false>(y, side, z, rows, channels, scale, shift, threads);
  });
}

// What of `kept` the backward passes read, repeated over a table's width.
struct Repeated {
  std::vector<float> mean, scale, shift;

  Repeated(const Table& table, const float* kept)
      : mean(table.repeated(kept)),
        scale(table.repeated(kept + 2 * table.channels)),
        shift(table.repeated(kept + 3 * table.channels)) {}
};

// Σ g and Σ g · (y − mean) over rows, g the gradient before the activation, at y normalised or at the result z where
// there was a side. g is written where it is wanted.
template <class T, Act act, bool has_side, bool written>
inline void reduce_rows(const T* dz, const T* y, const T* z, T* g_out, Index from, Index end, Index width,
                        const Repeated& of, float* sum, float* product) {
  by_fours(from, end, [&](Index row, auto rows) {
    blocks(width, [&](Index c, int lanes) {
      vf s = take(sum + c, lanes), q = take(product + c, lanes);
      vf mean = take(&of.mean[c], lanes), scale = take(&of.scale[c], lanes), shift = take(&of.shift[c], lanes);
      for (int i = 0; i < rows.value; ++i) {
        Index at = (row + i) * width + c;
        soon(dz + at), soon(y + at);
        if (has_side) soon(z + at);
        if (written) soon<true>(g_out + at);
        vf v = take(y + at, lanes);
        vf g = passed<act>(take(dz + at, lanes), has_side ? take(z + at, lanes) : v * scale + shift);
        if (written) put(g_out + at, g, lanes);
        s += g, q += g * (v - mean);
      }
      put(sum + c, s, lanes), put(product + c, q, lanes);
    });
  });
}

template <class T, Act act, bool has_side>
void reduce(const T* dz, const T* y, const T* z, T* dside, const Table& table, const float* kept, Sums& sums) {
  Repeated of(table, kept);
  by_rows(table.rows, ROWS_AT_ONCE, sums.threads, [&](int t, Index from, Index end) {
    std::vector<float> sum(table.width), product(table.width);
    reduce_rows<T, act, has_side, has_side>(dz, y, z, dside, from, end, table.width, of, sum.data(), product.data());
    sums.add(t, sum.data(), product.data());
  });
}

// The gradients of γ and β from the sums, and with them q and r, by channel, of what `spread` computes.
std::vector<float> finish(const Sums& sums, Index rows, Index channels, const float* kept, float* dgamma, float* dbeta,
                          int training) {
  const float *mean = kept, *rstd = kept + channels, *scale = kept + 2 * channels;
  std::vector<float> factors(2 * channels, 0.0f);
  for (Index c = 0; c < channels; ++c) {
    double g = sums.total(0, c, channels), gx = sums.total(1, c, channels) * rstd[c];
    dgamma[c] = float(gx), dbeta[c] = float(g);
    if (!training) continue;
    double slope = -gx / rows * rstd[c] * scale[c];
    factors[c] = float(slope), factors[channels + c] = float(-slope * mean[c] - g / rows * scale[c]);
  }
  return factors;
}

// dy = g · scale + y · q + r, by channel; dy may be dz.
template <class T, Act act>
void spread(const T* dz, const T* y, T* dy, const Table& table, const float* kept, const float* factors, int threads) {
  Index width = table.width, channels = table.channels;
  std::vector<float> a = table.repeated(kept + 2 * channels), b = table.repeated(kept + 3 * channels),
                     q = table.repeated(factors), o = table.repeated(factors + channels);
  by_rows(table.rows, ROWS_AT_ONCE, threads, [&](int, Index from, Index end) {
    by_fours(from, end, [&](Index row, auto rows) {
      blocks(width, [&](Index c, int lanes) {
        vf scale = take(&a[c], lanes), shift = take(&b[c], lanes);
        vf slope = take(&q[c], lanes), offset = take(&o[c], lanes);
        for (int i = 0; i < rows.value; ++i) {
          Index at = (row + i) * width + c;
          soon(dz + at), soon(y + at), soon<true>(dy + at);
          vf v = take(y + at, lanes), g = passed<act>(take(dz + at, lanes), v * scale + shift);
          put(dy + at, g * scale + v * slope + offset, lanes);
        }
      });
    });
  });
}

template <class T>
void norm_backward(const T* dz, const T* y, const T* z, T* dy, T* dside, Index rows, Index channels, const float* kept,
                   float* dgamma, float* dbeta, int training, int act, int threads) {
  Table table(rows, channels);
  Sums sums(table.width, threads);
  with_act(act, [&](auto a) {
    if (dside)
      reduce<T, a.value, true>(dz, y, z, dside, table, kept, sums);
    else
      reduce<T, a.value, false>(dz, y, z, dside, table, kept, sums);
  });
  std::vector<float> factors = finish(sums, rows, channels, kept, dgamma, dbeta, training);
  if (dside) return spread<T, NONE>(dside, y, dy, table, kept, factors.data(), threads);
  with_act(act, [&](auto a) { spread<T, a.value>(dz, y, dy, table, kept, factors.data(), threads); });
}

// ---------------------------------------------------------------------------------------------- depthwise

struct Shape {
  Index n, channels, height, width, out_height, out_width, kernel_h, kernel_w, stride, dilation, top, left;

  bool halved() const {  // 3 × 3 that keeps every second position
    return three() && stride == 2 && top == 1 && left == 1 && out_height == (height + 1) / 2 &&
           out_width == (width + 1) / 2;
  }
  bool three() const { return kernel_h == 3 && kernel_w == 3 && dilation == 1; }
  bool plain() const {  // 3 × 3 that keeps the size
    return kernel_h == 3 && kernel_w == 3 && stride == 1 && dilation == 1 && top == 1 && left == 1 &&
           out_height == height && out_width == width;
  }
};

template <int V>
struct Pack {
  vf v[V];
};

template <int V, class T>
inline Pack<V> read(const T* p, int lanes) {
  Pack<V> out;
  for (int i = 0; i < V; ++i) out.v[i] = V == 1 ? take(p, lanes) : load(p + i * LANES);
  return out;
}

template <int V, class T>
inline void write(T* p, const Pack<V>& a, int lanes) {
  for (int i = 0; i < V; ++i)
    if (V == 1)
      put(p, a.v[i], lanes);
    else
      store(p + i * LANES, a.v[i]);
}

template <int V>
inline void multiply_add(Pack<V>& sum, const Pack<V>& a, const Pack<V>& b) {
  for (int i = 0; i < V; ++i) sum.v[i] += a.v[i] * b.v[i];
}

// Calls each(channel, lanes, vectors) over blocks of 32 channels, whose bytes are a cache line, if there are so many.
// The last block may overlap the one before, which is right because results are written and not added up.
template <class Each>
inline void channel_blocks(Index channels, Each each) {
  constexpr Index two = 2 * LANES;
  if (channels < two)
    return blocks(channels, [&](Index c, int lanes) { each(c, lanes, std::integral_constant<int, 1>{}); });
  for (Index c = 0; c < channels; c += two)
    each(std::min(c, channels - two), LANES, std::integral_constant<int, 2>{});
}

// One row of a 3 × 3 convolution at stride 1. Each column read adds to the three outputs that see it.
template <int V, class T>
inline void row3(const T* const rows[3], const float* w, T* out, Index width, Index channels, int lanes) {
  Pack<V> weights[9];
  for (int k = 0; k < 9; ++k) weights[k] = read<V>(w + k * channels, lanes);
  Pack<V> before{}, here{};
  for (Index j = 0; j < width; ++j) {
    Pack<V> after{};
    for (int k = 0; k < 3; ++k) {
      Pack<V> x = read<V>(rows[k] + j * channels, lanes);
      if (k == 2) __builtin_prefetch(rows[k] + (j + width) * channels);
      multiply_add(before, x, weights[3 * k + 2]);
      multiply_add(here, x, weights[3 * k + 1]);
      multiply_add(after, x, weights[3 * k]);
    }
    __builtin_prefetch(out + (j + width) * channels, 1);
    if (j > 0) write<V>(out + (j - 1) * channels, before, lanes);
    before = here, here = after;
  }
  write<V>(out + (width - 1) * channels, before, lanes);
}

// One image of a 3 × 3 convolution at stride 1; `zeros` stands for the rows outside.
template <class T>
inline void image3(const T* x, const float* w, T* out, const T* zeros, const Shape& s) {
  Index line = s.width * s.channels;
  for (Index h = 0; h < s.height; ++h)
    channel_blocks(s.channels, [&](Index c, int lanes, auto v) {
      const T* here = x + h * line + c;
      const T* rows[3] = {h > 0 ? here - line : zeros, here, h + 1 < s.height ? here + line : zeros};
      row3<v.value>(rows, w + c, out + h * line + c, s.width, s.channels, lanes);
    });
}

// Writes the weight gradient of one image to dw [9, channels].
template <class T>
inline void weights3(const T* x, const T* dy, float* dw, const T* zeros, const Shape& s) {
  Index line = s.width * s.channels;
  channel_blocks(s.channels, [&](Index c, int lanes, auto v) {
    Pack<v.value> sums[9] = {};
    for (Index h = 0; h < s.height; ++h) {
      const T *at = x + h * line + c, *d = dy + h * line + c;
      const T* rows[3] = {h > 0 ? at - line : zeros, at, h + 1 < s.height ? at + line : zeros};
      Pack<v.value> before{}, here = read<v.value>(d, lanes);
      for (Index j = 0; j < s.width; ++j) {
        Pack<v.value> after{};
        if (j + 1 < s.width) after = read<v.value>(d + (j + 1) * s.channels, lanes);
        __builtin_prefetch(d + (j + 1) * s.channels + line);
        for (int k = 0; k < 3; ++k) {
          Pack<v.value> column = read<v.value>(rows[k] + j * s.channels, lanes);
          if (k == 2) __builtin_prefetch(rows[k] + j * s.channels + line);
          multiply_add(sums[3 * k], column, after);
          multiply_add(sums[3 * k + 1], column, here);
          multiply_add(sums[3 * k + 2], column, before);
        }
        before = here, here = after;
      }
    }
    for (int k = 0; k < 9; ++k) write<v.value>(dw + k * s.channels + c, sums[k], lanes);
  });
}

// The rows of x that output row h of a 3 × 3 convolution reads; `zeros` stands for those outside.
template <class T>
struct Rows {
  const T* at[3];

  Rows(const T* x, Index h, Index c, const T* zeros, const Shape& s) {
    for (Index k = 0; k < 3; ++k) {
      Index row = h * s.stride - s.top + k;
      at[k] = row >= 0 && row < s.height ? x + row * s.width * s.channels + c : zeros;
    }
  }
};

// Calls each(tap, offset) for the columns that output column j of a 3 × 3 convolution reads.
template <class Each>
inline void columns3(Index j, const Shape& s, Each each) {
  for (int k = 0; k < 3; ++k) {
    Index column = j * s.stride - s.left + k;
    if (column >= 0 && column < s.width) each(k, column * s.channels);
  }
}

// One image of a 3 × 3 convolution at any stride.
template <class T>
inline void strided3(const T* x, const float* w, T* out, const T* zeros, const Shape& s) {
  for (Index h = 0; h < s.out_height; ++h)
    channel_blocks(s.channels, [&](Index c, int lanes, auto v) {
      constexpr int V = v.value;
      Rows<T> rows(x, h, c, zeros, s);
      Pack<V> weights[9];
      for (int k = 0; k < 9; ++k) weights[k] = read<V>(w + k * s.channels + c, lanes);
      for (Index j = 0; j < s.out_width; ++j) {
        Pack<V> sum{};
        columns3(j, s, [&](int k, Index at) {
          for (int r = 0; r < 3; ++r) multiply_add(sum, read<V>(rows.at[r] + at, lanes), weights[3 * r + k]);
          for (int r = 1; r < 3; ++r) __builtin_prefetch(rows.at[r] + at + 2 * s.width * s.channels);
        });
        write<V>(out + (h * s.out_width + j) * s.channels + c, sum, lanes);
      }
    });
}

template <class T>
inline void strided_weights3(const T* x, const T* dy, float* dw, const T* zeros, const Shape& s) {
  channel_blocks(s.channels, [&](Index c, int lanes, auto v) {
    constexpr int V = v.value;
    Pack<V> sums[9] = {};
    for (Index h = 0; h < s.out_height; ++h) {
      Rows<T> rows(x, h, c, zeros, s);
      for (Index j = 0; j < s.out_width; ++j) {
        Pack<V> d = read<V>(dy + (h * s.out_width + j) * s.channels + c, lanes);
        columns3(j, s, [&](int k, Index at) {
          for (int r = 0; r < 3; ++r) multiply_add(sums[3 * r + k], read<V>(rows.at[r] + at, lanes), d);
          for (int r = 1; r < 3; ++r) __builtin_prefetch(rows.at[r] + at + 2 * s.width * s.channels);
        });
      }
    }
    for (int k = 0; k < 9; ++k) write<V>(dw + k * s.channels + c, sums[k], lanes);
  });
}

// The transpose of a 3 × 3 convolution of stride 2 with one pixel of padding, for one image: an even row or column
// meets the middle tap, an odd one the last tap of the output before it and the first of the one after.
template <class T>
inline void halved3_transposed(const T* dy, const float* w, T* dx, const T* zeros, const Shape& s) {
  Index line = s.out_width * s.channels;
  for (Index h = 0; h < s.height; ++h)
    channel_blocks(s.channels, [&](Index c, int lanes, auto v) {
      constexpr int V = v.value;
      Index a = h / 2, odd = h % 2;
      const T* lines[2] = {dy + a * line + c, odd && a + 1 < s.out_height ? dy + (a + 1) * line + c : zeros};
      Pack<V> weights[2][3], here[2], after[2];
      for (int k = 0; k < 3; ++k) {
        weights[0][k] = read<V>(w + ((odd ? 6 : 3) + k) * s.channels + c, lanes);
        weights[1][k] = read<V>(w + k * s.channels + c, lanes);
      }
      for (int r = 0; r < 2; ++r) here[r] = read<V>(lines[r], lanes);
      for (Index b = 0; b < s.out_width; ++b) {
        Pack<V> even{}, next{};
        for (int r = 0; r < 2; ++r) {
          after[r] = b + 1 < s.out_width ? read<V>(lines[r] + (b + 1) * s.channels, lanes) : Pack<V>{};
          multiply_add(even, here[r], weights[r][1]);
          multiply_add(next, here[r], weights[r][2]);
          multiply_add(next, after[r], weights[r][0]);
          here[r] = after[r];
        }
        T* to = dx + (h * s.width + 2 * b) * s.channels + c;
        __builtin_prefetch(to + s.width * s.channels, 1);
        write<V>(to, even, lanes);
        if (2 * b + 1 < s.width) write<V>(to + s.channels, next, lanes);
      }
    });
}

// Which positions of one side (rows or columns) each position of the other side meets, and by which tap.
struct Meeting {
  Index tap, position;
};
using Meetings = std::vector<std::vector<Meeting>>;

struct Side {
  Index in, out, kernel, stride, dilation, before;

  Meetings of_outputs() const {
    Meetings found(out);
    for (Index o = 0; o < out; ++o)
      for (Index k = 0; k < kernel; ++k) {
        Index i = o * stride - before + k * dilation;
        if (i >= 0 && i < in) found[o].push_back({k, i});
      }
    return found;
  }

  Meetings of_inputs() const {
    Meetings found(in);
    Meetings outputs = of_outputs();
    for (Index o = 0; o < out; ++o)
      for (Meeting m : outputs[o]) found[m.position].push_back({m.tap, o});
    return found;
  }
};

inline Side rows_of(const Shape& s) { return {s.height, s.out_height, s.kernel_h, s.stride, s.dilation, s.top}; }
inline Side columns_of(const Shape& s) { return {s.width, s.out_width, s.kernel_w, s.stride, s.dilation, s.left}; }

// Any depthwise convolution of one image, or its transpose: each position of `to` gathers what it meets in `from`.
template <class T>
inline void gather(const T* from, Index from_width, const float* w, T* to, const Meetings& rows,
                   const Meetings& columns, const Shape& s) {
  Index c_all = s.channels, width = columns.size();
  for (Index h = 0; h < Index(rows.size()); ++h)
    channel_blocks(c_all, [&](Index c, int lanes, auto v) {
      for (Index j = 0; j < width; ++j) {
        Pack<v.value> sum{};
        for (Meeting r : rows[h])
          for (Meeting m : columns[j])
            multiply_add(sum, read<v.value>(from + (r.position * from_width + m.position) * c_all + c, lanes),
                         read<v.value>(w + (r.tap * s.kernel_w + m.tap) * c_all + c, lanes));
        write<v.value>(to + (h * width + j) * c_all + c, sum, lanes);
      }
    });
}

// Writes the weight gradient of one image to dw [taps, channels]; `rows` and `columns` are what the outputs meet.
template <class T>
inline void gather_weights(const T* x, const T* dy, float* dw, const Meetings& rows, const Meetings& columns,
                           const Shape& s) {
  Index c_all = s.channels, line = s.out_width * c_all;
  channel_blocks(c_all, [&](Index c, int lanes, auto v) {
    std::vector<Pack<v.value>> sums(s.kernel_h * s.kernel_w);
    for (Index h = 0; h < s.out_height; ++h)
      for (Index j = 0; j < s.out_width; ++j) {
        Pack<v.value> d = read<v.value>(dy + h * line + j * c_all + c, lanes);
        for (Meeting r : rows[h])
          for (Meeting m : columns[j])
            multiply_add(sums[r.tap * s.kernel_w + m.tap],
                         read<v.value>(x + (r.position * s.width + m.position) * c_all + c, lanes), d);
      }
    for (Index k = 0; k < s.kernel_h * s.kernel_w; ++k) write<v.value>(dw + k * c_all + c, sums[k], lanes);
  });
}

// [channels, taps] → [taps, channels], the taps in reverse order where `flipped`.
std::vector<float> taps_first(const float* w, Index channels, Index taps, bool flipped) {
  std::vector<float> out(channels * taps);
  for (Index k = 0; k < taps; ++k)
    for (Index c = 0; c < channels; ++c) out[k * channels + c] = w[c * taps + (flipped ? taps - 1 - k : k)];
  return out;
}

// A depthwise convolution with what its passes over single images need.
template <class T>
struct Depthwise {
  Shape s;
  Index taps, in, out;
  std::vector<float> forward_weights, backward_weights;
  std::vector<T> zeros;
  Meetings rows, columns, rows_in, columns_in;

  Depthwise(const Shape& shape, const float* w)
      : s(shape),
        taps(s.kernel_h * s.kernel_w),
        in(s.height * s.width * s.channels),
        out(s.out_height * s.out_width * s.channels),
        forward_weights(taps_first(w, s.channels, taps, false)),
        backward_weights(taps_first(w, s.channels, taps, s.plain())),
        zeros(s.width * s.channels, T{}),
        rows(rows_of(s).of_outputs()),
        columns(columns_of(s).of_outputs()),
        rows_in(rows_of(s).of_inputs()),
        columns_in(columns_of(s).of_inputs()) {}

  void forward(const T* x, T* y) const {
    const float* w = forward_weights.data();
    if (s.plain())
      image3(x, w, y, zeros.data(), s);
    else if (s.three())
      strided3(x, w, y, zeros.data(), s);
    else
      gather(x, s.width, w, y, rows, columns, s);
  }

  void backward(const T* dy, T* dx) const {
    if (s.plain())
      image3(dy, backward_weights.data(), dx, zeros.data(), s);
    else if (s.halved())
      halved3_transposed(dy, backward_weights.data(), dx, zeros.data(), s);
    else
      gather(dy, s.out_width, backward_weights.data(), dx, rows_in, columns_in, s);
  }

  void weights(const T* x, const T* dy, float* dw) const {
    if (s.plain())
      weights3(x, dy, dw, zeros.data(), s);
    else if (s.three())
      strided_weights3(x, dy, dw, zeros.data(), s);
    else
      gather_weights(x, dy, dw, rows, columns, s);
  }
};

// Weight gradients of single images, summed by thread, then over threads in order.
struct WeightSums {
  Index channels, taps;
  int threads;
  std::vector<double> totals;

  WeightSums(Index c, Index k, int t) : channels(c), taps(k), threads(t), totals(c * k * t, 0.0) {}

  void add(int thread, const std::vector<float>& image) {
    for (Index i = 0; i < channels * taps; ++i) totals[thread * channels * taps + i] += image[i];
  }

  void total(float* dw) const {
    for (Index k = 0; k < taps; ++k)
      for (Index c = 0; c < channels; ++c) {
        double sum = 0;
        for (int t = 0; t < threads; ++t) sum += totals[(t * taps + k) * channels + c];
        dw[c * taps + k] = float(sum);
      }
  }
};

template <class T>
void depthwise_forward(const T* x, const float* w, T* y, const Shape& s, int threads) {
  Depthwise<T> conv(s, w);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index n = 0; n < s.n; ++n) conv.forward(x + n * conv.in, y + n * conv.out);
}

// dx or dw may be null: that gradient is then not wanted.
template <class T>
void depthwise_backward(const T* x, const T* dy, const float* w, T* dx, float* dw, const Shape& s, int threads) {
  Depthwise<T> conv(s, w);
  WeightSums sums(s.channels, conv.taps, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    std::vector<float> image(conv.taps * s.channels);
    for (Index n = share(s.n, t, threads); n < share(s.n, t + 1, threads); ++n) {
      if (dx) conv.backward(dy + n * conv.out, dx + n * conv.in);
      if (!dw) continue;
      conv.weights(x + n * conv.in, dy + n * conv.out, image.data());
      sums.add(t, image);
    }
  }
  if (dw) sums.total(dw);
}

// out = depthwise(act(norm(y))): what lies between is made image by image, in the cache.
template <class T>
void norm_depthwise_forward(const T* y, const float* w, T* out, const Norm& norm, int act, const Shape& s,
                            int threads) {
  Depthwise<T> conv(s, w);
  Index positions = s.height * s.width;
  prepare(y, s.n * positions, s.channels, norm, threads);
  Table table(positions, s.channels);
  Repeated of(table, norm.kept);
  with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
      std::vector<T> z(conv.in);
      for (Index n = share(s.n, t, threads); n < share(s.n, t + 1, threads); ++n) {
        affine_rows<T, a.value, false>(y + n * conv.in, nullptr, z.data(), 0, table.rows, table.width, of.scale.data(),
                                       of.shift.data());
        conv.forward(z.data(), out + n * conv.out);
      }
    }
  });
}

template <class T>
void norm_depthwise_backward(const T* dout, const T* y, const float* w, T* dy, float* dw, const float* kept,
                             float* dgamma, float* dbeta, int training, int act, const Shape& s, int threads) {
  Depthwise<T> conv(s, w);
  Table table(s.height * s.width, s.channels), whole(s.n * s.height * s.width, s.channels);
  Repeated of(table, kept);
  WeightSums weights(s.channels, conv.taps, threads);
  Sums sums(table.width, threads);
  with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
      std::vector<T> z(conv.in);
      std::vector<float> image(conv.taps * s.channels);
      for (Index n = share(s.n, t, threads); n < share(s.n, t + 1, threads); ++n) {
        const T *from = y + n * conv.in, *d = dout + n * conv.out;
        affine_rows<T, a.value, false>(from, nullptr, z.data(), 0, table.rows, table.width, of.scale.data(),
                                       of.shift.data());
        conv.weights(z.data(), d, image.data());
        weights.add(t, image);
        conv.backward(d, z.data());
        std::vector<float> sum(table.width), product(table.width);
        reduce_rows<T, a.value, false, true>(z.data(), from, nullptr, dy + n * conv.in, 0, table.rows, table.width, of,
                                             sum.data(), product.data());
        sums.add(t, sum.data(), product.data());
      }
    }
  });
  weights.total(dw);
  std::vector<float> factors = finish(sums, s.n * s.height * s.width, s.channels, kept, dgamma, dbeta, training);
  spread<T, NONE>(dy, y, dy, whole, kept, factors.data(), threads);
}

// ---------------------------------------------------------------------------------------------- pointwise, in groups

// Products of a value of a matrix with a vector of another one, summed in float32. What is multiplied at a time is a
// Lane: STEP values along the sum.
template <class T>
struct Dot {
  static constexpr int STEP = 1;
  using Lane = float;
  static vf wide(const T* p) { return vector_of(load_some(p, 1)[0]); }
  static vf wide_lane(const Lane* p) { return vector_of(*p); }
  static vf lanes(const Lane* p) { return load(p); }
  static Lane lane(float first, float) { return first; }
  static void mix(Lane* p, const T* first, const T*, int n) { put(p, take(first, n), LANES); }
  static void add(vf& sum, vf a, vf b) { sum += a * b; }
};

#ifdef __AVX512BF16__
inline std::uint16_t rounded(float value) {
  bf16 out[LANES];
  store(out, vector_of(value));
  return out[0].bits;
}

inline vf all_lanes(const void* p) {
  std::uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vf)_mm512_set1_epi32(int(bits));
}

template <>
struct Dot<bf16> {
  static constexpr int STEP = 2;
  using Lane = std::uint32_t;
  static vf wide(const bf16* p) { return all_lanes(p); }
  static vf wide_lane(const Lane* p) { return all_lanes(p); }
  static vf lanes(const Lane* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Lane lane(float first, float second) { return rounded(first) | Lane(rounded(second)) << 16; }
  static void mix(Lane* p, const bf16* first, const bf16* second, int n) {
    vu both = (vu)take(second, n) | (vu)take(first, n) >> 16;
    std::memcpy(p, &both, sizeof both);
  }
  static void add(vf& sum, vf a, vf b) { sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

inline Index vectors(Index values) { return (values + LANES - 1) / LANES; }

// Vectors are worked on by up to four at a time: calls each(first vector, how many).
template <class Each>
inline void chunks(Index count, Each each) {
  Index parts = (count + 3) / 4;
  for (Index i = 0; i < parts; ++i) {
    Index from = count * i / parts, size = count * (i + 1) / parts - from;
    if (size == 1) each(from, std::integral_constant<int, 1>{});
    if (size == 2) each(from, std::integral_constant<int, 2>{});
    if (size == 3) each(from, std::integral_constant<int, 3>{});
    if (size == 4) each(from, std::integral_constant<int, 4>{});
  }
}

// So many rows fit into the registers beside V vectors of columns.
template <int V>
constexpr int HIGH = V == 1 ? 14 : V == 2 ? 12 : V == 3 ? 8 : 6;

inline int lanes_of(Index vector, Index values) { return int(std::min<Index>(LANES, values - vector * LANES)); }

// R rows of y = x · weights for one group: x [R, in], packed weights [in / STEP, vectors · LANES], V of the vectors.
template <int R, int V, class T>
inline void tile(const T* x, Index x_line, const typename Dot<T>::Lane* w, Index w_line, Index in, T* y, Index y_line,
                 Index first, Index out) {
  vf sums[R][V] = {};
  for (Index k = 0; k < in; k += Dot<T>::STEP, w += w_line) {
    vf b[V];
    for (int v = 0; v < V; ++v) b[v] = Dot<T>::lanes(w + v * LANES);
    for (int r = 0; r < R; ++r) {
      vf a = Dot<T>::wide(x + r * x_line + k);
      for (int v = 0; v < V; ++v) Dot<T>::add(sums[r][v], a, b[v]);
    }
  }
  for (int v = 0; v < V; ++v)
    for (int r = 0; r < R; ++r)
      put(y + r * y_line + v * LANES, sums[r][v], lanes_of(first + v, out));
}

// The weights [groups · out, in] of each group as lanes [in / STEP, vectors(out) · LANES]; with `turned` those of the
// transposed product: [groups · in, out] then.
template <class T>
std::vector<typename Dot<T>::Lane> packed(const float* w, Index groups, Index in, Index out, bool turned) {
  Index line = vectors(out) * LANES, steps = in / Dot<T>::STEP;
  std::vector<typename Dot<T>::Lane> lanes(groups * steps * line, 0);
  for (Index g = 0; g < groups; ++g)
    for (Index k = 0; k < steps; ++k)
      for (Index o = 0; o < out; ++o) {
        Index i = k * Dot<T>::STEP, last = i + Dot<T>::STEP - 1;
        auto at = [&](Index i) { return turned ? w[(g * in + i) * out + o] : w[(g * out + o) * in + i]; };
        lanes[(g * steps + k) * line + o] = Dot<T>::lane(at(i), at(last));
      }
  return lanes;
}

// y [rows, groups · out] = x [rows, groups · in] times the weights of each group; `in` is a multiple of STEP.
template <class T>
void pointwise(const T* x, const float* w, T* y, Index rows, Index groups, Index in, Index out, int turned,
               int threads) {
  auto weights = packed<T>(w, groups, in, out, turned);
  Index line = vectors(out) * LANES, group = in / Dot<T>::STEP * line;
  Index parts = groups * ((vectors(out) + 3) / 4);
  by_rows(rows, 24, threads, [&](int, Index from, Index end) {
    Index part = 0;
    for (Index g = 0; g < groups; ++g)
      chunks(vectors(out), [&](Index first, auto v) {
        constexpr int V = v.value, R = HIGH<V>;
        const auto* own = &weights[g * group + first * LANES];
        const T* source = x + g * in;
        T* target = y + g * out + first * LANES;
        Index r = from;
        ahead(x + end * groups * in, (end - from) * groups * in, part, parts);
        ahead<true>(y + end * groups * out, (end - from) * groups * out, part++, parts);
        for (; r + R <= end; r += R)
          tile<R, V>(source + r * groups * in, groups * in, own, line, in, target + r * groups * out, groups * out,
                     first, out);
        for (; r < end; ++r)
          tile<1, V>(source + r * groups * in, groups * in, own, line, in, target + r * groups * out, groups * out,
                     first, out);
      });
  });
}

// R rows (outputs) by V vectors (inputs) of the weight gradient, added to dw.
template <int R, int V, class Lane, class D>
inline void weights_tile(const Lane* dy, Index dy_line, const Lane* x, Index x_line, Index steps, float* dw,
                         Index dw_line, D) {
  vf sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = load(dw + r * dw_line + v * LANES);
  for (Index k = 0; k < steps; ++k, dy += dy_line, x += x_line) {
    vf b[V];
    for (int v = 0; v < V; ++v) b[v] = D::lanes(x + v * LANES);
    for (int r = 0; r < R; ++r) {
      vf a = D::wide_lane(dy + r);
      for (int v = 0; v < V; ++v) D::add(sums[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(dw + r * dw_line + v * LANES, sums[r][v]);
}

// dw [groups · out, in] = dyᵀ · x for each group; its transpose where that wastes fewer lanes.
template <class T>
void pointwise_weights(const T* dy, const T* x, float* dw, Index rows, Index groups, Index in, Index out, int threads) {
  bool turned = vectors(out) * in < vectors(in) * out;
  if (turned) std::swap(dy, x), std::swap(in, out);
  using D = Dot<T>;
  using Lane = typename D::Lane;
  constexpr Index AT_ONCE = 128;
  Index x_line = vectors(in) * LANES, dy_line = vectors(out) * LANES, size = groups * out * x_line;
  std::vector<T> zeros(std::max(in, out), T{});
  std::vector<float> all(size * threads, 0.0f);
  std::vector<Lane> space((x_line + dy_line) * AT_ONCE * threads);
  by_rows(rows, AT_ONCE, threads, [&](int t, Index from, Index end) {
    Lane *xs = &space[(x_line + dy_line) * AT_ONCE * t], *dys = xs + x_line * AT_ONCE;
    for (Index g = 0; g < groups; ++g) {
      Index steps = 0;
      ahead(x + end * groups * in, (end - from) * groups * in, g, groups);
      ahead(dy + end * groups * out, (end - from) * groups * out, g, groups);
      auto mix = [&](const T* table, Index values, Index r, Lane* into) {
        const T *one = table + (r * groups + g) * values, *two = r + 1 < end ? one + groups * values : zeros.data();
        blocks(values, [&](Index c, int n) { D::mix(into + c, one + c, two + c, n); });
      };
      for (Index r = from; r < end; r += D::STEP, ++steps)
        mix(x, in, r, xs + steps * x_line), mix(dy, out, r, dys + steps * dy_line);
      float* own = &all[size * t + g * out * x_line];
      chunks(vectors(in), [&](Index first, auto v) {
        constexpr int V = v.value, R = HIGH<V>;
        Index o = 0;
        for (; o + R <= out; o += R)
          weights_tile<R, V>(dys + o, dy_line, xs + first * LANES, x_line, steps, own + o * x_line + first * LANES,
                             x_line, D{});
        for (; o + 4 <= out; o += 4)
          weights_tile<4, V>(dys + o, dy_line, xs + first * LANES, x_line, steps, own + o * x_line + first * LANES,
                             x_line, D{});
        for (; o < out; ++o)
          weights_tile<1, V>(dys + o, dy_line, xs + first * LANES, x_line, steps, own + o * x_line + first * LANES,
                             x_line, D{});
      });
    }
  });
  for (Index o = 0; o < groups * out; ++o)
    for (Index i = 0; i < in; ++i) {
      double sum = 0;
      for (int t = 0; t < threads; ++t) sum += all[size * t + o * x_line + i];
      Index g = o / out, row = o % out;
      dw[turned ? (g * in + i) * out + row : o * in + i] = float(sum);
    }
}

}  // namespace
}  // namespace kernels

using kernels::bf16, kernels::Index, kernels::Norm, kernels::Shape;

// The type of activations is chosen when this is compiled, which takes half the time that both would.
#ifndef SCALAR
#define SCALAR bf16
#endif
using Scalar = SCALAR;

extern "C" {

void norm_forward(const Scalar* y, const Scalar* side, Scalar* z, Index rows, Index channels, const Norm* norm, int act,
                  int threads) {
  kernels::norm_forward(y, side, z, rows, channels, *norm, act, threads);
}

void norm_backward(const Scalar* dz, const Scalar* y, const Scalar* z, Scalar* dy, Scalar* dside, Index rows,
                   Index channels, const float* kept, float* dgamma, float* dbeta, int training, int act, int threads) {
  kernels::norm_backward(dz, y, z, dy, dside, rows, channels, kept, dgamma, dbeta, training, act, threads);
}

void norm_depthwise_forward(const Scalar* y, const float* w, Scalar* out, const Norm* norm, int act, const Shape* s,
                            int threads) {
  kernels::norm_depthwise_forward(y, w, out, *norm, act, *s, threads);
}

void norm_depthwise_backward(const Scalar* dout, const Scalar* y, const float* w, Scalar* dy, float* dw,
                             const float* kept, float* dgamma, float* dbeta, int training, int act, const Shape* s,
                             int threads) {
  kernels::norm_depthwise_backward(dout, y, w, dy, dw, kept, dgamma, dbeta, training, act, *s, threads);
}

void depthwise_forward(const Scalar* x, const float* w, Scalar* y, const Shape* s, int threads) {
  kernels::depthwise_forward(x, w, y, *s, threads);
}

void depthwise_backward(const Scalar* x, const Scalar* dy, const float* w, Scalar* dx, float* dw, const Shape* s,
                        int threads) {
  kernels::depthwise_backward(x, dy, w, dx, dw, *s, threads);
}

void pointwise(const Scalar* x, const float* w, Scalar* y, Index rows, Index groups, Index in, Index out, int turned,
               int threads) {
  kernels::pointwise(x, w, y, rows, groups, in, out, turned, threads);
}

void pointwise_weights(const Scalar* dy, const Scalar* x, float* dw, Index rows, Index groups, Index in, Index out,
                       int threads) {
  kernels::pointwise_weights(dy, x, dw, rows, groups, in, out, threads);
}
}
