// exp, erf and tanh of floats, with the bits of the functions that torch's activations call: those of SLEEF 3 at one ulp, and
// for erf formula 7.1.26 of Abramowitz and Stegun. exp of doubles is the C library's.
#pragma once

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

constexpr float log2_e = 1.442695040888963407359924681001892137426645954152985934135449406931f;
constexpr float ln2_upper = 0.693145751953125f;
constexpr float ln2_lower = 1.428606765330187045e-06f;

INLINE Floats all(float x) { return Floats{} + x; }

// The nearest whole number, ties to even, for |x| < 2²²; else anything.
INLINE Floats nearest(Floats x) {
  const Floats shift = all(0x1.8p23f);
  return (x + shift) - shift;
}

// x · 2^q for whole q; anything where |q| ≥ 256.
INLINE Floats scaled(Floats x, Floats q) {
#if defined(__AVX512F__)
  return (Floats)INSTRUCTION_SCALEF(x, q);
#else
  // In two steps, each of which has a float's exponent.
  q = pick((q < all(256.0f)) & (q > all(-256.0f)), q, Floats{});
  const Ints whole = __builtin_convertvector(q, Ints), half = whole >> 1;
  return x * as_floats((Bits)(half + 127) << 23) * as_floats((Bits)(whole - half + 127) << 23);
#endif
}

LONG Floats exponential(Floats x) {
  const Floats q = nearest(x * log2_e);
  Floats s = fma(q, all(-ln2_upper), x);
  s = fma(q, all(-ln2_lower), s);
  Floats u = all(0.000198527617612853646278381f);
  u = fma(u, s, all(0.00139304355252534151077271f));
  u = fma(u, s, all(0.00833336077630519866943359f));
  u = fma(u, s, all(0.0416664853692054748535156f));
  u = fma(u, s, all(0.166666671633720397949219f));
  u = fma(u, s, all(0.5f));
  u = 1.0f + fma(s * s, u, s);
  u = scaled(u, q);
  u = pick(x < all(-104.0f), Floats{}, u);
  return pick(x > all(100.0f), all(__builtin_inff()), u);
}

LONG Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

LONG Floats error_function(Floats x) {
  const Bits sign = as_bits(x) & 0x80000000u;
  const Floats t = 1.0f / fma(all(0.3275911f), as_floats(as_bits(x) & 0x7fffffffu), all(1.0f));
  Floats r = fma(all(1.061405429f), t, all(-1.453152027f));
  r = fma(r, t, all(1.421413741f));
  r = fma(r, t, all(-0.284496736f));
  r = fma(r, t, all(0.254829592f));
  const Floats made = fma(-exponential(-(x * x)) * t, r, all(1.0f));
  return as_floats(as_bits(made) ^ sign);
}

// A number as the sum of two floats, the second the error of the first.
struct Pair {
  Floats x, y;
};

INLINE Pair normalized(Pair a) {
  const Floats s = a.x + a.y;
  return {s, (a.x - s) + a.y};
}
INLINE Pair product(Pair a, Floats b) {
  const Floats s = a.x * b;
  return {s, fma(a.y, b, fma(a.x, b, -s))};
}
INLINE Pair product(Pair a, Pair b) {
  const Floats s = a.x * b.x;
  return {s, fma(a.x, b.y, fma(a.y, b.x, fma(a.x, b.x, -s)))};
}
INLINE Pair square(Pair a) {
  const Floats s = a.x * a.x;
  return {s, fma(a.x + a.x, a.y, fma(a.x, a.x, -s))};
}
INLINE Pair inverse(Pair a) {
  const Floats s = 1.0f / a.x;
  return {s, s * fma(-a.y, s, fma(-a.x, s, all(1.0f)))};
}
INLINE Pair quotient(Pair a, Pair b) {
  const Floats t = 1.0f / b.x, s = t * a.x;
  const Floats u = fma(t, a.x, -s), v = fma(-b.y, t, fma(-b.x, t, all(1.0f)));
  return {s, fma(s, v, fma(a.y, t, u))};
}
// Where |a| ≥ |b| ...
INLINE Pair ordered_sum(Pair a, Pair b) {
  const Floats s = a.x + b.x;
  return {s, (((a.x - s) + b.x) + a.y) + b.y};
}
INLINE Pair ordered_sum(Floats a, Pair b) {
  const Floats s = a + b.x;
  return {s, ((a - s) + b.x) + b.y};
}
// ... and where they may be anything.
INLINE Pair any_sum(Pair a, Floats b) {
  const Floats s = a.x + b, v = s - a.x;
  return {s, ((a.x - (s - v)) + (b - v)) + a.y};
}
INLINE Pair any_sum(Pair a, Pair b) {
  const Floats s = a.x + b.x, v = s - a.x;
  return {s, ((a.x - (s - v)) + (b.x - v)) + (a.y + b.y)};
}

// e^y for 0 ≤ y ≤ 9.
LONG Pair exponential_pair(Floats y) {
  const Floats q = nearest(y * log2_e);
  Pair s = any_sum(Pair{y, Floats{}}, q * -ln2_upper);
  s = any_sum(s, q * -ln2_lower);
  s = normalized(s);
  Floats u = all(0.1980960224e-3f);
  u = fma(u, s.x, all(0.1394256484e-2f));
  u = fma(u, s.x, all(0.8333456703e-2f));
  u = fma(u, s.x, all(0.4166637361e-1f));
  Pair t = any_sum(product(s, u), all(0.166666659414234244790680580464e+0f));
  t = any_sum(product(s, t), all(0.5f));
  t = any_sum(s, product(square(s), t));
  t = ordered_sum(all(1.0f), t);
  return {scaled(t.x, q), scaled(t.y, q)};
}

LONG Floats hyperbolic_tangent(Floats x) {
  const Bits sign = as_bits(x) & 0x80000000u;
  const Floats y = as_floats(as_bits(x) & 0x7fffffffu);
  const Pair d = exponential_pair(y), e = inverse(d);
  const Pair made = quotient(ordered_sum(d, Pair{-e.x, -e.y}), ordered_sum(d, e));
  const Floats value = pick(y > all(8.664339742f), all(1.0f), made.x + made.y);
  return pick(x != x, x, as_floats(as_bits(value) ^ sign));
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
