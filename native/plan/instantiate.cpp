#include "instantiate.h"

#include "join.h"
#include "plan.h"

namespace orchard {

std::vector<const char*> switches(const Problem& p, bool chunks) {
  return {
      chunks ? "chunks" : "!chunks", dropout_threshold(p.dropout_p) > 0 ? "dropout" : "!dropout"};
}

KernelPlan make_kernel(const Problem& p, const std::string& family, const TileChoice& tile,
    const std::vector<const char*>& flags, int64_t heads, int64_t length) {
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(p.q.sizes[3]);
  const int64_t blocks = blocks_of(length, tile.rows);
  KernelPlan kernel;
  kernel.family = family;
  kernel.tile_name = tile.name;
  kernel.name = join(family, "_", dtype.torch, "_d", bd, tile.name.empty() ? "" : "_", tile.name);
  const char* chunks = "false";
  const char* dropout = "false";
  for (const std::string flag : flags) {
    // A kernel's name says which loads it uses either way, and dropout only if it is on.
    if (flag == "!chunks") kernel.name += "_elements";
    if (flag[0] != '!') kernel.name += "_" + flag;
    if (flag == "chunks") chunks = "true";
    if (flag == "dropout") dropout = "true";
  }
  const std::string args = join(family, "<", dtype.metal, ", ",
      tile.operand.empty() ? "" : tile.operand + ", ", bd, ", ", tile.args,
      tile.args.empty() ? "" : ", ", kSimdgroups, ", Variant<", chunks, ", ", dropout, ">>");
  kernel.instantiation = join("template [[host_name(\"", kernel.name, "\")]] [[kernel]] decltype(",
      args, ") ", args, ";\n");
  kernel.tile = join(tile.text, tile.text.empty() ? "" : ", ", "head_dim padded to ", bd, "; ",
      heads, " x ", blocks, " threadgroups of ", kSimdgroups * ORCHARD_SIMD_WIDTH, " threads");
  kernel.groups = {static_cast<uint64_t>(heads), static_cast<uint64_t>(blocks)};
  kernel.threads = kSimdgroups * ORCHARD_SIMD_WIDTH;
  return kernel;
}

}  // namespace orchard
