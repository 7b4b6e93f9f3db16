// The choice of the unit whose kernels run: once per process, by what the CPU and the OS support, or by the
// environment variable ICAE_FAST_ISA.
#pragma once

#include <string>
#include <vector>

#include "abi/kernels.h"

namespace icae_fast {

// Return the chosen unit. While oneDNN is switched off, the AMX unit is replaced by the faster one for AVX512-BF16.
// Throws std::runtime_error if ICAE_FAST_ISA names no unit, or one that this CPU cannot run.
const Kernels& kernels();

// The CPU's features that kernels here use or will use, if the OS lets a process use them. amx_in_torch means that
// torch uses AMX too.
std::vector<std::string> cpu_features();

// Names of this build's units, the most basic first.
std::vector<std::string> built_isas();

// Names of this build's units that this CPU can run.
std::vector<std::string> runnable_isas();

}  // namespace icae_fast
