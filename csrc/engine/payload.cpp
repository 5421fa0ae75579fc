#include "engine/payload.h"

#include "kernels/weighted_sum.h"

namespace hvd_backup {

Factors factors_of(const Decision& decision, DataType dtype, bool average) {
  if (average && !is_integer(dtype)) return {decision.weights, 1.0 / decision.samples};
  return {std::vector<double>(decision.weights.size(), 1.0), 1.0};  // a plain sum
}

std::string payload_of(const Bucket& bucket, bool average) {
  std::string payload(static_cast<const char*>(bucket.contribution), bucket.bytes());
  payload.push_back(static_cast<char>(bucket.layout.dtype));
  payload.push_back(average ? 1 : 0);
  return payload;
}

std::string combine_payloads(const Decision& decision, const std::vector<std::string>& payloads) {
  if (payloads.front().size() <= 2) return {};
  const std::string form = payloads.front().substr(payloads.front().size() - 2);
  const auto dtype = static_cast<DataType>(form.front());
  const std::size_t elements_bytes = payloads.front().size() - form.size();
  if (size_of(dtype) == 0 || elements_bytes % size_of(dtype) != 0) return {};  // malformed
  const Factors factors = factors_of(decision, dtype, form.back() != 0);
  std::vector<const void*> sources;
  for (const std::string& payload : payloads) {
    if (payload.size() != payloads.front().size() || !payload.ends_with(form)) return {};
    sources.push_back(payload.data());
  }
  std::string result(elements_bytes, '\0');
  weighted_sum(dtype, result.data(), sources, factors.weights, factors.scale, result.size() / size_of(dtype));
  return result;
}

}  // namespace hvd_backup
