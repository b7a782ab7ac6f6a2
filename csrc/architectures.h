#pragma once

#include <string_view>

// Architectures that the build holds machine code for, such as 8.0:9.0a: surgeon_kernels/runtime/toolchain.py defines
// them beside nvcc's flags.
#ifndef SURGEON_ARCHITECTURES
#error "define SURGEON_ARCHITECTURES, the list of architectures, between colons, that nvcc compiles for"
#endif

namespace surgeon {

#define SURGEON_STRING(...) #__VA_ARGS__
#define SURGEON_STRING_OF(...) SURGEON_STRING(__VA_ARGS__)
inline constexpr std::string_view kArchitectures = SURGEON_STRING_OF(SURGEON_ARCHITECTURES);
#undef SURGEON_STRING_OF
#undef SURGEON_STRING

}  // namespace surgeon
