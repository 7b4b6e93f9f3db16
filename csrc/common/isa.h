// Which instruction set's kernels run: chosen once a process, from what the CPU and the OS allow or by the
// environment variable ICAE_FAST_ISA.
#pragma once

#include <string>
#include <vector>

#include "abi/kernels.h"

namespace icae_fast {

// The chosen unit; the faster one for AVX512-BF16 in place of that for AMX while oneDNN is switched off. Throws
// std::runtime_error when ICAE_FAST_ISA names no unit or one that this CPU cannot run.
const Kernels& kernels();

// Those of the CPU's features that kernels here use or will use, as far as the OS lets a process use them;
// amx_in_torch says that torch uses AMX too.
std::vector<std::string> cpu_features();

// Names of the units in this build, the plainest first.
std::vector<std::string> built_isas();

// Those of them that this CPU can run.
std::vector<std::string> runnable_isas();

}  // namespace icae_fast
