// Picks the instruction set at run time and exports the C ABI. Each op adds one SS_DISPATCH line.
#include <cstdlib>
#include <cstring>

#include "add_norm.h"
#include "causal_conv1d.h"
#include "mamba_step.h"
#include "packed_linear.h"
#include "parallel.h"
#include "selective_scan.h"
#include "ssm_kernel.h"
#include "statescan.h"

#if defined(SS_HAVE_avx2) && defined(_MSC_VER)
#include <intrin.h>
#endif

namespace ss {
ParallelFor g_parallel_for = nullptr;

enum class Isa { generic, avx2, avx512, neon };

static bool cpu_has_avx2() {
#if defined(SS_HAVE_avx2)
#if defined(_MSC_VER)
  int r[4];
  __cpuidex(r, 7, 0);
  bool avx2 = r[1] & (1 << 5);
  __cpuid(r, 1);
  bool fma = r[2] & (1 << 12), f16c = r[2] & (1 << 29), osxsave = r[2] & (1 << 27);
  return avx2 && fma && f16c && osxsave && (_xgetbv(0) & 6) == 6;
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#else
  return false;
#endif
}

static bool cpu_has_avx512() {
#if defined(SS_HAVE_avx512)
#if defined(_MSC_VER)
  int r[4], s[4];
  __cpuidex(r, 7, 0);
  __cpuidex(s, 7, 1);
  unsigned b = unsigned(r[1]);
  return (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (unsigned(r[2]) >> 11 & 1) &&
         (unsigned(s[0]) >> 5 & 1) && (_xgetbv(0) & 0xe6) == 0xe6;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
#else
  return false;
#endif
}

static Isa detect() {
  Isa best = Isa::generic;
#if defined(SS_HAVE_neon)
  best = Isa::neon;
#endif
  if (cpu_has_avx2()) best = Isa::avx2;
  if (cpu_has_avx2() && cpu_has_avx512()) best = Isa::avx512;
  const char* named = std::getenv("STATESCAN_CPU_ISA");  // lowers it only
  if (named) {
    if (!std::strcmp(named, "generic")) best = Isa::generic;
    if (!std::strcmp(named, "avx2") && best == Isa::avx512) best = Isa::avx2;
  }
  return best;
}

static Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}
}  // namespace ss

SS_API int32_t ss_abi_version() { return 1; }

SS_API const char* ss_isa() {
  switch (ss::isa()) {
    case ss::Isa::avx512: return "avx512";
    case ss::Isa::avx2: return "avx2";
    case ss::Isa::neon: return "neon";
    default: return "generic";
  }
}

SS_API void ss_set_parallel_for(void* fn) { ss::g_parallel_for = reinterpret_cast<ss::ParallelFor>(fn); }

#if defined(SS_HAVE_avx512)
#define SS_CASE_avx512(name, args) case ss::Isa::avx512: return name##_avx512 args;
#define SS_DECL_avx512(name, params) extern "C" int32_t name##_avx512 params;
#else
#define SS_CASE_avx512(name, args)
#define SS_DECL_avx512(name, params)
#endif
#if defined(SS_HAVE_avx2)
#define SS_CASE_avx2(name, args) case ss::Isa::avx2: return name##_avx2 args;
#define SS_DECL_avx2(name, params) extern "C" int32_t name##_avx2 params;
#else
#define SS_CASE_avx2(name, args)
#define SS_DECL_avx2(name, params)
#endif
#if defined(SS_HAVE_neon)
#define SS_CASE_neon(name, args) case ss::Isa::neon: return name##_neon args;
#define SS_DECL_neon(name, params) extern "C" int32_t name##_neon params;
#else
#define SS_CASE_neon(name, args)
#define SS_DECL_neon(name, params)
#endif

// A kernel file under kernels/ defines `extern "C" int32_t SS_KERNEL(name)(params)`; this exports `name`.
#define SS_DISPATCH(name, params, args)                       \
  extern "C" int32_t name##_generic params;                   \
  SS_DECL_avx2(name, params)                                  \
  SS_DECL_avx512(name, params)                                \
  SS_DECL_neon(name, params)                                  \
  SS_API int32_t name params {                                \
    switch (ss::isa()) {                                      \
      SS_CASE_avx512(name, args)                              \
      SS_CASE_avx2(name, args)                                \
      SS_CASE_neon(name, args)                                \
      default: return name##_generic args;                    \
    }                                                         \
  }

// ---- ops, one line each (declare argument structs in their own header under csrc/) ----
SS_DISPATCH(ss_selective_scan, (const ss_scan_args* args), (args))
SS_DISPATCH(ss_selective_scan_backward, (const ss_scan_args* args), (args))
SS_DISPATCH(ss_selective_state_update, (const ss_update_args* args), (args))
SS_DISPATCH(ss_causal_conv1d, (const ss_conv_args* a), (a))
SS_DISPATCH(ss_causal_conv1d_backward, (const ss_conv_args* a), (a))
SS_DISPATCH(ss_add_rms_norm, (const ss_norm_args* a), (a))
SS_DISPATCH(ss_add_rms_norm_backward, (const ss_norm_args* a), (a))
SS_DISPATCH(ss_packed_linear, (const ss_linear_args* args), (args))
SS_DISPATCH(ss_mamba_step, (const ss_step_args* args), (args))
SS_DISPATCH(ss_vandermonde, (const ss_vandermonde_args* a), (a))
SS_DISPATCH(ss_vandermonde_backward, (const ss_vandermonde_args* a), (a))
SS_DISPATCH(ss_cauchy, (const ss_cauchy_args* a), (a))
SS_DISPATCH(ss_cauchy_backward, (const ss_cauchy_args* a), (a))
SS_DISPATCH(ss_powers, (const ss_powers_args* a), (a))
SS_DISPATCH(ss_powers_backward, (const ss_powers_args* a), (a))
