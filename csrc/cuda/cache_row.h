// How long a row of the cache is; see cache_row.cuh.
#pragma once

namespace bitinfer::cuda {

// The bytes of a key or value of `dim` numbers of 16 bits, or rounded to 8 or 4.
constexpr int cache_row_bytes(int dim, int bits) { return bits == 16 ? 2 * dim : dim * bits / 8 + 8; }

}  // namespace bitinfer::cuda
