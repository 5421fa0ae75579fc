#include "transport/mpi_handle.h"

#include <algorithm>
#include <functional>

namespace hvd_backup {

std::span<const RequestSet::Finished> RequestSet::take_finished() {
  finished_.clear();
  if (requests_.empty()) return finished_;
  indices_.resize(requests_.size());
  statuses_.resize(requests_.size());
  int outcount = 0;
  const int code =
      MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &outcount, indices_.data(), statuses_.data());
  if (is_loss(code)) return finished_;
  if (code != MPI_ERR_IN_STATUS) check_mpi(code, "completing transfers");
  if (outcount == MPI_UNDEFINED) return finished_;

  const auto count = static_cast<std::size_t>(outcount);
  for (std::size_t i = 0; i < count; ++i) {
    int bytes = 0;
    MPI_Get_count(&statuses_[i], MPI_BYTE, &bytes);
    finished_.push_back({numbers_[static_cast<std::size_t>(indices_[i])],
                         code == MPI_ERR_IN_STATUS ? statuses_[i].MPI_ERROR : MPI_SUCCESS,
                         static_cast<std::size_t>(bytes)});
  }
  // The last request takes the place of each finished one. From the highest index down, so that it is never itself one
  // of those still to be removed.
  std::sort(indices_.begin(), indices_.begin() + outcount, std::greater<>());
  for (std::size_t i = 0; i < count; ++i) {
    const auto hole = static_cast<std::size_t>(indices_[i]);
    requests_[hole] = requests_.back();
    numbers_[hole] = numbers_.back();
    requests_.pop_back();
    numbers_.pop_back();
  }
  return finished_;
}

void RequestSet::cancel(const std::function<bool(std::size_t)>& is_wanted) noexcept {
  if (!mpi_is_running()) return;
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    if (is_wanted(numbers_[i])) MPI_Cancel(&requests_[i]);
  }
}

void RequestSet::abandon(const std::function<bool(std::size_t)>& is_receive) noexcept {
  if (mpi_is_running()) {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (is_receive && is_receive(numbers_[i])) MPI_Cancel(&requests_[i]);
      MPI_Request_free(&requests_[i]);
    }
  }
  requests_.clear();
  numbers_.clear();
}

}  // namespace hvd_backup
