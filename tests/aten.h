// base/aten.h, and the operators that only tests call.
#pragma once
#include "base/aten.h"

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logspace.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
