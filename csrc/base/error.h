// The one exception tree of the core. UsageError: the caller did something wrong and is told what to do instead.
// RuntimeFailure: the world did (MPI, a lost peer); the engine stores it and the next call of the training thread
// raises it. The C API turns both into status codes.
#pragma once

#include <stdexcept>
#include <string>

namespace hvd_backup {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class UsageError : public Error {
 public:
  using Error::Error;
};

class RuntimeFailure : public Error {
 public:
  using Error::Error;
};

}  // namespace hvd_backup
