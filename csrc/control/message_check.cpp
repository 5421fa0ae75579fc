#include "control/message_check.h"

#include <cmath>
#include <type_traits>

namespace hvd_backup {

namespace {

void expect(std::int64_t low, std::int64_t value, std::int64_t high, const char* what) {
  if (low <= value && value <= high) return;
  throw RuntimeFailure(std::string("malformed message: ") + what + " is " + std::to_string(value) + ", expected " +
                       std::to_string(low) + " to " + std::to_string(high));
}

void expect_options(const ChannelOptions& options, int size) {
  expect(1, options.required, size, "the number of contributors");
  expect(0, options.grace_us, most_steps, "the grace time");
  expect(0, options.max_misses, INT32_MAX, "max_misses");
  expect(1, options.max_lag, most_steps, "max_lag");
}

}  // namespace

void check_message(const Message& message, int size, const ChannelFacts& facts) {
  std::visit(
      [&](const auto& body) {
        using Body = std::decay_t<decltype(body)>;
        if constexpr (requires { body.step; }) expect(0, body.step, facts.open_step, "the step");
        if constexpr (requires { body.round; }) expect(0, body.round, facts.current_round, "the round");
        if constexpr (requires { body.scope; }) expect(0, body.scope, most_buckets - 1, "the scope");
        if constexpr (std::is_same_v<Body, Open>) {
          expect_options(body.options, size);
        } else if constexpr (std::is_same_v<Body, Arrive>) {
          expect(0, body.base, body.step, "the base step");
          expect(1, body.buckets, most_buckets, "the number of buckets");
          expect(1, body.scopes, body.buckets, "the number of scopes");
          expect(0, body.scope, body.scopes - 1, "the scope");
          if (!std::isfinite(body.samples) || !(body.samples > 0)) {
            throw RuntimeFailure("malformed message: samples is " + std::to_string(body.samples));
          }
        } else if constexpr (std::is_same_v<Body, Sync>) {
          expect(facts.first_known, body.have, facts.open_step, "the number of updates");
        } else if constexpr (std::is_same_v<Body, Offered>) {
          expect(0, body.bytes, most_steps, "the size of a state");
        } else if constexpr (std::is_same_v<Body, StateLost>) {
          expect(0, body.server, size - 1, "a rank");
        } else if constexpr (std::is_same_v<Body, Progress>) {
          expect(0, body.unsubmitted, most_buckets, "the number of buckets");
          for (const int rank : body.contributions_missing) expect(0, rank, size - 1, "a rank");
          for (const int rank : body.results_missing) expect(0, rank, size - 1, "a rank");
        } else if constexpr (std::is_same_v<Body, BeginRound>) {
          expect(-1, body.length, most_steps, "the length of the round");
          expect(0, body.align_every, most_steps, "align_every");
        }
      },
      message);
}

}  // namespace hvd_backup
