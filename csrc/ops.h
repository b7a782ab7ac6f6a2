#pragma once

// Headers of torch, for the <op>_ops.cpp files, the only ones that know it: each registers one op's CUDA
// implementations. Schemas and fake kernels stand in surgeon_kernels/<family>/<op>.py, so that a graph that holds an op
// loads before the extension does. Arguments are checked in Python (surgeon_kernels/<family>/<op>.py), where the same
// checks guard the reference; in C++ only what would corrupt memory is checked again.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
