// What libcaldera_nccl.so holds: c10d's NCCL group of ranks on GPUs.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

// For rank `rank` of `size`, which meet in `store`; sets `group`. Throws what c10d throws.
extern "C" void caldera_make_nccl_group(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                        at::Device device, std::chrono::milliseconds timeout,
                                        c10::intrusive_ptr<c10d::Backend>& group);
