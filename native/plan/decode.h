// The plan of attention of few queries to a cache of keys and values, and of filling one.
#pragma once

#include "../../shaders/decode_params.h"
#include "problem.h"

namespace orchard {

/// A call for a cache. `attention` has the operands as one problem: keys and values with the
/// strides from one entry of the cache to the next, and the capacity of a sequence as length.
struct CacheProblem {
  Problem attention;
  CacheParams cache{};  ///< without what fill_cache_params says
  bool paged = false;
  int64_t pages = 0;      ///< that a sequence may have
  int64_t page_size = 0;  ///< keys of an entry, paged or not
  int64_t entries = 0;
  int64_t added = 0;
};

struct DecodePlan {
  Plan plan;  ///< what else a plan is; its params are those of `params`
  DecodeParams params{};
  int64_t part_rows = 0;  ///< rows of the parts' sums, of part_stride + 2 floats
};

/// Fills params but for the strides of `out`, and for which buffers the cache has.
DecodePlan plan_decode(const CacheProblem& problem, const Layout& out);

/// Whether the forward of a call that no backward follows runs on the decode kernel rather than on
/// its own: a call of few queries and many keys, as far as that kernel knows its arguments.
bool prefers_decode(const Problem& problem);

/// The plan of such a call, with row_stats in place of lse.
DecodePlan plan_forward_as_decode(const Problem& problem, const Layout& out);

/// New keys, or values, and the cache that they go to: both as (B or entries, Hkv, length, width).
struct AppendProblem {
  DType dtype = DType::kOther;
  Layout added, cache;
  CacheParams params{};  ///< without what the layouts say
  int64_t pages = 0;     ///< that a sequence may have, where there are pages
  int64_t offset = 0;    ///< from what cache_seqlens says to where the first new key goes
};

/// All params.
DecodePlan plan_append(const AppendProblem& problem);

/// Keys of a sequence that the cache has room for.
int64_t capacity_of(const CacheProblem& problem);

}  // namespace orchard
