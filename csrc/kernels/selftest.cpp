#include "statescan.h"
extern "C" int32_t SS_KERNEL(ss_selftest)(int32_t x) { return x + 1; }
