// Checks what the kernels rely on, where a mistake would make them read out of bounds.
#pragma once

#include <stdexcept>

#include "scoring.h"

namespace orchard {

/// A malformed call. It goes on to the reference op, whose own checks word the mistake and raise it
/// with the type that it has on every device.
struct Mistake : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int32_t device_type_of(const Tensor& x);

/// The dtype as torch's C interface numbers them: a ScalarType takes many calls of it to find.
int32_t dtype_code(const Tensor& x);

void check_operands(const Operands& operands);
void check_scalars(const Scoring& scoring, const std::string& impl);

/// attn_mask, alibi_slopes and sinks.
void check_additions(const Scoring& scoring, const Operands& operands);

/// The dropout seed; also checks the arguments that decide whether one is needed.
uint64_t checked_seed(const Scoring& scoring);

/// dout and out of a backward.
void check_like_out(const Tensor& x, const Operands& operands);

/// Dense float32: a number a row, (B, H, L), and two a row, (B, H, L, 2).
Tensor dense_rows(const Tensor& x, const Tensor& query);
Tensor dense_row_stats(const Tensor& x, const Tensor& query);

}  // namespace orchard
