// The plan of native/plan behind a C interface, for planner/__init__.py: what the library decides
// on a Mac is asked here without torch. Compiled with two lists that mirror.py reads from
// shaders/params.h: ORCHARD_BUFFERS, the names of the buffers, and ORCHARD_OFFSETS, an offsetof for
// each field of AttentionParams. Those of caches are read from shaders/decode_params.h.
#include <algorithm>
#include <cstddef>
#include <string>

#include "native/plan/backward_cost.h"
#include "native/plan/decode.h"
#include "native/plan/plan.h"

using orchard::KernelPlan;
using orchard::Layout;
using orchard::Plan;
using orchard::Problem;

namespace {

/// A plan with the texts that are not strings of its own.
struct Answer {
  Plan plan;
  std::vector<std::string> alternatives;
  DecodeParams params{};  // of caches
  int64_t part_rows = 0;
};

Answer* answer_of(orchard::DecodePlan decode) {
  auto* answer = new Answer;
  answer->plan = std::move(decode.plan);
  answer->alternatives.resize(answer->plan.kernels.size());
  answer->params = decode.params;
  answer->part_rows = decode.part_rows;
  return answer;
}

}  // namespace

extern "C" {

/// Python writes the fields before `tiles` in place.
Problem* bridge_new_problem() { return new Problem; }
void bridge_delete_problem(Problem* problem) { delete problem; }
void bridge_set_tiles(Problem* problem, const char* tiles) { problem->tiles = tiles; }
uint64_t bridge_bytes_before_tiles() { return offsetof(Problem, tiles); }
uint64_t bridge_bytes_of_layout() { return sizeof(Layout); }
uint64_t bridge_bytes_of_mask_layout() { return sizeof(orchard::MaskLayout); }

/// The backward's plan where there is a dout.
Answer* bridge_plan(const Problem* problem, const Layout* out, const Layout* dout) {
  auto* answer = new Answer;
  answer->plan = dout == nullptr ? orchard::plan_forward(*problem, *out)
                                 : orchard::plan_backward(*problem, *out, *dout);
  for (const KernelPlan& kernel : answer->plan.kernels) {
    std::string joined;
    for (const std::string& name : kernel.alternatives)
      joined += (joined.empty() ? "" : ",") + name;
    answer->alternatives.push_back(joined);
  }
  return answer;
}

/// What dk, dv and dq take by the plan's estimate: with dS stored, of so many query heads and
/// keys at once, or computed twice, and so many parts of a group.
double bridge_time_of_backward(const Problem* problem, int32_t stored, int64_t heads_at_once,
    int64_t keys_at_once, int64_t parts) {
  const int bd = orchard::padded_head_dim(orchard::widest_head_dim(*problem));
  const orchard::TileRow& row = orchard::tiles(bd, orchard::names(problem->dtype));
  return orchard::time_of_backward(
      *problem, row, bd, {heads_at_once, keys_at_once, stored, 0, {}}, parts);
}

/// The divisions of dS that fit, seven numbers each as DsDivision has them: writes as many as fit,
/// and returns how many there are.
uint64_t bridge_ds_divisions(const Problem* problem, int64_t* numbers, uint64_t capacity) {
  const int bd = orchard::padded_head_dim(orchard::widest_head_dim(*problem));
  const auto all = orchard::ds_divisions(*problem, bd);
  for (size_t i = 0; i < std::min<size_t>(capacity, all.size()); i++) {
    const orchard::DsDivision& x = all[i];
    for (int64_t number : {x.heads, x.keys, x.tile_elements, x.sum_elements, x.rows.keys,
             x.rows.tiles, x.rows.folded})
      *numbers++ = number;
  }
  return all.size();
}

/// `numbers` are paged, pages, page_size, entries, added, table_row, has_lengths, has_starts,
/// has_entries.
Answer* bridge_plan_decode(const Problem* problem, const int64_t* numbers, const Layout* out) {
  orchard::CacheProblem x;
  x.attention = *problem;
  x.paged = numbers[0] != 0;
  x.pages = numbers[1];
  x.page_size = numbers[2];
  x.entries = numbers[3];
  x.added = numbers[4];
  x.cache.table_row = numbers[5];
  x.cache.has_lengths = static_cast<int32_t>(numbers[6]);
  x.cache.has_starts = static_cast<int32_t>(numbers[7]);
  x.cache.has_entries = static_cast<int32_t>(numbers[8]);
  x.attention.k.sizes[2] = x.attention.v.sizes[2] = orchard::capacity_of(x);
  return answer_of(orchard::plan_decode(x, *out));
}

/// The plan of a forward that no backward follows, where it runs on the decode kernel.
Answer* bridge_plan_forward_as_decode(const Problem* problem, const Layout* out) {
  return answer_of(orchard::plan_forward_as_decode(*problem, *out));
}

int32_t bridge_prefers_decode(const Problem* problem) { return orchard::prefers_decode(*problem); }

/// `numbers` are paged, pages, offset, table_row, has_lengths, has_entries.
Answer* bridge_plan_append(
    int32_t dtype, const Layout* added, const Layout* cache, const int64_t* numbers) {
  orchard::AppendProblem x;
  x.dtype = static_cast<orchard::DType>(dtype);
  x.added = *added;
  x.cache = *cache;
  x.params.paged = static_cast<int32_t>(numbers[0]);
  x.pages = numbers[1];
  x.offset = numbers[2];
  x.params.table_row = numbers[3];
  x.params.has_lengths = static_cast<int32_t>(numbers[4]);
  x.params.has_entries = static_cast<int32_t>(numbers[5]);
  return answer_of(orchard::plan_append(x));
}

const DecodeParams* bridge_decode_params(const Answer* answer) { return &answer->params; }
uint64_t bridge_bytes_of_decode_params() { return sizeof(DecodeParams); }
int64_t bridge_part_rows(const Answer* answer) { return answer->part_rows; }

void bridge_delete_plan(Answer* answer) { delete answer; }

/// refusal, detail, advice
void bridge_texts(const Answer* answer, const char** texts) {
  const Plan& plan = answer->plan;
  for (const std::string* text : {&plan.refusal, &plan.detail, &plan.advice}) {
    *texts++ = text->c_str();
  }
}

uint64_t bridge_num_kernels(const Answer* answer) { return answer->plan.kernels.size(); }

/// family, name, instantiation, tile, tile_name, alternatives; groups in x and y, threads, role
void bridge_kernel(const Answer* answer, uint64_t n, const char** texts, uint64_t* numbers) {
  const KernelPlan& kernel = answer->plan.kernels[n];
  for (const std::string* text : {&kernel.family, &kernel.name, &kernel.instantiation, &kernel.tile,
           &kernel.tile_name, &answer->alternatives[n]}) {
    *texts++ = text->c_str();
  }
  numbers[0] = kernel.groups[0];
  numbers[1] = kernel.groups[1];
  numbers[2] = kernel.threads;
  numbers[3] = static_cast<uint64_t>(kernel.role);
}

uint64_t bridge_num_launches(const Answer* answer) { return answer->plan.launches.size(); }

/// kernel, groups in x and y, first_head, key_begin, key_end; the last three as the launch sets
/// them in the params
void bridge_launch(const Answer* answer, uint64_t n, int64_t* numbers) {
  const orchard::KernelLaunch& launch = answer->plan.launches[n];
  AttentionParams params{};
  launch.set(params);
  numbers[0] = static_cast<int64_t>(launch.kernel);
  numbers[1] = static_cast<int64_t>(launch.groups[0]);
  numbers[2] = static_cast<int64_t>(launch.groups[1]);
  numbers[3] = params.first_head;
  numbers[4] = params.key_begin;
  numbers[5] = params.key_end;
}

const AttentionParams* bridge_params(const Answer* answer) { return &answer->plan.params; }
int64_t bridge_ds_elements(const Answer* answer) { return answer->plan.ds_elements; }
int64_t bridge_dkv_part_elements(const Answer* answer) { return answer->plan.dkv_part_elements; }
int64_t bridge_dmask_part_elements(const Answer* answer) {
  return answer->plan.dmask_part_elements;
}
int64_t bridge_forward_part_elements(const Answer* answer) {
  return answer->plan.forward_part_elements;
}
int64_t bridge_hull_elements(const Answer* answer) { return answer->plan.hull_elements; }
int64_t bridge_map_elements(const Answer* answer) { return answer->plan.map_elements; }

void bridge_strides_in_order_of(const int64_t* like, const int64_t* sizes, int64_t* strides) {
  std::array<int64_t, 4> a, b;
  std::copy_n(like, 4, a.begin());
  std::copy_n(sizes, 4, b.begin());
  const auto result = orchard::strides_in_order_of(a, b);
  std::copy(result.begin(), result.end(), strides);
}

/// How many there are; writes as many as fit.
uint64_t bridge_head_dims(int64_t* head_dims, uint64_t capacity) {
  const auto all = orchard::kernel_head_dims();
  std::copy_n(all.begin(), std::min<size_t>(capacity, all.size()), head_dims);
  return all.size();
}

void bridge_buffers(int64_t* numbers) {
  for (int64_t number : {ORCHARD_BUFFERS}) *numbers++ = number;
}

/// Of the fields of AttentionParams, and behind them its size.
void bridge_offsets(uint64_t* offsets) {
  for (uint64_t offset : {ORCHARD_OFFSETS, sizeof(AttentionParams)}) *offsets++ = offset;
}

}  // extern "C"
