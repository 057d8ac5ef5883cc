// The C ABI of statescan's CPU kernels. Every function returns 0, or a negative code for a case that it does not take
// (the Python side checks shapes and dtypes first, so a code is a programmer's error). Pointers are to host memory; strides
// are in elements; the caller owns all memory.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define SS_API extern "C" __declspec(dllexport)
#else
#define SS_API extern "C" __attribute__((visibility("default")))
#endif

enum ss_dtype : int32_t { SS_F32 = 0, SS_BF16 = 1, SS_F16 = 2, SS_F64 = 3, SS_I8 = 4 };

// Name of a kernel's symbol for the instruction set it is compiled for: SS_KERNEL(foo) -> foo_avx512.
#define SS_CAT2(a, b) a##_##b
#define SS_CAT(a, b) SS_CAT2(a, b)
#define SS_KERNEL(name) SS_CAT(name, SS_ISA)
