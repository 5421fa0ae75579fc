// Small contributions: they travel with the arrival, and come back summed with the decision, a chain of two messages in
// place of three. And by what contributions are multiplied, which is the same whoever sums them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "base/data_type.h"
#include "control/messages.h"
#include "engine/channel.h"

namespace hvd_backup {

// What fits, with the rest of the message, into one that MPI sends without asking the receiver first.
inline constexpr std::size_t most_payload_bytes = 4096;

// By what contributions are multiplied, and their sum.
struct Factors {
  std::vector<double> weights;
  double scale = 1.0;
};

Factors factors_of(const Decision& decision, DataType dtype, bool average);

// The elements, and behind them what they are and what becomes of them.
std::string payload_of(const Bucket& bucket, bool average);

// The Coordinator's Combine.
std::string combine_payloads(const Decision& decision, const std::vector<std::string>& payloads);

}  // namespace hvd_backup
