// Checks the arguments of weighted_sum and chooses, once for each process, the widest kernel that the machine can run.
#include "kernels/weighted_sum.h"

#include <algorithm>
#include <array>
#include <cfenv>
#include <string>

#include "base/error.h"
#include "kernels/weighted_sum_isa.h"

namespace hvd_backup {

namespace {

struct Supported {
  std::array<InstructionSet, 3> sets{};
  std::size_t count = 0;

  Supported() {
    add({"baseline", baseline::weighted_sum_kernel});
#if HVD_BACKUP_KERNEL_VARIANTS  // x86-64; set by cmake/KernelVariants.cmake
    // f16c converts float16; every CPU with AVX2 has it, but the compiler may use it only when it is asked for.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
      add({"avx2", avx2::weighted_sum_kernel});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        add({"avx512", avx512::weighted_sum_kernel});
      }
    }
#endif
  }

  void add(InstructionSet set) { sets[count++] = set; }
};

void check_integer_weights(std::span<const double> weights, double scale) {
  const auto is_one = [](double weight) { return weight == 1.0; };
  const auto bad = std::find_if_not(weights.begin(), weights.end(), is_one);
  if (bad == weights.end() && is_one(scale)) return;
  throw UsageError("weighted_sum of integers: the " +
                   (bad == weights.end()
                        ? "scale is " + std::to_string(scale)
                        : "weight " + std::to_string(bad - weights.begin()) + " is " + std::to_string(*bad)) +
                   ", but integers are summed exactly and every weight and the scale must be 1; "
                   "use a floating-point type for means and weights");
}

// Denormal numbers are not zero, and rounding is to nearest, until the end of the scope.
class UsualArithmetic {
 public:
  UsualArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~UsualArithmetic() { std::fesetenv(&before_); }
  UsualArithmetic(const UsualArithmetic&) = delete;
  UsualArithmetic& operator=(const UsualArithmetic&) = delete;

 private:
  std::fenv_t before_{};
};

}  // namespace

std::span<const InstructionSet> instruction_sets() {
  static const Supported supported;
  return {supported.sets.data(), supported.count};
}

void weighted_sum(DataType dtype, void* destination, std::span<const void* const> sources,
                  std::span<const double> weights, double scale, std::size_t count, SquaredNorms* norms) {
  if (sources.empty()) throw UsageError("weighted_sum: no sources; at least one is needed");
  if (weights.size() != sources.size()) {
    throw UsageError("weighted_sum: " + std::to_string(weights.size()) + " weights for " +
                     std::to_string(sources.size()) + " sources; give one weight for each source");
  }
  if (is_integer(dtype)) {
    check_integer_weights(weights, scale);
    if (norms != nullptr) throw UsageError("weighted_sum of integers: there are no squared norms of integers");
  }
  if (count == 0) return;
  const UsualArithmetic here;
  instruction_sets().back().sum(dtype, destination, sources.data(), weights.data(), sources.size(), scale, count,
                                norms);
}

const char* kernel_instruction_set() { return instruction_sets().back().name; }

}  // namespace hvd_backup
